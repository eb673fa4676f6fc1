"""The cache of the native backend: C writes and reads it, Python moves parts of it."""

# L layers, S cache slots, H heads, K head width, T tokens

import ctypes
from collections.abc import Iterator
from dataclasses import dataclass
from typing import final

import numpy as np

from gpt2core.backends._shared.memory import private_memory
from gpt2core.backends.native.packing import CCache


@dataclass(frozen=True, slots=True)
class Layout:
    """What a model and its cache must agree on, since C reads one by the shape of the other."""

    layers: int
    heads: int
    head_dim: int
    itemsize: int
    lanes: int  # positions, and a head's values, are kept in multiples of this
    key_block: int  # keys lie in blocks of so many positions, one position beside the other


@final
class NativeCache:
    """Keys and values, float32 or bfloat16; zeroed lazily, so unused slots take no memory."""

    def __init__(self, layout: Layout, slots: int, capacity: int) -> None:
        self.layout, self.slots, self.capacity = layout, slots, capacity
        lanes, block = layout.lanes, layout.key_block
        positions = -(-capacity // lanes) * lanes
        widths = layout.head_dim, -(-layout.head_dim // lanes) * lanes  # keys, values
        each = layout.layers * slots * layout.heads * positions * layout.itemsize
        self._memory = private_memory(each * sum(widths))
        start = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))
        self.there = CCache(start, start + each * widths[0], slots, positions)
        self.dtype = np.float32 if layout.itemsize == 4 else np.uint16
        numbers = np.frombuffer(self._memory, self.dtype)
        shape = layout.layers, slots, layout.heads, positions
        border = each * widths[0] // layout.itemsize
        self._keys = numbers[:border].reshape(*shape[:3], positions // block, widths[0], block)
        self._values = numbers[border:].reshape(*shape, widths[1])[..., : widths[0]]  # (L, S, H, C, K)

    @property
    def nbytes(self) -> int:
        """Bytes that a full cache takes."""
        return len(self._memory)

    def copy(self, source: int, target: int, start: int, end: int) -> None:
        """Copy positions `start` to `end` - 1 from slot to slot."""
        self._values[:, target, :, start:end] = self._values[:, source, :, start:end]
        for blocks, lanes in _split(start, end, self.layout.key_block):
            self._keys[:, target, :, blocks, :, lanes] = self._keys[:, source, :, blocks, :, lanes]

    def read(self, slot: int, tokens: int) -> np.ndarray:
        """The first `tokens` positions of a slot, (L, 2, H, T, K)."""
        layout, block = self.layout, self.layout.key_block
        result = np.empty((layout.layers, 2, layout.heads, tokens, layout.head_dim), self.dtype)
        for blocks, lanes in _split(0, tokens, block):
            keys = self._keys[:, slot, :, blocks, :, lanes].swapaxes(-1, -2)  # (L, H, blocks, lanes, K)
            first, width = blocks.start * block, keys.shape[3]
            part = result[:, 0, :, first : first + keys.shape[2] * width]
            part[...] = keys.reshape(part.shape)
        result[:, 1] = self._values[:, slot, :, :tokens]
        return result

    def write(self, slot: int, positions: np.ndarray) -> None:
        """Let a slot begin with these positions, (L, 2, H, T, K)."""
        block, tokens = self.layout.key_block, positions.shape[3]
        for blocks, lanes in _split(0, tokens, block):
            there = self._keys[:, slot, :, blocks, :, lanes]  # (L, H, blocks, K, lanes)
            first, (layers, heads, count, width, wide) = blocks.start * block, there.shape
            part = positions[:, 0, :, first : first + count * wide]
            there[...] = part.reshape(layers, heads, count, wide, width).swapaxes(-1, -2)
        self._values[:, slot, :, :tokens] = positions[:, 1]


def _split(start: int, end: int, block: int) -> Iterator[tuple[slice, slice]]:
    """Positions as blocks and the lanes of them: a broken first block, whole ones, a broken last one."""
    while start < end:
        first, lane = divmod(start, block)
        if lane == 0 and end - start >= block:
            last = end // block
            yield slice(first, last), slice(0, block)
            start = last * block
        else:
            done = min(end, (first + 1) * block)
            yield slice(first, first + 1), slice(lane, lane + done - start)
            start = done
