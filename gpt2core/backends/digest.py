"""Which model a backend holds, told by what it computes."""

import hashlib
from typing import Final

from gpt2core.backends.base import Backend
from gpt2core.batch import Batch

_TOKENS: Final = 128
_STRIDE: Final = 8


def probe_digest(backend: Backend) -> bytes:
    """SHA-256 of the logits that a probe gives, 32 bytes.

    They hold the weights, the precision and the backend's bits; with the capability `PortableBits` the same
    model has the same digest on every machine. It takes a pass over 128 tokens.
    """
    config = backend.config
    tokens = [(40503 * i + 7) % config.vocab_size for i in range(min(_TOKENS, config.n_positions))]
    batch = Batch.of([(tokens, 0, 0)], range(0, len(tokens), _STRIDE))
    logits = backend.forward(batch, backend.new_cache(1, len(tokens)))
    return hashlib.sha256(logits.astype("<f4").tobytes()).digest()
