"""The scheduler's guarantees, as its module's docstring lists them."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpt2core.engine.request import LOGITS_CHUNK, Request
from gpt2core.engine.scheduler import Scheduler, fair_shares
from gpt2core.sampling.params import SamplingParams


def request(prompt_tokens: int, *, new: int = 10, logits_from: int | None = None) -> Request:
    return Request(
        token_ids=[0] * prompt_tokens,
        prompt_tokens=prompt_tokens,
        prompt=0,
        choice=0,
        params=SamplingParams(),
        seed=0,
        max_new_tokens=new,
        end_token_ids=frozenset(),
        stream=None,
        echo="",
        logits_from=logits_from,
    )


def advance(scheduler: Scheduler) -> dict[Request, int]:
    """Do what the engine does with a plan; return how many tokens each request took."""
    step = scheduler.plan()
    taken = {}
    for one in step.decode:
        one.cached += 1
        one.token_ids.append(0)
        taken[one] = 1
    for one, count in step.prefill:
        one.cached += count
        taken[one] = count
        if one.cached == one.prompt_tokens:
            one.token_ids.append(0)
            scheduler.begin_decoding(one)
    for one in taken:
        if one.cached >= one.prompt_tokens and len(one.token_ids) - one.prompt_tokens >= one.max_new_tokens:
            scheduler.remove(one)
    return taken


def test_shares_are_equal_where_all_want_more():
    assert fair_shares(12, [100, 100, 100]) == [4, 4, 4]


def test_what_the_modest_leave_goes_to_the_others_in_equal_parts():
    assert fair_shares(512, [1000, 10, 1000, 2]) == [250, 10, 250, 2]


def test_odd_units_go_to_the_smaller_want_and_then_to_the_earlier():
    assert fair_shares(11, [100, 100, 50]) == [4, 3, 4]


@given(st.integers(1, 600), st.lists(st.integers(1, 1000), min_size=1, max_size=20))
def test_shares_are_max_min_fair(budget, wants):
    shares = fair_shares(budget, wants)
    assert sum(shares) == min(budget, sum(wants))
    assert all(0 <= share <= want for share, want in zip(shares, wants, strict=True))
    # Whoever got less than it wants got as much as anybody, but for the odd unit.
    short = [share for share, want in zip(shares, wants, strict=True) if share < want]
    assert all(share >= max(shares) - 1 for share in short)
    if budget >= len(wants):
        assert min(shares) >= 1


def test_decoding_rows_get_a_token_in_every_step_while_a_long_prompt_is_read():
    scheduler = Scheduler(slots=4, step_tokens=64)
    decoding = [request(1, new=100) for _ in range(3)]
    for one in decoding:
        scheduler.add(one)
    advance(scheduler)
    long = request(1000)
    scheduler.add(long)
    steps = 0
    while long.cached < 1000:
        taken = advance(scheduler)
        assert [taken[one] for one in decoding] == [1, 1, 1]
        steps += 1
    assert steps == 17  # 61 tokens a step: all of the budget that the three leave


def test_a_short_prompt_beside_a_long_one_is_read_in_one_step():
    scheduler = Scheduler(slots=4, step_tokens=64)
    long, short = request(1000), request(20)
    scheduler.add(long)
    advance(scheduler)
    scheduler.add(short)
    taken = advance(scheduler)
    assert (taken[short], taken[long]) == (20, 44)


def test_prefill_advances_in_every_step_when_decoding_rows_fill_the_budget():
    scheduler = Scheduler(slots=8, step_tokens=4)
    for _ in range(7):
        scheduler.add(request(1, new=1000))
    while scheduler.prefilling or scheduler.waiting:
        advance(scheduler)
    late = request(100)
    scheduler.add(late)
    assert advance(scheduler)[late] == 8  # one token per slot is kept for prompts


def test_slots_are_given_in_order_of_arrival_and_lowest_first():
    scheduler = Scheduler(slots=3, step_tokens=64)
    first = [request(1, new=new) for new in (5, 3, 5)]
    later = [request(1) for _ in range(2)]
    for one in (*first, *later):
        scheduler.add(one)
    scheduler.plan()
    assert [one.slot for one in first] == [0, 1, 2]
    assert [one.slot for one in later] == [None, None]
    scheduler.remove(first[2])
    scheduler.remove(first[0])
    scheduler.plan()
    assert [one.slot for one in later] == [0, 2]


def test_decoding_rows_stand_in_order_of_slots_whoever_came_last():
    scheduler = Scheduler(slots=3, step_tokens=64)
    old = [request(1, new=100) for _ in range(3)]
    for one in old:
        scheduler.add(one)
    advance(scheduler)
    scheduler.remove(old[0])
    new = request(1, new=100)
    scheduler.add(new)
    advance(scheduler)
    assert scheduler.plan().decode == [new, old[1], old[2]]


def test_a_sequence_that_leaves_the_queue_leaves_no_trace():
    scheduler = Scheduler(slots=1, step_tokens=64)
    runs, waits, last = request(5), request(5), request(5)
    for one in (runs, waits, last):
        scheduler.add(one)
    scheduler.plan()
    scheduler.remove(waits)
    scheduler.remove(runs)
    assert [one for one, _ in scheduler.plan().prefill] == [last]
    assert scheduler.running == 1
    assert not scheduler.waiting


def test_a_prompt_whose_logits_are_read_comes_in_chunks_that_bound_their_memory():
    scheduler = Scheduler(slots=2, step_tokens=1000)
    reads = request(700, new=0, logits_from=300)
    scheduler.add(reads)
    assert advance(scheduler)[reads] == 300 + LOGITS_CHUNK
    assert advance(scheduler)[reads] == LOGITS_CHUNK


def test_repair_after_an_interrupted_admission_loses_no_sequence_and_no_slot():
    scheduler = Scheduler(slots=2, step_tokens=64)
    one, two = request(5), request(5)
    scheduler.add(one)
    scheduler.add(two)
    scheduler.prefilling.append(one)  # where `plan` may be interrupted: admitted, the slot not given yet
    scheduler.repair()
    assert list(scheduler.waiting) == [one, two]
    assert not scheduler.prefilling
    scheduler.plan()
    scheduler.waiting.appendleft(one)  # and: the slot given, the queue not yet left
    scheduler.repair()
    assert not scheduler.waiting
    assert [s.slot for s in scheduler.prefilling] == [0, 1]


@pytest.mark.parametrize("seed", range(5))
def test_nobody_starves_and_no_slot_is_given_twice(seed):
    rng = random.Random(seed)
    slots, step_tokens = rng.randint(1, 6), rng.randint(1, 40)
    scheduler = Scheduler(slots=slots, step_tokens=step_tokens)
    arrived: list[Request] = []
    admitted: list[Request] = []
    for _ in range(300):
        if rng.random() < 0.3:
            one = request(rng.choice([1, 3, 90]), new=rng.randint(1, 20))
            arrived.append(one)
            scheduler.add(one)
        before = {one: one.cached for one in (*scheduler.prefilling, *scheduler.decoding)}
        taken = advance(scheduler)
        assert sum(taken.values()) <= max(step_tokens, 2 * slots)
        assert set(before) <= set(taken)  # whoever holds a slot advances
        held = [one.slot for one in (*scheduler.prefilling, *scheduler.decoding)]
        assert len(held) == len(set(held)) <= slots
        admitted += [one for one in taken if one not in admitted]
    assert admitted == arrived[: len(admitted)]
    while scheduler.running or scheduler.waiting:
        advance(scheduler)
    assert all(len(one.token_ids) == one.prompt_tokens + one.max_new_tokens for one in arrived)
