"""What a measurement depends on besides the code under test: the machine, the versions, and other work."""

import hashlib
import json
import os
import platform
import time
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Final

from gpt2core import __version__

PACKAGES: Final = (
    *("numpy", "tokenizers", "torch", "jax", "jaxlib", "flax", "onnxruntime", "onnx", "transformers"),
    *("ctranslate2", "llama-cpp-python", "openvino", "openvino-genai", "optimum", "optimum-onnx"),
)
"""The distributions whose versions may change a figure."""

ID_CHARACTERS: Final = 16
CPU_INFO: Final = Path("/proc/cpuinfo")
CPU_TIMES: Final = Path("/proc/stat")


def fingerprint() -> dict[str, Any]:
    """The machine and the versions as one JSON object; `id` is a hash of the rest."""
    facts = {
        "machine": {
            "cpu": _cpu(),
            "cores": usable_cores(),
            "memory_nbytes": _memory_nbytes(),
            "system": f"{platform.system()} {platform.release()}",
            "architecture": platform.machine(),
        },
        "python": platform.python_version(),
        "gpt2core": __version__,
        "packages": {name: found for name in PACKAGES if (found := _version(name)) is not None},
    }
    canonical = json.dumps(facts, sort_keys=True, separators=(",", ":")).encode()
    return {"id": hashlib.sha256(canonical).hexdigest()[:ID_CHARACTERS], **facts}


def differences(there: Mapping[str, Any], here: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Each entry in which two nested JSON objects differ, as `name: VALUE there, VALUE here`."""
    found = []
    for name in dict.fromkeys([*there, *here]):
        old, new = there.get(name), here.get(name)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            found += differences(old, new, f"{prefix}{name}.")
        elif old != new:
            found.append(f"{prefix}{name}: {_shown(old)} there, {_shown(new)} here")
    return found


def usable_cores() -> int:
    """Processors that this process may use; a container or taskset may allow fewer than there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass(frozen=True, slots=True)
class OtherWork:
    """What was done beside a measurement; None where the system does not tell.

    Attributes:
        others_cores: cores that other processes than this one and its children kept busy.
        steal_share: of the processors' time, what the hypervisor gave to other machines.
    """

    others_cores: float | None = None
    steal_share: float | None = None


class OtherWorkWatch:
    """Watches, from when it is made, what else the machine does. Ticks of 10 ms: one moment says little."""

    def __init__(self) -> None:
        self._begin = _cpu_times()

    def read(self) -> OtherWork:
        """What was done since; children count once they have ended."""
        if self._begin is None or (now := _cpu_times()) is None:
            return OtherWork()
        wall_s, own_s, busy_s, steal_s, all_s = (b - a for a, b in zip(self._begin, now, strict=True))
        if all_s <= 0 or wall_s <= 0:
            return OtherWork()
        return OtherWork(others_cores=(busy_s - own_s) / wall_s, steal_share=steal_s / all_s)


def _cpu_times() -> tuple[float, ...] | None:
    """Seconds: of the clock, of this process and its children, of all processes, stolen, in all."""
    try:
        first = CPU_TIMES.read_text(encoding="ascii").split("\n", 1)[0].split()
        tick_s = 1 / os.sysconf("SC_CLK_TCK")
        user, nice, system, idle, waiting, irq, softirq, steal = (tick_s * int(part) for part in first[1:9])
    except (OSError, ValueError, AttributeError):
        return None
    busy = user + nice + system + irq + softirq
    return time.monotonic(), sum(os.times()[:4]), busy, steal, busy + idle + waiting + steal


def _shown(value: object) -> str:
    if value is None:
        return "none"
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."


def _cpu() -> str:
    if CPU_INFO.is_file():
        for line in CPU_INFO.read_text(errors="replace").splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()


def _memory_nbytes() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # Windows has no sysconf, others not all names
        return None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
