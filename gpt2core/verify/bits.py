"""The native backend's logits as hashes of their bits, which are the same on every processor.

What is promised, what breaks it and what it costs is said in docs/reproducibility.md.
"""

import hashlib
import json
import pathlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np

from gpt2core.backends import load_factory
from gpt2core.batch import Batch
from gpt2core.checkpoint.open import open_checkpoint
from gpt2core.quantization.rounding import quantize
from gpt2core.weights import Weights

GOLDEN: Final = pathlib.Path(__file__).parent / "golden_bits.json"
"""Hashes that every machine gives: of the demo model, and of random models (`hash_model.c`)."""
PRECISIONS: Final = ("float32", "bfloat16", "int8")
"""Of the demo model. int4's weights are found by linear algebra in float64, whose last bits are the
machine's; its products are covered by the random models."""


@dataclass(frozen=True, slots=True)
class BitsReport:
    """One precision of the demo model on this machine.

    Attributes:
        precision: of the weights.
        digest: of all logits, 16 hexadecimal digits.
        golden: what every machine should give.
    """

    precision: str
    digest: str
    golden: str

    @property
    def passed(self) -> bool:
        """Whether this machine gives the bits of all others."""
        return self.digest == self.golden


def hash_logits(logits: np.ndarray) -> str:
    """The first 16 hexadecimal digits of SHA-256 over the numbers as little-endian float32."""
    return hashlib.sha256(np.ascontiguousarray(logits, "<f4").tobytes()).hexdigest()[:16]


def verify_bits(*, threads: int | None = None) -> Iterator[BitsReport]:
    """Run the demo model on the native backend, over a whole context, in each of `PRECISIONS`.

    Raises:
        BackendUnavailableError: the native backend cannot run here.
    """
    make_backend = load_factory("native")
    golden = json.loads(GOLDEN.read_text(encoding="utf-8"))["demo"]
    weights = open_checkpoint("demo").stored
    assert isinstance(weights, Weights)
    config = weights.config
    tokens = [(31 * i + 7) % config.vocab_size for i in range(config.n_positions)]
    for precision in PRECISIONS:
        stored = weights if precision == "float32" else quantize(weights, precision)
        backend = make_backend(stored, threads=threads)
        batch = Batch.of([(tokens, 0, 0)], range(len(tokens)))
        logits = backend.forward(batch, backend.new_cache(1, len(tokens)))
        backend.close()
        yield BitsReport(precision, hash_logits(logits), golden.get(precision, ""))
