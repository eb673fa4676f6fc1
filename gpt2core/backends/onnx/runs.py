"""A ragged batch cut into passes of the graph, each over neighbouring slots: their cache is one view.

Every pass reads all the weights, so as few as possible are wanted: small holes between decoding rows are
bridged by rows whose result nobody reads, and prompts that begin together are padded to one length.

A row that bridges a hole writes into a slot that the batch does not own. It always writes at the first
position, where attention costs least, and whoever runs the pass keeps those keys and values before and puts
them back after, whatever happens in between: 2 L D numbers per hole, where a second pass would read all
weights again. So bridging needs to know nothing about what a slot holds, and leaves no trace in it.
"""

# B rows, R rows of a run, S new tokens per row, N new tokens of the batch, K of them in a run, G holes
# L layers, D width

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

import numpy as np

from gpt2core._shapes import Int32
from gpt2core.batch import Batch

_WIDEST_HOLE: Final = 6  # a row costs about a tenth of what reading the weights once more does
_PADDING_FACTOR, _PADDING_FREE = 1.25, 32
"""A run of prompts may hold at most this factor more tokens than it needs, beyond some that cost nothing."""
_LONGEST_PART: Final = 256
"""Tokens of a text alone in one run: 512 take 3 % less time so in float32 and 7 % in int8, 1000 as long."""


@dataclass(frozen=True, slots=True)
class Run:
    """One pass of the graph."""

    slots: slice
    tokens: Int32[np.ndarray, "R S"]
    positions: Int32[np.ndarray, "R S"]
    seqlens_k: Int32[np.ndarray, "R"]  # positions that each row sees, less one
    source: Int32[np.ndarray, "K"]  # indices into the batch's tokens
    place: Int32[np.ndarray, "K"]  # where these stand among the run's R S tokens
    bridged: Int32[np.ndarray, "G"]  # slots of others, of which position 0 is written


def plan_runs(batch: Batch) -> list[Run]:
    """Every row of a checked batch, in exactly one run."""
    indices = _indices(len(batch.slots))
    if len(batch.tokens) == len(indices) and (batch.slots == batch.slots[0] + indices).all():
        first = int(batch.slots[0])  # neighbours of one token each: what decoding mostly is, so made short
        span = slice(first, first + len(indices))
        tokens, starts = batch.tokens[:, None], np.ascontiguousarray(batch.starts)
        return [Run(span, tokens, starts[:, None], starts, indices, indices, _indices(0))]
    firsts = batch.firsts
    order = np.argsort(batch.slots, kind="stable")
    single, fresh = batch.lengths == 1, batch.starts == 0
    runs = [_decode_run(batch, rows, firsts) for rows in _bridged(batch, order[single[order]].tolist())]
    runs += [
        _prompt_run(batch, rows, firsts)
        for rows in _together(batch, order[~single[order] & fresh[order]].tolist())
    ]
    runs += [_prompt_run(batch, [row], firsts) for row in order[~single[order] & ~fresh[order]].tolist()]
    return [part for run in runs for part in _in_parts(run)]


@lru_cache(256)
def _indices(count: int) -> Int32[np.ndarray, "count"]:
    indices = np.arange(count, dtype=np.int32)
    indices.flags.writeable = False
    return indices


def _bridged(batch: Batch, rows: list[int]) -> list[list[int]]:
    groups: list[list[int]] = []
    last = -1
    for row in rows:
        slot = int(batch.slots[row])
        if groups and slot - last - 1 <= _WIDEST_HOLE:
            groups[-1].append(row)
        else:
            groups.append([row])
        last = slot
    return groups


def _together(batch: Batch, rows: list[int]) -> list[list[int]]:
    groups: list[list[int]] = []
    last, longest, total = -1, 0, 0
    for row in rows:
        slot, length = int(batch.slots[row]), int(batch.lengths[row])
        widened = max(longest, length)
        padded = widened * (len(groups[-1]) + 1) if groups else 0
        if groups and slot == last + 1 and padded <= _PADDING_FACTOR * (total + length) + _PADDING_FREE:
            groups[-1].append(row)
            longest, total = widened, total + length
        else:
            groups.append([row])
            longest = total = length
        last = slot
    return groups


def _in_parts(run: Run) -> Iterator[Run]:
    """A long text alone, cut: the operator attends to a whole run's keys, also to those that are masked."""
    rows, new = run.tokens.shape
    if rows > 1 or new <= _LONGEST_PART:  # the operator takes one row at a time that goes on with several
        yield run
        return
    for first in range(0, new, _LONGEST_PART):
        part = slice(first, first + _LONGEST_PART)
        tokens = run.tokens[:, part]
        seen = run.seqlens_k - new + min(first + _LONGEST_PART, new)
        place = _indices(tokens.shape[1])
        positions = run.positions[:, part]
        yield Run(run.slots, tokens, positions, seen, run.source[part], place, run.bridged)


def _decode_run(batch: Batch, rows: list[int], firsts: np.ndarray) -> Run:
    slots = batch.slots[rows]
    span = slice(int(slots[0]), int(slots[-1]) + 1)
    place = slots - slots[0]
    tokens = np.zeros((span.stop - span.start, 1), np.int32)
    tokens[place, 0] = batch.tokens[firsts[rows]]
    seqlens_k = np.zeros(span.stop - span.start, np.int32)  # a hole's row sees itself alone
    seqlens_k[place] = batch.starts[rows]
    source = firsts[rows].astype(np.int32)
    bridged = np.setdiff1d(np.arange(span.start, span.stop, dtype=np.int32), slots)
    return Run(span, tokens, seqlens_k[:, None], seqlens_k, source, place, bridged)


def _prompt_run(batch: Batch, rows: list[int], firsts: np.ndarray) -> Run:
    first, start = int(batch.slots[rows[0]]), int(batch.starts[rows[0]])
    lengths = batch.lengths[rows]
    shape = len(rows), int(lengths.max())
    there = np.arange(shape[1]) < lengths[:, None]  # (R, S); beyond is padding
    # A row is padded with its own last token: any other may be NaN, and weight 0 times NaN is NaN.
    column = np.minimum(np.arange(shape[1]), lengths[:, None] - 1)  # (R, S)
    tokens = batch.tokens[firsts[rows][:, None] + column]
    positions = (start + column).astype(np.int32)
    source = (firsts[rows][:, None] + column)[there].astype(np.int32)
    ends = np.full(shape[0], start + shape[1] - 1, np.int32)
    return Run(
        slice(first, first + len(rows)),
        tokens,
        positions,
        ends,
        source,
        np.flatnonzero(there).astype(np.int32),
        np.empty(0, np.int32),
    )
