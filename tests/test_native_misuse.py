"""Misuse of the native backend from Python: a typed error before any C runs, never a crash."""

from dataclasses import replace

import numpy as np
import pytest

from gpt2core.backends.native import NativeBackend
from gpt2core.backends.numpy import NumpyBackend
from gpt2core.batch import Batch
from gpt2core.errors import BackendError, RequestError
from gpt2core.quantization.rounding import quantize
from gpt2core.testing import random_config, random_weights

WEIGHTS = random_weights(random_config())
CONTEXT = WEIGHTS.config.n_positions


@pytest.fixture
def backend():
    backend = NativeBackend(WEIGHTS, threads=1)
    yield backend
    backend.close()


@pytest.mark.parametrize("capacity", [CONTEXT + 1, 100_000, 2**40])
def test_a_capacity_beyond_the_context_is_refused(backend, capacity):
    with pytest.raises(RequestError, match=f"capacity is {capacity}; this model's context is {CONTEXT}; use"):
        backend.new_cache(1, capacity)


@pytest.mark.parametrize("size", [0, -1, 1.0, True, "4", None])
@pytest.mark.parametrize("name", ["slots", "capacity"])
def test_a_cache_of_no_size_is_refused(backend, name, size):
    with pytest.raises(
        RequestError, match=f"the cache's {name} is {size!r}; use a whole number of 1 or more"
    ):
        backend.new_cache(**{"slots": 1, "capacity": 4, name: size})


def test_a_size_may_be_a_number_of_numpy(backend):
    cache = backend.new_cache(np.int64(2), np.int32(4))
    assert (cache.slots, cache.capacity) == (2, 4)


@pytest.mark.parametrize("slots", [2**40, 2**62])
def test_a_cache_that_no_memory_holds_is_a_typed_error(backend, slots):
    with pytest.raises(BackendError, match=f"no memory for a cache of {slots} slots of {CONTEXT} tokens"):
        backend.new_cache(slots, CONTEXT)


OTHERS = {
    "fewer layers": {"n_layer": 1},
    "more heads": {"n_head": WEIGHTS.config.n_head * 2},
    "narrower": {"n_embd": WEIGHTS.config.n_embd // 2},
}


@pytest.mark.parametrize("shape", OTHERS)
def test_a_cache_of_another_shape_is_refused(backend, shape):
    foreign = NativeBackend(random_weights(random_config(**OTHERS[shape])), threads=1)
    with pytest.raises(RequestError, match="use what new_cache of this backend returned"):
        backend.forward(Batch.of([([1], 0, 0)]), foreign.new_cache(1, 8))


def test_a_cache_of_another_precision_is_refused(backend):
    foreign = NativeBackend(quantize(WEIGHTS, "int8"), threads=1)
    with pytest.raises(RequestError, match=r"itemsize=2.*itemsize=4"):
        backend.forward(Batch.of([([1], 0, 0)]), foreign.new_cache(1, 8))


def test_a_cache_of_another_backend_is_refused(backend):
    with pytest.raises(RequestError, match="the cache is NumpyCache"):
        backend.forward(Batch.of([([1], 0, 0)]), NumpyBackend(WEIGHTS).new_cache(1, 8))


def test_in_a_cache_of_a_longer_context_positions_end_with_the_models_own(backend):
    longer = NativeBackend(random_weights(random_config(n_positions=2 * CONTEXT)), threads=1)
    cache = longer.new_cache(1, 2 * CONTEXT)
    assert np.isfinite(backend.forward(Batch.of([([1], CONTEXT - 1, 0)]), cache)).all()
    with pytest.raises(RequestError, match=f"capacity of {CONTEXT}"):
        backend.forward(Batch.of([([1], CONTEXT, 0)]), cache)


@pytest.mark.parametrize("dtype", [np.int64, np.float32, np.int16, np.uint32])
@pytest.mark.parametrize("name", ["tokens", "lengths", "starts", "slots", "logits_at"])
def test_arrays_of_another_type_are_refused_by_name(backend, name, dtype):
    batch = Batch.of([([1, 2], 0, 0)])
    batch = replace(batch, **{name: getattr(batch, name).astype(dtype)})
    with pytest.raises(RequestError, match=f"batch.{name} must be a one-dimensional int32 array"):
        backend.forward(batch, backend.new_cache(1, 8))


def test_arrays_with_gaps_in_memory_are_read_as_they_are_meant(backend):
    tokens = np.arange(20, dtype=np.int32)[::2]
    batch = Batch.of([(tokens.tolist(), 0, 0)], [9, 0, 3])
    want = backend.forward(batch, backend.new_cache(1, 10))
    gaps = replace(batch, tokens=tokens, logits_at=np.array([9, 8, 0, 7, 3], np.int32)[::2])
    np.testing.assert_array_equal(backend.forward(gaps, backend.new_cache(1, 10)), want)


def test_a_closed_backend_makes_no_cache(backend):
    backend.close()
    with pytest.raises(RequestError, match="native backend is closed; load the model again"):
        backend.new_cache(1, 8)
