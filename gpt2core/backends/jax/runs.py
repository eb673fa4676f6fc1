"""A ragged batch cut into steps of a few padded shapes, so that the number of compilations is bounded."""

# B rows of the batch, R rows of a run, N tokens per row, W = 3 + N, M computed logits, K wanted ones of these

from dataclasses import dataclass
from itertools import product
from typing import Final, NamedTuple

import numpy as np

from gpt2core._shapes import Int32
from gpt2core.batch import Batch

_FEWEST_READ: Final = 128  # reading less of the cache than this saves nothing that can be measured
_MOST_TOKENS: Final = 1024
"""Several rows share a prefill up to this many tokens, padding included; scores take memory."""


class StepShape(NamedTuple):
    """What a step is compiled for, beside the model and the cache's shape."""

    rows: int
    tokens: int  # per row
    read: int  # positions of the cache that attention looks at
    wanted: int  # logits: one per row or all


@dataclass(frozen=True, slots=True)
class Run:
    """One step."""

    shape: StepShape
    rows: Int32[np.ndarray, "R W"]  # slot, start, length, then the tokens
    wanted: Int32[np.ndarray, "M"]  # indices into the R N tokens
    answers: Int32[np.ndarray, "K"]  # indices into the batch's logits_at
    place: Int32[np.ndarray, "K"]  # where these stand among the M logits


@dataclass(frozen=True, slots=True)
class Buckets:
    """The padded sizes of steps over one cache: powers of two, from a least size on.

    Compiling takes longer than a small model computes, so a small model has fewer and larger sizes.
    """

    slots: int
    capacity: int
    fewest_rows: int = 1
    fewest_tokens: tuple[int, ...] = (16, 64)

    def rows(self, rows: int) -> int:
        """Rows of a step for `rows` rows."""
        return min(max(self.fewest_rows, _power(rows)), _power(self.slots))

    def tokens(self, tokens: int) -> int:
        """New tokens per row of a step for rows of up to `tokens` new tokens."""
        if tokens == 1:
            return 1
        least = next((least for least in self.fewest_tokens if tokens <= least), _power(tokens))
        return min(least, self.capacity)

    def read(self, end: int) -> int:
        """Cached positions that a step reads for rows that end at `end`."""
        return min(max(_FEWEST_READ, _power(end)), self.capacity)

    def most_rows(self, tokens: int) -> int:
        """Rows that share a step at most."""
        return _power(self.slots) if tokens == 1 else max(1, _MOST_TOKENS // _power(tokens))

    def shapes(self) -> set[StepShape]:
        """Every shape that `plan_runs` can ask for; its size bounds the compilations."""
        tokens = {self.tokens(n) for n in range(1, self.capacity + 1)}
        read = {self.read(end) for end in range(1, self.capacity + 1)}
        return {
            StepShape(self.rows(r), n, t, wanted)
            for n, t in product(tokens, read)
            for r in range(1, min(self.slots, self.most_rows(n)) + 1)
            for wanted in {self.rows(r), self.rows(r) * n}
        }


def plan_runs(batch: Batch, buckets: Buckets) -> list[Run]:
    """Every row of the batch in exactly one run; rows with one new token come first, all together."""
    tokens_per_row = np.array([buckets.tokens(n) for n in batch.lengths.tolist()])
    runs = []
    for tokens in np.unique(tokens_per_row).tolist():
        rows = np.flatnonzero(tokens_per_row == tokens)
        most = buckets.most_rows(tokens)
        runs += [_run(batch, rows[i : i + most], tokens, buckets) for i in range(0, len(rows), most)]
    return runs


def _run(batch: Batch, rows: np.ndarray, tokens: int, buckets: Buckets) -> Run:
    count = buckets.rows(len(rows))
    firsts, lengths = batch.firsts[rows], batch.lengths[rows]
    table = np.zeros((count, 3 + tokens), np.int32)
    table[:, 0] = buckets.slots  # padding: no such slot, so nothing is written
    table[: len(rows), 0] = batch.slots[rows]
    table[: len(rows), 1] = batch.starts[rows]
    table[: len(rows), 2] = lengths
    for i, (first, length) in enumerate(zip(firsts.tolist(), lengths.tolist(), strict=True)):
        table[i, 3 : 3 + length] = batch.tokens[first : first + length]

    offsets = batch.logits_at[:, None] - firsts  # (wanted by the batch, rows of this run)
    answers, row = np.nonzero((offsets >= 0) & (offsets < lengths))
    at = row * tokens + offsets[answers, row]  # among the R N tokens
    wanted = (np.arange(count) * tokens).astype(np.int32)
    wanted[row] = at
    if np.array_equal(wanted[row], at):  # at most one per row
        place = row
    else:
        wanted, place = np.arange(count * tokens, dtype=np.int32), at
    shape = StepShape(count, tokens, buckets.read(int(batch.ends[rows].max())), len(wanted))
    return Run(shape, table, wanted, answers.astype(np.int32), place.astype(np.int32))


def _power(n: int) -> int:
    return 1 << (n - 1).bit_length()
