"""What a measurement depends on besides the code under test: the machine and the versions."""

import hashlib
import json
import os
import platform
from collections.abc import Mapping
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


def fingerprint() -> dict[str, Any]:
    """The machine and the versions as one JSON object; `id` is a hash of the rest."""
    facts = {
        "machine": {
            "cpu": _cpu(),
            "cores": _usable_cores(),
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


def _usable_cores() -> int:
    if hasattr(os, "sched_getaffinity"):  # Linux; a container or taskset may allow fewer than there are
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


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
