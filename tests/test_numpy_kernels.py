"""The kernels against SciPy and closed forms."""

import numpy as np
import pytest
import scipy.special
from hypothesis import given
from hypothesis import strategies as st

from gpt2core import kernels, reference
from gpt2core.config import ACTIVATIONS
from gpt2core.weights import LayerNorm


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_erf_is_within_its_stated_error(dtype):
    x = np.concatenate([np.linspace(-6, 6, 100_001), [0, -0.0, 1, -1, 30, -30]]).astype(dtype)
    np.testing.assert_allclose(kernels.erf(x), scipy.special.erf(x), rtol=0, atol=2.5e-7)


def test_reference_erf_is_exact():
    x = np.linspace(-6, 6, 1001)
    np.testing.assert_allclose(reference._erf(x), scipy.special.erf(x), rtol=1e-14, atol=1e-15)


@pytest.mark.parametrize("name", sorted(ACTIVATIONS))
def test_activations_equal_the_reference_and_stay_finite(name):
    x = np.concatenate([np.linspace(-12, 12, 200_000), [-1e4, 1e4, 0.0]]).astype(np.float32)  # several blocks
    got = x.copy()
    kernels.activate(got.reshape(1, -1), name)
    want = reference.ACTIVATIONS[name](x.astype(np.float64))
    np.testing.assert_allclose(got, want, rtol=2e-6, atol=2e-6)


@given(st.integers(1, 5), st.integers(1, 70), st.floats(1e-12, 1e-1), st.integers(0, 2**32))
def test_layer_norm_equals_its_definition(n, d, epsilon, seed):
    rng = np.random.default_rng(seed)
    x, weight, bias = rng.normal(3, 2, (n, d)), rng.normal(size=d), rng.normal(size=d)
    want = (x - x.mean(1, keepdims=True)) / np.sqrt(x.var(1, keepdims=True) + epsilon) * weight + bias
    np.testing.assert_allclose(kernels.layer_norm(x, weight, bias, epsilon), want, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(
        reference.layer_norm(x, LayerNorm(weight, bias), epsilon), want, rtol=1e-9, atol=1e-9
    )


def plain_attention(q, k, v, scale):
    """Softmax attention of the last N of T positions by its definition, head by head."""
    n, t = len(q), k.shape[1]
    y = np.empty_like(q)
    for h in range(q.shape[1]):
        for i in range(n):
            seen = t - n + i + 1
            weights = scipy.special.softmax(scale * k[h, :seen] @ q[i, h])
            y[i, h] = weights @ v[h, :seen]
    return y


@pytest.mark.parametrize(
    ("n", "start"), [(1, 0), (2, 0), (63, 0), (64, 0), (65, 0), (150, 0), (1, 40), (70, 33)]
)
def test_blocked_causal_attention_equals_its_definition(n, start):
    rng = np.random.default_rng(n)
    q = rng.normal(size=(n, 3, 5))
    k, v = rng.normal(size=(2, 3, start + n, 5))
    got = kernels.attend_causal(q, k, v, 0.7)
    np.testing.assert_allclose(got, plain_attention(q, k, v, 0.7), rtol=1e-10, atol=1e-12)


def test_blocked_attention_never_holds_the_full_score_matrix(monkeypatch):
    sizes = []
    real = kernels._exponentiate
    monkeypatch.setattr(kernels, "_exponentiate", lambda s: sizes.append(s.size) or real(s))
    rng = np.random.default_rng(0)
    k, v = rng.normal(size=(2, 4, 512, 8))
    kernels.attend_causal(rng.normal(size=(512, 4, 8)), k, v, 1.0)
    assert max(sizes) <= 4 * 64 * 512
    assert sum(sizes) < 0.6 * 4 * 512 * 512  # keys of the future are not multiplied


def test_one_query_attention_sees_each_rows_own_positions_only():
    rng = np.random.default_rng(1)
    q, ends = rng.normal(size=(3, 2, 4)), np.array([7, 2, 5], np.int32)
    k, v = rng.normal(size=(2, 3, 2, 7, 4))
    got = kernels.attend_one(q, k, v, ends, 0.5)
    for row, end in enumerate(ends):
        want = plain_attention(q[row][None], k[row, :, :end], v[row, :, :end], 0.5)[0]
        np.testing.assert_allclose(got[row], want, rtol=1e-10, atol=1e-12)
