"""The native backend's trace: of the same kernels, and with the bits of an ordinary pass."""

import numpy as np
import pytest

from gpt2core.backends.base import Traces
from gpt2core.backends.native import NativeBackend
from gpt2core.batch import Batch
from gpt2core.errors import RequestError
from gpt2core.quantization.rounding import PRECISIONS, dequantize, quantize
from gpt2core.reference import reference_trace
from gpt2core.testing import random_config, random_weights
from gpt2core.testing.subject import TOLERANCE

WEIGHTS = random_weights(
    random_config(n_embd=144, n_head=2, n_inner=37, n_layer=2, vocab_size=263, n_positions=600), seed=3
)
TOKENS = np.random.default_rng(4).integers(0, 263, 530).tolist()  # two passes in C
STORED = {precision: quantize(WEIGHTS, precision) for precision in PRECISIONS} | {"float32": WEIGHTS}


def logits(backend, tokens):
    return backend.forward(Batch.of([(tokens, 0, 0)], range(len(tokens))), backend.new_cache(1, 600))


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("precision", STORED)
def test_a_traced_pass_gives_the_bits_of_an_untraced_one(precision, threads):
    backend = NativeBackend(STORED[precision], threads=threads)
    for count in (1, 7, 100, 530):
        want = logits(backend, TOKENS[:count])
        np.testing.assert_array_equal(backend.trace(TOKENS[:count]).logits, want)
        np.testing.assert_array_equal(logits(backend, TOKENS[:count]), want, err_msg="after a trace")


@pytest.mark.parametrize("count", [1, 6, 65, 530])
def test_its_parts_are_those_of_the_reference(count):
    backend = NativeBackend(WEIGHTS, threads=3)
    assert isinstance(backend, Traces)
    got, want = backend.trace(TOKENS[:count]), reference_trace(WEIGHTS, TOKENS[:count])
    for (name, mine), (_, theirs) in zip(got.parts(), want.parts(), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=0, atol=TOLERANCE, err_msg=name)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_of_quantized_weights_it_is_near_the_reference_of_what_they_mean(precision):
    backend = NativeBackend(STORED[precision], threads=2)
    got, want = backend.trace(TOKENS[:65]), reference_trace(dequantize(STORED[precision]), TOKENS[:65])
    for (name, mine), (_, theirs) in zip(got.parts(), want.parts(), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=0, atol=0.6, err_msg=name)
    np.testing.assert_allclose(got.attentions.sum(-1), 1, rtol=0, atol=1e-6)
    assert not np.triu(got.attentions, 1).any()


def test_a_closed_backend_shows_nothing():
    backend = NativeBackend(WEIGHTS, threads=1)
    backend.close()
    with pytest.raises(RequestError, match="native backend is closed"):
        backend.trace([1])
