"""The comparison: engines side by side, each in a process of its own, round by round."""
