"""Products with weights of any encoding: those in fewer bits become float32 block by block, in the cache."""

# N tokens, I inputs, O outputs, n outputs of a block

from typing import Final

import numpy as np

from gpt2core._shapes import Float, Float32
from gpt2core.encodings import BFloat16, Int4, Int8, widen_bfloat16
from gpt2core.weights import Linear, Matrix

_BLOCK_NUMBERS: Final = 1 << 17  # 512 KiB of float32: the product reads a block from the L2 cache


def linear(x: Float[np.ndarray, "N I"], layer: Linear) -> Float[np.ndarray, "N O"]:
    """`x @ weight + bias`."""
    y = multiply(x, layer.weight)
    y += layer.bias
    return y


def multiply(x: Float[np.ndarray, "N I"], weight: Matrix) -> Float[np.ndarray, "N O"]:
    """`x @ weight`, a weight in fewer bits made a block of columns at a time."""
    if isinstance(weight, np.ndarray):
        return x @ weight
    inputs, outputs = weight.shape
    y = np.empty((len(x), outputs), np.float32)
    step = max(16, _BLOCK_NUMBERS // inputs)
    for start in range(0, outputs, step):
        stop = min(start + step, outputs)
        y[:, start:stop] = x @ _columns(weight, start, stop)
    if isinstance(weight, Int8):
        y *= weight.scale
    return y


def _columns(weight: Int8 | Int4 | BFloat16, start: int, stop: int) -> Float32[np.ndarray, "I n"]:
    """The weights of some outputs; of `Int8` without its scale, which is cheaper to apply to the product."""
    if isinstance(weight, Int8):
        return weight.values[:, start:stop].astype(np.float32)
    if isinstance(weight, BFloat16):
        return widen_bfloat16(weight.bits[:, start:stop])
    return weight.outputs(start, stop).T
