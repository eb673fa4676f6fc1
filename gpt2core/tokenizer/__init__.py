"""Text to token ids and back: the tokenizer, how its files are read, how a stream is decoded."""
