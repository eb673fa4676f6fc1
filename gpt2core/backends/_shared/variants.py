"""The native kernels' prebuilt libraries: one for each set of instructions, beside the C they are made of.

Wheels bring them, and `pip install` from a clone makes them where there is a compiler. This file needs
nothing but the standard library, since the build of the package runs it by its path, and the registry of
backends looks here without loading anything.
"""

import os
import pathlib
import platform
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

KERNELS: Final = pathlib.Path(__file__).parent.parent / "native/kernels"
FOLDER: Final = KERNELS.parent / "prebuilt"
DIGEST_NAME: Final = "sources.sha256"
"""The file, written last, that says of which sources the libraries were made."""
VARIABLE: Final = "GPT2CORE_NATIVE"
"""The environment variable that names the variant to load, or "compile"."""
COMPILE: Final = "compile"
FLAGS: Final = ("-O3", "-std=gnu11", "-fno-math-errno", "-ffp-contract=off", "-fPIC", "-shared", "-pthread")
_COMPILING: Final = ("GPT2CORE_CC", "GPT2CORE_CFLAGS")
"""Who sets one of these wants what it says to be compiled."""
_MACHINES: Final = {"AMD64": "x86_64", "arm64": "aarch64", "ARM64": "aarch64"}


@dataclass(frozen=True, slots=True)
class Variant:
    """A library for the processors that have some instructions.

    Attributes:
        name: also of its file.
        features: that the processor must have, in the words of Linux' /proc/cpuinfo.
        flags: for gcc, clang and `zig cc`, beyond those of the machine's least processor.
    """

    name: str
    features: tuple[str, ...] = ()
    flags: tuple[str, ...] = ()

    @property
    def file_name(self) -> str:
        """Of the library on this system."""
        return self.name + (".dll" if sys.platform == "win32" else ".so")


_AVX2: Final = ("avx2", "fma")
_AVX512: Final = (*_AVX2, "avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl")


def _x86(name: str, *features: str) -> Variant:
    return Variant(name, features, tuple(f"-m{feature.replace('_', '')}" for feature in features))


VARIANTS: Final[Mapping[str, tuple[Variant, ...]]] = {
    "x86_64": (
        _x86("avx512vnni", *_AVX512, "avx512_vnni"),
        _x86("avx512", *_AVX512),
        _x86("avxvnni", *_AVX2, "avx_vnni"),
        _x86("avx2", *_AVX2),
        _x86("sse2"),
    ),
    "aarch64": (
        Variant("i8mm", ("asimddp", "i8mm"), ("-mcpu=generic+dotprod+i8mm",)),
        Variant("dotprod", ("asimddp",), ("-mcpu=generic+dotprod",)),
        Variant("neon", (), ("-mcpu=generic",)),
    ),
}
"""By machine, the best first; the last one runs on all of them."""
NAMES: Final = tuple(variant.name for variants in VARIANTS.values() for variant in variants)


def machine_name() -> str:
    """This processor's family, the same on every system: "x86_64", "aarch64", ..."""
    machine = platform.machine()
    return _MACHINES.get(machine, machine)


def find_prebuilt(folder: pathlib.Path | None = None) -> tuple[Variant, ...]:
    """The prebuilt variants that are here, best first, whether or not this processor can run them.

    None count where their sources have changed since, as in a clone, where the one for the least processor
    is missing, or where the environment asks for something to be compiled.
    """
    folder = folder or FOLDER
    named = os.environ.get(VARIABLE, "")
    if named == COMPILE or (not named and any(os.environ.get(name) for name in _COMPILING)):
        return ()
    try:
        made_of = (folder / DIGEST_NAME).read_text().strip()
    except OSError:
        return ()
    if made_of != digest_sources():
        return ()
    variants = VARIANTS.get(machine_name(), ())
    found = tuple(variant for variant in variants if (folder / variant.file_name).exists())
    return found if found and not found[-1].features else ()


def digest_sources(kernels: pathlib.Path | None = None) -> str:
    """SHA-256, in hexadecimal, of every `*.c` and `*.h` of the kernels, without their tests."""
    import hashlib

    digest = hashlib.sha256()
    for path in sorted((kernels or KERNELS).glob("*.[ch]")):
        content = path.read_bytes()
        digest.update(f"{path.name} {len(content)}\n".encode() + content)
    return digest.hexdigest()


def build_variants(
    folder: pathlib.Path,
    compiler: Sequence[str],
    *,
    variants: Sequence[Variant],
    kernels: pathlib.Path | None = None,
    suffix: str | None = None,
) -> dict[str, str]:
    """Compile libraries into `folder`; what the compiler said of those that it could not build, by name.

    Args:
        folder: exists; what it holds of an earlier build is replaced.
        compiler: the command, such as ["zig", "cc", "-target", "aarch64-linux-musl"], with the flags of the
            least processor and any further ones.
        variants: of `VARIANTS`.
        kernels: the folder of `gpt2.c`.
        suffix: of the libraries' names, of the system they are for; None: of this one.
    """
    import subprocess  # these cost milliseconds, which only those who build should wait for
    from concurrent.futures import ThreadPoolExecutor

    kernels = kernels or KERNELS

    def build(variant: Variant) -> str:
        made = folder / (variant.name + suffix if suffix else variant.file_name)
        command = [*compiler, *variant.flags, "-s", "gpt2.c", "-o", str(made), "-lm"]
        done = subprocess.run(command, cwd=kernels, capture_output=True, text=True, check=False)
        return "" if done.returncode == 0 else done.stderr or f"exit code {done.returncode}"

    (folder / DIGEST_NAME).unlink(missing_ok=True)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        said = dict(zip([variant.name for variant in variants], pool.map(build, variants), strict=True))
    (folder / DIGEST_NAME).write_text(digest_sources(kernels) + "\n")
    return {name: text for name, text in said.items() if text}
