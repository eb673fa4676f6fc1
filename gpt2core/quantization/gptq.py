"""4-bit rounding that makes up for its own errors: GPTQ (Frantar et al. 2022), layer after layer.

The inputs whose products should stay what they are come from a pass over token ids; random ones do nearly as
well as text, since what matters is which inputs are large and which go together.
"""

# B texts, T tokens of each, N = B T, D width, H heads, K head width
# I inputs, O outputs, G groups, S inputs per group, n groups to be rounded

from collections.abc import Iterator, Sequence
from typing import Final

import numpy as np

from gpt2core import kernels
from gpt2core._shapes import Float32, Int
from gpt2core.encodings import SMALLEST_SCALE, Int4, pack_nibbles, read_only
from gpt2core.weights import LayerNorm, Linear, Weights, as_array

TEXTS: Final = 16
_LONGEST: Final = 256  # tokens of a text
_SHRINKS: Final = tuple(1 - 0.04 * i for i in range(10))  # of a group's range: 1 down to 0.64
_DAMPING: Final = 0.01  # of the mean squared input, added to each: keeps rare inputs from being sacrificed


def random_texts(weights: Weights) -> Int[np.ndarray, "B T"]:
    """Token ids to calibrate on where there is no text."""
    shape = TEXTS, min(_LONGEST, weights.config.n_positions)
    return np.random.default_rng(0).integers(0, weights.config.vocab_size, shape)


def round_layers(weights: Weights, texts: Int[np.ndarray, "B T"], group_size: int) -> Iterator[Int4]:
    """The matrices of `weights.blocks` in 4 bits, in the order in which they compute.

    Each is rounded for the inputs that the rounded ones before it produce.
    """
    config, count = weights.config, texts.shape[1]
    x = (as_array(weights.wte)[texts] + weights.wpe[:count]).reshape(-1, config.n_embd)  # (N, D)
    for i, block in enumerate(weights.blocks):
        h = _norm(x, block.ln_1, weights)
        yield (c_attn := round_for_inputs(as_array(block.c_attn.weight), h, group_size))
        y = _attention(_apply(block.c_attn, c_attn, h), count, weights, i)
        yield (attn_c_proj := round_for_inputs(as_array(block.attn_c_proj.weight), y, group_size))
        x += _apply(block.attn_c_proj, attn_c_proj, y)
        h = _norm(x, block.ln_2, weights)
        yield (c_fc := round_for_inputs(as_array(block.c_fc.weight), h, group_size))
        h = _apply(block.c_fc, c_fc, h)
        kernels.activate(h, config.activation_function)
        yield (mlp_c_proj := round_for_inputs(as_array(block.mlp_c_proj.weight), h, group_size))
        x += _apply(block.mlp_c_proj, mlp_c_proj, h)


def _apply(layer: Linear, weight: Int4, x: Float32[np.ndarray, "N I"]) -> Float32[np.ndarray, "N O"]:
    """What the rounded layer makes of its inputs."""
    return kernels.linear(x, weight.float32(), layer.bias)


def round_for_inputs(
    weight: Float32[np.ndarray, "I O"], x: Float32[np.ndarray, "N I"], group_size: int
) -> Int4:
    """Round so that `x @ weight` changes little: the error of each input is made up for by those after it.

    Frantar et al. 2022, "GPTQ", algorithm 1, with the inputs in their own order and a group's scale and zero
    chosen when its turn comes.
    """
    inputs, outputs = weight.shape
    groups = -(-inputs // group_size)
    rest = weight.T.copy()  # (O, I): what is not yet rounded, as the errors so far ask for
    feedback = _feedback(x)  # (I, I)
    values = np.zeros((outputs, groups * group_size), np.uint8)
    scale = np.empty((outputs, groups), np.float32)
    zero = np.empty((outputs, groups), np.uint8)
    for g in range(groups):
        first, last = g * group_size, min((g + 1) * group_size, inputs)
        part = rest[:, first:last].copy()
        _, scale[:, g], zero[:, g] = best_rounding(part)
        below, above = -zero[:, g].astype(np.float32), 15 - zero[:, g].astype(np.float32)
        errors = np.empty_like(part)
        for j in range(last - first):
            at = first + j
            steps = np.clip(np.rint(part[:, j] / scale[:, g]), below, above)
            values[:, at] = steps - below
            errors[:, j] = (part[:, j] - steps * scale[:, g]) / feedback[at, at]
            part[:, j + 1 :] -= errors[:, j, None] * feedback[at, at + 1 : last]
        rest[:, last:] -= errors @ feedback[first:last, last:]
        values[:, last : (g + 1) * group_size] = zero[:, g, None]  # padding
    return Int4(read_only(pack_nibbles(values)), read_only(scale), read_only(pack_nibbles(zero)), inputs)


def best_rounding(
    w: Float32[np.ndarray, "n S"], shrinks: Sequence[float] = _SHRINKS
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Values (n, S), scale (n,) and zero (n,) of 4 bits for each group, those of the least squared error.

    From each of several ranges, narrower than the group's extremes: round, then fit the scale to the rounded
    values by least squares, then round again. As in HQQ (Badri & Shaji 2023, "Half-Quadratic Quantization of
    Large Machine Learning Models") values and parameters are improved in turn, by looking at weights alone.
    """
    low, high = np.minimum(w.min(1), 0), np.maximum(w.max(1), 0)
    best_error = np.full(len(w), np.inf, np.float32)
    best_values, best_scale = np.zeros(w.shape, np.uint8), np.ones(len(w), np.float32)
    best_zero = np.zeros(len(w), np.uint8)
    for shrink in shrinks:
        scale = np.maximum((high - low) * np.float32(shrink / 15), SMALLEST_SCALE)  # (n,)
        zero = np.clip(np.rint(-low * np.float32(shrink) / scale), 0, 15)[:, None]  # (n, 1)
        steps = _steps(w, scale, zero)  # (n, S): value - zero
        square = np.einsum("ns,ns->n", steps, steps)
        fitted = np.einsum("ns,ns->n", w, steps) / np.maximum(square, 1)
        scale = np.where(fitted > 0, fitted, scale).astype(np.float32)
        steps = _steps(w, scale, zero)
        rest = w - steps * scale[:, None]
        error = np.einsum("ns,ns->n", rest, rest)
        better = error < best_error
        best_error[better], best_scale[better] = error[better], scale[better]
        best_zero[better] = zero[better, 0]
        best_values[better] = steps[better] + zero[better]
    return best_values, best_scale, best_zero


def _steps(w: np.ndarray, scale: np.ndarray, zero: np.ndarray) -> np.ndarray:
    steps = w / scale[:, None]
    np.rint(steps, out=steps)
    return np.clip(steps, -zero, 15 - zero, out=steps)


def _feedback(x: Float32[np.ndarray, "N I"]) -> Float32[np.ndarray, "I I"]:
    """The upper Cholesky factor of the inverse of `x.T @ x`: how an error is spread over later inputs."""
    hessian = (x.T @ x).astype(np.float64)
    hessian[np.diag_indices_from(hessian)] += max(_DAMPING * float(np.diag(hessian).mean()), 1e-12)
    return np.linalg.cholesky(np.linalg.inv(hessian)).T.astype(np.float32)


def _norm(x: Float32[np.ndarray, "N D"], norm: LayerNorm, weights: Weights) -> Float32[np.ndarray, "N D"]:
    return kernels.layer_norm(x, norm.weight, norm.bias, weights.config.layer_norm_epsilon)


def _attention(
    qkv: Float32[np.ndarray, "N D3"], count: int, weights: Weights, layer: int
) -> Float32[np.ndarray, "N D"]:
    """Each text's causal attention; `count` is T."""
    config = weights.config
    heads = qkv.reshape(-1, count, 3, config.n_head, config.head_dim)  # (B, T, 3, H, K)
    scale = config.attention_scale(layer)
    y = [
        kernels.attend_causal(text[:, 0], text[:, 1].swapaxes(0, 1), text[:, 2].swapaxes(0, 1), scale)
        for text in heads
    ]  # (T, H, K) each
    return np.concatenate(y).reshape(len(qkv), -1)
