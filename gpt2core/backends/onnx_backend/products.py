"""Matrix products as ONNX nodes, of quantised weights: int8 and int4 in ONNX Runtime's words."""

# O outputs, G groups, S inputs per group, V vocabulary, D width

import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Final, final

import numpy as np

from gpt2core.backends.onnx_backend.nodes import Graph
from gpt2core.backends.onnx_backend.operators import MICROSOFT
from gpt2core.quantized_weights import Int4, Int8, QuantizedLinear, QuantizedWeights
from gpt2core.weights import BLOCK_NAMES

_INT8_ACTIVATIONS: Final = 4  # accuracy_level of MatMulNBits: inputs in int8 too, by blocks of each row


@final
class Quantized:
    """Products whose inputs ONNX Runtime rounds to 8 bits as they come, so that they are of whole numbers.

    `DynamicQuantizeMatMul` takes int8 weights and one scale for all tokens of a pass; `MatMulNBits` takes
    int4 weights and scales by blocks of each token.
    """

    def __init__(self, weights: QuantizedWeights) -> None:
        self._layers = {
            f"h.{i}.{name}": getattr(block, field)
            for i, block in enumerate(weights.blocks)
            for field, name in BLOCK_NAMES.items()
        }

    def linear(self, g: Graph, x: str, name: str) -> str:
        """See `Products`."""
        layer: QuantizedLinear = self._layers[name]
        weight, scale, bias = f"{name}.weight", f"{name}.weight_scale", f"{name}.bias"
        if not isinstance(layer.weight, Int4):
            return g.op("DynamicQuantizeMatMul", x, weight, scale, "", bias, domain=MICROSOFT)
        return g.op(
            "MatMulNBits",
            *(x, weight, scale, f"{name}.weight_zero", "", bias),
            domain=MICROSOFT,
            K=layer.weight.inputs,
            N=len(layer.weight.scale),
            bits=4,
            block_size=layer.weight.group_size,
            accuracy_level=_INT8_ACTIVATIONS,
        )

    def head(self, g: Graph, x: str, name: str) -> None:
        """See `Products`."""
        g.ops("DynamicQuantizeMatMul", (x, name, f"{name}_scale"), ["logits"], MICROSOFT)


def quantized_arrays(weights: QuantizedWeights) -> Iterator[tuple[str, np.ndarray]]:
    """The initializers that `Quantized` names, and the layer norms: views of the weights.

    The head, a table of rows, is turned to (D, V), since `DynamicQuantizeMatMul` takes nothing else. Whoever
    wants it contiguous has to copy it.
    """
    for name, array in weights.named():
        if name.partition(".")[0] not in ("wte", "wpe", "lm_head") and array.dtype != np.uint8:
            yield name, array
    for i, block in enumerate(weights.blocks):
        for field, name in BLOCK_NAMES.items():
            layer = getattr(block, field)
            if isinstance(layer, QuantizedLinear) and isinstance(layer.weight, Int4):
                packed, scale, zero = layer.weight.packed, layer.weight.scale, layer.weight.zero
                yield f"h.{i}.{name}.weight", packed.reshape(*scale.shape, -1)  # (O, G, S / 2)
                yield f"h.{i}.{name}.weight_zero", zero
    assert isinstance(weights.lm_head, Int8)
    yield "lm_head.weight", weights.lm_head.values.T
    yield "lm_head.weight_scale", weights.lm_head.scale.reshape(-1)


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
