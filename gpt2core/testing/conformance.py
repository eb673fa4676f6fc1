"""The conformance suite: what any backend must do, as checks that raise AssertionError with the failed claim.

Public through `gpt2core.testing`. Every check makes its own backend over a small random model and compares
numbers with the float64 reference, so a backend that only agrees with itself does not pass.

Some backends compile once per shape of a cache, which takes longer than all else here. So all checks share
two shapes: 4 slots of the full context, and `SMALL`, where another shape is the point.
"""

# T tokens of a sequence, M wanted logits, V vocabulary

import functools
import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from gpt2core.backends.base import Backend, BackendFactory, Cache, EstimatesCost, RunsPrecisions, Traces
from gpt2core.batch import Batch
from gpt2core.errors import BackendError, RequestError
from gpt2core.quantization.rounding import dequantize, quantize
from gpt2core.reference import reference_logits, reference_trace
from gpt2core.testing.moving import (
    copied_positions_go_on_as_computed_ones,
    moved_positions_go_on_as_computed_ones,
)
from gpt2core.testing.random_model import random_config, random_weights
from gpt2core.testing.subject import TOLERANCE, NotApplicable, Row, Subject
from gpt2core.weights import Weights

SMALL = (1, 4)  # slots, capacity
ROUNDED_TOLERANCE = 0.1
"""Largest root mean square difference of logits, in their spread, where kernels may round their inputs."""


def agrees_with_the_reference_at_every_position(subject: Subject) -> None:
    """Prefilling the full context gives the reference's logits at each of its positions."""
    tokens = subject.tokens(subject.config.n_positions)
    got = subject.forward(subject.cache(), (tokens, 0, 0), logits_at=range(len(tokens)))
    subject.expect_close("whole context", got, reference_logits(subject.weights, tokens))


def decoding_equals_prefilling(subject: Subject) -> None:
    """One token at a time, up to the last position, gives what one pass gives."""
    tokens, cache = subject.tokens(subject.config.n_positions, seed=1), subject.cache()
    got = [subject.forward(cache, ([token], i, 2))[0] for i, token in enumerate(tokens)]
    subject.expect_close("token by token", np.stack(got), reference_logits(subject.weights, tokens))


def chunked_prefill_equals_whole(subject: Subject) -> None:
    """A prompt in chunks of uneven length gives what one pass gives."""
    tokens, cache, start, got = subject.tokens(50, seed=2), subject.cache(), 0, []
    for size in (1, 7, 2, 30, 10):
        got.append(subject.forward(cache, (tokens[start : start + size], start, 1), logits_at=range(size)))
        start += size
    subject.expect_close(
        "chunks of 1, 7, 2, 30, 10", np.concatenate(got), reference_logits(subject.weights, tokens)
    )


def batch_equals_single(subject: Subject) -> None:
    """Rows of different lengths in one batch get what each gets alone, whatever the order of their slots."""
    prompts = [subject.tokens(n, seed=n) for n in (5, 1, 23, 2)]
    slots, cache = (2, 0, 3, 1), subject.cache()
    got = subject.forward(cache, *[(p, 0, s) for p, s in zip(prompts, slots, strict=True)])
    subject.expect("ragged prefill", got, *prompts)
    for step in range(3):
        prompts = [[*p, 7 + step] for p in prompts]
        got = subject.forward(cache, *[([p[-1]], len(p) - 1, s) for p, s in zip(prompts, slots, strict=True)])
        subject.expect("ragged decode", got, *prompts)


def prefill_and_decode_mix_in_one_batch(subject: Subject) -> None:
    """Rows that decode, rows that begin and rows that go on with a chunk share a pass."""
    a, b, c = (subject.tokens(count, seed=seed) for count, seed in ((9, 3), (20, 4), (6, 5)))
    cache = subject.cache()
    subject.forward(cache, (a[:-1], 0, 1), (b[:11], 0, 3))
    got = subject.forward(cache, (c, 0, 0), ([a[-1]], 8, 1), (b[11:], 11, 3))
    subject.expect("prefill beside decode", got, c, a, b)


def rows_join_and_leave(subject: Subject) -> None:
    """A row that joins midway, and one that pauses or leaves, change nothing for the others."""
    a, b, c = (subject.tokens(count, seed=seed) for count, seed in ((4, 6), (30, 7), (8, 8)))
    cache = subject.cache()
    subject.forward(cache, (a, 0, 0), (b, 0, 1))
    a, b = [*a, 1], [*b, 2]
    got = subject.forward(cache, ([1], 4, 0), ([2], 30, 1), (c, 0, 2))
    subject.expect("third row joins", got, a, b, c)
    a, c = [*a, 3], [*c, 4]
    subject.expect("middle row pauses", subject.forward(cache, ([4], 8, 2), ([3], 5, 0)), c, a)
    b, d = [*b, 5], subject.tokens(3, seed=9)
    got = subject.forward(cache, ([5], 31, 1), (d, 0, 0))
    subject.expect("paused row goes on, first slot has a new tenant", got, b, d)


def dirty_slot_equals_clean_slot(subject: Subject) -> None:
    """What an earlier, longer tenant left in a slot is never seen."""
    cache, old = subject.cache(), subject.tokens(subject.config.n_positions, seed=10)
    new = subject.tokens(5, seed=11)
    subject.forward(cache, (old, 0, 0), (old, 0, 1), logits_at=[])
    subject.expect("after a full tenant", subject.forward(cache, (new, 0, 0)), new)
    neighbour = subject.tokens(40, seed=12)
    subject.forward(cache, (neighbour, 0, 1), logits_at=[])
    got = subject.forward(cache, ([3], 5, 0), ([4], 40, 1))
    subject.expect("short row beside a long one", got, [*new, 3], [*neighbour, 4])


def nan_in_one_row_stays_there(subject: Subject) -> None:
    """A row whose numbers are not finite spoils neither its neighbours nor the next tenant of its slot."""
    wpe = subject.weights.wpe.copy()
    wpe[12:] = np.nan
    sick = Subject(subject.factory, replace(subject.weights, wpe=wpe), subject.tolerance)
    cache, long, short = sick.cache(), sick.tokens(14, seed=13), sick.tokens(4, seed=14)
    got = sick.forward(cache, (long, 0, 0), (short, 0, 1))
    assert not np.isfinite(got[0]).any(), "a NaN in the weights was hidden"
    sick.expect("neighbour of a NaN in prefill", got[1:], short)
    got = sick.forward(cache, ([1], 14, 0), ([2], 4, 1))
    sick.expect("neighbour of a NaN in decode", got[1:], [*short, 2])
    new = sick.tokens(3, seed=15)
    sick.expect("next tenant after a NaN", sick.forward(cache, (new, 0, 0), ([5], 5, 1)), new, [*short, 2, 5])
    got = sick.forward(cache, ([6], 3, 0), ([7], 6, 1))
    sick.expect("next tenant's decode", got, [*new, 6], [*short, 2, 5, 7])


def rewinding_forgets_what_came_after(subject: Subject) -> None:
    """A smaller start goes back to that position and on from there with other tokens."""
    tokens, cache = subject.tokens(20, seed=16), subject.cache()
    subject.forward(cache, (tokens, 0, 1), logits_at=[])
    subject.expect("one token back", subject.forward(cache, ([9], 19, 1)), [*tokens[:19], 9])
    got = subject.forward(cache, ([1, 2, 3], 6, 1))
    subject.expect("far back, several tokens", got, [*tokens[:6], 1, 2, 3])
    subject.expect("and on", subject.forward(cache, ([4], 9, 1)), [*tokens[:6], 1, 2, 3, 4])


def wanted_logits_come_in_the_order_asked(subject: Subject) -> None:
    """`logits_at` may be empty, repeat itself and run backwards; an empty one still fills the cache."""
    tokens, cache, vocab = subject.tokens(10, seed=17), subject.cache(), subject.config.vocab_size
    got = subject.forward(cache, (tokens[:6], 0, 0), logits_at=[])
    assert got.shape == (0, vocab), f"empty logits_at: shape is {got.shape}, expected {(0, vocab)}"
    assert subject.forward(cache, ([tokens[6]], 6, 0), logits_at=[]).shape == (0, vocab)
    got = subject.forward(cache, (tokens[7:], 7, 0), logits_at=[2, 0, 2])
    want = reference_logits(subject.weights, tokens)[[9, 7, 9]]
    subject.expect_close("backwards and repeated logits_at", got, want)


def logits_belong_to_the_caller(subject: Subject) -> None:
    """The result is a float32 array that may be written to and outlives the next pass."""
    tokens, cache = subject.tokens(5, seed=18), subject.cache()
    first = subject.forward(cache, (tokens, 0, 0))
    assert isinstance(first, np.ndarray), f"logits are a {type(first).__name__}, expected a NumPy array"
    assert first.dtype == np.float32, f"logits are {first.dtype}, expected float32"
    kept = first.copy()
    subject.forward(cache, ([1], 5, 0))
    assert np.array_equal(first, kept), "a later pass wrote into logits that had been returned"
    first[...] = 0
    subject.expect("after the caller wrote into logits", subject.forward(cache, ([1], 5, 0)), [*tokens, 1])


def full_context_is_usable_and_no_more(subject: Subject) -> None:
    """The last position works; one more is refused, and so is a cache beyond the context."""
    context, cache = subject.config.n_positions, subject.cache()
    tokens = subject.tokens(context, seed=19)
    subject.forward(cache, (tokens[:-1], 0, 3), logits_at=[])
    subject.expect("last position", subject.forward(cache, ([tokens[-1]], context - 1, 3)), tokens)
    _expect_refused(subject, cache, ([1], context, 3))
    slots, capacity = SMALL
    small = subject.backend.new_cache(slots, capacity)
    assert small.capacity == capacity, f"cache.capacity is {small.capacity}, expected {capacity}"
    assert small.slots == slots, f"cache.slots is {small.slots}, expected {slots}"
    assert small.nbytes > 0, "cache.nbytes is not positive"
    few = tokens[:capacity]
    subject.expect("small cache", subject.forward(small, (few, 0, 0)), few)
    _expect_refused(subject, small, ([1], capacity, 0))


def nothing_is_written_outside_the_batchs_slots(subject: Subject) -> None:
    """Sleeping rows between, below and above the active ones are untouched."""
    sleepers = [subject.tokens(6 + i, seed=20 + i) for i in range(2)]
    active = [subject.tokens(30, seed=23), subject.tokens(17, seed=24)]
    for asleep, awake in (((0, 2), (3, 1)), ((3, 1), (0, 2))):
        cache = subject.cache()
        for rows, slots in ((sleepers, asleep), (active, awake)):
            subject.forward(cache, *[(s, 0, slot) for s, slot in zip(rows, slots, strict=True)], logits_at=[])
        for step in range(4):
            going = zip(active, awake, strict=True)
            subject.forward(cache, *[([step], len(s) + step, slot) for s, slot in going])
        got = subject.forward(cache, *[([1], len(s), slot) for s, slot in zip(sleepers, asleep, strict=True)])
        subject.expect(f"sleeping rows in slots {asleep}", got, *[[*s, 1] for s in sleepers])


def an_error_commits_nothing(subject: Subject) -> None:
    """A refused batch leaves every row as it was."""
    cache, histories = subject.cache(), [subject.tokens(n, seed=20 + n) for n in (7, 4, 5, 6)]
    subject.forward(cache, *[(tokens, 0, slot) for slot, tokens in enumerate(histories)], logits_at=[])
    vocab, context = subject.config.vocab_size, subject.config.n_positions
    for bad in (
        [([1], 3, 0), ([vocab], 4, 1)],  # token past the vocabulary
        [([1], 3, 0), ([-1], 4, 1)],
        [([1], 3, 0), ([1], 4, 4)],  # no such slot
        [([1], 3, 0), ([1], 4, -1)],
        [([1], 3, 0), ([1], 4, 0)],  # one slot twice
        [([1], 3, 0), ([1], context, 1)],  # past the capacity
        [([1], 3, 0), ([1], -1, 1)],
        [([1], 3, 0), ([], 4, 1)],  # no token
        [],
    ):
        _expect_refused(subject, cache, *bad)
    _expect_refused(subject, cache, ([1], 7, 0), logits_at=[1])
    got = subject.forward(cache, *[([5], len(tokens), slot) for slot, tokens in enumerate(histories)])
    subject.expect("after refused batches", got, *[[*tokens, 5] for tokens in histories])


def caches_are_independent(subject: Subject) -> None:
    """Two caches of one backend share nothing."""
    first, second = subject.cache(), subject.cache()
    a, b = subject.tokens(9, seed=27), subject.tokens(12, seed=28)
    subject.forward(first, (a, 0, 0), logits_at=[])
    subject.forward(second, (b, 0, 0), logits_at=[])
    subject.expect("first cache", subject.forward(first, ([1], 9, 0)), [*a, 1])
    subject.expect("second cache", subject.forward(second, ([2], 12, 0)), [*b, 2])


def closing_is_final_and_harmless(subject: Subject) -> None:
    """`close` may be called twice, `forward` after it is refused, and threads=1 gives the same numbers."""
    backend = subject.factory(subject.weights, device="cpu", threads=1)
    assert isinstance(backend, Backend), f"{type(backend).__name__} lacks a part of the Backend protocol"
    assert backend.config == subject.config, "backend.config is not the weights' config"
    tokens, cache = subject.tokens(SMALL[1], seed=29), backend.new_cache(*SMALL)
    subject.expect("one thread", backend.forward(Batch.of([(tokens, 0, 0)]), cache), tokens)
    backend.close()
    backend.close()
    try:
        backend.forward(Batch.of([(tokens, 0, 0)]), cache)
    except RequestError:
        return
    raise AssertionError("forward on a closed backend did not raise RequestError")


def a_trace_shows_the_references_numbers(subject: Subject) -> None:
    """Where a backend has `Traces`: hidden states, attention maps and logits are those of the reference."""
    if not isinstance(subject.backend, Traces):
        raise NotApplicable("the backend has no Traces")
    for count in (1, 11):
        tokens = subject.tokens(count, seed=30)
        got, want = subject.backend.trace(tokens), reference_trace(subject.weights, tokens)
        for (name, mine), (_, theirs) in zip(got.parts(), want.parts(), strict=True):
            subject.expect_close(f"trace of {count} tokens, {name}", mine, theirs)
    for bad in ([], [subject.config.vocab_size], [0] * (subject.config.n_positions + 1)):
        try:
            subject.backend.trace(bad)
        except RequestError:
            continue
        raise AssertionError(f"a trace of {len(bad)} tokens was not refused with a RequestError")


def every_precision_computes_what_its_weights_say(subject: Subject) -> None:
    """Where a factory has `RunsPrecisions`: rounded weights give nearly the logits that they stand for.

    Kernels may round their inputs too, so what is allowed is a share of the logits' spread.
    """
    if not isinstance(subject.factory, RunsPrecisions):
        raise NotApplicable("the factory has no RunsPrecisions")
    tokens = subject.tokens(40, seed=31)
    for precision in subject.factory.precisions:
        if precision == "float32":
            continue
        rounded = quantize(subject.weights, precision)
        want = reference_logits(dequantize(rounded), tokens)
        backend = subject.factory(rounded)
        try:
            cache = backend.new_cache(4, subject.config.n_positions)
            whole = backend.forward(Batch.of([(tokens[:39], 0, 1)], range(39)), cache)
            last = backend.forward(Batch.of([(tokens[39:], 39, 1)]), cache)
        finally:
            backend.close()
        got = np.concatenate([whole, last])
        assert got.shape == want.shape, f"{precision}: shape is {got.shape}, expected {want.shape}"
        off = float(np.sqrt(np.square(got - want).mean()) / want.std())
        assert off <= ROUNDED_TOLERANCE, (
            f"{precision}: logits are off by {off:.3g} of their spread, allowed is {ROUNDED_TOLERANCE:.3g}"
        )


def a_price_of_tokens_is_finite_and_grows(subject: Subject) -> None:
    """Where a backend has `EstimatesCost`: a positive, finite number that more tokens never make smaller."""
    backend = subject.backend
    if not isinstance(backend, EstimatesCost):
        raise NotApplicable("the backend has no EstimatesCost")
    for rows in (1, 2, 8, 32):
        prices = [backend.extra_tokens_cost(tokens, rows) for tokens in range(1, 17)]
        finite = all(math.isfinite(price) and price > 0 for price in prices)
        assert finite, f"prices beside {rows} rows are {prices}, expected positive finite numbers"
        grows = prices == sorted(prices) and prices[0] < prices[-1]
        assert grows, f"prices beside {rows} rows do not grow: {prices}"


def two_callers_at_once_get_their_own_answers(subject: Subject) -> None:
    """Two threads, each with a cache of its own, get what each would get alone."""
    backend, failures = subject.backend, list[str]()
    begin = threading.Barrier(2)

    def write(seed: int) -> None:
        history = subject.tokens(8, seed=seed)
        try:
            cache = backend.new_cache(4, subject.config.n_positions)
            begin.wait()
            got = [backend.forward(Batch.of([(history, 0, 0)]), cache)]
            for token in range(16):
                history = [*history, token]
                got.append(backend.forward(Batch.of([([token], len(history) - 1, 0)]), cache))
            want = reference_logits(subject.weights, history)[7:]
            subject.expect_close(f"caller {seed}", np.concatenate(got), want)
        except BaseException as error:  # told by the check, not by the thread
            begin.abort()
            failures.append(f"{type(error).__name__}: {error}")

    callers = [threading.Thread(target=write, args=(seed,)) for seed in (32, 33)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert not failures, "; ".join(failures)


def a_cache_of_another_model_is_refused(subject: Subject) -> None:
    """A cache of a model with another number of layers is refused; it is neither read nor written."""
    layers = subject.config.n_layer + 1
    blocks = (*subject.weights.blocks, subject.weights.blocks[0])
    other = replace(subject.weights, config=replace(subject.config, n_layer=layers), blocks=blocks)
    stranger = subject.factory(other)
    try:
        cache = stranger.new_cache(4, subject.config.n_positions)
        try:
            subject.forward(cache, (subject.tokens(3, seed=34), 0, 0))
        except (RequestError, BackendError):
            return
        raise AssertionError(f"the cache of a model of {layers} layers was not refused")
    finally:
        stranger.close()


def a_cache_beyond_the_context_is_refused(subject: Subject) -> None:
    """More capacity than the context, none, and no slots are refused when the cache is made."""
    context = subject.config.n_positions
    for slots, capacity in ((1, context + 1), (1, 0), (1, -1), (0, context)):
        try:
            subject.backend.new_cache(slots, capacity)
        except (RequestError, BackendError):
            continue
        raise AssertionError(f"a cache of {slots} slots of {capacity} tokens was not refused")


def _expect_refused(
    subject: Subject, cache: Cache, *rows: Row, logits_at: Sequence[int] | None = None
) -> None:
    try:
        subject.forward(cache, *rows, logits_at=logits_at)
    except RequestError:
        return
    raise AssertionError(f"rows {rows} (logits_at {logits_at}) were not refused with a RequestError")


CONFORMANCE_CHECKS: tuple[Callable[[Subject], None], ...] = (
    agrees_with_the_reference_at_every_position,
    decoding_equals_prefilling,
    chunked_prefill_equals_whole,
    batch_equals_single,
    prefill_and_decode_mix_in_one_batch,
    rows_join_and_leave,
    dirty_slot_equals_clean_slot,
    nan_in_one_row_stays_there,
    rewinding_forgets_what_came_after,
    wanted_logits_come_in_the_order_asked,
    logits_belong_to_the_caller,
    full_context_is_usable_and_no_more,
    nothing_is_written_outside_the_batchs_slots,
    an_error_commits_nothing,
    caches_are_independent,
    closing_is_final_and_harmless,
    a_trace_shows_the_references_numbers,
    every_precision_computes_what_its_weights_say,
    a_price_of_tokens_is_finite_and_grows,
    copied_positions_go_on_as_computed_ones,
    moved_positions_go_on_as_computed_ones,
    two_callers_at_once_get_their_own_answers,
    a_cache_of_another_model_is_refused,
    a_cache_beyond_the_context_is_refused,
)


def check_backend(
    factory: BackendFactory,
    weights: Weights | None = None,
    *,
    checks: Sequence[Callable[[Subject], None]] = CONFORMANCE_CHECKS,
    tolerance: float = TOLERANCE,
) -> dict[str, str]:
    """Run the conformance suite against a backend.

    Args:
        factory: what makes the backend, as an entry point of `gpt2core.backends` would name it.
        weights: the model to run, with a context of 64 or more; by default `random_weights(random_config())`.
        checks: which of `CONFORMANCE_CHECKS`.
        tolerance: largest allowed difference of a logit from the float64 reference.

    Returns:
        For each check its name and "passed", or which capability the backend lacks for it.

    Raises:
        AssertionError: names the check, the claim and the difference.
    """
    weights = weights or random_weights(random_config())
    outcomes = {}
    for check in checks:
        try:
            _run_check(check, factory, weights, tolerance)
        except NotApplicable as reason:
            outcomes[check.__name__] = f"not applicable: {reason}"
        else:
            outcomes[check.__name__] = "passed"
    return outcomes


def conformance_tests(
    factory: BackendFactory, weights: Weights | None = None, *, tolerance: float = TOLERANCE
) -> list[Callable[[], None]]:
    """The conformance suite as functions without arguments, for `pytest.mark.parametrize`.

    A check of a capability that the backend lacks is reported as skipped.

    Args:
        factory, weights, tolerance: as of `check_backend`.
    """

    def make(check: Callable[[Subject], None]) -> Callable[[], None]:
        @functools.wraps(check)
        def run() -> None:
            _run_check(check, factory, weights or random_weights(random_config()), tolerance)

        return run

    return [make(check) for check in CONFORMANCE_CHECKS]


def _run_check(
    check: Callable[[Subject], None], factory: BackendFactory, weights: Weights, tolerance: float
) -> None:
    subject = Subject(factory, weights, tolerance)
    try:
        check(subject)
    except AssertionError as error:
        raise AssertionError(f"{check.__name__}: {error}") from error
    finally:
        if "backend" in subject.__dict__:
            subject.backend.close()
