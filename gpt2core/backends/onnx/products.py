"""Matrix products as ONNX nodes, of quantized weights: int8 and int4 in ONNX Runtime's words."""

# O outputs, I inputs, G groups, S inputs per group, V vocabulary, D width

import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Final, Protocol, final

import numpy as np

from gpt2core.backends.onnx.nodes import Graph, Products
from gpt2core.backends.onnx.operators import MICROSOFT
from gpt2core.encodings import Int4, Int8
from gpt2core.quantization.rounding import int8_columns
from gpt2core.weights import BLOCK_NAMES, LINEAR, Linear, Matrix, Weights, as_array, named_arrays

_INT8_ACTIVATIONS: Final = 4  # accuracy_level of MatMulNBits: inputs in int8 too, by groups of each token
_GROUPS: Final = 256, 128, 64, 32, 16  # inputs; a longer group is faster, as fewer scales are read
_MOST_PADDING: Final = 1.05
_OFFSET: Final = 128  # what MatMulNBits subtracts from a byte when it is given no zeros


class QuantizedProducts(Products, Protocol):
    """Products of quantized weights; they bring their own initializers."""

    def arrays(self) -> Iterator[tuple[str, np.ndarray]]:
        """The initializers of every `linear`."""
        ...

    def head_arrays(self) -> Iterator[tuple[str, np.ndarray]]:
        """The initializers of `head`."""
        ...


@final
class ByToken:
    """`MatMulNBits`: each token's inputs are rounded by groups, so that it depends on no other token.

    The fastest for few tokens, where reading the weights is what takes time.
    """

    flat = widened = False

    def __init__(self, weights: Weights) -> None:
        self._weights = weights
        self._layers = dict(_layers(weights))

    def linear(self, g: Graph, x: str, name: str) -> str:
        """See `Products`."""
        weight = self._layers[name].weight
        group = weight.group_size if isinstance(weight, Int4) else None
        more = self._attributes(*weight.shape, bits=4 if group else 8, group=group)
        zero = f"{name}.weight_zero" if group else ""
        inputs = x, f"{name}.weight", f"{name}.weight_scale", zero, "", f"{name}.bias"
        return g.op("MatMulNBits", *inputs, domain=MICROSOFT, **more)

    def head(self, g: Graph, x: str, name: str) -> None:
        """See `Products`."""
        more = self._attributes(self._weights.config.n_embd, self._weights.config.vocab_size, bits=8)
        g.ops("MatMulNBits", (x, name, f"{name}_scale"), ["logits"], MICROSOFT, **more)

    def arrays(self) -> Iterator[tuple[str, np.ndarray]]:
        """See `QuantizedProducts`."""
        for name, layer in self._layers.items():
            yield f"{name}.bias", layer.bias
            if isinstance(layer.weight, Int4):
                packed, scale = layer.weight.packed, layer.weight.scale
                yield f"{name}.weight", packed.reshape(*scale.shape, -1)  # (O, G, S / 2)
                yield f"{name}.weight_scale", scale
                yield f"{name}.weight_zero", layer.weight.zero
            else:
                yield from _grouped(f"{name}.weight", _int8(layer.weight))

    def head_arrays(self) -> Iterator[tuple[str, np.ndarray]]:
        """See `QuantizedProducts`."""
        yield from _grouped("lm_head.weight", _int8(self._weights.lm_head.T))

    @staticmethod
    def _attributes(inputs: int, outputs: int, *, bits: int, group: int | None = None) -> dict[str, int]:
        return {
            "K": inputs,
            "N": outputs,
            "bits": bits,
            "block_size": group or group_size(inputs),
            "accuracy_level": _INT8_ACTIVATIONS,
        }


@final
class ByPass:
    """`DynamicQuantizeMatMul`: one scale for the inputs of all tokens of a pass, int8 weights.

    The fastest for many tokens, where multiplying is what takes time. Weights of 4 bits are rounded again, to
    8 bits with a scale per output: that changes them some thirty times less than their first rounding did.
    """

    flat = widened = False

    def __init__(self, weights: Weights) -> None:
        self._weights = weights

    def linear(self, g: Graph, x: str, name: str) -> str:
        """See `Products`."""
        inputs = x, f"{name}.weight", f"{name}.weight_scale", "", f"{name}.bias"
        return g.op("DynamicQuantizeMatMul", *inputs, domain=MICROSOFT)

    def head(self, g: Graph, x: str, name: str) -> None:
        """See `Products`."""
        g.ops("DynamicQuantizeMatMul", (x, name, f"{name}_scale"), ["logits"], MICROSOFT)

    def arrays(self) -> Iterator[tuple[str, np.ndarray]]:
        """See `QuantizedProducts`."""
        for name, layer in _layers(self._weights):
            yield f"{name}.bias", layer.bias
            yield from named_arrays(f"{name}.weight", _int8(layer.weight))

    def head_arrays(self) -> Iterator[tuple[str, np.ndarray]]:
        """See `QuantizedProducts`; the table of rows is turned to (D, V), which is all the operator takes."""
        yield from named_arrays("lm_head.weight", _int8(self._weights.lm_head.T))


def _layers(weights: Weights) -> Iterator[tuple[str, Linear]]:
    for i, block in enumerate(weights.blocks):
        for field in LINEAR:
            yield f"h.{i}.{BLOCK_NAMES[field]}", getattr(block, field)


def _int8(weight: Matrix) -> Int8:
    return weight if isinstance(weight, Int8) else int8_columns(as_array(weight))


def group_size(inputs: int) -> int:
    """How many inputs of int8 weights share a scale in `MatMulNBits`: many, but with little padding."""
    return next((s for s in _GROUPS if -(-inputs // s) * s <= _MOST_PADDING * inputs), _GROUPS[-1])


def _grouped(name: str, weight: Int8) -> Iterator[tuple[str, np.ndarray]]:
    """A weight (I, O) as the bytes (O, G, S) and scales (O, G) of `MatMulNBits`."""
    inputs, outputs = weight.shape
    group = group_size(inputs)
    groups = -(-inputs // group)
    grouped = np.empty((outputs, groups * group), np.uint8)
    np.bitwise_xor(weight.values.T.view(np.uint8), np.uint8(_OFFSET), out=grouped[:, :inputs])  # adds it
    grouped[:, inputs:] = _OFFSET
    yield name, grouped.reshape(outputs, groups, group)
    yield f"{name}_scale", np.repeat(weight.scale[:, None], groups, axis=1)


def packs_whole_numbers() -> bool:
    """Whether ONNX Runtime surely rearranges int8 and int4 matrices here, and reads no others afterwards."""
    return platform.machine().lower() in ("x86_64", "amd64") and not sums_overflow()


def sums_overflow(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether this processor may add two products of uint8 and int8 in 16 bits, which saturates.

    x86 without VNNI does; there ONNX Runtime has to be told to take a way round it, which copies the weights
    and is slower. Where the system does not tell, the answer is the safe one.
    """
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return False
    try:
        text = cpuinfo.read_text()
    except OSError:
        return True
    return not {"avx512_vnni", "avx_vnni"} & set(text.split())
