"""Memory for key-value caches, taken page by page as it is written, and for files, given back once copied."""

import math
import mmap
from typing import Any

import numpy as np

from gpt2core._shapes import Float32


def lazy_zeros(shape: tuple[int, ...]) -> Float32[np.ndarray, "..."]:
    """Float32 zeros, writable, of which only written pages take memory, a few kB each.

    `numpy.zeros` asks the system for huge pages (2 MB on Linux). A cache's rows lie far apart, so a few
    tokens in each would touch nearly all: the whole cache would be cleared and resident at the first step.
    """
    nbytes = 4 * math.prod(shape)
    if hasattr(mmap, "MAP_ANONYMOUS"):
        memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    else:  # Windows
        memory = mmap.mmap(-1, nbytes)
    return np.frombuffer(memory, np.float32).reshape(shape)


def give_back(array: np.ndarray) -> None:
    """Return the pages of the file that an array is mapped from to the system, which can read them again.

    For a backend that keeps a rearranged copy; without this, both would be resident. Other arrays are left
    alone, and so are writable maps, which may hold changes of their own.
    """
    base: Any = array
    while isinstance(base, np.ndarray | memoryview):
        base = base.base if isinstance(base, np.ndarray) else base.obj
    if hasattr(mmap, "MADV_DONTNEED") and isinstance(base, mmap.mmap) and memoryview(base).readonly:
        base.madvise(mmap.MADV_DONTNEED)
