"""A batch that would read or write outside the vocabulary or the cache is refused, with value and limit."""

from dataclasses import replace

import numpy as np
import pytest

from gpt2core.batch import Batch
from gpt2core.errors import RequestError

GOOD = Batch.of([([1, 2, 3], 0, 1), ([4], 9, 0)])
LIMITS = {"vocab_size": 5, "slots": 2, "capacity": 10}


def test_a_good_batch_passes():
    GOOD.check(**LIMITS)


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"vocab_size": 4}, r"batch.tokens holds 4; .* below the vocabulary's size, 4"),
        ({"slots": 1}, r"batch.slots holds 1; .* below the cache's slots, 1"),
        ({"capacity": 9}, r"starts \[0, 9\] plus lengths \[3, 1\] must lie in the cache's capacity of 9"),
    ],
)
def test_limits_of_model_and_cache_are_named(limits, message):
    with pytest.raises(RequestError, match=message):
        GOOD.check(**{**LIMITS, **limits})


def ints(*values):
    return np.array(values, np.int32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": ints(1, 2, -3, 4)}, "batch.tokens holds -3"),
        ({"lengths": ints(4, 0)}, r"lengths \[4, 0\] must be >= 1"),
        ({"lengths": ints(3, 2)}, r"lengths \[3, 2\] must be >= 1 and sum to 4"),
        ({"lengths": ints(3)}, "1 lengths, 2 starts and 2 slots"),
        ({"slots": ints(1, 1)}, r"slots \[1, 1\] must be distinct"),
        ({"slots": ints(-1, 0)}, "batch.slots holds -1"),
        ({"starts": ints(-1, 0)}, r"starts \[-1, 0\]"),
        ({"starts": ints(0, 2**31 - 1)}, "capacity of 10"),
        ({"logits_at": ints(4)}, "batch.logits_at holds 4; .* the number of tokens, 4"),
        ({"logits_at": ints(-1)}, "batch.logits_at holds -1"),
        ({"tokens": np.array([1, 2, 3, 4])}, "batch.tokens must be a one-dimensional int32 array"),
        ({"tokens": ints(1, 2, 3, 4)[None]}, "batch.tokens must be a one-dimensional int32 array"),
        ({"slots": [1, 0]}, "batch.slots must be a one-dimensional int32 array"),
        ({"lengths": ints(), "starts": ints(), "slots": ints(), "tokens": ints()}, "no rows"),
    ],
)
def test_each_fault_is_refused_by_name(change, message):
    with pytest.raises(RequestError, match=message):
        replace(GOOD, **change).check(**LIMITS)
