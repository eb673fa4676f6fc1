"""What this machine offers a process, and what the process used: cores, processor, memory, how it ended."""

import contextlib
import functools
import os
import pathlib
import platform
import sys
from typing import Final

_CGROUPS: Final = pathlib.Path("/sys/fs/cgroup")
_PROC: Final = pathlib.Path("/proc")
_PROCESSOR_LINES: Final = ("model", "cpu family", "stepping", "flags", "CPU ", "Features")


def install_hint(extra: str) -> str:
    """How to install the framework of an extra, or that there is none to install for this Python."""
    if lacking := _without_wheels():
        return (
            f"its packages have no wheels for {lacking}; take the backend numpy or native, or a CPython of "
            "64 bits on Linux (glibc), Windows (x86-64) or macOS (arm64)"
        )
    return f"install it with: pip install 'gpt2core[{extra}]'"


def _without_wheels() -> str:
    """What about this Python keeps PyTorch, JAX and ONNX Runtime from having wheels; "" if nothing does."""
    if sys.implementation.name != "cpython":
        return platform.python_implementation()
    if sys.maxsize < 2**32:
        return "a Python of 32 bits"
    machine = platform.machine().lower()
    if sys.platform == "linux":
        if machine not in ("x86_64", "aarch64"):
            return f"{machine} on Linux"
        try:
            return "" if os.confstr("CS_GNU_LIBC_VERSION") else "Linux without glibc"
        except (ValueError, OSError):  # as with musl, on Alpine
            return "Linux without glibc"
    known = {"darwin": ("arm64",), "win32": ("amd64", "x86_64")}
    return (
        "" if machine in known.get(sys.platform, ()) else f"{machine} on {platform.system() or sys.platform}"
    )


def count_cores() -> int:
    """How many cores this process may use: those of its affinity, at most what its cgroup's quota pays for.

    A container that is limited to 2 CPUs sees all cores of its host; as many threads would only wait for each
    other. A part of a core counts as one.
    """
    cores = _count_affinity()
    quota = read_quota()
    return cores if quota is None else max(1, min(cores, quota))


def limit_threads(threads: int | None) -> int | None:
    """`threads`; where that is None and a quota allows fewer cores than there are, what it allows.

    None lets a framework count for itself, and frameworks count cores without looking at quotas.
    """
    if threads is None and count_cores() < _count_affinity():
        return count_cores()
    return threads


def _count_affinity() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def read_quota(*, cgroups: pathlib.Path | None = None, proc: pathlib.Path | None = None) -> int | None:
    """The CPU time that the process's cgroups allow it, in cores rounded up; None: as much as there is.

    The smallest quota on the way from the process's own cgroup to the root holds. Version 2 keeps it in
    `cpu.max`, version 1 in `cpu.cfs_quota_us` and `cpu.cfs_period_us`.
    """
    cgroups, proc = cgroups or _CGROUPS, proc or _PROC
    found = []
    for controllers, own in _list_cgroups(proc / "self/cgroup"):
        for root in (cgroups / controllers,) if controllers else (cgroups, cgroups / "unified"):
            # Inside a container the path may be the host's, which is not mounted: then the root is its own.
            for folder in (root / own, *(root / own).parents):
                quota = _quota_in(folder)
                if quota is not None:
                    found.append(quota)
                if folder == root:
                    break
    return min(found, default=None)


def _list_cgroups(path: pathlib.Path) -> list[tuple[str, str]]:
    """Controllers ("" for version 2) and path of each cgroup of this process that may have a quota."""
    try:
        lines = path.read_text(errors="replace").splitlines()
    except OSError:
        return []
    fields = [line.split(":", 2) for line in lines if line.count(":") >= 2]
    return [
        (controllers, own.strip("/"))
        for _, controllers, own in fields
        if (controllers == "" or "cpu" in controllers.split(",")) and ".." not in own.split("/")
    ]


def _quota_in(folder: pathlib.Path) -> int | None:
    with contextlib.suppress(OSError, ValueError):
        quota, period = (folder / "cpu.max").read_text().split()
        return None if quota == "max" else _round_up(int(quota), int(period))
    with contextlib.suppress(OSError, ValueError):
        quota_us = int((folder / "cpu.cfs_quota_us").read_text())
        return _round_up(quota_us, int((folder / "cpu.cfs_period_us").read_text()))
    return None


def _round_up(quota_us: int, period_us: int) -> int | None:
    return max(1, -(-quota_us // period_us)) if quota_us > 0 and period_us > 0 else None


def name_processor() -> str:
    """The processor's name, as a person would say it."""
    for line in describe_processor():
        name, _, value = line.partition(":")
        if name.strip() == "model name":
            return value.strip()
    return platform.processor() or platform.machine()  # the former runs a program, and takes milliseconds


@functools.cache
def describe_processor() -> tuple[str, ...]:
    """Name and instructions of the first processor; names alone are often no more than "AMD EPYC"."""
    found: list[str] = []
    with contextlib.suppress(OSError), (_PROC / "cpuinfo").open(encoding="utf-8", errors="replace") as file:
        for line in file:
            if not line.strip():
                break  # the next processor
            if line.startswith(_PROCESSOR_LINES):
                found.append(" ".join(line.split()))
    return tuple(found) or (platform.processor(),)


def peak_memory_nbytes() -> int | None:
    """The most resident memory that this process has had; None where the system does not tell.

    Linux's own figure where it is to be had: that of getrusage begins with what the parent had.
    """
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in (_PROC / "self/status").read_text(errors="replace").splitlines():
            if line.startswith("VmHWM:"):
                return 1024 * int(line.split()[1])
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def describe_exit(code: int, without: str = "no result") -> str:
    """How a process ended that should have left something: by a signal, or by itself `without` it."""
    if code >= 0:
        return f"its process ended with exit code {code} and {without}"
    import signal  # costs a millisecond, which those whose processes live should not wait for

    known = {number.value: number.name for number in signal.Signals}
    return f"its process was killed by {known.get(-code, f'signal {-code}')}"
