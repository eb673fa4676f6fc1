"""Threads of NumPy's own BLAS, for the duration of a forward pass.

NumPy's wheels carry an OpenBLAS whose thread count is a setting of the process. It is set when a pass begins
and put back when it ends, so that other users of NumPy in the process keep theirs.
"""

import ctypes
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Final

import numpy as np

from gpt2core._machine import limit_threads
from gpt2core.errors import BackendUnavailableError, RequestError

_AFFIXES: Final = (
    ("scipy_", "64_"),
    ("scipy_", ""),
    ("", "64_"),
    ("", ""),
)  # NumPy's wheels, then a system's BLAS


class _Threads:
    """Sets the thread count on entry and puts the former one back on exit; may be entered again and again."""

    def __init__(self, threads: int, get: Callable[[], int], put: Callable[[int], None]) -> None:
        self._threads, self._get, self._put = threads, get, put
        self._before = threads

    def __enter__(self) -> None:
        self._before = self._get()
        if self._before != self._threads:
            self._put(self._threads)

    def __exit__(self, *_: object) -> None:
        if self._before != self._threads:
            self._put(self._before)


def blas_threads(threads: int | None) -> AbstractContextManager[None]:
    """A reusable context in which NumPy's BLAS uses `threads` threads.

    None changes nothing, unless a quota allows fewer cores than the BLAS has threads: then as many as it
    allows.

    Raises:
        RequestError: `threads` is not a whole number of 1 or more.
        BackendUnavailableError: this NumPy's BLAS is not an OpenBLAS.
    """
    check_threads(threads)
    wanted = limit_threads(threads)
    if wanted is None:
        return nullcontext()
    functions = _openblas()
    if functions is None and threads is None:
        return nullcontext()
    if functions is None:
        raise BackendUnavailableError(
            f"threads={threads}: NumPy's BLAS here is not an OpenBLAS, so its threads cannot be set from "
            "inside; leave threads=None and set its environment variable (such as MKL_NUM_THREADS) instead"
        )
    get, put = functions
    return _Threads(wanted if threads is not None else min(wanted, get()), get, put)


def check_threads(threads: int | None) -> None:
    """Refuse a thread count that is not None or a whole number of 1 or more, for every backend alike."""
    if threads is not None and (isinstance(threads, bool) or not isinstance(threads, int) or threads < 1):
        raise RequestError(f"threads is {threads!r}; use None or a whole number of 1 or more")


@cache
def _openblas() -> tuple[Callable[[], int], Callable[[int], None]] | None:
    """OpenBLAS's getter and setter, looked up in what NumPy itself is linked to."""
    linked = ctypes.CDLL(np.linalg._umath_linalg.__file__)
    for prefix, suffix in _AFFIXES:
        try:
            get = linked[f"{prefix}openblas_get_num_threads{suffix}"]
            put = linked[f"{prefix}openblas_set_num_threads{suffix}"]
        except AttributeError:
            continue
        put.restype = None
        return get, put
    return None
