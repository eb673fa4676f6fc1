"""Products with weights of any encoding: quantised ones become float32 block by block, in the cache."""

# N tokens, I inputs, O outputs, V vocabulary, D width, n outputs of a block

from collections.abc import Callable
from functools import partial
from typing import Final

import numpy as np

from gpt2core._shapes import Float32
from gpt2core.backends.numpy import kernels
from gpt2core.quantization.encodings import (
    BFloat16,
    Int4,
    Int8,
    Matrix,
    QuantizedLinear,
    Table,
    widen_bfloat16,
)
from gpt2core.weights import Linear

_BLOCK_NUMBERS: Final = 1 << 17  # 512 KiB of float32: the product reads a block from the L2 cache


def linear(x: Float32[np.ndarray, "N I"], layer: Linear | QuantizedLinear) -> Float32[np.ndarray, "N O"]:
    """`x @ weight + bias`."""
    if isinstance(layer, Linear):
        return kernels.linear(x, layer.weight, layer.bias)
    y = np.empty((len(x), len(layer.bias)), np.float32)
    _multiply(x, y, _outputs_of(layer.weight))
    if isinstance(layer.weight, Int8):
        y *= layer.weight.scale
    y += layer.bias
    return y


def project(
    x: Float32[np.ndarray, "N D"], table: Float32[np.ndarray, "V D"] | Table
) -> Float32[np.ndarray, "N V"]:
    """`x @ table.T`: the LM head."""
    if isinstance(table, np.ndarray):
        return x @ table.T
    rows = table.values if isinstance(table, Int8) else table.bits
    y = np.empty((len(x), len(rows)), np.float32)
    if isinstance(table, Int8):
        _multiply(x, y, lambda start, stop: rows[start:stop].astype(np.float32).T)
        y *= table.scale.T
    else:
        _multiply(x, y, lambda start, stop: widen_bfloat16(rows[start:stop]).T)
    return y


def _outputs_of(weight: Matrix) -> Callable[[int, int], np.ndarray]:
    """What gives the columns (I, n) of some outputs in float32; of `Int8` without its scale."""
    if isinstance(weight, Int8):
        return partial(_columns_of_int8, weight)
    if isinstance(weight, BFloat16):
        return partial(_columns_of_bfloat16, weight)
    return partial(_columns_of_int4, weight)


def _columns_of_int8(weight: Int8, start: int, stop: int) -> np.ndarray:
    return weight.values[:, start:stop].astype(np.float32)


def _columns_of_bfloat16(weight: BFloat16, start: int, stop: int) -> np.ndarray:
    return widen_bfloat16(weight.bits[:, start:stop])


def _columns_of_int4(weight: Int4, start: int, stop: int) -> np.ndarray:
    return weight.outputs(start, stop).T


def _multiply(x: np.ndarray, y: np.ndarray, columns: Callable[[int, int], np.ndarray]) -> None:
    """`y = x @ weight`, the weight made a block of columns at a time."""
    step = max(16, _BLOCK_NUMBERS // x.shape[1])
    for start in range(0, y.shape[1], step):
        stop = min(start + step, y.shape[1])
        y[:, start:stop] = x @ columns(start, stop)
