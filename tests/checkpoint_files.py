"""Checkpoints of a few kilobytes, sound or broken on purpose, written without gpt2core's own writer."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from gpt2core.config import ModelConfig
from gpt2core.weights import expected_shapes

TINY = ModelConfig(vocab_size=23, n_positions=8, n_embd=12, n_layer=2, n_head=3)
DTYPES = {"<f4": "F32", "<f2": "F16", "<f8": "F64", "<i8": "I64", "|u1": "U8", "|b1": "BOOL", "<u2": "BF16"}


def random_tensors(
    config: ModelConfig = TINY, *, seed: int = 0, prefix: str = "transformer."
) -> dict[str, Any]:
    """Float32 tensors as transformers names them."""
    rng = np.random.default_rng(seed)
    return {
        (name if name.startswith("lm_head") else prefix + name): rng.normal(0, 0.3, shape).astype(np.float32)
        for name, shape in expected_shapes(config).items()
    }


def bfloat16(array: np.ndarray) -> np.ndarray:
    """The upper half of float32 numbers; stands for dtype BF16 in `write_tensors`."""
    return (array.view(np.uint32) >> 16).astype(np.uint16)


def file_bytes(header: Any, data: bytes = b"") -> bytes:
    """A safetensors file of any header, sound or not."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def layout(tensors: dict[str, np.ndarray]) -> tuple[dict[str, Any], bytes]:
    """The header and the data of a sound file; uint16 arrays count as bfloat16."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    data = b""
    for name, array in tensors.items():
        part = array.tobytes()
        header[name] = {
            "dtype": DTYPES[array.dtype.str],
            "shape": list(array.shape),
            "data_offsets": [len(data), len(data) + len(part)],
        }
        data += part
    return header, data


def write_tensors(path: Path, tensors: dict[str, np.ndarray]) -> None:
    """Write a sound file whose data lie 8-aligned, as the reference implementation writes it."""
    header, data = layout(tensors)
    text = json.dumps(header).encode()
    path.write_bytes(file_bytes(text + b" " * (-len(text) % 8), data))


def write_config(folder: Path, config: ModelConfig = TINY, **fields: Any) -> None:
    """Write config.json with `fields` besides those of `config`."""
    (folder / "config.json").write_text(json.dumps(config.to_dict() | fields))


def write_checkpoint(
    folder: Path, tensors: dict[str, Any], config: ModelConfig = TINY, **fields: Any
) -> None:
    """Write config.json and model.safetensors."""
    folder.mkdir(parents=True, exist_ok=True)
    write_config(folder, config, **fields)
    write_tensors(folder / "model.safetensors", tensors)
