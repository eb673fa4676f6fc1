"""Quantised checkpoints in files: `model.safetensors` and a field of `config.json`, read by memory mapping.

`config.json` is the model's own with `"gpt2core_quantization": {"version": 1, "precision": ...}`, for "int4"
also `"group_size"`. The tensors have the names of the float32 checkpoint; beside a rounded `X.weight` stand
`X.weight_scale` (F32) and, for "int4", `X.weight_zero` (U8), in the shapes of `quantized_weights`.
"""

import json
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np

from gpt2core._json import listed, read_json_object, shown, shown_name
from gpt2core.checkpoint.folder import WEIGHTS
from gpt2core.checkpoint.safetensors import (
    SafetensorsFile,
    TensorData,
    count_nonfinite,
    replacing,
    write_safetensors,
)
from gpt2core.config import QUANTIZATION_FIELD, ModelConfig
from gpt2core.errors import CheckpointError
from gpt2core.quantization.encodings import (
    BFloat16,
    Int4,
    Int8,
    Matrix,
    QuantizedBlock,
    QuantizedLinear,
    QuantizedWeights,
    Table,
)
from gpt2core.quantization.rounding import GROUP_SIZES, PRECISIONS
from gpt2core.weights import BLOCK_NAMES, LayerNorm, expected_shapes

VERSION: Final = 1
_PREFIX: Final = "transformer."
_TABLES: Final = ("wte.weight", "lm_head.weight")


@dataclass(frozen=True, slots=True)
class Quantization:
    """What the field of `config.json` says."""

    precision: str
    group_size: int | None = None


def read_quantization(folder: Path) -> Quantization | None:
    """How the folder's weights are stored; None for float weights.

    Raises:
        CheckpointError: config.json is missing, or the field names what this version does not read.
    """
    field = read_json_object(folder / "config.json").get(QUANTIZATION_FIELD)
    if field is None:
        return None
    if isinstance(field, dict) and field.get("version") == VERSION and field.get("precision") in PRECISIONS:
        precision, group_size = field["precision"], field.get("group_size")
        expected = GROUP_SIZES if precision == "int4" else (None,)
        if field.keys() <= {"version", "precision", "group_size"} and group_size in expected:
            return Quantization(precision, group_size)
    raise CheckpointError(
        f"{folder}/config.json: {QUANTIZATION_FIELD} is {shown(field)}, which this version does not read; "
        "quantise the model again with `gpt2core quantize`"
    )


def save_quantized(folder: str | os.PathLike[str], weights: QuantizedWeights) -> None:
    """Write `model.safetensors` and `config.json`, each replaced as a whole; no tokenizer.

    Raises:
        CheckpointError: the folder cannot be written.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be made: {error.strerror}") from error
    first = weights.blocks[0].c_attn.weight
    field: dict[str, Any] = {"version": VERSION, "precision": weights.precision}
    if isinstance(first, Int4):
        field["group_size"] = first.group_size
    arrays = sorted(weights.named(), key=lambda item: -item[1].itemsize)  # keeps wide numbers aligned
    with replacing(folder / WEIGHTS) as file:
        write_safetensors(
            file,
            {
                _full(name): TensorData(_DTYPES[array.dtype.str[1:]], array.shape, partial(_stored, array))
                for name, array in arrays
            },
        )
    with replacing(folder / "config.json") as file:
        config = weights.config.to_dict() | {QUANTIZATION_FIELD: field}
        file.write((json.dumps(config, indent=2) + "\n").encode())


_DTYPES: Final = {"f4": "F32", "u2": "BF16", "i1": "I8", "u1": "U8"}


def _stored(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array, array.dtype.newbyteorder("<"))


def _full(name: str) -> str:
    return name if name.startswith("lm_head") else _PREFIX + name


def read_quantized(folder: Path, config: ModelConfig, quantization: Quantization) -> QuantizedWeights:
    """Map the weights; what is read at once is only the float32 part.

    Raises:
        CheckpointError: naming every missing, surplus, misshapen, non-finite or truncated tensor.
    """
    file = SafetensorsFile(folder / WEIGHTS)
    faults, tensors = list(file.faults), {}
    expected = dict(_expected(config, quantization))
    for name, (dtype, shape) in expected.items():
        entry = file.entries.get(_full(name))
        if entry is None:
            if _full(name) not in file.faulty:
                faults.append(f"tensor {_full(name)} of shape {list(shape)} is missing")
        elif (entry.dtype, entry.shape) != (dtype, shape):
            found = f"{entry.dtype} {list(entry.shape)}"
            faults.append(f"tensor {_full(name)} is {found}, expected {dtype} {list(shape)}")
        else:
            tensors[name] = file.stored(_full(name))
            if dtype == "F32" and (bad := count_nonfinite(tensors[name])):
                faults.append(f"tensor {_full(name)} holds {bad} numbers that are not finite")
    surplus = file.entries.keys() - {_full(name) for name in expected}
    faults += [f"tensor {shown_name(name)} is surplus" for name in sorted(surplus)]
    if faults:
        count = f"{len(faults)} faults" if len(faults) > 1 else "a fault"
        raise CheckpointError(f"{folder / WEIGHTS} has {count}: {listed(faults)}")
    return _arranged(config, quantization, tensors)


def _expected(
    config: ModelConfig, quantization: Quantization
) -> Iterator[tuple[str, tuple[str, tuple[int, ...]]]]:
    """Name, dtype and shape of each tensor of a quantised checkpoint."""
    for name, shape in expected_shapes(config).items():
        table = name in _TABLES
        if len(shape) == 1 or name == "wpe.weight":
            yield name, ("F32", shape)
        elif quantization.precision == "bfloat16":
            yield name, ("BF16", shape)
        elif table or quantization.group_size is None:
            yield name, ("I8", shape)
            yield f"{name}_scale", ("F32", (shape[0], 1) if table else (shape[1],))
        else:
            inputs, outputs = shape
            groups = math.ceil(inputs / quantization.group_size)
            yield name, ("U8", (outputs, groups * quantization.group_size // 2))
            yield f"{name}_scale", ("F32", (outputs, groups))
            yield f"{name}_zero", ("U8", (outputs, math.ceil(groups / 2)))


def _arranged(
    config: ModelConfig, quantization: Quantization, tensors: dict[str, np.ndarray]
) -> QuantizedWeights:
    def table(name: str) -> Table:
        if quantization.precision == "bfloat16":
            return BFloat16(tensors[name])
        return Int8(tensors[name], tensors[f"{name}_scale"])

    def linear(name: str) -> QuantizedLinear:
        weight: Matrix
        if quantization.group_size is None:
            weight = table(f"{name}.weight")
        else:
            packed, scale, zero = (tensors[f"{name}.weight{ending}"] for ending in ("", "_scale", "_zero"))
            weight = Int4(packed, scale, zero, expected_shapes(config)[f"{name}.weight"][0])
        return QuantizedLinear(weight, tensors[f"{name}.bias"])

    def norm(name: str) -> LayerNorm:
        return LayerNorm(tensors[f"{name}.weight"], tensors[f"{name}.bias"])

    def block(i: int) -> QuantizedBlock:
        parts: dict[str, Any] = {
            field: norm(f"h.{i}.{name}") if field.startswith("ln") else linear(f"h.{i}.{name}")
            for field, name in BLOCK_NAMES.items()
        }
        return QuantizedBlock(**parts)

    wte = table("wte.weight")
    return QuantizedWeights(
        config=config,
        precision=quantization.precision,
        wte=wte,
        wpe=tensors["wpe.weight"],
        blocks=tuple(block(i) for i in range(config.n_layer)),
        ln_f=norm("ln_f"),
        lm_head=wte if config.tie_word_embeddings else table("lm_head.weight"),
    )
