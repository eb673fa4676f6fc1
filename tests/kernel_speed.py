"""Speed of each native kernel in % of the processor's peak, by instruction set and compiler.

For `scripts/kernel-speed`. Every build runs once in each round, pinned to one core, and the best of the
rounds counts. `peak` is what a loop over registers reaches with the build's own instructions, in 10**9
operations a second; a kernel's figure is its speed and the share of that peak. Operands lie in the cache:
what memory takes is shown by `examples/step_times.py`.
"""

import argparse
import os
import pathlib
import platform
import shutil
import subprocess
import sys
import tempfile
from collections import defaultdict

import bits

X86 = {
    "AVX-512 VNNI": ("-march=native", "avx512_vnni"),
    "AVX-512": ("-march=skylake-avx512", "avx512bw"),
    "AVX-VNNI": ("-march=alderlake", "avx_vnni"),
    "AVX2": ("-march=haswell", "avx2"),
    "AVX2, tuned for AMD": ("-march=haswell -mtune=znver3", "avx2"),
    "AVX": ("-march=sandybridge", "avx"),
    "AVX, unfused": ("-march=sandybridge -DGPT2CORE_UNFUSED", "avx"),
    "SSE4": ("-march=nehalem", "sse4_2"),
    "SSE4, unfused": ("-march=nehalem -DGPT2CORE_UNFUSED", "sse4_2"),
    "SSE2": ("-march=x86-64", "sse2"),
    "SSE2, unfused": ("-march=x86-64 -DGPT2CORE_UNFUSED", "sse2"),
}
AARCH64 = {"this processor": ("-mcpu=native", "asimd"), "NEON": ("-mcpu=generic", "asimd")}
OPTIMIZED = "-O3"
PEAK_OF = {
    "product float32": "float",
    "product bfloat16": "float",
    "product int8": "int8",
    "product int4": "int4",
    "attention float32": "float",
    "attention bfloat16": "float",
}


def main() -> int:
    """Compile, run in turns, print one table."""
    cpu = pathlib.Path("/proc/cpuinfo")
    has = set(cpu.read_text().split()) if cpu.exists() else set()
    sets = X86 if platform.machine() == "x86_64" else AARCH64
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sets", default=";".join(sets), help="instruction sets, separated by semicolons")
    parser.add_argument("--compilers", default="gcc,clang")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--milliseconds", type=float, default=20, help="of each kernel in each round")
    parser.add_argument("--flags", default="", help="further flags for the compilers")
    parser.add_argument(
        "--stages", action="store_true", help="instead: what threads pay for meeting after a stage"
    )
    args = parser.parse_args()
    wanted = args.sets.split(";")
    for name in wanted:
        if name not in sets:
            parser.error(f"there is no set {name!r}; use {'; '.join(sets)}")
    with tempfile.TemporaryDirectory() as scratch:
        if args.stages:  # the same with every instruction set
            compiler, (flags, _) = args.compilers.partition(",")[0], next(iter(sets.values()))
            program = pathlib.Path(scratch) / "stages"
            bits.compile_driver(compiler, f"{OPTIMIZED} {flags} {args.flags}", program, "kernel_speed.c")
            show_stages(program, args.rounds, args.milliseconds)
            return 0
        programs = {}
        for name in wanted:
            flags, feature = sets[name]
            for compiler in args.compilers.split(","):
                if feature in has and shutil.which(compiler):
                    to = pathlib.Path(scratch) / str(len(programs))
                    further = f"{OPTIMIZED} {flags} {args.flags}"
                    program = bits.compile_driver(compiler, further, to, "kernel_speed.c")
                    programs[f"{name}, {compiler}"] = program
        best: dict[str, dict[tuple[str, str], float]] = {name: defaultdict(float) for name in programs}
        for _ in range(args.rounds):
            for name, program in programs.items():
                for kernel, rows, speed in run(program, args.milliseconds):
                    best[name][kernel, rows] = max(best[name][kernel, rows], speed)
    show(best)
    return 0


def run(program: pathlib.Path, milliseconds: float) -> list[tuple[str, str, float]]:
    """(kernel, rows, 10**9 operations a second) of one round, on the last of this process's cores."""
    command = [str(program), str(milliseconds)]
    if hasattr(os, "sched_getaffinity") and shutil.which("taskset"):
        command = ["taskset", "-c", str(max(os.sched_getaffinity(0))), *command]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    words = [line.split() for line in done.stdout.splitlines()]
    return [(f"{what} {precision}", rows, float(speed)) for what, precision, rows, speed in words]


def show_stages(program: pathlib.Path, rounds: int, milliseconds: float) -> None:
    """What a stage takes, and how much of that it would not take one thread: the least of the rounds."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    counts = [1 << power for power in range(cores.bit_length())]
    best: dict[tuple[int, int], int] = {}
    for _ in range(rounds):
        for threads in counts:
            command = [str(program), str(milliseconds), "stages", str(threads)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            for line in done.stdout.splitlines():
                count, items, took_ns = map(int, line.split())
                best[count, items] = min(took_ns, best.get((count, items), took_ns))
    print("| threads | items of each | stage, us | meeting, us |\n|---:|---:|---:|---:|")
    for (threads, items), took_ns in sorted(best.items()):
        print(f"| {threads} | {items} | {took_ns / 1000:.2f} | {(took_ns - best[1, items]) / 1000:.2f} |")


def show(best: dict[str, dict[tuple[str, str], float]]) -> None:
    """One row per kernel and number of rows, one column per build."""
    print("| | | " + " | ".join(best) + " |\n|---|---:" + "|---:" * len(best) + "|")
    keys = list(next(iter(best.values())))
    for kernel, rows in keys:
        cells = []
        for speeds in best.values():
            speed = speeds[kernel, rows]
            peak = speeds.get((f"peak {PEAK_OF.get(kernel)}", "0"))
            cells.append(f"{speed:.0f}" if peak is None else f"{speed:.0f} ({speed / peak:.0%})")
        print(f"| {kernel} | {rows if rows != '0' else ''} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    sys.exit(main())
