"""A cache's memory is zero, writable, and resident only where it was written."""

import subprocess
import sys

import numpy as np
import pytest

from gpt2core.backends._shared.memory import lazy_zeros


def test_lazy_zeros_are_writable_float32_zeros_and_private_to_each_array():
    first, second = lazy_zeros((3, 4, 5)), lazy_zeros((3, 4, 5))
    assert (first.shape, first.dtype) == ((3, 4, 5), np.float32)
    assert not first.any()
    first[1, 2, 3] = 7
    assert first.sum() == 7
    assert not second.any()


@pytest.mark.skipif(sys.platform != "linux", reason="reads the process's memory from Linux's /proc")
@pytest.mark.parametrize("backend", ["numpy", "native", "torch", "onnx"])
def test_a_few_tokens_in_every_slot_do_not_make_the_whole_cache_resident(backend):
    code = f"""
import numpy as np, psutil
from gpt2core.backends import load_factory
from gpt2core.batch import Batch
from gpt2core.testing import random_config, random_weights
config = random_config(n_positions=4096, n_embd=512, n_head=8)
backend = load_factory({backend!r})(random_weights(config))
backend.forward(Batch.of([([1] * 8, 0, 0)]), backend.new_cache(1, 64))
cache, rss = backend.new_cache(8, 4096), psutil.Process().memory_info().rss
backend.forward(Batch.of([([1] * 8, 0, slot) for slot in range(8)]), cache)
print((psutil.Process().memory_info().rss - rss) / cache.nbytes)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(result.stdout) < 0.2
