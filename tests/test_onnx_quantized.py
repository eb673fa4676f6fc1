"""How the ONNX Runtime backend runs quantized weights: one layout for few tokens, one for many."""

import numpy as np
import pytest

from gpt2core.backends.onnx import OnnxBackend, passes
from gpt2core.backends.onnx.products import ByPass, ByToken, group_size
from gpt2core.batch import Batch
from gpt2core.quantization.rounding import quantize
from gpt2core.testing import random_config, random_weights
from gpt2core.testing.conformance import TOLERANCE

QUANTIZED = {p: quantize(random_weights(random_config()), p, group_size=32) for p in ("int8", "int4")}


def made(backend):
    """Which layouts there are: True for few tokens, False for many."""
    return set(backend._network._bodies), set(backend._network._heads)


def test_a_layout_is_made_when_a_pass_first_needs_it():
    backend = OnnxBackend(QUANTIZED["int8"])
    cache = backend.new_cache(8, 40)
    backend.forward(Batch.of([(range(16), 0, 0)]), cache)  # a text alone
    backend.forward(Batch.of([([1], 0, slot) for slot in range(4)]), cache)
    assert made(backend) == ({True}, {True})
    backend.forward(Batch.of([(range(17), 0, 0)]), cache)
    assert made(backend) == ({True, False}, {True})
    backend.forward(Batch.of([([1], 0, slot) for slot in range(8)]), cache)
    assert made(backend) == ({True, False}, {True, False})


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_a_step_of_few_rows_is_that_of_each_row_alone(precision):
    backend = OnnxBackend(QUANTIZED[precision])
    cache = backend.new_cache(4, 8)
    alone = [backend.forward(Batch.of([([token], 0, 0)]), cache)[0] for token in (3, 1, 4)]
    together = backend.forward(Batch.of([([3], 0, 0), ([1], 0, 1), ([4], 0, 2)]), cache)
    np.testing.assert_allclose(together, alone, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_guesses_about_a_text_are_read_as_its_steps_are(precision):
    backend = OnnxBackend(QUANTIZED[precision])
    cache = backend.new_cache(1, 16)
    tokens = [3, 1, 4, 1, 5, 9, 2, 6]
    steps = [backend.forward(Batch.of([([token], i, 0)]), cache)[0] for i, token in enumerate(tokens)]
    at_once = backend.forward(Batch.of([(tokens, 0, 0)], range(8)), cache)
    np.testing.assert_allclose(at_once, steps, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize(("tokens", "what"), [(1, "few"), (30, "many")])
def test_numbers_that_are_not_finite_are_not_hidden_by_rounding(tokens, what):
    weights = QUANTIZED["int8"]
    backend, other = OnnxBackend(weights), weights.wpe.copy()
    other[tokens - 1] = np.inf
    object.__setattr__(weights, "wpe", other)
    try:
        got = backend.forward(Batch.of([(range(tokens), 0, 0)]), backend.new_cache(1, 32))
    finally:
        object.__setattr__(weights, "wpe", random_weights(random_config()).wpe)
    assert np.isnan(got).all(), f"{what} tokens"


@pytest.mark.parametrize("inputs", [16, 32, 48, 64, 768, 1024, 1280, 1600, 3072, 5120, 6400])
def test_groups_are_long_but_pad_little(inputs):
    size = group_size(inputs)
    assert -(-inputs // size) * size <= 1.05 * inputs
    assert inputs % 256 or size == 256


def test_weights_of_4_bits_change_little_when_rounded_to_8():
    first, second = (
        QUANTIZED["int4"].blocks[0].c_fc.weight.float32(),
        dict(ByPass(QUANTIZED["int4"]).arrays()),
    )
    again = second["h.0.mlp.c_fc.weight"] * second["h.0.mlp.c_fc.weight_scale"]
    assert np.abs(again - first).max() <= np.abs(first).max() / 254 * 1.001


def test_the_bytes_of_the_layout_for_few_tokens_mean_the_same_weights():
    weights = QUANTIZED["int8"]
    arrays = dict(ByToken(weights).arrays())
    grouped, scale = arrays["h.0.mlp.c_fc.weight"], arrays["h.0.mlp.c_fc.weight_scale"]  # (O, G, S), (O, G)
    meant = ((grouped.astype(np.float32) - 128) * scale[:, :, None]).reshape(len(grouped), -1)
    want = weights.blocks[0].c_fc.weight.float32()
    np.testing.assert_array_equal(meant[:, : len(want)], want.T)
    assert not meant[:, len(want) :].any()


@pytest.mark.parametrize("rearranged", [True, False])
def test_matrices_are_let_go_only_where_they_are_surely_rearranged(monkeypatch, rearranged):
    monkeypatch.setattr(passes, "packs_whole_numbers", lambda: rearranged)
    (kept,) = OnnxBackend(QUANTIZED["int8"])._network._bodies[True]._kept
    assert ("h.0.mlp.c_fc.weight" in kept) is not rearranged
    assert {"h.0.mlp.c_fc.weight_scale", "h.0.mlp.c_fc.bias", "h.0.ln_1.weight"} <= set(kept)
