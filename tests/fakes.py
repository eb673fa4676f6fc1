"""What tests of everything above the backend share: `FakeBackend` and a tokenizer of single bytes."""

from collections.abc import Mapping, Sequence

import numpy as np
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Inner

from gpt2core import testing
from gpt2core.config import ModelConfig
from gpt2core.testing import FakeBackend, hashed
from gpt2core.testing.fake import LogitsOf
from gpt2core.tokenizer.tokenizer import Tokenizer

END = 256

__all__ = ["END", "FakeBackend", "byte_tokenizer", "config", "endless", "hashed", "scripted"]


def config(context: int = 64, *, vocab_size: int = 257, eos: tuple[int, ...] = (END,)) -> ModelConfig:
    return ModelConfig(
        vocab_size=vocab_size, n_positions=context, n_embd=4, n_layer=1, n_head=1, eos_token_ids=eos
    )


def byte_tokenizer() -> Tokenizer:
    """Token id = byte; 256 is `<|endoftext|>`."""
    spelling = [chr(b) for b in range(256)]
    others = iter(range(256, 1000))
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    for b in range(256):
        if b not in printable:  # as GPT-2 spells bytes that are no printable character of Latin-1
            spelling[b] = chr(next(others))
    inner = Inner(models.BPE({token: b for b, token in enumerate(spelling)}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens([AddedToken("<|endoftext|>", special=True, normalized=False)])
    return Tokenizer(inner)


def endless(history: tuple[int, ...], vocab_size: int) -> np.ndarray:
    """`hashed`, without the end of text."""
    logits = hashed(history, vocab_size)
    logits[END] = -100
    return logits


def scripted(continuations: Mapping[Sequence[int], Sequence[int]]) -> LogitsOf:
    """`gpt2core.testing.scripted` with `END`."""
    return testing.scripted(continuations, end=END)
