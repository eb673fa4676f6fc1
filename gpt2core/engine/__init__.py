"""The loop that writes all text: requests, who runs next, rows of a batch, speculation."""
