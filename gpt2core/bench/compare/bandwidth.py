"""How fast this machine reads memory: `python -m gpt2core.bench.compare.bandwidth THREADS`.

Each of several ways of reading a buffer much larger than the processor's caches is tried, with one thread per
part of the buffer; NumPy lets go of Python's lock in all of them. The fastest way counts, in its fastest run:
what slows a run down is never the memory itself. Run as a program, since it must tell OpenBLAS to leave the
threads to it before NumPy is imported.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

import numpy as np

LEAST_NBYTES: Final = 256 << 20
CACHES: Final = 4
"""The buffer is at least so many times the last cache."""
REPEATS: Final = 5
_ROW: Final = 4096


def read_bandwidth(threads: int, *, nbytes: int | None = None, timeout_s: float = 300.0) -> dict[str, Any]:
    """Bytes per second that `threads` threads read, measured in a process of its own.

    Returns:
        "value" (bytes/s), "method" (the fastest way), "by_method", "buffer_nbytes", "threads".

    Raises:
        RuntimeError: the process failed; with its last line.
    """
    arguments = [str(threads)] + ([] if nbytes is None else [str(nbytes)])
    one_each = {name: "1" for name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    done = subprocess.run(
        [sys.executable, "-m", "gpt2core.bench.compare.bandwidth", *arguments],
        env={**os.environ, **one_each},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=timeout_s,
    )
    if done.returncode:
        said = done.stderr.strip().splitlines()
        raise RuntimeError(f"measuring the read bandwidth failed: {said[-1] if said else done.returncode}")
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def buffer_nbytes() -> int:
    """Of the buffer: several times the largest cache that the system tells of."""
    sizes = [0]
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()
        if text.endswith("K") and text[:-1].isdigit():
            sizes.append(int(text[:-1]) << 10)
    return max(LEAST_NBYTES, CACHES * max(sizes))


def _measure(threads: int, nbytes: int) -> dict[str, Any]:
    rows = 2 * max(1, nbytes // (8 * _ROW * threads))  # even, for the two halves
    parts = [np.ones((rows, _ROW), np.float32) for _ in range(threads)]  # written: every page is there
    vector = np.ones(_ROW, np.float32)
    ways: dict[str, Callable[[np.ndarray[Any, Any]], object]] = {
        "matrix times vector": lambda part: part @ vector,
        "sum": lambda part: part.sum(),
        "dot of two halves": lambda part: np.dot(*np.split(part.ravel(), 2)),
        "maximum of integers": lambda part: part.view(np.int32).max(),
    }
    read_nbytes = sum(part.nbytes for part in parts)
    by_method = {}
    with ThreadPoolExecutor(threads) as pool:
        for name, way in ways.items():
            times_s = []
            for _ in range(REPEATS):
                began_s = time.perf_counter()
                list(pool.map(way, parts))
                times_s.append(time.perf_counter() - began_s)
            by_method[name] = read_nbytes / min(times_s)
    best = max(by_method, key=lambda name: by_method[name])
    about = {"buffer_nbytes": read_nbytes, "threads": threads}
    return {"value": by_method[best], "method": best, "by_method": by_method, **about}


if __name__ == "__main__":
    count, *size = map(int, sys.argv[1:])
    print(json.dumps(_measure(count, size[0] if size else buffer_nbytes())))
