"""The classic benchmark: prompts x total lengths x runs, on one model or server."""
