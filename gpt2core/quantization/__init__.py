"""Weights in fewer bits: how they are stored (`encodings`), how they are rounded (`rounding`, `gptq`)."""
