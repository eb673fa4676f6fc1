"""The output folder: its files, what they hold, and what may be resumed."""
