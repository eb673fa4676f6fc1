"""What the measurements say: analysis, figures and one page."""
