"""What `gpt2core bench recommend` measured: the fastest backend of this machine, for one shape of model.

One small JSON file per shape, device and number of threads in the user's cache folder, read by `choose`.
Reading it needs no framework and no extra: versions are the names of the folders beside the packages.
A file that is damaged, somebody else's, of another machine or of other versions counts as no file.
"""

import hashlib
import json
import os
import pathlib
import platform
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from typing import Any, Final

from gpt2core._files import cache_folder, is_ours_alone, replacing
from gpt2core._json import loads_strict
from gpt2core._machine import count_cores, describe_processor
from gpt2core._version import __version__
from gpt2core.backends._shared.c_compiler import find_compiler
from gpt2core.backends._shared.variants import find_prebuilt
from gpt2core.config import ModelConfig

FOLDER: Final = "recommended"
PACKAGES: Final = ("numpy", "torch", "jax", "jaxlib", "flax", "onnxruntime", "onnx")
_FORMAT: Final = 1
_LARGEST_NBYTES: Final = 1 << 16
_SHAPE: Final = ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head", "mlp_dim")


@dataclass(frozen=True, slots=True)
class Recommendation:
    """The fastest backend for one shape of model on one device.

    Attributes:
        backend: its name.
        precision: of the weights; a precision other than this one has no recommendation.
        why: one line with the figures.
        measured_at: ISO 8601, UTC.
    """

    backend: str
    precision: str
    why: str
    measured_at: str


def find(
    config: ModelConfig, *, device: str = "cpu", threads: int | None = None, precision: str = "float32"
) -> Recommendation | None:
    """What was measured for this shape, device, number of threads and precision here, if it still holds."""
    path = _path(config, device, threads)
    try:
        if not (is_ours_alone(path.parent) and is_ours_alone(path)):
            return None
        with path.open("rb") as file:
            content = file.read(_LARGEST_NBYTES + 1)
        document = loads_strict(content) if len(content) <= _LARGEST_NBYTES else None
    except (OSError, ValueError):
        return None
    if not isinstance(document, dict) or document.get("format") != _FORMAT:
        return None
    entry = (
        document["by_precision"].get(precision) if isinstance(document.get("by_precision"), dict) else None
    )
    if not isinstance(entry, dict) or not all(
        isinstance(entry.get(name), str) for name in Recommendation.__slots__
    ):
        return None
    if document.get("fingerprint") != fingerprint():
        return None
    return Recommendation(**{name: entry[name] for name in Recommendation.__slots__})


def save(
    found: Mapping[str, Recommendation],
    config: ModelConfig,
    *,
    device: str = "cpu",
    threads: int | None = None,
) -> pathlib.Path:
    """Keep recommendations by precision for a model of this shape; the file is replaced as a whole.

    Raises:
        OSError: the folder cannot be written, or others may write to it.
    """
    path = _path(config, device, threads)
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    if not is_ours_alone(path.parent):
        raise OSError(f"{path.parent} is not this user's alone; let nobody else own it or write to it")
    document = {
        "format": _FORMAT,
        "fingerprint": fingerprint(),
        "shape": _shape(config),
        "device": device,
        "threads": threads,
        "by_precision": {precision: asdict(one) for precision, one in found.items()},
    }
    with replacing(path, private=True) as file:
        file.write(json.dumps(document, allow_nan=False).encode())
    return path


def fingerprint() -> dict[str, Any]:
    """What a measurement depends on, found without importing anything: versions and processor."""
    return {
        "gpt2core": __version__,
        "python": sys.version,
        "packages": {name: _installed_as(name) for name in PACKAGES},
        "machine": platform.machine(),
        "processor": list(describe_processor()),
        "compiler": find_compiler(),  # whether the native backend can run, and how fast
        "prebuilt": [variant.name for variant in find_prebuilt()],
        "cores": count_cores(),
    }


def _path(config: ModelConfig, device: str, threads: int | None) -> pathlib.Path:
    key = json.dumps([_shape(config), device, threads])
    return cache_folder(FOLDER) / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.json"


def _shape(config: ModelConfig) -> dict[str, int]:
    return {name: getattr(config, name) for name in _SHAPE}


def _installed_as(package: str) -> list[str] | None:
    """The folders of metadata beside a package, `torch-2.13.0.dist-info`; None where it is missing."""
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        return None
    beside = os.path.dirname(next(iter(spec.submodule_search_locations)))
    try:
        names = os.listdir(beside)
    except OSError:
        return []
    builds = (f"{package}-", f"{package}_gpu-")  # onnxruntime and onnxruntime_gpu are one package
    return sorted(name for name in names if name.startswith(builds) and name.endswith(".dist-info"))
