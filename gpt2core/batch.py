"""Batch: what one forward pass is asked."""

# N new tokens in all, B rows, M wanted logits

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np

from gpt2core._shapes import Int32
from gpt2core.config import ModelConfig
from gpt2core.errors import RequestError, in_short
from gpt2core.token_ids import TokenIds, check_token_ids


@dataclass(frozen=True, slots=True)
class Batch:
    """New tokens of several sequences, concatenated; prefill, decode and mixtures of both have this one form.

    A row begins with `start == 0` in a free slot, leaves by being left out of the next batch, and rewinds
    with a `start` smaller than what is cached.
    """

    tokens: Int32[np.ndarray, "N"]  # the rows' new tokens, one row after the other
    lengths: Int32[np.ndarray, "B"]  # new tokens per row, >= 1
    starts: Int32[np.ndarray, "B"]  # tokens of that row already cached
    slots: Int32[np.ndarray, "B"]  # cache slot per row, distinct
    logits_at: Int32[np.ndarray, "M"]  # indices into tokens whose logits are wanted; may be empty

    @classmethod
    def of(
        cls, rows: Iterable[tuple[Sequence[int], int, int]], logits_at: Sequence[int] | None = None
    ) -> Self:
        """Build a batch from rows of (new tokens, start, slot); by default their last logits are wanted."""
        rows = list(rows)
        lengths = np.array([len(tokens) for tokens, _, _ in rows], np.int32)
        if logits_at is None:
            logits_at = (np.cumsum(lengths) - 1).tolist()
        return cls(
            tokens=np.array([t for tokens, _, _ in rows for t in tokens], np.int32),
            lengths=lengths,
            starts=np.array([start for _, start, _ in rows], np.int32),
            slots=np.array([slot for _, _, slot in rows], np.int32),
            logits_at=np.array(logits_at, np.int32),
        )

    @property
    def ends(self) -> Int32[np.ndarray, "B"]:
        """Tokens per row that are cached once the pass is done."""
        return self.starts + self.lengths

    @property
    def firsts(self) -> Int32[np.ndarray, "B"]:
        """Index in `tokens` of each row's first."""
        return np.cumsum(self.lengths, dtype=np.int32) - self.lengths

    @property
    def positions(self) -> Int32[np.ndarray, "N"]:
        """Position of each new token in its sequence."""
        shifts = np.repeat(self.starts - self.firsts, self.lengths)  # (N,)
        return np.arange(len(self.tokens), dtype=np.int32) + shifts

    def check(self, *, vocab_size: int, slots: int, capacity: int) -> None:
        """Refuse what would read or write outside the vocabulary or the cache; backends call it first.

        Raises:
            RequestError: naming the first array that is wrong, its value and the limit.
        """
        for name in ("tokens", "lengths", "starts", "slots", "logits_at"):
            array = getattr(self, name)
            if not isinstance(array, np.ndarray) or array.dtype != np.int32 or array.ndim != 1:
                raise RequestError(
                    f"batch.{name} must be a one-dimensional int32 array, not {in_short(array)}"
                )
        rows = len(self.lengths)
        if rows == 0:
            raise RequestError("batch has no rows; a forward pass needs at least one")
        if len(self.starts) != rows or len(self.slots) != rows:
            raise RequestError(
                f"batch has {rows} lengths, {len(self.starts)} starts and {len(self.slots)} slots; "
                "each row needs one of each"
            )
        if self.lengths.min() < 1 or self.lengths.sum(dtype=np.int64) != len(self.tokens):
            raise RequestError(
                f"batch.lengths {self.lengths.tolist()} must be >= 1 and sum to {len(self.tokens)}"
            )
        _check_range("tokens", self.tokens, vocab_size, "the vocabulary's size")
        _check_range("slots", self.slots, slots, "the cache's slots")
        _check_range("logits_at", self.logits_at, len(self.tokens), "the number of tokens")
        if len(set(self.slots.tolist())) != rows:
            raise RequestError(f"batch.slots {self.slots.tolist()} must be distinct")
        end = int((self.starts.astype(np.int64) + self.lengths).max())
        if self.starts.min() < 0 or end > capacity:
            raise RequestError(
                f"batch.starts {self.starts.tolist()} plus lengths {self.lengths.tolist()} must lie in the "
                f"cache's capacity of {capacity}"
            )


def whole_sequence(config: ModelConfig, token_ids: TokenIds) -> Batch:
    """One sequence from its beginning in slot 0, with the logits of all its positions wanted, checked.

    Raises:
        RequestError: no tokens, more than the context, or what is no id of the vocabulary.
    """
    ids = check_token_ids(token_ids, config.vocab_size)
    batch = Batch.of([(ids, 0, 0)], range(len(ids)))
    batch.check(vocab_size=config.vocab_size, slots=1, capacity=config.n_positions)
    return batch


def _check_range(name: str, array: Int32[np.ndarray, "K"], limit: int, meaning: str) -> None:
    if len(array) and (array.min() < 0 or array.max() >= limit):
        bad = array[(array < 0) | (array >= limit)][0]
        raise RequestError(f"batch.{name} holds {bad}; it must be at least 0 and below {meaning}, {limit}")
