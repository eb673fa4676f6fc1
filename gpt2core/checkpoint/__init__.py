"""From a checkpoint's name to its weights: where files are, what is checked in them, how they are written."""
