"""Memory for key-value caches, taken page by page as it is written, and for files, given back once copied."""

import math
import mmap
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Final

import numpy as np

from gpt2core._shapes import Float32

_RELEASE_EVERY_S: Final = 0.01


def lazy_zeros(shape: tuple[int, ...]) -> Float32[np.ndarray, "..."]:
    """Float32 zeros, writable, of which only written pages take memory, a few kB each.

    `numpy.zeros` asks the system for huge pages (2 MB on Linux). A cache's rows lie far apart, so a few
    tokens in each would touch nearly all: the whole cache would be cleared and resident at the first step.
    """
    return np.frombuffer(private_memory(4 * math.prod(shape)), np.float32).reshape(shape)


def private_memory(nbytes: int) -> mmap.mmap:
    """Zeros that take memory when first written to."""
    if hasattr(mmap, "MAP_ANONYMOUS"):
        return mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return mmap.mmap(-1, nbytes)  # Windows


def give_back(array: np.ndarray) -> None:
    """Return the pages of the file that an array is mapped from to the system, which can read them again.

    For a backend that keeps a rearranged copy; without this, both would be resident. Other arrays are left
    alone, and so are writable maps, which may hold changes of their own.
    """
    mapped = read_only_map(array)
    if mapped is not None and hasattr(mmap, "MADV_DONTNEED"):
        mapped.madvise(mmap.MADV_DONTNEED)


@contextmanager
def giving_back(arrays: Iterable[np.ndarray]) -> Iterator[None]:
    """`give_back` of all these, again and again meanwhile: for an engine that copies one after the other."""
    one_of_each = {id(m): array for array in arrays if (m := read_only_map(array)) is not None}
    done = threading.Event()

    def work() -> None:
        while not done.wait(_RELEASE_EVERY_S):
            for array in one_of_each.values():
                give_back(array)

    if not one_of_each:
        yield
        return
    worker = threading.Thread(target=work, name="gpt2core-release", daemon=True)
    worker.start()
    try:
        yield
    finally:
        done.set()
        worker.join()
        for array in one_of_each.values():
            give_back(array)


def read_only_map(array: np.ndarray) -> mmap.mmap | None:
    """The map of a file that an array lies in; None where there is none, or a writable one."""
    base: Any = array
    while isinstance(base, np.ndarray | memoryview):
        base = base.base if isinstance(base, np.ndarray) else base.obj
    return base if isinstance(base, mmap.mmap) and memoryview(base).readonly else None
