"""Subject: a backend under test beside the reference, for the conformance suite."""

# T tokens of a sequence, M wanted logits, V vocabulary

import unittest
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from gpt2core._shapes import Float32
from gpt2core.backends.base import Backend, BackendFactory, Cache
from gpt2core.batch import Batch
from gpt2core.config import ModelConfig
from gpt2core.reference import reference_logits
from gpt2core.weights import Weights

TOLERANCE = 2e-4
"""Largest difference of a float32 logit from the reference; the models' logits spread by about 1.5."""

Row = tuple[Sequence[int], int, int]  # new tokens, start, slot


class NotApplicable(unittest.SkipTest):
    """A check is of a capability that the backend does not have; test runners show it as skipped."""


@dataclass
class Subject:
    """A backend under test and what it should answer."""

    factory: BackendFactory
    weights: Weights
    tolerance: float = TOLERANCE

    @property
    def config(self) -> ModelConfig:
        """What the model computes."""
        return self.weights.config

    @cached_property
    def backend(self) -> Backend:
        """The backend, made once per check."""
        return self.factory(self.weights)

    def tokens(self, count: int, seed: int = 0) -> list[int]:
        """`count` random token ids."""
        return np.random.default_rng(seed).integers(0, self.config.vocab_size, count).tolist()

    def cache(self) -> Cache:
        """A fresh cache of 4 slots and full context."""
        return self.backend.new_cache(4, self.config.n_positions)

    def forward(
        self, cache: Cache, *rows: Row, logits_at: Sequence[int] | None = None
    ) -> Float32[np.ndarray, "M V"]:
        """One pass over rows of (new tokens, start, slot)."""
        return self.backend.forward(Batch.of(rows, logits_at), cache)

    def expect(self, claim: str, got: np.ndarray, *histories: Sequence[int]) -> None:
        """`got` (M, V) must be the reference's logits after each of M token histories."""
        want = np.stack([reference_logits(self.weights, history)[-1] for history in histories])
        self.expect_close(claim, got, want)

    def expect_close(self, claim: str, got: np.ndarray, want: np.ndarray) -> None:
        """`got` and `want` must have one shape and differ by the tolerance at most."""
        assert got.shape == want.shape, f"{claim}: shape is {got.shape}, expected {want.shape}"
        error = np.abs(got - want)
        worst = float(error.max()) if np.isfinite(error).all() else float("nan")
        assert worst <= self.tolerance, (
            f"{claim}: logits differ by {worst:.3g}, allowed is {self.tolerance:.3g}"
        )
