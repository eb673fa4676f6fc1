"""Builds of the native kernels by other flags and compilers, each made once for all processes of a test run.

They lie in the tests' own cache folder (`conftest.py`), under a lock: a process that comes second waits for
the first one's build instead of compiling too.
"""

import contextlib
import fcntl
import hashlib
import os
import pathlib
import platform
from collections.abc import Iterator

import bits
import pytest

from gpt2core._machine import describe_processor
from gpt2core.backends.native.build import FLAGS_VARIABLE, KERNELS, load_library
from gpt2core.checkpoint.open import open_checkpoint, save_checkpoint
from gpt2core.quantization.rounding import quantize
from gpt2core.weights import Weights

OTHERS: dict[str, tuple[str | None, str]] = (
    {
        "AVX2": (None, "-O1 -mno-avx512f"),
        "SSE2": (None, "-O1 -march=x86-64"),
        "clang": ("clang", "-O1"),
        "clang, AVX2": ("clang", "-O1 -mno-avx512f"),
    }
    if platform.machine() == "x86_64"
    else {"-O1": (None, "-O1"), "clang": ("clang", "-O1")}
)
"""Compiler (None: the default one) and further flags of libraries for lesser processors, by name."""


@contextlib.contextmanager
def alone(name: str) -> Iterator[pathlib.Path]:
    """A folder of this name, in which no other process of the tests works meanwhile."""
    folder = pathlib.Path(os.environ["GPT2CORE_CACHE"]) / "tests" / name
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield folder


def use_build(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every backend that is made from here on run this one of OTHERS."""
    compiler, flags = OTHERS[name]
    if compiler is not None:
        monkeypatch.setenv("GPT2CORE_CC", compiler)
    monkeypatch.setenv(FLAGS_VARIABLE, flags)
    with alone("libraries"):
        load_library()


def driver(compiler: str, flags: str, source: str = "hash_model.c") -> pathlib.Path:
    """One of `kernels/tests` as a program; the compiler's assembly lies beside it."""
    flags = f"{flags} -save-temps=obj"
    digest = hashlib.sha256(repr((compiler, flags, source, describe_processor())).encode())
    for path in sorted(KERNELS.rglob("*.[ch]")):
        digest.update(path.read_bytes())
    with alone(f"drivers/{digest.hexdigest()[:16]}") as folder:
        program = folder / "driver"
        if not program.exists():
            bits.compile_driver(compiler, flags, folder / "new", source).rename(program)
            for path in folder.glob("*.[io]"):
                path.unlink()
    return program


def stored_demo(precision: str) -> Weights:
    """The demo's weights, rounded once for all builds: int4's linear algebra is not the same everywhere."""
    if precision == "float32":
        return open_checkpoint("demo").stored
    with alone(f"demo/{precision}") as folder:
        if not (folder / "model.safetensors").exists():
            save_checkpoint(folder, quantize(open_checkpoint("demo").stored, precision))
        return open_checkpoint(str(folder)).stored
