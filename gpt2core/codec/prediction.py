"""What a model and a file must agree on, and the levels."""

import hashlib

from gpt2core import GPT2, PortableBits, RequestError
from gpt2core.backends.digest import probe_digest
from gpt2core.codec.container import (
    MODEL_DIGEST_NBYTES,
    TOKENIZER_DIGEST_NBYTES,
    Windows,
)
from gpt2core.codec.text import ReversibleTokenizer


class Predictor:
    """One model as both sides of the codec use it.

    Raises:
        RequestError: the model runs on a backend whose bits depend on machine or batch.

    Attributes:
        text: its tokens' bytes.
        begin: what the first window begins with: the end-of-text token, as GPT-2 was trained, or nothing.
    """

    def __init__(self, model: GPT2) -> None:
        backend = model.backend
        if not isinstance(backend, PortableBits):
            raise RequestError(
                f"the backend {backend.name!r} does not give the same bits on every machine, so that another "
                "could not expand the file; take backend 'native'"
            )
        self.backend = backend
        self.bits = backend.bits_version
        self.precision = backend.precision
        self.context = model.config.n_positions
        self.vocab_size = model.config.vocab_size
        self.text = ReversibleTokenizer(model.tokenizer, self.vocab_size)
        eos = model.config.eos_token_ids[:1]
        self.begin: list[int] = list(eos)

    def model_digest(self) -> bytes:
        """Of the logits that a probe gives, which hold the weights, the precision and this machine's bits."""
        return probe_digest(self.backend)[:MODEL_DIGEST_NBYTES]

    def tokenizer_digest(self) -> bytes:
        """Of the bytes of every token."""
        digest = hashlib.sha256()
        for data in self.text.bytes_of:
            digest.update(len(data).to_bytes(4, "little") + data)
        return digest.digest()[:TOKENIZER_DIGEST_NBYTES]


def windows_of_level(level: int, context: int) -> tuple[Windows, bool]:
    """How a level predicts, and whether its segments continue each other.

    Raises:
        RequestError: `level` is not in 1..9.
    """
    if level not in range(1, 10):
        raise RequestError(f"level is {level!r}; it can be a whole number from 1 to 9")
    half, quarter = max(1, context // 2), max(1, context // 4)
    table = {
        1: Windows(quarter, 0, quarter, 8),
        2: Windows(half, 0, half, 8),
        3: Windows(context, 0, context, 4),
        4: Windows(context, half, half, 6),
        5: Windows(context, half, half, 14),
        6: Windows(context, half, half, 32),
        7: Windows(context, half, half, 128),
        8: Windows(context, half, half, 32),
        9: Windows(context, context - quarter, quarter, 64),
    }
    return table[level], level >= 8
