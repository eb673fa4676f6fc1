"""A ragged batch cut into steps of a few padded shapes, so that the number of compilations is bounded."""

# B rows of the batch, R rows of a run, N tokens per row, M computed logits, K wanted ones among them

from dataclasses import dataclass
from itertools import product
from typing import Final, NamedTuple

import numpy as np

from gpt2core._shapes import Int32
from gpt2core.batch import Batch

_FEWEST_TOKENS, _FEW_TOKENS = 16, 64  # rows of 2 to 16, 17 to 64, then powers of two
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
    rows: Int32[np.ndarray, "R 3+N"]  # slot, start, length, then the tokens
    wanted: Int32[np.ndarray, "M"]  # indices into the R N tokens
    answers: Int32[np.ndarray, "K"]  # indices into the batch's logits_at
    place: Int32[np.ndarray, "K"]  # where these stand among the M logits


def step_shapes(slots: int, capacity: int) -> set[StepShape]:
    """Every shape that `plan_runs` can ask for; its size bounds the compilations."""
    rows = {_power(r) for r in range(1, slots + 1)}
    tokens = {_token_bucket(n, capacity) for n in range(1, capacity + 1)}
    read = {_read_bucket(end, capacity) for end in range(1, capacity + 1)}
    return {
        StepShape(r, n, t, wanted)
        for r, n, t in product(rows, tokens, read)
        if n == 1 or r <= _most_rows(n)
        for wanted in (r, r * n)
    }


def plan_runs(batch: Batch, slots: int, capacity: int) -> list[Run]:
    """Every row of the batch in exactly one run; rows with one new token come first, all together."""
    buckets = np.array([_token_bucket(n, capacity) for n in batch.lengths.tolist()])
    runs = []
    for tokens in np.unique(buckets).tolist():
        rows = np.flatnonzero(buckets == tokens)
        most = slots if tokens == 1 else _most_rows(tokens)
        runs += [
            _run(batch, rows[i : i + most], tokens, slots, capacity) for i in range(0, len(rows), most)
        ]
    return runs


def _run(batch: Batch, rows: np.ndarray, tokens: int, slots: int, capacity: int) -> Run:
    count = _power(len(rows))
    firsts, lengths = (np.cumsum(batch.lengths) - batch.lengths)[rows], batch.lengths[rows]
    table = np.zeros((count, 3 + tokens), np.int32)
    table[:, 0] = slots  # padding: no such slot, so nothing is written
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
    shape = StepShape(count, tokens, _read_bucket(int(batch.ends[rows].max()), capacity), len(wanted))
    return Run(shape, table, wanted, answers.astype(np.int32), place.astype(np.int32))


def _power(n: int) -> int:
    return 1 << (n - 1).bit_length()


def _most_rows(tokens: int) -> int:
    return max(1, _MOST_TOKENS // _power(tokens))


def _token_bucket(n: int, capacity: int) -> int:
    if n == 1:
        return 1
    if n <= _FEWEST_TOKENS:
        return min(_FEWEST_TOKENS, capacity)
    return min(max(_FEW_TOKENS, _power(n)), capacity)


def _read_bucket(end: int, capacity: int) -> int:
    return min(max(_FEWEST_READ, _power(end)), capacity)
