"""The built-in backends pass the conformance suite on every variant; broken ones fail their check."""

import threading
import unittest
from dataclasses import replace

import numpy as np
import pytest

from gpt2core.backends import load_factory
from gpt2core.backends.numpy.backend import NumpyBackend, NumpyCache
from gpt2core.batch import Batch
from gpt2core.errors import RequestError
from gpt2core.testing import (
    CONFORMANCE_CHECKS,
    VARIANTS,
    NotApplicable,
    check_backend,
    conformance_tests,
    random_config,
    random_weights,
)

LACKS = {
    ("jax", "every_precision_computes_what_its_weights_say"): "the factory has no RunsPrecisions",
    **{
        (backend, "moved_positions_go_on_as_computed_ones"): "the backend has no MovesCache"
        for backend in ("torch", "jax", "onnx")
    },
}
BACKENDS = ("numpy", "native", "torch", "jax", "onnx")


@pytest.mark.parametrize("check", CONFORMANCE_CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("backend", BACKENDS)
def test_built_in_backends_conform(backend, check):
    outcome = check_backend(load_factory(backend), checks=[check])[check.__name__]
    lacks = LACKS.get((backend, check.__name__))
    assert outcome == (f"not applicable: {lacks}" if lacks else "passed")


@pytest.mark.parametrize("variant", [v for v in VARIANTS if v != "plain"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_built_in_backends_conform_on_every_variant(backend, variant):
    smaller = {"n_positions": 64, "n_layer": 2}  # what compiles each step takes as long as it has layers
    weights = random_weights(random_config(**{**smaller, **VARIANTS[variant]}), seed=1)
    check_backend(load_factory(backend), weights)


class Broken:
    """A NumPy backend with one planted fault."""

    name = "broken"

    def __init__(self, weights, *, device="cpu", threads=None):
        self.inner = NumpyBackend(weights)
        self.config = weights.config

    def new_cache(self, slots, capacity):
        return self.inner.new_cache(slots, capacity)

    def forward(self, batch, cache):
        return self.inner.forward(batch, cache)

    def close(self):
        self.inner.close()


class NoPositions(Broken):
    def __init__(self, weights, **options):
        super().__init__(replace(weights, wpe=np.zeros_like(weights.wpe)))
        self.config = weights.config


class HalfPrecision(Broken):
    def forward(self, batch, cache):
        return super().forward(batch, cache).astype(np.float16).astype(np.float32)


class ReversesRows(Broken):
    def forward(self, batch, cache):
        return super().forward(batch, cache)[::-1].copy()


class IgnoresSlots(Broken):
    def forward(self, batch, cache):
        batch.check(vocab_size=self.config.vocab_size, slots=cache.slots, capacity=cache.capacity)
        return super().forward(replace(batch, slots=np.arange(len(batch.slots), dtype=np.int32)), cache)


class WritesIntoTheNextSlot(Broken):
    def forward(self, batch, cache):
        logits = super().forward(batch, cache)
        if batch.slots.max() + 1 < cache.slots and len(batch.lengths) == 2:
            cache.kv[:, :, batch.slots.max() + 1] += 0.5
        return logits


class KeepsNaN(Broken):
    def forward(self, batch, cache):
        cache.filled[:] = 0  # so that nothing is ever zeroed
        return super().forward(batch, cache)


class ReusesItsOutput(Broken):
    buffer = None

    def forward(self, batch, cache):
        logits = super().forward(batch, cache)
        if self.buffer is None or self.buffer.shape != logits.shape:
            self.buffer = logits
        self.buffer[...] = logits
        return self.buffer


class CommitsBeforeChecking(Broken):
    def forward(self, batch, cache):
        try:
            batch.check(vocab_size=self.config.vocab_size, slots=cache.slots, capacity=cache.capacity)
        except RequestError:
            cache.kv[...] = 1
            raise
        return super().forward(batch, cache)


class ClampsTokens(Broken):
    def forward(self, batch, cache):
        tokens = batch.tokens.clip(0, self.config.vocab_size - 1)
        return super().forward(replace(batch, tokens=tokens), cache)


class SharesOneCache(Broken):
    def new_cache(self, slots, capacity):
        if (capacity, slots) != (getattr(self, "capacity", 0), getattr(self, "slots", 0)):
            self.capacity, self.slots, self.cache = capacity, slots, super().new_cache(slots, capacity)
        return self.cache


class CannotClose(Broken):
    def close(self):
        self.inner = NumpyBackend(random_weights(self.config))


class TracesAnotherLayersMap(Broken):
    def trace(self, token_ids):
        trace = self.inner.trace(token_ids)
        return replace(trace, attentions=trace.attentions[::-1])


class TracesTooMuch(Broken):
    def trace(self, token_ids):
        return self.inner.trace([*token_ids, 0][: max(len(token_ids), 1)])


class RefusesToRewind(Broken):
    def forward(self, batch, cache):
        batch.check(vocab_size=self.config.vocab_size, slots=cache.slots, capacity=cache.capacity)
        starts = np.maximum(batch.starts, np.minimum(cache.filled[batch.slots], 19)).astype(np.int32)
        starts[batch.starts == 0] = 0
        return super().forward(replace(batch, starts=starts), cache)


class AlwaysReturnsSomething(Broken):
    def forward(self, batch, cache):
        if len(batch.logits_at) == 0:
            batch = replace(batch, logits_at=np.array([0], np.int32))
        return super().forward(batch, cache)


class RoundsWrongly(Broken):
    precisions = ("float32", "int8")

    def __init__(self, weights, **options):
        if weights.precision != "float32":
            weights = replace(weights, wpe=np.zeros_like(weights.wpe))
        super().__init__(weights)


class PricesNothing(Broken):
    def extra_tokens_cost(self, tokens, rows):
        return 0.0


class PricesAlike(Broken):
    def extra_tokens_cost(self, tokens, rows):
        return 1.0


class PricesEndlessly(Broken):
    def extra_tokens_cost(self, tokens, rows):
        return float("inf") if rows > 8 else tokens


class CopiesWholeBlocks(Broken):
    def copy_cache(self, cache, source, target, start, end):
        self.inner.copy_cache(cache, source, target, start // 8 * 8, end)


class CopiesTooFew(Broken):
    def copy_cache(self, cache, source, target, start, end):
        self.inner.copy_cache(cache, source, target, start, end)
        cache.kv[:, :, target, :, end - 1] = 0


class MovesToTheWrongSlot(Broken):
    def read_cache(self, cache, slot, tokens):
        return self.inner.read_cache(cache, slot, tokens)

    def write_cache(self, cache, slot, positions):
        self.inner.write_cache(cache, slot, positions)
        self.inner.write_cache(cache, (slot + 1) % cache.slots, positions)


class SharesScratch(Broken):
    """Two passes at once leave their results in one place."""

    def __init__(self, weights, **options):
        super().__init__(weights)
        self.meeting = threading.Barrier(2)

    def forward(self, batch, cache):
        self.scratch = super().forward(batch, cache)
        try:
            self.meeting.wait(timeout=0.2)
        except threading.BrokenBarrierError:
            self.meeting.reset()
        return self.scratch


class TakesAnyCache(Broken):
    def forward(self, batch, cache):
        cache.config = self.config
        return super().forward(batch, cache)


class TakesAnySize(Broken):
    def new_cache(self, slots, capacity):
        return NumpyCache(self.config, max(slots, 1), max(capacity, 1))


@pytest.mark.parametrize(
    ("fault", "caught_by"),
    [
        (NoPositions, "agrees_with_the_reference_at_every_position"),
        (NoPositions, "decoding_equals_prefilling"),
        (NoPositions, "chunked_prefill_equals_whole"),
        (HalfPrecision, "agrees_with_the_reference_at_every_position"),
        (ReversesRows, "batch_equals_single"),
        (ReversesRows, "prefill_and_decode_mix_in_one_batch"),
        (IgnoresSlots, "rows_join_and_leave"),
        (IgnoresSlots, "nothing_is_written_outside_the_batchs_slots"),
        (WritesIntoTheNextSlot, "nothing_is_written_outside_the_batchs_slots"),
        (KeepsNaN, "nan_in_one_row_stays_there"),
        (RefusesToRewind, "rewinding_forgets_what_came_after"),
        (AlwaysReturnsSomething, "wanted_logits_come_in_the_order_asked"),
        (ReusesItsOutput, "logits_belong_to_the_caller"),
        (ClampsTokens, "an_error_commits_nothing"),
        (CommitsBeforeChecking, "an_error_commits_nothing"),
        (SharesOneCache, "caches_are_independent"),
        (CannotClose, "closing_is_final_and_harmless"),
        (TracesAnotherLayersMap, "a_trace_shows_the_references_numbers"),
        (TracesTooMuch, "a_trace_shows_the_references_numbers"),
        (RoundsWrongly, "every_precision_computes_what_its_weights_say"),
        (PricesNothing, "a_price_of_tokens_is_finite_and_grows"),
        (PricesAlike, "a_price_of_tokens_is_finite_and_grows"),
        (PricesEndlessly, "a_price_of_tokens_is_finite_and_grows"),
        (CopiesWholeBlocks, "copied_positions_go_on_as_computed_ones"),
        (CopiesTooFew, "copied_positions_go_on_as_computed_ones"),
        (MovesToTheWrongSlot, "moved_positions_go_on_as_computed_ones"),
        (SharesScratch, "two_callers_at_once_get_their_own_answers"),
        (TakesAnyCache, "a_cache_of_another_model_is_refused"),
        (TakesAnySize, "a_cache_beyond_the_context_is_refused"),
    ],
)
def test_a_planted_fault_is_caught(fault, caught_by):
    checks = [check for check in CONFORMANCE_CHECKS if check.__name__ == caught_by]
    with pytest.raises(AssertionError, match=caught_by):
        check_backend(fault, checks=checks)


def test_a_dirty_slot_that_shows_through_is_caught():
    class SeesThePast(Broken):
        def forward(self, batch, cache):
            if batch.starts.max() == 5 and len(batch.starts) == 2:
                starts = batch.starts + np.array([3, 0], np.int32)
                return super().forward(replace(batch, starts=starts), cache)
            return super().forward(batch, cache)

    checks = [check for check in CONFORMANCE_CHECKS if check.__name__ == "dirty_slot_equals_clean_slot"]
    check_backend(Broken, checks=checks)

    class ForgetsToMask(Broken):
        def forward(self, batch, cache):
            starts = np.where(batch.starts == 5, 7, batch.starts).astype(np.int32)
            return super().forward(replace(batch, starts=starts), cache)

    with pytest.raises(AssertionError, match="short row beside a long one"):
        check_backend(ForgetsToMask, checks=checks)


def test_every_check_is_named_and_says_its_claim_and_has_a_planted_fault():
    names = [check.__name__ for check in CONFORMANCE_CHECKS]
    assert len(set(names)) == len(names)
    assert all(check.__doc__ for check in CONFORMANCE_CHECKS)
    marks = {mark.name: mark for mark in test_a_planted_fault_is_caught.pytestmark}
    caught = {name for _, name in marks["parametrize"].args[1]}
    assert set(names) - caught <= {"dirty_slot_equals_clean_slot", "full_context_is_usable_and_no_more"}


def test_what_a_backend_lacks_is_said_and_not_passed_over():
    outcomes = check_backend(Broken)
    assert list(outcomes) == [check.__name__ for check in CONFORMANCE_CHECKS]
    assert {name: outcome for name, outcome in outcomes.items() if outcome != "passed"} == {
        "a_trace_shows_the_references_numbers": "not applicable: the backend has no Traces",
        "every_precision_computes_what_its_weights_say": "not applicable: the factory has no RunsPrecisions",
        "a_price_of_tokens_is_finite_and_grows": "not applicable: the backend has no EstimatesCost",
        "copied_positions_go_on_as_computed_ones": "not applicable: the backend has no CopiesCache",
        "moved_positions_go_on_as_computed_ones": "not applicable: the backend has no MovesCache",
    }


def test_the_suite_is_a_list_of_functions_for_pytest():
    tests = {test.__name__: test for test in conformance_tests(Broken)}
    assert list(tests) == [check.__name__ for check in CONFORMANCE_CHECKS]
    tests["caches_are_independent"]()
    with pytest.raises(NotApplicable, match="no Traces"):  # which pytest reports as a skip
        tests["a_trace_shows_the_references_numbers"]()
    assert issubclass(NotApplicable, unittest.SkipTest)
    reversing = {test.__name__: test for test in conformance_tests(ReversesRows)}
    with pytest.raises(AssertionError, match="batch_equals_single"):
        reversing["batch_equals_single"]()


def test_batch_of_wants_each_rows_last_logits_by_default():
    batch = Batch.of([([1, 2, 3], 0, 1), ([4], 9, 0)])
    assert batch.logits_at.tolist() == [2, 3]
    assert batch.positions.tolist() == [0, 1, 2, 9]
    assert batch.ends.tolist() == [3, 10]
