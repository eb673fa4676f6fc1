"""Memory for key-value caches: zero, and taken from the system page by page, as it is written."""

import math
import mmap

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
