"""Encodings: a matrix in 8, 4 or 16 bits per number, as read-only arrays.

Each has a `shape` and says in `float32()` and `rows(ids)` what it means; `gpt2core.quantization` chooses the
numbers, and checkpoints keep its `arrays()`, each under the matrix's name and an ending.
"""

# V vocabulary, D width, I inputs, O outputs, G groups of an output's inputs, S inputs per group

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np

from gpt2core._shapes import Float32, Int

SMALLEST_SCALE: Final = np.finfo(np.float32).tiny
"""Of a matrix of zeros, so that nothing is divided by zero."""


@dataclass(frozen=True, slots=True)
class Int8:
    """`values * scale`: one scale for each output of a linear layer, or for each row of a table.

    Attributes:
        values: int8, (I, O) of a linear layer, (V, D) of a table, -127 to 127.
        scale: float32, (O,) of a linear layer, (V, 1) of a table.
    """

    values: np.ndarray
    scale: Float32[np.ndarray, "..."]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the matrix that this stands for."""
        return self.values.shape

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays."""
        return self.values.nbytes + self.scale.nbytes

    @property
    def T(self) -> "Int8":
        """A table (V, D) as the matrix (D, V) of a linear layer, without a copy."""
        return Int8(self.values.T, self.scale[:, 0])

    def float32(self) -> Float32[np.ndarray, "..."]:
        """The matrix that this stands for."""
        return self.values * self.scale

    def rows(self, ids: Int[np.ndarray, "..."]) -> Float32[np.ndarray, "... D"]:
        """Rows of a table in float32."""
        return self.values[ids] * self.scale[ids]

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
    def shape(self) -> tuple[int, int]:
        """Of the matrix that this stands for, (I, O)."""
        return self.inputs, len(self.packed)

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays."""
        return self.packed.nbytes + self.scale.nbytes + self.zero.nbytes

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

    def rows(self, ids: Int[np.ndarray, "..."]) -> Float32[np.ndarray, "... O"]:
        """Rows in float32; the whole matrix is unpacked for them, as tables are never in 4 bits."""
        return self.float32()[ids]

    def arrays(self) -> Iterator[tuple[str, np.ndarray]]:
        """What is stored, by the ending of its name."""
        yield "", self.packed
        yield "_scale", self.scale
        yield "_zero", self.zero


@dataclass(frozen=True, slots=True)
class BFloat16:
    """The upper halves of float32 numbers, as uint16."""

    bits: np.ndarray

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the matrix that this stands for."""
        return self.bits.shape

    @property
    def nbytes(self) -> int:
        """Bytes of the array."""
        return self.bits.nbytes

    @property
    def T(self) -> "BFloat16":
        """A table (V, D) as the matrix (D, V) of a linear layer, without a copy."""
        return BFloat16(self.bits.T)

    def float32(self) -> Float32[np.ndarray, "..."]:
        """The matrix that this stands for."""
        return widen_bfloat16(self.bits)

    def rows(self, ids: Int[np.ndarray, "..."]) -> Float32[np.ndarray, "... D"]:
        """Rows of a table in float32."""
        return widen_bfloat16(self.bits[ids])

    def arrays(self) -> Iterator[tuple[str, np.ndarray]]:
        """What is stored, by the ending of its name."""
        yield "", self.bits


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


def read_only(array: np.ndarray) -> np.ndarray:
    """The same array, from now on not to be written to."""
    array.flags.writeable = False
    return array
