"""Every row is attended exactly once, runs are views of neighbouring slots, and leftovers are zeroed."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from gpt2core.backends._shared.ragged import note_filled, plan_attention
from gpt2core.batch import Batch


@st.composite
def batches(draw):
    slots = draw(st.permutations(range(12)))[: draw(st.integers(1, 12))]
    lengths = [draw(st.sampled_from([1, 1, 1, 2, 5])) for _ in slots]
    starts = [draw(st.integers(0, 5000)) for _ in slots]
    return Batch.of([([0] * n, start, slot) for n, start, slot in zip(lengths, starts, slots, strict=True)])


@given(batches())
def test_every_token_is_attended_once_with_its_own_slot_and_end(batch):
    plan = plan_attention(batch)
    seen = {}
    for run in plan.decode:
        tokens = np.arange(len(batch.tokens))[run.tokens]
        for token, slot, end in zip(tokens, run.rows, run.ends, strict=True):
            assert token not in seen
            seen[token] = (slot, end)
        assert run.longest == max(run.ends)
    for row in plan.prefill:
        for token in range(row.tokens.start, row.tokens.stop):
            assert token not in seen
            seen[token] = (row.slot, row.end)
    slots, ends = np.repeat(batch.slots, batch.lengths), np.repeat(batch.ends, batch.lengths)
    assert seen == {i: (slots[i], ends[i]) for i in range(len(batch.tokens))}


@given(batches())
def test_padding_reads_at_most_twice_what_is_needed_and_a_little(batch):
    for run in plan_attention(batch).decode:
        assert run.longest * len(run.ends) <= 2 * run.ends.sum() + 1024


def test_rows_in_order_of_their_slots_are_one_view():
    (run,) = plan_attention(Batch.of([([1], 5, 0), ([1], 9, 1), ([1], 2, 2)])).decode
    assert run.tokens == slice(0, 3)
    assert run.slots == slice(0, 3)


def test_rows_out_of_order_still_make_one_run():
    (run,) = plan_attention(Batch.of([([1], 5, 2), ([1], 9, 0), ([1], 2, 1)])).decode
    assert run.tokens.tolist() == [1, 2, 0]
    assert run.slots == slice(0, 3)


def test_a_hole_between_slots_parts_a_run():
    plan = plan_attention(Batch.of([([1], 5, 0), ([1], 9, 2)]))
    assert [run.slots for run in plan.decode] == [slice(0, 1), slice(2, 3)]


def test_one_long_row_does_not_make_many_short_ones_read_its_length():
    plan = plan_attention(Batch.of([([1], 10_000 if slot == 4 else 10, slot) for slot in range(8)]))
    assert [run.slots for run in plan.decode] == [slice(0, 4), slice(4, 6), slice(6, 8)]


def test_leftovers_of_a_longer_tenant_are_reported_once():
    filled = np.zeros(3, np.int32)
    assert note_filled(filled, Batch.of([([0] * 9, 0, 1)])) == []
    assert note_filled(filled, Batch.of([([0] * 4, 0, 1), ([0], 0, 2)])) == [(1, slice(4, 9))]
    assert note_filled(filled, Batch.of([([0], 4, 1)])) == []
    assert filled.tolist() == [0, 5, 1]
