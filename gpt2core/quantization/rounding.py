"""Quantisation in NumPy: float32 weights to 8, 4 or 16 bits, without any text to calibrate on.

What is rounded are the matrices of the linear layers, and the token embedding and the LM head, which stay
in 8 bits with "int4" too: they are what perplexity is most sensitive to. Biases, layer norms and the
position embedding stay float32.
"""

# V vocabulary, D width, I inputs, O outputs, G groups, S inputs per group, n outputs or groups of a part

from collections.abc import Sequence
from typing import Final

import numpy as np

from gpt2core._shapes import Float32
from gpt2core.errors import CheckpointError, RequestError, in_short
from gpt2core.quantization.encodings import (
    BFloat16,
    Int8,
    Matrix,
    QuantizedBlock,
    QuantizedLinear,
    QuantizedWeights,
    Table,
    round_to_bfloat16,
)
from gpt2core.weights import Block, Linear, Weights

PRECISIONS: Final = ("int8", "int4", "bfloat16")
GROUP_SIZES: Final = (32, 64, 128)
GROUP_SIZE: Final = 128
_SHRINKS: Final = tuple(1 - 0.04 * i for i in range(10))  # of a group's range: 1 down to 0.64
_PART: Final = 1 << 20  # numbers worked on at once, a few MB with all their scratch
_TINY: Final = float(np.finfo(np.float32).tiny)


def quantize(weights: Weights, precision: str, *, group_size: int = GROUP_SIZE) -> QuantizedWeights:
    """Round weights to a precision.

    "int8" is symmetric with one scale per output of a layer and per row of the embedding. "int4" has a scale
    and a zero per group of `group_size` inputs of each output, and rounds by GPTQ for the inputs that random
    tokens cause (`gpt2core.quantization.gptq`), which takes minutes for GPT-2 small; embedding and head are
    int8. "bfloat16" halves every matrix.

    Raises:
        RequestError: an unknown precision or group size.
        CheckpointError: a matrix holds numbers that are not finite.
    """
    if precision not in PRECISIONS:
        raise RequestError(f"precision {in_short(precision)} is unknown; use {_either(PRECISIONS)}")
    if group_size not in GROUP_SIZES:
        raise RequestError(f"group_size is {in_short(group_size)}; use {_either(GROUP_SIZES)}")

    def linear(layer: Linear) -> QuantizedLinear:
        _check_finite(layer.weight)
        weight: Matrix
        if precision == "int8":
            weight = int8_columns(layer.weight)
        else:
            weight = BFloat16(read_only(round_to_bfloat16(layer.weight)))
        return QuantizedLinear(weight, layer.bias)

    def block(b: Block) -> QuantizedBlock:
        c_attn, attn_c_proj, c_fc, mlp_c_proj = map(linear, (b.c_attn, b.attn_c_proj, b.c_fc, b.mlp_c_proj))
        return QuantizedBlock(b.ln_1, c_attn, attn_c_proj, b.ln_2, c_fc, mlp_c_proj)

    def table(array: Float32[np.ndarray, "V D"]) -> Table:
        _check_finite(array)
        return BFloat16(read_only(round_to_bfloat16(array))) if precision == "bfloat16" else int8_rows(array)

    wte = table(weights.wte)
    if precision == "int4":
        from gpt2core.quantization import (
            gptq,  # it uses the NumPy backend's kernels, whose package imports this module
        )

        for b in weights.blocks:
            for layer in (b.c_attn, b.attn_c_proj, b.c_fc, b.mlp_c_proj):
                _check_finite(layer.weight)
        blocks = gptq.quantize_blocks(weights, gptq.random_texts(weights), group_size)
    else:
        blocks = tuple(map(block, weights.blocks))
    return QuantizedWeights(
        config=weights.config,
        precision=precision,
        wte=wte,
        wpe=weights.wpe,
        blocks=blocks,
        ln_f=weights.ln_f,
        lm_head=wte if weights.lm_head is weights.wte else table(weights.lm_head),
    )


def dequantize(weights: QuantizedWeights) -> Weights:
    """The float32 weights that quantised ones stand for: the reference for every backend that runs them."""

    def linear(layer: QuantizedLinear) -> Linear:
        return Linear(read_only(layer.weight.float32()), layer.bias)

    def block(b: QuantizedBlock) -> Block:
        c_attn, attn_c_proj, c_fc, mlp_c_proj = map(linear, (b.c_attn, b.attn_c_proj, b.c_fc, b.mlp_c_proj))
        return Block(b.ln_1, c_attn, attn_c_proj, b.ln_2, c_fc, mlp_c_proj)

    wte = read_only(weights.wte.float32())
    tied = weights.lm_head is weights.wte
    return Weights(
        config=weights.config,
        wte=wte,
        wpe=weights.wpe,
        blocks=tuple(map(block, weights.blocks)),
        ln_f=weights.ln_f,
        lm_head=wte if tied else read_only(weights.lm_head.float32()),
    )


def int8_columns(weight: Float32[np.ndarray, "I O"]) -> Int8:
    """One scale per output."""
    scale = _int8_scale(np.maximum(weight.max(0), -weight.min(0)))
    return _int8(weight, scale)


def int8_rows(table: Float32[np.ndarray, "V D"]) -> Int8:
    """One scale per row."""
    scale = _int8_scale(np.maximum(table.max(1), -table.min(1)))
    return _int8(table, scale[:, None])


def _int8_scale(largest: np.ndarray) -> np.ndarray:
    return np.maximum(largest / np.float32(127), np.float32(_TINY))


def _int8(array: np.ndarray, scale: np.ndarray) -> Int8:
    values = np.empty(array.shape, np.int8)
    rows = max(1, _PART // array.shape[1])
    for i in range(0, len(array), rows):
        of_rows = scale[i : i + rows] if scale.ndim == 2 else scale
        values[i : i + rows] = np.clip(np.rint(array[i : i + rows] / of_rows), -127, 127)
    return Int8(read_only(values), read_only(scale))


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
        scale = np.maximum((high - low) * np.float32(shrink / 15), np.float32(_TINY))  # (n,)
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


def _check_finite(array: np.ndarray) -> None:
    if not np.isfinite([array.max(), array.min()]).all():
        raise CheckpointError(
            "a matrix holds numbers that are not finite, which no scale fits; check the model"
        )


def read_only(array: np.ndarray) -> np.ndarray:
    """The same array, from now on not to be written to."""
    array.flags.writeable = False
    return array


def _either(values: tuple[object, ...]) -> str:
    return " or ".join(map(repr, values))
