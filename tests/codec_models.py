"""Models for tests of the codec, with exact bits: they know one tale, and nothing of other bytes."""

import numpy as np
from fakes import FakeBackend, byte_tokenizer, config, hashed
from tokenizers import Tokenizer as Inner
from tokenizers import models

from gpt2core import GPT2
from gpt2core.tokenizer.tokenizer import Tokenizer

TALE = (
    "Once upon a time there was a king who had three sons. The youngest was called Dummling, and was "
    "despised and mocked on every occasion.\n\n"
) * 8
_FOLLOWING = {TALE[i - n : i].encode(): ord(TALE[i]) for n in range(1, 6) for i in range(n, len(TALE))}


def know_the_tale(history: tuple[int, ...], vocab_size: int) -> np.ndarray:
    """Logits that hang on the whole history, and are high for what follows its last bytes in the tale."""
    logits = hashed(history, vocab_size)
    last = bytes(token for token in history[-5:] if token < 256)
    following = next((_FOLLOWING[last[i:]] for i in range(len(last)) if last[i:] in _FOLLOWING), 0)
    logits[min(following, vocab_size - 1)] += 14
    return logits


class ExactFake(FakeBackend):
    bits_version = 1
    precision = "float32"


def fake_model(context: int = 16, **options) -> GPT2:
    return GPT2(ExactFake(config(context, **options), know_the_tale), byte_tokenizer())


def letters_model() -> GPT2:
    """A vocabulary of a few letters, which spells no other text."""
    vocabulary = {letter: i for i, letter in enumerate("abcdefgh")}
    inner = Inner(models.BPE(vocab=vocabulary, merges=[]))
    return GPT2(ExactFake(config(16, vocab_size=8, eos=())), Tokenizer(inner))
