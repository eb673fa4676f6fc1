"""How a ragged batch is cut for attention; shared by the backends that attend row by row or run by run."""

# B rows, R rows of a run, N new tokens in all, S cache slots

from dataclasses import dataclass

import numpy as np

from gpt2core._shapes import Int32
from gpt2core.batch import Batch

_PADDING_FACTOR, _PADDING_FREE = 2, 1024
"""A run may read at most this factor more cached positions than it needs, beyond some that cost nothing."""


@dataclass(frozen=True, slots=True)
class DecodeRun:
    """Rows of one new token each whose slots are neighbours, so that their part of the cache is one view."""

    tokens: slice | Int32[np.ndarray, "R"]  # indices into the batch's tokens, in the order of the slots
    slots: slice
    ends: Int32[np.ndarray, "R"]  # positions that each row sees, its own included

    longest: int  # the most positions that a row of the run sees

    @property
    def rows(self) -> Int32[np.ndarray, "R"]:
        """The slots one by one."""
        return np.arange(self.slots.start, self.slots.stop, dtype=np.int32)


@dataclass(frozen=True, slots=True)
class PrefillRow:
    """One row of several new tokens."""

    tokens: slice
    slot: int
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class AttentionPlan:
    """Every row of a batch, exactly once."""

    decode: tuple[DecodeRun, ...]
    prefill: tuple[PrefillRow, ...]


def plan_attention(batch: Batch) -> AttentionPlan:
    """Group one-token rows by neighbouring slots; give rows of several tokens one by one.

    A run is cut where a row far longer than its neighbours would make all of them read its length.
    """
    firsts = batch.firsts
    ends, slots = batch.ends, batch.slots
    singles = np.flatnonzero(batch.lengths == 1)
    singles = singles[np.argsort(slots[singles], kind="stable")]
    runs: list[list[int]] = []
    longest = total = 0
    for row in singles.tolist():
        end = int(ends[row])
        widened = max(longest, end)
        if (
            runs
            and slots[row] == slots[runs[-1][-1]] + 1
            and widened * (len(runs[-1]) + 1) <= _PADDING_FACTOR * (total + end) + _PADDING_FREE
        ):
            runs[-1].append(row)
            longest, total = widened, total + end
        else:
            runs.append([row])
            longest = total = end
    return AttentionPlan(
        decode=tuple(_decode_run(np.array(rows), firsts, slots, ends) for rows in runs),
        prefill=tuple(
            PrefillRow(
                tokens=slice(int(firsts[row]), int(firsts[row] + batch.lengths[row])),
                slot=int(slots[row]),
                start=int(batch.starts[row]),
                end=int(ends[row]),
            )
            for row in np.flatnonzero(batch.lengths > 1)
        ),
    )


def _decode_run(rows: np.ndarray, firsts: np.ndarray, slots: np.ndarray, ends: np.ndarray) -> DecodeRun:
    tokens, first, slot = firsts[rows].astype(np.int32), int(firsts[rows[0]]), int(slots[rows[0]])
    consecutive = np.array_equal(tokens, np.arange(first, first + len(rows)))
    return DecodeRun(
        tokens=slice(first, first + len(rows)) if consecutive else tokens,
        slots=slice(slot, slot + len(rows)),
        ends=ends[rows],
        longest=int(ends[rows].max()),
    )


def note_filled(filled: Int32[np.ndarray, "S"], batch: Batch) -> list[tuple[int, slice]]:
    """Record what the batch will fill and return (slot, positions) of leftovers beyond the rows' ends.

    Runs read padded lengths, where weight 0 meets whatever an earlier tenant left: 0 times NaN is NaN. So a
    row that ends before its slot's high-water mark has the rest zeroed, once per tenant.
    """
    stale = []
    for slot, end in zip(batch.slots.tolist(), batch.ends.tolist(), strict=True):
        if filled[slot] > end:
            stale.append((slot, slice(end, int(filled[slot]))))
        filled[slot] = end
    return stale
