"""The kernels of a GPT-2 in NumPy: they work in place where they can, and in pieces that stay in the cache.

Each takes any floating dtype and computes in it.
"""

# N tokens, I inputs, O outputs, D width, H heads, K head width, R rows, T cached positions, Q query block, M
# MLP width

import math
from collections.abc import Callable

import numpy as np

from gpt2core._shapes import Float, Int32

Array = Float[np.ndarray, "..."]

_BLOCK_FLOATS = 1 << 16  # 256 KiB of float32: a block and its scratch stay in a core's L2 cache
_QUERY_BLOCK = 64  # queries per attention block: scores of all heads for 64 queries, never for all


def linear(
    x: Float[np.ndarray, "N I"], weight: Float[np.ndarray, "I O"], bias: Float[np.ndarray, "O"]
) -> Float[np.ndarray, "N O"]:
    """`x @ weight + bias`, one product for all tokens of a ragged batch."""
    y = x @ weight
    y += bias
    return y


def layer_norm(
    x: Float[np.ndarray, "N D"],
    weight: Float[np.ndarray, "D"],
    bias: Float[np.ndarray, "D"],
    epsilon: float,
) -> Float[np.ndarray, "N D"]:
    """Normalise each row to mean 0 and variance 1, then scale and shift (Ba et al. 2016, section 3)."""
    y = x - x.mean(-1, keepdims=True)
    deviation = np.einsum("nd,nd->n", y, y)[:, None]  # (N, 1) sum of squares, without a squared copy
    deviation /= x.shape[1]
    deviation += epsilon
    np.sqrt(deviation, out=deviation)
    y /= deviation
    y *= weight
    y += bias
    return y


# -------------------------------------------------------------------------------------------------
# activations


def activate(x: Float[np.ndarray, "N M"], name: str) -> None:
    """Apply the activation `name` (of `config.ACTIVATIONS`) in place, block by block."""
    function = _ACTIVATIONS[name]
    flat = x.reshape(-1)
    for start in range(0, flat.size, _BLOCK_FLOATS):
        function(flat[start : start + _BLOCK_FLOATS])


def _gelu_tanh(x: Array) -> None:
    u = x * x
    u *= 0.044715
    u += 1
    u *= x
    u *= math.sqrt(2 / math.pi)
    np.tanh(u, out=u)
    u += 1
    u *= 0.5
    x *= u


def _gelu_erf(x: Array) -> None:
    u = erf(x * math.sqrt(0.5))
    u += 1
    u *= 0.5
    x *= u


def _gelu_clipped(x: Array) -> None:
    _gelu_erf(x)
    np.clip(x, -10, 10, out=x)


def _sigmoid_of(x: Array) -> Array:
    u = x * 0.5  # through tanh, which cannot overflow
    np.tanh(u, out=u)
    u += 1
    u *= 0.5
    return u


def _sigmoid(x: Array) -> None:
    x[...] = _sigmoid_of(x)


def _silu(x: Array) -> None:
    x *= _sigmoid_of(x)


def _quick_gelu(x: Array) -> None:
    x *= _sigmoid_of(x * 1.702)


def _hardswish(x: Array) -> None:
    u = x + 3
    np.clip(u, 0, 6, out=u)
    u /= 6
    x *= u


def _laplace(x: Array) -> None:
    x -= 0.707107
    x /= 0.282095 * math.sqrt(2)
    x[...] = erf(x)
    x += 1
    x *= 0.5


def _mish(x: Array) -> None:
    x *= np.tanh(np.logaddexp(x.dtype.type(0), x))


def _sqrt_softplus(x: Array) -> None:
    np.sqrt(np.logaddexp(x.dtype.type(0), x), out=x)


def _relu2(x: Array) -> None:
    np.maximum(x, 0, out=x)
    x *= x


_ACTIVATIONS: dict[str, Callable[[Array], object]] = {
    "gelu": _gelu_erf,
    "gelu_10": _gelu_clipped,
    "gelu_accurate": _gelu_tanh,
    "gelu_fast": _gelu_tanh,
    "gelu_new": _gelu_tanh,
    "gelu_python": _gelu_erf,
    "gelu_python_tanh": _gelu_tanh,
    "gelu_pytorch_tanh": _gelu_tanh,
    "hardswish": _hardswish,
    "laplace": _laplace,
    "leaky_relu": lambda x: np.maximum(x, 0.01 * x, out=x),
    "linear": lambda x: None,
    "mish": _mish,
    "quick_gelu": _quick_gelu,
    "relu": lambda x: np.maximum(x, 0, out=x),
    "relu2": _relu2,
    "relu6": lambda x: np.clip(x, 0, 6, out=x),
    "sigmoid": _sigmoid,
    "silu": _silu,
    "sqrtsoftplus": _sqrt_softplus,
    "swish": _silu,
    "tanh": lambda x: np.tanh(x, out=x),
}

_ERF = tuple(2 / math.sqrt(math.pi) * (-1) ** n / (math.factorial(n) * (2 * n + 1)) for n in range(13))
_ERFC = (
    -1.26551223, 1.00002368, 0.37409196, 0.09678418, -0.18628806, 0.27886807, -1.13520398, 1.48851587,
    -0.82215223, 0.17087277,
)  # fmt: skip


def erf(x: Array) -> Array:
    """The error function, within 1.2e-7 everywhere; NumPy has none of its own.

    For |x| < 1 its Maclaurin series (DLMF 7.6.1), elsewhere the approximation of erfc in Press et al.,
    "Numerical Recipes in C", section 6.2 (fractional error below 1.2e-7).
    """
    a = np.abs(x)
    t = 1 / (1 + 0.5 * a)
    tail = t * np.exp(_polynomial(t, _ERFC) - a * a)
    series = x * _polynomial(np.minimum(a, 1) ** 2, _ERF)
    return np.where(a < 1, series, np.copysign(1 - tail, x))


def _polynomial(x: Array, coefficients: tuple[float, ...]) -> Array:
    y = np.full_like(x, coefficients[-1])
    for c in coefficients[-2::-1]:
        y *= x
        y += c
    return y


# ---------------------------------------------------------------------------------------------------
# attention


def attend_one(
    q: Float[np.ndarray, "R H K"],
    k: Float[np.ndarray, "R H T K"],
    v: Float[np.ndarray, "R H T K"],
    ends: Int32[np.ndarray, "R"],
    scale: float,
) -> Float[np.ndarray, "R H K"]:
    """One query per row over the first `ends[row]` cached positions; what lies beyond must be finite."""
    scores = k @ (q * q.dtype.type(scale))[..., None]  # (R, H, T, 1)
    scores = scores[..., 0]
    longest = k.shape[2]
    if ends.min() < longest:
        beyond = np.arange(longest) >= ends[:, None]  # (R, T)
        np.copyto(scores, -np.inf, where=beyond[:, None])
    total = _exponentiate(scores)  # (R, H, 1)
    y = (scores[..., None, :] @ v)[..., 0, :]  # (R, H, K)
    y /= total
    return y


def attend_causal(
    q: Float[np.ndarray, "N H K"],
    k: Float[np.ndarray, "H T K"],
    v: Float[np.ndarray, "H T K"],
    scale: float,
) -> Float[np.ndarray, "N H K"]:
    """The last N of T positions attend to themselves and to all before them, a block of queries at a time.

    A block's scores are (H, Q, T) at the most; the full (H, N, T) matrix never exists, and keys that lie in
    a block's future are not multiplied at all.
    """
    n, heads, _ = q.shape
    start = k.shape[1] - n
    y = np.empty_like(q, order="C")
    future = np.triu(np.full((min(_QUERY_BLOCK, n),) * 2, -np.inf, q.dtype), 1)
    buffer = np.empty(heads * len(future) * k.shape[1], q.dtype)
    for first in range(0, n, _QUERY_BLOCK):
        last = min(first + _QUERY_BLOCK, n)
        rows, seen = last - first, start + last
        block = q[first:last].transpose(1, 0, 2) * q.dtype.type(scale)  # (H, Q, K)
        scores = buffer[: heads * rows * seen].reshape(heads, rows, seen)
        np.matmul(block, k[:, :seen].transpose(0, 2, 1), out=scores)
        scores[:, :, start + first :] += future[:rows, :rows]
        total = _exponentiate(scores)  # (H, Q, 1)
        block = scores @ v[:, :seen]  # (H, Q, K)
        block /= total
        y[first:last] = block.transpose(1, 0, 2)
    return y


def _exponentiate(scores: Array) -> Array:
    """Softmax's numerator in place; returns its denominator, so that only the short side is divided."""
    scores -= scores.max(-1, keepdims=True)
    np.exp(scores, out=scores)
    return scores.sum(-1, keepdims=True)
