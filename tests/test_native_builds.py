"""Builds of the native backend for lesser processors and by another compiler: right, the same bits."""

import functools

import numpy as np
import pytest
from native_builds import OTHERS, stored_demo, use_build

from gpt2core.backends.native import NativeBackend
from gpt2core.batch import Batch
from gpt2core.quantization.rounding import PRECISIONS, quantize
from gpt2core.testing import check_backend, random_config, random_weights
from gpt2core.weights import Weights

ALL = ("float32", *PRECISIONS)
SHAPES = {  # in each something is no whole vector, strip or group
    "wide": {"n_embd": 144, "n_head": 2, "n_inner": 37, "n_layer": 2, "vocab_size": 263, "n_positions": 160},
    "odd": {"n_embd": 35, "n_head": 5, "n_inner": 101, "n_layer": 1, "vocab_size": 97, "n_positions": 33},
    "narrow": {"n_embd": 4, "n_head": 2, "n_inner": 3, "n_layer": 2, "vocab_size": 13, "n_positions": 17},
    "untied": {
        "n_embd": 96,
        "n_layer": 1,
        "vocab_size": 241,
        "tie_word_embeddings": False,
        "n_positions": 50,
    },
}
MODELS = ("demo", *SHAPES)


@functools.cache
def stored(model: str, precision: str) -> Weights:
    if model == "demo":
        return stored_demo(precision)
    weights = random_weights(random_config(**SHAPES[model]), seed=3)
    return weights if precision == "float32" else quantize(weights, precision, group_size=32)


def passes(weights: Weights) -> np.ndarray:
    """Logits of a prompt, of a row's steps beside another's chunk, and of a few tokens more; (M, V)."""
    backend = NativeBackend(weights, threads=2)
    room = min(weights.config.n_positions, 150)
    texts = [np.random.default_rng(n).integers(0, weights.config.vocab_size, room).tolist() for n in range(2)]
    cache, first = backend.new_cache(3, room), room - 6
    got = [backend.forward(Batch.of([(texts[0][:first], 0, 2)], range(first)), cache)]
    for step in range(4):
        rows = [(texts[0][first + step :][:1], first + step, 2), (texts[1][3 * step :][:3], 3 * step, 0)]
        got.append(backend.forward(Batch.of(rows, range(4)), cache))
    got.append(backend.forward(Batch.of([(texts[0][-2:], room - 2, 2)], [1, 0]), cache))
    backend.close()
    return np.concatenate(got)


@functools.cache
def default_bits(model: str, precision: str) -> np.ndarray:
    return passes(stored(model, precision))


@pytest.mark.parametrize("build", OTHERS)
@pytest.mark.parametrize("precision", ALL)
def test_every_build_gives_the_same_bits_of_the_demo_and_of_random_models(build, precision, monkeypatch):
    want = {model: default_bits(model, precision) for model in MODELS}  # before another build is named
    use_build(build, monkeypatch)
    for model in MODELS:
        np.testing.assert_array_equal(passes(stored(model, precision)), want[model], err_msg=model)


@pytest.mark.parametrize("build", OTHERS)
def test_every_build_passes_the_suite(build, monkeypatch):
    use_build(build, monkeypatch)
    check_backend(NativeBackend)
    check_backend(NativeBackend, random_weights(random_config(n_positions=64, n_embd=35, n_head=5)))
