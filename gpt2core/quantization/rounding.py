"""Quantization in NumPy: float32 weights to 8, 4 or 16 bits, without any text to calibrate on.

What is rounded are the matrices of the linear layers, and the token embedding and the LM head, which stay
in 8 bits with "int4" too: they are what perplexity is most sensitive to. Biases, layer norms and the
position embedding stay float32.
"""

# V vocabulary, D width, I inputs, O outputs

from collections.abc import Callable
from typing import Any, Final

import numpy as np

from gpt2core._shapes import Float32
from gpt2core.encodings import SMALLEST_SCALE, BFloat16, Int4, Int8, read_only, round_to_bfloat16
from gpt2core.errors import CheckpointError, RequestError, in_short
from gpt2core.quantization import gptq
from gpt2core.weights import Weights

PRECISIONS: Final = ("int8", "int4", "bfloat16")
GROUP_SIZES: Final = (32, 64, 128)
GROUP_SIZE: Final = 128
VERSION: Final = 1
"""Counts up when the same weights are rounded to other numbers: what was kept of before is not taken then."""
_PART: Final = 1 << 20  # numbers worked on at once, a few MB with all their scratch


def quantize(
    weights: Weights,
    precision: str,
    *,
    group_size: int = GROUP_SIZE,
    on_progress: Callable[[int, int], None] | None = None,
) -> Weights:
    """Round weights to a precision.

    "int8" is symmetric with one scale per output of a layer and per row of the embedding. "int4" has a scale
    and a zero per group of `group_size` inputs of each output, and rounds by GPTQ for the inputs that random
    tokens cause (`gpt2core.quantization.gptq`), which takes minutes for GPT-2 small; embedding and head are
    int8. "bfloat16" halves every matrix.

    Args:
        weights: float32.
        precision: of `PRECISIONS`.
        group_size: of `GROUP_SIZES`; of "int4" only.
        on_progress: is called after each matrix with how many numbers are rounded, and how many will be.

    Raises:
        RequestError: an unknown precision or group size, or weights that are rounded already.
        CheckpointError: a matrix holds numbers that are not finite.
    """
    if precision not in PRECISIONS:
        raise RequestError(f"precision {in_short(precision)} is unknown; use {_either(PRECISIONS)}")
    if group_size not in GROUP_SIZES:
        raise RequestError(f"group_size is {in_short(group_size)}; use {_either(GROUP_SIZES)}")
    if weights.precision != "float32":
        raise RequestError(
            f"the model is quantized already, to {weights.precision}; name the float model it was made of"
        )
    _check_finite(weights)
    done, all_ = 0, sum(array.size for _, array in weights.named() if array.ndim == 2) - weights.wpe.size

    def counted(round_: Callable[[np.ndarray], Any]) -> Callable[[np.ndarray], Any]:
        def round_and_count(matrix: np.ndarray) -> Any:
            nonlocal done
            rounded = round_(matrix)
            done += matrix.size
            if on_progress is not None:
                on_progress(done, all_)
            return rounded

        return round_and_count

    if precision == "bfloat16":
        return weights.convert(precision, counted(_bfloat16), counted(_bfloat16))
    if precision == "int8":
        return weights.convert(precision, counted(int8_columns), counted(int8_rows))
    layers = gptq.round_layers(weights, gptq.random_texts(weights), group_size)
    # Both go in the layers' order.
    return weights.convert(precision, counted(lambda _: next(layers)), counted(int8_rows))


def dequantize(weights: Weights) -> Weights:
    """The float32 weights that rounded ones stand for: the reference for every backend that runs them."""

    def float32(matrix: Int8 | Int4 | BFloat16) -> np.ndarray:
        return read_only(matrix.float32())

    return weights if weights.precision == "float32" else weights.convert("float32", float32, float32)


def _bfloat16(matrix: np.ndarray) -> BFloat16:
    return BFloat16(read_only(round_to_bfloat16(matrix)))


def int8_columns(weight: Float32[np.ndarray, "I O"]) -> Int8:
    """One scale per output."""
    scale = _int8_scale(np.maximum(weight.max(0), -weight.min(0)))
    return _int8(weight, scale)


def int8_rows(table: Float32[np.ndarray, "V D"]) -> Int8:
    """One scale per row."""
    scale = _int8_scale(np.maximum(table.max(1), -table.min(1)))
    return _int8(table, scale[:, None])


def _int8_scale(largest: np.ndarray) -> np.ndarray:
    return np.maximum(largest / np.float32(127), SMALLEST_SCALE)


def _int8(array: np.ndarray, scale: np.ndarray) -> Int8:
    values = np.empty(array.shape, np.int8)
    rows = max(1, _PART // array.shape[1])
    for i in range(0, len(array), rows):
        of_rows = scale[i : i + rows] if scale.ndim == 2 else scale
        values[i : i + rows] = np.clip(np.rint(array[i : i + rows] / of_rows), -127, 127)
    return Int8(read_only(values), read_only(scale))


def _check_finite(weights: Weights) -> None:
    for name, array in weights.named():
        rounded = array.ndim == 2 and name != "wpe.weight"
        if rounded and not np.isfinite([array.max(), array.min()]).all():
            raise CheckpointError(
                f"{name} holds numbers that are not finite, which no scale fits; check the model"
            )


def _either(values: tuple[object, ...]) -> str:
    return " or ".join(map(repr, values))
