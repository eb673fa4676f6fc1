"""Logits' bits of random models from every build of the native kernels, in C alone.

`scripts/bits` runs all builds, the long form with `--long`; pytest runs the short one.
"""

import argparse
import json
import os
import pathlib
import platform
import shutil
import subprocess
import sys
import tempfile

from gpt2core.backends.native.build import KERNELS
from gpt2core.verify.bits import GOLDEN

FLAGS = ("-std=gnu11", "-fno-math-errno", "-ffp-contract=off", "-pthread", "-w")
X86 = {
    "AVX-512 VNNI": "-O3 -march=native",
    "AVX-512": "-O2 -march=skylake-avx512",
    "AVX-VNNI": "-O3 -march=alderlake",
    "AVX2": "-O3 -march=haswell",
    "AVX2, FMA": "-O2 -march=haswell -mtune=znver3",  # AMD's tuning, by which gcc folds loads into FMAs
    "AVX without FMA": "-O1 -march=sandybridge",
    "SSE4": "-O1 -march=nehalem",
    "SSE2": "-O1 -march=x86-64",
    "scalar": "-O1 -march=x86-64 -DGPT2CORE_SCALAR",
    "scalar, FMA": "-O2 -march=haswell -DGPT2CORE_SCALAR",
    "not optimized": "-O0 -march=native",
}
_NEEDS = {
    "skylake-avx512": "avx512bw",
    "alderlake": "avx_vnni",
    "haswell": "avx2",
    "sandybridge": "avx",
    "nehalem": "sse4_2",
}
AARCH64 = {
    "aarch64, NEON": ("aarch64-linux-gnu-gcc", "-O3"),
    "aarch64, dot products": ("aarch64-linux-gnu-gcc", "-O2 -march=armv8.2-a+dotprod"),
    "aarch64, matrix products": ("aarch64-linux-gnu-gcc", "-O2 -march=armv8.2-a+dotprod+i8mm"),
    "aarch64, scalar": ("aarch64-linux-gnu-gcc", "-O1 -DGPT2CORE_SCALAR"),
}


def _builds() -> dict[str, tuple[str, str]]:
    """Compiler and flags of all builds that this processor, or an emulator, can run."""
    if platform.machine() != "x86_64":
        return {"cc": ("cc", "-O3"), "cc, scalar": ("cc", "-O2 -DGPT2CORE_SCALAR")}
    cpu = pathlib.Path("/proc/cpuinfo")
    has = set(cpu.read_text().split()) if cpu.exists() else set()
    runnable = {
        name: flags
        for name, flags in X86.items()
        if all(feature in has for march, feature in _NEEDS.items() if march in flags)
    }
    x86 = {f"{cc}, {name}": (cc, flags) for cc in ("gcc", "clang") for name, flags in runnable.items()}
    return {**x86, **AARCH64}


BUILDS = _builds()
_STRICT = "-fsanitize=address,undefined -fno-sanitize-recover=all"
SANITIZERS = {
    "addresses and undefined behavior": f"-O1 -g -march=native {_STRICT}",
    "the same, AVX2": f"-O1 -g -march=haswell {_STRICT}",
    "threads": "-O1 -g -march=native -fsanitize=thread",
}
SHORT, LONG = (0, 20, 50), (0, 200, 1300)
"""The first seed, the number of models, the positions of each and precision."""


def compile_driver(compiler: str, flags: str, to: pathlib.Path, source: str = "hash_model.c") -> pathlib.Path:
    """One of `kernels/tests` as a program."""
    subprocess.run(
        [compiler, *FLAGS, *flags.split(), str(KERNELS / "tests" / source), "-o", str(to), "-lm"], check=True
    )
    return to


def run_driver(
    program: pathlib.Path, compiler: str, form: tuple[int, int, int], *options: str
) -> dict[str, str]:
    """The hash of each precision."""
    command, environment = [str(program), *map(str, form), *options], dict(os.environ)
    if compiler.startswith("aarch64") and platform.machine() != "aarch64":
        command.insert(0, "qemu-aarch64")
        environment["QEMU_LD_PREFIX"] = "/usr/aarch64-linux-gnu"
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr[-4000:]}")
    lines = [line.split() for line in done.stdout.splitlines()]
    return {precision: digest for precision, digest, _ in lines}


def golden(form: tuple[int, int, int]) -> dict[str, str]:
    """What every build gives."""
    return json.loads(GOLDEN.read_text())["random models"]["long" if form == LONG else "short"]


def main() -> int:
    """Run all builds that this machine has a compiler for; 1 where one differs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--long", action="store_true", help="200 models and 10**6 positions instead of 20")
    parser.add_argument("--builds", default=";".join(BUILDS), help="names of builds, separated by semicolons")
    args = parser.parse_args()
    form = LONG if args.long else SHORT
    wanted = args.builds.split(";")
    if unknown := [name for name in wanted if name not in BUILDS]:
        parser.error(f"there is no build {unknown[0]!r}; use {'; '.join(BUILDS)}")
    want, wrong = golden(form), 0
    with tempfile.TemporaryDirectory() as scratch:
        for name in wanted:
            compiler, flags = BUILDS[name]
            if shutil.which(compiler) is None:
                print(f"{name:32} no {compiler} here")
                continue
            program = compile_driver(compiler, flags, pathlib.Path(scratch) / "driver")
            got = run_driver(program, compiler, form)
            differs = [precision for precision in want if got[precision] != want[precision]]
            wrong += bool(differs)
            print(
                f"{name:32} {'differs in ' + ', '.join(differs) if differs else 'the same bits'}", flush=True
            )
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
