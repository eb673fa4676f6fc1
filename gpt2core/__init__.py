"""GPT-2-family language models from one Hugging Face checkpoint on pluggable backends."""

__version__ = "0.1.0"
