"""The public fake: its example runs, it behaves as a backend, and it notices what an engine mixes up."""

import doctest

import numpy as np
import pytest

from gpt2core.backends.base import Backend
from gpt2core.batch import Batch
from gpt2core.errors import RequestError
from gpt2core.testing import FakeBackend, fake, hashed, random_config

CONFIG = random_config()


def test_the_example_in_its_documentation_runs():
    result = doctest.testmod(fake)
    assert result.attempted > 5
    assert result.failed == 0


def test_its_logits_are_those_of_the_rows_own_history_whatever_the_slots_and_chunks():
    backend = FakeBackend(CONFIG)
    assert isinstance(backend, Backend)
    cache = backend.new_cache(3, 16)
    backend.forward(Batch.of([([1, 2], 0, 2), ([9], 0, 0)]), cache)
    got = backend.forward(Batch.of([([8], 1, 0), ([3, 4], 2, 2)]), cache)
    want = [hashed((9, 8), CONFIG.vocab_size), hashed((1, 2, 3, 4), CONFIG.vocab_size)]
    np.testing.assert_array_equal(got, want)


def test_a_row_that_starts_behind_what_its_slot_holds_is_noticed():
    backend = FakeBackend(CONFIG)
    with pytest.raises(AssertionError, match="slot 0 holds 0 tokens, the row starts at 3"):
        backend.forward(Batch.of([([1], 3, 0)]), backend.new_cache(1, 8))


def test_misuse_is_refused_as_a_real_backend_refuses_it():
    backend, other = FakeBackend(CONFIG), FakeBackend(random_config(n_layer=1))
    with pytest.raises(RequestError, match="for 97 tokens was asked for"):
        backend.new_cache(1, 97)
    with pytest.raises(RequestError, match="of another model"):
        backend.forward(Batch.of([([1], 0, 0)]), other.new_cache(1, 8))
    cache = backend.new_cache(1, 8)
    backend.close()
    with pytest.raises(RequestError, match="closed"):
        backend.forward(Batch.of([([1], 0, 0)]), cache)
