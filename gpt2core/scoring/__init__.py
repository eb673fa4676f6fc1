"""Scoring: how well a model predicts texts, token by token and word by word (docs/scoring.md)."""
