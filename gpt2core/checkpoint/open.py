"""Checkpoints: a folder, a model's id on the Hugging Face Hub or "demo" in, configuration and weights out."""

import json
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np

from gpt2core._json import listed, shown
from gpt2core.checkpoint import hub
from gpt2core.checkpoint.adapter import ADAPTER_CONFIG, is_adapter, merge_adapter, read_adapter_config
from gpt2core.checkpoint.convert import convert_pickle
from gpt2core.checkpoint.folder import (
    QUANTIZATION_VERSION,
    SMALL_FILES,
    WEIGHTS,
    holds_weights,
    read_config,
    read_storage,
    read_weights,
)
from gpt2core.checkpoint.hub import Source
from gpt2core.checkpoint.safetensors import ITEM_NBYTES, STORED, TensorData, replacing, write_safetensors
from gpt2core.config import QUANTIZATION_FIELD, ModelConfig
from gpt2core.encodings import Int4, round_to_bfloat16
from gpt2core.errors import CheckpointError, CheckpointWarning, RequestError, UnsupportedCheckpointError
from gpt2core.quantization.rounding import dequantize
from gpt2core.weights import Weights

__all__ = [
    "Checkpoint", "Located", "Source", "convert_pickle", "locate", "open_checkpoint", "read_checkpoint",
    "read_config", "read_weights", "resolve", "save_checkpoint", "save_model",
]  # fmt: skip

_TOKENIZER_FILES: Final = ("tokenizer.json", "vocab.json", "vocab.txt")
DEMO: Final = Path(__file__).parent.parent / "demo"


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A model that was read and checked.

    Attributes:
        source: what was asked for: "demo", a folder, a hub id.
        folder: the local folder that was named; where it holds an adapter only, the base is another.
        tokenizer_folder: holds the tokenizer: an adapter's own, or else the model's.
        config: the same as `stored.config`.
        stored: with the adapter merged, if there is one; in the precision of the file, read-only;
            memory-mapped where the file holds aligned float32, in fewer bits always.
    """

    source: str
    folder: Path
    tokenizer_folder: Path
    config: ModelConfig
    stored: Weights

    @property
    def weights(self) -> Weights:
        """The float32 weights; of a quantized checkpoint what its numbers stand for, made at each access."""
        return dequantize(self.stored)


def open_checkpoint(
    model: str | os.PathLike[str],
    *,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
    token: str | bool | None = None,
    strict: bool = False,
    adapter: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> Checkpoint:
    """Find a model, read its configuration and its weights, and check them.

    Args:
        model: "demo" for the bundled model, an existing folder, or else a hub id, `name` or `owner/name`. A
            path object always means a folder; "./demo" is a folder too.
        revision: branch, tag or commit on the hub; None for the main branch.
        cache_dir: instead of huggingface_hub's own cache.
        local_files_only: never use the network.
        token: for private and gated repositories; None for the one that `hf auth login` stored.
        strict: refuse a `config.json` with fields that are not known; otherwise those that GPT-2 does not
            read are left out with a `CheckpointWarning`.
        adapter: a folder or hub id of a LoRA adapter (as peft saves it) to merge into the model. A model that
            is an adapter only is merged into the base that it names; one that lies beside a model, into that.
        progress: show a download's progress on stderr.

    Raises:
        CheckpointError: it is not there, or not whole; all faults of its tensors are listed at once.
        UnsupportedCheckpointError: it is pickled, or asks for what gpt2core does not compute.
    """
    source = Source(model, revision, cache_dir, local_files_only, token, strict, adapter)
    return read_checkpoint(source, progress=progress)


def read_checkpoint(source: Source, *, progress: bool = True) -> Checkpoint:
    """`open_checkpoint` of a source."""
    located = locate(source, progress=progress)
    config, storage = read_storage(located.base, strict=source.strict)
    stored = read_weights(located.base, config, storage)
    if located.adapter is not None:
        stored = merge_adapter(stored, located.adapter)
    name = os.fspath(source.model)
    return Checkpoint(name, located.folder, located.tokenizer, stored.config, stored)


@dataclass(frozen=True, slots=True)
class Located:
    """The local folders of a model.

    Attributes:
        folder: what was named.
        base: holds `config.json` and the weights.
        adapter: holds what is to be merged into them.
        tokenizer: the adapter's folder if that has a tokenizer, else the base's.
    """

    folder: Path
    base: Path
    adapter: Path | None
    tokenizer: Path


def locate(source: Source, *, progress: bool = True) -> Located:
    """Find a model's files and those of its adapter; downloads what is not there.

    Raises:
        CheckpointError: as of `resolve`; or the folder is an adapter whose base cannot be found.
    """
    folder = base = resolve(source, progress=progress)
    adapter = None
    if source.adapter is not None:
        beside = replace(source, model=source.adapter, revision=None, adapter=None)
        adapter = resolve(beside, progress=progress)
        if not is_adapter(adapter):
            raise CheckpointError(f"{source.adapter} is no adapter: it holds no {ADAPTER_CONFIG}")
    if is_adapter(folder) and not holds_weights(folder):
        if adapter is not None:
            raise CheckpointError(f"{source.model} is an adapter itself; name its base as the model")
        base, adapter = _base_of(source, folder, progress), folder
    elif is_adapter(folder) and adapter is None:
        adapter = folder
        warnings.warn(
            f"{folder} holds an adapter beside the model, which is merged into it; to run the model without, "
            f"move {ADAPTER_CONFIG} away",
            CheckpointWarning,
            stacklevel=2,
        )
    own = adapter is not None and any((adapter / name).is_file() for name in _TOKENIZER_FILES)
    return Located(folder, base, adapter, adapter if adapter is not None and own else base)


def _base_of(source: Source, folder: Path, progress: bool) -> Path:
    """The folder of the model that an adapter was trained on."""
    fields = read_adapter_config(folder)
    name, revision = fields.get("base_model_name_or_path"), fields.get("revision")
    if not isinstance(name, str) or not name:
        raise CheckpointError(
            f"{folder} is an adapter that names no base; name the base as the model and this as its adapter"
        )
    local = os.path.isdir(os.path.expanduser(name))
    revision = revision if isinstance(revision, str) and not local else None
    try:
        base = resolve(replace(source, model=name, revision=revision, adapter=None), progress=progress)
    except CheckpointError as error:
        raise CheckpointError(
            f"{folder} is an adapter for {shown(name)}, which is not found: {error}; name its base as the "
            "model and this folder as the adapter (--model BASE --adapter FOLDER)"
        ) from error
    if is_adapter(base) and not holds_weights(base):
        raise CheckpointError(f"{folder} is an adapter for {shown(name)}, which is an adapter too")
    return base


def resolve(source: Source, *, progress: bool = True) -> Path:
    """The local folder of a model; downloads it if it is a hub id that the cache does not hold.

    Raises:
        CheckpointError: there is no such model; says what was tried and what would help.
    """
    model, revision = source.model, source.revision
    if not isinstance(model, str | os.PathLike) or not isinstance(name := os.fspath(model), str):
        raise CheckpointError(f"model is {shown(model)}, expected 'demo', a folder or a hub id")
    if name == "demo" and isinstance(model, str):
        if not (DEMO / "config.json").is_file():
            raise CheckpointError(
                f"the demo model is not in {DEMO}; install gpt2core again, or name another model"
            )
        folder = DEMO
    else:
        folder = Path(os.path.expanduser(name))
    if name and os.path.isdir(folder):  # unlike Path.is_dir, no error for a name too long for the file system
        if revision is not None:
            raise CheckpointError(
                f"{name} is a local folder, which has no revision {revision!r}; leave it out"
            )
        return folder
    if name and os.path.exists(folder):
        if name.endswith(".gguf"):
            raise UnsupportedCheckpointError(
                f"{name} is a file of llama.cpp; run `gpt2core convert {name}` and name the folder that it "
                "makes"
            )
        raise CheckpointError(f"{name} is a file; name the folder that holds it")

    if isinstance(model, str) and (pasted := hub.parse_url(name)):
        name = pasted[0]
        source = replace(source, model=name, revision=revision or pasted[1])
    if not isinstance(model, str) or not hub.is_hub_id(name):
        kind = "" if not isinstance(model, str) else ", and no hub id (name or owner/name) either"
        raise CheckpointError(f"{shown(name)} is not an existing folder{kind}; check the path")
    try:
        return hub.download(source, progress=progress)
    except CheckpointError as error:
        import difflib  # here: only an error needs it

        if not difflib.get_close_matches(name.lower(), ["demo"], cutoff=0.75):
            raise
        raise type(error)(f"{error}; did you mean demo, the bundled model?") from error


# What a dtype cannot hold rounds to infinity from here on; NaN is in no range.
_LIMITS: Final = {"float32": np.inf, "float16": 65520.0, "bfloat16": (2 - 2**-8) * 2.0**127}
_STORED: Final = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
_UNREAD_BESIDE: Final = ("vocab.json", "merges.txt", "vocab.txt")  # where there is a tokenizer.json
_WHOLE: Final = {"u2": "BF16", "i1": "I8", "u1": "U8"}  # of encodings


def save_checkpoint(folder: str | os.PathLike[str], weights: Weights, *, dtype: str = "float32") -> None:
    """Write `model.safetensors` and `config.json` as transformers writes them; no tokenizer.

    Each file is replaced as a whole, so that a reader finds the complete old or the complete new one, and
    weights that are mapped from the old file stay what they are.

    Args:
        folder: made if it does not exist.
        weights: of any precision; arrays of any float type.
        dtype: "float32", "float16" or "bfloat16" for float arrays, rounded to the nearest; quantized weights
            are written as they are, which is "float32".

    Raises:
        RequestError: another dtype.
        CheckpointError: a tensor holds a number that `dtype` cannot hold, or the folder cannot be written.
    """
    if dtype not in _STORED:
        raise RequestError(f"dtype is {shown(dtype)}, expected one of {', '.join(_STORED)}")
    if weights.precision != "float32" and dtype != "float32":
        raise RequestError(
            f"{weights.precision} weights are written as they are, not as {dtype}; leave dtype out"
        )
    faults = [
        f"{name} reaches {extreme:.6g}"
        for name, array in weights.named()
        if array.dtype.kind == "f"
        and not (extreme := max(float(array.max()), -float(array.min()))) < _LIMITS[dtype]
    ]
    if faults:
        raise CheckpointError(f"{dtype} cannot hold these weights: {listed(faults)}; save them as float32")
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be made: {error.strerror}") from error
    tensors = {
        name if name.startswith("lm_head") else f"transformer.{name}": _tensor_data(array, dtype)
        for name, array in weights.named()
    }
    # Wide numbers first, which keeps them aligned.
    ordered = sorted(tensors.items(), key=lambda item: -ITEM_NBYTES[item[1].dtype])
    with replacing(folder / WEIGHTS) as file:
        write_safetensors(file, dict(ordered))
    config = weights.config.to_dict() | _described(weights, dtype)
    with replacing(folder / "config.json") as file:
        file.write((json.dumps(config, indent=2) + "\n").encode())


def save_model(folder: str | os.PathLike[str], weights: Weights, tokenizer_files: Mapping[str, str]) -> None:
    """`save_checkpoint`, and the files of a tokenizer by name.

    Raises:
        CheckpointError: as of `save_checkpoint`; or the folder holds files that would be read beside the new
            ones and change what they mean.
    """
    folder = Path(folder)
    written = {"config.json", *tokenizer_files}
    foreign = [name for name in (ADAPTER_CONFIG, *SMALL_FILES) if name not in written]
    beside = [name for name in foreign if name not in _UNREAD_BESIDE and (folder / name).exists()]
    if beside:
        raise CheckpointError(
            f"{folder} holds {', '.join(beside)}, which would be read together with the saved model; save it "
            "to another folder, or remove them"
        )
    save_checkpoint(folder, weights)
    for name, text in tokenizer_files.items():
        with replacing(folder / name) as file:
            file.write(text.encode())


def _described(weights: Weights, dtype: str) -> dict[str, Any]:
    """The field of `config.json` that says how the weights are stored."""
    if weights.precision == "float32":
        return {"torch_dtype": dtype}
    field: dict[str, Any] = {"version": QUANTIZATION_VERSION, "precision": weights.precision}
    if isinstance(matrix := weights.blocks[0].c_attn.weight, Int4):
        field["group_size"] = matrix.group_size
    return {QUANTIZATION_FIELD: field}


def _tensor_data(array: np.ndarray[Any, Any], dtype: str) -> TensorData:
    stored = _STORED[dtype] if array.dtype.kind == "f" else _WHOLE[array.dtype.str[1:]]
    return TensorData(stored, array.shape, partial(_encode, array, stored))


def _encode(array: np.ndarray[Any, Any], stored: str) -> np.ndarray[Any, Any]:
    """The bytes of an array in the file's type, little-endian."""
    if stored == "BF16" and array.dtype.kind == "f":
        return round_to_bfloat16(array)
    return np.ascontiguousarray(array, STORED[stored])
