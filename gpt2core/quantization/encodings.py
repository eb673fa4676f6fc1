"""Quantised weights: a GPT-2's matrices in 8, 4 or 16 bits as read-only arrays, everything small in float32.

Each encoding says in `float32` what it means; `gpt2core.quantization.rounding` chooses the numbers, and
`gpt2core.checkpoint.quantized` keeps them in files.
"""

# V vocabulary, P positions, D width, I inputs, O outputs, G groups of an output's inputs, S inputs per group

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from gpt2core._shapes import Float32, Int32
from gpt2core.config import ModelConfig
from gpt2core.weights import BLOCK_NAMES, LayerNorm


@dataclass(frozen=True, slots=True)
class Int8:
    """`values * scale`: one scale for each output of a linear layer, or for each row of a table.

    Attributes:
        values: int8, (I, O) of a linear layer, (V, D) of a table, -127 to 127.
        scale: float32, (O,) of a linear layer, (V, 1) of a table.
    """

    values: np.ndarray
    scale: Float32[np.ndarray, "..."]

    def float32(self) -> Float32[np.ndarray, "..."]:
        """The matrix that this stands for."""
        return self.values * self.scale

    def arrays(self) -> Iterator[tuple[str, np.ndarray]]:
        """What is stored, by the ending of its name."""
        yield "", self.values
        yield "_scale", self.scale


@dataclass(frozen=True, slots=True)
class Int4:
    """`(value - zero) * scale`, with a scale and a zero for each group of S inputs of each output.

    The layout is that of ONNX Runtime's `MatMulNBits`: outputs first, two values per byte, the lower half
    first. The last group is padded to S inputs, with values that equal its zero.

    Attributes:
        packed: uint8 (O, G S / 2), the values 0 to 15.
        scale: float32 (O, G).
        zero: uint8 (O, ceil(G / 2)), the zeros 0 to 15.
        inputs: I.
    """

    packed: np.ndarray
    scale: Float32[np.ndarray, "O G"]
    zero: np.ndarray
    inputs: int

    @property
    def group_size(self) -> int:
        """S: how many inputs share a scale."""
        return 2 * self.packed.shape[1] // self.scale.shape[1]

    def outputs(self, start: int, stop: int) -> Float32[np.ndarray, "O I"]:
        """The weights of some outputs, outputs first."""
        scale = self.scale[start:stop]
        values = unpack_nibbles(self.packed[start:stop]).astype(np.float32)
        values = values.reshape(*scale.shape, self.group_size)  # (O, G, S)
        values -= unpack_nibbles(self.zero[start:stop])[:, : scale.shape[1], None]
        values *= scale[:, :, None]
        return values.reshape(len(scale), -1)[:, : self.inputs]

    def float32(self) -> Float32[np.ndarray, "I O"]:
        """The matrix that this stands for."""
        return np.ascontiguousarray(self.outputs(0, len(self.scale)).T)

    def arrays(self) -> Iterator[tuple[str, np.ndarray]]:
        """What is stored, by the ending of its name."""
        yield "", self.packed
        yield "_scale", self.scale
        yield "_zero", self.zero


@dataclass(frozen=True, slots=True)
class BFloat16:
    """The upper halves of float32 numbers, as uint16, in the checkpoint's own shape."""

    bits: np.ndarray

    def float32(self) -> Float32[np.ndarray, "..."]:
        """The matrix that this stands for."""
        return widen_bfloat16(self.bits)

    def arrays(self) -> Iterator[tuple[str, np.ndarray]]:
        """What is stored, by the ending of its name."""
        yield "", self.bits


Matrix = Int8 | Int4 | BFloat16
Table = Int8 | BFloat16


@dataclass(frozen=True, slots=True)
class QuantizedLinear:
    """`x @ weight + bias`, the weight in any encoding."""

    weight: Matrix
    bias: Float32[np.ndarray, "O"]


@dataclass(frozen=True, slots=True)
class QuantizedBlock:
    """One transformer block; see `gpt2core.weights.Block`."""

    ln_1: LayerNorm
    c_attn: QuantizedLinear
    attn_c_proj: QuantizedLinear
    ln_2: LayerNorm
    c_fc: QuantizedLinear
    mlp_c_proj: QuantizedLinear


@dataclass(frozen=True, slots=True)
class QuantizedWeights:
    """All parameters; `lm_head is wte` when the head is tied: its rows are then also the embeddings.

    Attributes:
        config: what the model computes.
        precision: of `gpt2core.quantization.rounding.PRECISIONS`.
        wte, lm_head: tables (V, D).
        wpe, ln_f: as of `Weights`, float32.
        blocks: in the order in which they compute.
    """

    config: ModelConfig
    precision: str
    wte: Table
    wpe: Float32[np.ndarray, "P D"]
    blocks: tuple[QuantizedBlock, ...]
    ln_f: LayerNorm
    lm_head: Table

    def named(self) -> Iterator[tuple[str, np.ndarray]]:
        """Each array once, with its name in the file (without the `transformer.` prefix)."""
        yield from _endings("wte.weight", self.wte)
        yield "wpe.weight", self.wpe
        for i, block in enumerate(self.blocks):
            for field, name in BLOCK_NAMES.items():
                part = getattr(block, field)
                if isinstance(part, QuantizedLinear):
                    yield from _endings(f"h.{i}.{name}.weight", part.weight)
                else:
                    yield f"h.{i}.{name}.weight", part.weight
                yield f"h.{i}.{name}.bias", part.bias
        yield "ln_f.weight", self.ln_f.weight
        yield "ln_f.bias", self.ln_f.bias
        if self.lm_head is not self.wte:
            yield from _endings("lm_head.weight", self.lm_head)

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return sum(array.nbytes for _, array in self.named())


def _endings(name: str, matrix: Matrix) -> Iterator[tuple[str, np.ndarray]]:
    for ending, array in matrix.arrays():
        yield name + ending, array


def look_up(
    table: Float32[np.ndarray, "V D"] | Table, tokens: Int32[np.ndarray, "..."]
) -> Float32[np.ndarray, "... D"]:
    """The rows of tokens in float32, the caller's own."""
    if isinstance(table, Int8):
        return table.values[tokens] * table.scale[tokens]
    if isinstance(table, BFloat16):
        return widen_bfloat16(table.bits[tokens])
    return table[tokens]


def unpack_nibbles(packed: np.ndarray) -> np.ndarray:
    """The halves of bytes, uint8 (..., n) -> (..., 2 n), the lower one first."""
    values = np.empty((*packed.shape[:-1], 2 * packed.shape[-1]), np.uint8)
    np.bitwise_and(packed, 15, out=values[..., ::2])
    np.right_shift(packed, 4, out=values[..., 1::2])
    return values


def pack_nibbles(values: np.ndarray) -> np.ndarray:
    """Numbers 0 to 15 by twos in bytes, uint8 (..., n) -> (..., ceil(n / 2)); an odd end is filled with 0."""
    if values.shape[-1] % 2:
        values = np.pad(values, [(0, 0)] * (values.ndim - 1) + [(0, 1)])
    return values[..., ::2] | (values[..., 1::2] << 4)


def widen_bfloat16(bits: np.ndarray) -> Float32[np.ndarray, "..."]:
    """The float32 numbers whose upper halves are `bits`."""
    wide = bits.astype(np.uint32)
    wide <<= 16
    return wide.view(np.float32)


def round_to_bfloat16(array: np.ndarray) -> np.ndarray:
    """The upper halves of float32 numbers, rounded to nearest, ties to even."""
    bits = np.ascontiguousarray(array, np.float32).view(np.uint32)
    # Half a unit less one, plus the last bit that stays.
    return ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype("<u2")
