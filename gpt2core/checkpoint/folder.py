"""A checkpoint's folder: its config, its weight files, and everything that can be wrong with its tensors.

A quantized one has `"gpt2core_quantization": {"version": 1, "precision": ...}` in its `config.json`, for
"int4" also `"group_size"`. Its tensors have the names of the float32 checkpoint; beside a rounded `X.weight`
stand `X.weight_scale` (F32) and, for "int4", `X.weight_zero` (U8), in the shapes of `gpt2core.encodings`.
"""

import re
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np

from gpt2core._json import listed, read_json_object, shown, shown_name
from gpt2core.checkpoint.names import HEAD, MODEL, is_mask, is_other_head, layer_of, wrapping_prefix
from gpt2core.checkpoint.safetensors import (
    READABLE,
    SafetensorsFile,
    Tensors,
    count_nonfinite,
    equal_arrays,
)
from gpt2core.config import QUANTIZATION_FIELD, ModelConfig, known_token_ids
from gpt2core.encodings import BFloat16, Int4, Int8
from gpt2core.errors import CheckpointError, CheckpointWarning, UnsupportedCheckpointError
from gpt2core.quantization.rounding import GROUP_SIZES, PRECISIONS
from gpt2core.weights import Matrix, Weights, expected_shapes, weights_from_tensors

WEIGHTS: Final = "model.safetensors"
WEIGHTS_INDEX: Final = "model.safetensors.index.json"
SMALL_FILES: Final = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "vocab.json",
    "merges.txt", "vocab.txt", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
    "spiece.model", "sentencepiece.bpe.model", "tokenizer.model",
)  # fmt: skip
"""What a checkpoint's folder may hold beside its weights; the first is needed, some tokenizer too."""

QUANTIZATION_VERSION: Final = 1
_EMBEDDING: Final = "wte.weight"
_SHARD_NAME: Final = re.compile(r"\w[\w.-]*\.safetensors", re.ASCII)
_TRAINING_STATE: Final = re.compile(
    r"(adapter_model|training_args|optimizer|scheduler|scaler|rng_state\w*)\.(bin|pt)"
)


@dataclass(frozen=True, slots=True)
class Storage:
    """How a folder's weights are stored: their precision, and of "int4" the inputs that share a scale."""

    precision: str = "float32"
    group_size: int | None = None

    def parts(self, name: str, shape: tuple[int, ...]) -> dict[str, tuple[tuple[str, ...], tuple[int, ...]]]:
        """Dtypes and shape of each tensor that stands for a parameter, by the ending of its name."""
        table = name in (_EMBEDDING, HEAD)
        if self.precision == "float32":
            return {"": (READABLE, shape)}
        if len(shape) == 1 or name == "wpe.weight":
            return {"": (("F32",), shape)}
        if self.precision == "bfloat16":
            return {"": (("BF16",), shape)}
        if table or self.group_size is None:
            return {"": (("I8",), shape), "_scale": (("F32",), (shape[0], 1) if table else shape[1:])}
        inputs, outputs = shape
        groups = -(-inputs // self.group_size)
        return {
            "": (("U8",), (outputs, groups * self.group_size // 2)),
            "_scale": (("F32",), (outputs, groups)),
            "_zero": (("U8",), (outputs, -(-groups // 2))),
        }


FLOAT32: Final = Storage()


def read_config(folder: Path, *, strict: bool = False) -> ModelConfig:
    """Read `config.json`; a `generation_config.json` that names eos_token_id overrides its.

    `strict` is that of `ModelConfig.from_dict`.

    Raises:
        CheckpointError: a file is missing (config.json) or wrong.
        UnsupportedCheckpointError: config.json asks for what is not implemented.
    """
    return _read_description(folder, strict)[0]


def read_storage(folder: Path, *, strict: bool = False) -> tuple[ModelConfig, Storage]:
    """`read_config`, and how the weights are stored.

    Raises:
        CheckpointError: as of `read_config`, or this version does not read such weights.
    """
    config, fields = _read_description(folder, strict)
    return config, _storage(folder, fields.get(QUANTIZATION_FIELD))


def _read_description(folder: Path, strict: bool) -> tuple[ModelConfig, dict[str, Any]]:
    if not (folder / "config.json").exists():
        raise CheckpointError(f"{folder}/config.json does not exist{_what_is(folder)}")
    fields = read_json_object(folder / "config.json")
    try:
        config = ModelConfig.from_dict(fields, strict=strict)
    except UnsupportedCheckpointError as error:
        raise UnsupportedCheckpointError(_in_folder(folder, error)) from error
    except CheckpointError as error:
        raise CheckpointError(_in_folder(folder, error)) from error
    path = folder / "generation_config.json"
    eos = read_json_object(path).get("eos_token_id") if path.exists() else None
    return with_generation_config(config, eos, str(path)), fields


def with_generation_config(config: ModelConfig, eos_token_id: Any, label: str) -> ModelConfig:
    """A configuration with the end-of-text tokens that a generation config names; None names none.

    Raises:
        CheckpointError: they are no token ids; `label` is how the error calls the generation config.
    """
    if eos_token_id is None:
        return config
    try:
        return replace(config, eos_token_ids=known_token_ids(eos_token_id, config.vocab_size))
    except CheckpointError as error:
        raise CheckpointError(str(error).replace("config.json", label, 1)) from error


_TRAINED: Final = re.compile(r"checkpoint-(\d{1,12})")


def _what_is(folder: Path) -> str:
    """What a folder without config.json is instead, and what to do about it."""
    try:
        names = sorted(path.name for path in folder.iterdir())
    except OSError as error:
        return f" ({error.strerror})"
    if not names:
        return ": the folder is empty"
    trained = sorted((int(match[1]), name) for name in names if (match := _TRAINED.fullmatch(name)))
    if trained:
        latest = trained[-1][1]
        return f"; the folder holds a training's checkpoints, the last is {latest}: name {folder / latest}"
    if holds_weights(folder):
        return ""
    files = listed([shown_name(name) for name in names], 5)
    return f"; the folder holds {files}; name the one that holds the model"


def _storage(folder: Path, field: Any) -> Storage:
    if field is None:
        return Storage()
    if isinstance(field, dict) and field.get("version") == QUANTIZATION_VERSION:
        storage = Storage(field.get("precision", ""), field.get("group_size"))
        sizes = GROUP_SIZES if storage.precision == "int4" else (None,)
        known = field.keys() <= {"version", "precision", "group_size"}
        if known and storage.precision in PRECISIONS and storage.group_size in sizes:
            return storage
    raise CheckpointError(
        f"{folder}/config.json: {QUANTIZATION_FIELD} is {shown(field)}, which this version does not read; "
        "quantize the model again with `gpt2core quantize`"
    )


def _either(names: tuple[str, ...]) -> str:
    *most, last = names
    return f"{', '.join(most)} or {last}" if most else last


def _in_folder(folder: Path, error: CheckpointError) -> str:
    text = str(error)
    return f"{folder}/{text}" if text.startswith("config.json") else text


_OTHER_FORMATS: Final = {
    ".h5": "weights of TensorFlow; load them with transformers 4 (from_tf=True) and save_pretrained",
    ".msgpack": "weights of Flax; load them with transformers 4 (from_flax=True) and save_pretrained",
    ".ckpt.index": "a checkpoint of TensorFlow 1; run transformers 4's convert_gpt2_original_tf_checkpoint",
    ".onnx": "a graph without the model's configuration; take the checkpoint that it was exported from",
    ".ot": "weights of rust-bert; take the PyTorch checkpoint that they were made from",
    ".gguf": "a file of llama.cpp; run `gpt2core convert {file}` and name the folder that it makes",
}
"""Ending of a file's name -> what it is and what to do with it."""


def holds_weights(folder: Path) -> bool:
    """Whether a folder holds a model's own weights, readable or pickled, beside what an adapter has."""
    return any((folder / name).exists() for name in (WEIGHTS, WEIGHTS_INDEX)) or bool(find_pickles(folder))


def find_pickles(folder: Path) -> list[str]:
    """Names of files in `folder` that look like pickled weights."""
    names = sorted(path.name for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".pth", ".ckpt"))
    return [name for name in names if not _TRAINING_STATE.fullmatch(name)]


def read_weights(folder: Path, config: ModelConfig, storage: Storage = FLOAT32) -> Weights:
    """Map `model.safetensors`, or the shards that `model.safetensors.index.json` lists.

    The result's own config differs from `config` in one case: where that ties the head but the file holds a
    head with other numbers, the head is separate, as in transformers from version 5 on.

    Raises:
        CheckpointError: naming every missing, surplus, misshapen, non-finite, truncated or otherwise wrong
            tensor, in the file's own spelling.
    """
    if (folder / WEIGHTS).exists():
        return weights_from_files(config, [SafetensorsFile(folder / WEIGHTS)], folder / WEIGHTS, storage)
    if (folder / WEIGHTS_INDEX).exists():
        files, faults = _open_shards(folder)
        return weights_from_files(config, files, folder / WEIGHTS_INDEX, storage, faults)
    try:
        pickles = find_pickles(folder)
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be read: {error.strerror}") from error
    if pickles:
        raise UnsupportedCheckpointError(
            f"{folder} holds pickled weights ({listed(pickles, 3)}), which can run code when they are read; "
            f"run `gpt2core convert {folder}` once to make {WEIGHTS} of them"
        )
    for name in sorted(path.name for path in folder.iterdir()):
        if remedy := next((text for ending, text in _OTHER_FORMATS.items() if name.endswith(ending)), None):
            raise UnsupportedCheckpointError(
                f"{folder} holds no {WEIGHTS} but {shown_name(name)}, {remedy.format(file=folder / name)}"
            )
    raise CheckpointError(f"{folder} holds no weights: neither {WEIGHTS} nor {WEIGHTS_INDEX}")


def _open_shards(folder: Path) -> tuple[list[SafetensorsFile], list[str]]:
    """Open each shard that the index names; what disagrees with the index is a fault."""
    path = folder / WEIGHTS_INDEX
    weight_map = read_json_object(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(
            f"{path}: weight_map is {shown(weight_map)}, expected tensor names and their files"
        )
    shards: dict[str, set[str]] = {}
    for name, shard in weight_map.items():
        shards.setdefault(shard if isinstance(shard, str) else shown(shard), set()).add(name)
    files, faults = [], []
    for shard, promised in sorted(shards.items()):
        if not _SHARD_NAME.fullmatch(shard):  # no separators: a shard cannot lie outside the folder
            faults.append(
                f"the index names {shown(shard)} for {_some(promised)}, which is no plain file name"
            )
            continue
        try:
            file = SafetensorsFile(folder / shard)
        except CheckpointError as error:
            faults.append(f"{error} (it should hold {_some(promised)})")
            continue
        files.append(file)
        present = file.entries.keys() | file.faulty
        faults += [f"tensor {shown_name(name)} is not in {shard}" for name in sorted(promised - present)]
        faults += [
            f"tensor {shown_name(name)} of {shard} is not so indexed" for name in sorted(present - promised)
        ]
    return files, faults


def _some(names: Iterable[str]) -> str:
    return "tensors " + listed(sorted(map(shown_name, names)), 2).replace("; ", ", ")


def weights_from_files(
    config: ModelConfig,
    files: Sequence[Tensors],
    label: Path,
    storage: Storage = FLOAT32,
    faults: Iterable[str] = (),
) -> Weights:
    """Arrange the tensors of one checkpoint's files, of which `label` is how errors call it.

    Raises:
        CheckpointError: listing all `faults`, those of the files, and those of their tensors.
    """
    reader = _Reader(config, storage, files)
    if reader.remarks:
        warnings.warn(f"{label}: {listed(reader.remarks)}", CheckpointWarning, stacklevel=2)
    every = [*faults, *reader.faults]
    if every:
        count = f"{len(every)} faults" if len(every) > 1 else "a fault"
        raise CheckpointError(f"{label} has {count}: {listed(every)}")
    return reader.weights()


class _Reader:
    """Matches the tensors of files with those that a config promises, and collects what is wrong."""

    def __init__(self, config: ModelConfig, storage: Storage, files: Sequence[Tensors]) -> None:
        self.config, self.storage = config, storage
        self.faults: list[str] = []
        self._tensors: dict[str, np.ndarray] = {}  # by the name without prefix
        self._prefixed = False
        self._found: dict[str, tuple[Tensors, str]] = {}  # -> the file, its spelling
        self._sharded = len(files) > 1
        self.remarks: list[str] = []
        self._wrapping = wrapping_prefix(name for file in files for name in file.entries.keys() | file.faulty)
        if self._wrapping:
            self.remarks.append(f'the names of all tensors begin with "{self._wrapping}", which is taken off')
        self._heads: list[str] = []
        for file in files:
            self.faults += [self._in(file, fault) for fault in file.faults]
            for name in sorted(file.entries.keys() | file.faulty):
                self._find(file, name)
        if self._heads and self._found:
            self.remarks.append(
                f"heads that are not the language model's are left out: {listed(self._heads, 3)}"
            )
        self._match()

    def _find(self, file: Tensors, name: str) -> None:
        inner = name.removeprefix(self._wrapping)
        if is_other_head(inner):
            self._heads.append(shown_name(name))
            return
        if is_mask(inner):
            return
        bare = inner if inner == MODEL + HEAD else inner.removeprefix(MODEL)
        if bare != inner:
            self._prefixed = True
        if bare in self._found:
            other = shown_name(self._found[bare][1])
            self.faults.append(self._in(file, f"tensor {shown_name(name)} stands twice, also as {other}"))
        else:
            self._found[bare] = file, name

    def _match(self) -> None:
        if not any(layer_of(name) is not None or name in (_EMBEDDING, HEAD) for name in self._found):
            names = self._heads + [shown_name(name) for _, name in self._found.values()]
            self.faults.append(
                "it holds no GPT-2 language model"
                + (f", its tensors are {listed(names, 3)}" if names else " and no tensors")
            )
            return
        # One block has 12 tensors: a config that lies about n_layer cannot make this list a billion names.
        held = max((layer_of(name) or 0) + 1 for name in self._found)
        layers = min(self.config.n_layer, held, len(self._found) + 1)
        if held != self.config.n_layer:
            self.faults.append(f"config.json says {self.config.n_layer} layers, the file has {held}")
        shapes = expected_shapes(replace(self.config, n_layer=layers))
        if self._head_may_differ and HEAD in self._found:
            shapes[HEAD] = shapes[_EMBEDDING]
            if _EMBEDDING not in self._found:
                del shapes[_EMBEDDING]
        expected = {
            name + ending: part
            for name, shape in shapes.items()
            for ending, part in self.storage.parts(name, shape).items()
        }
        for name, (dtypes, shape) in expected.items():
            if name not in self._found:
                prefix = MODEL if self._prefixed and not name.startswith(HEAD) else ""
                why = " (it is a GPT-2 without its language model's head)" if name == HEAD else ""
                self.faults.append(
                    f"tensor {self._wrapping}{prefix}{name} of shape {list(shape)} is missing{why}"
                )
            else:
                self._read(name, dtypes, shape)
        self.faults += [
            self._in(file, f"tensor {shown_name(name)} is surplus, config.json has no place for it")
            for bare, (file, name) in self._found.items()
            if bare not in expected and (layer_of(bare) or 0) < layers
        ]

    @property
    def _head_may_differ(self) -> bool:
        """Whether a head that the file holds may have other numbers than the embedding it is tied to."""
        return self.config.tie_word_embeddings and self.storage.precision == "float32"

    def _read(self, bare: str, dtypes: tuple[str, ...], shape: tuple[int, ...]) -> None:
        file, name = self._found[bare]
        if name in file.faulty:
            return  # among the file's own faults
        entry = file.entries[name]
        fault = ""
        if entry.dtype not in dtypes:
            fault = f"has dtype {entry.dtype}, expected {_either(dtypes)}"
        elif entry.shape != shape:
            fault = f"has shape {list(entry.shape)}, expected {list(shape)}"
        elif "F32" not in dtypes:
            self._tensors[bare] = file.stored(name)
        else:
            self._tensors[bare] = file.float32(name)
            if bad := count_nonfinite(self._tensors[bare]):
                fault = f"holds {bad} of {self._tensors[bare].size} numbers that are not finite in float32"
        if fault:
            self.faults.append(self._in(file, f"tensor {shown_name(name)} {fault}"))

    def _in(self, file: Tensors, fault: str) -> str:
        return f"{file.path.name}: {fault}" if self._sharded else fault

    def weights(self) -> Weights:
        tensors, config = self._tensors, self.config
        if self._head_may_differ and HEAD in tensors:
            if _EMBEDDING not in tensors:
                tensors[_EMBEDDING] = tensors[HEAD]
            elif not equal_arrays(tensors[HEAD], tensors[_EMBEDDING]):
                config = replace(config, tie_word_embeddings=False)
        matrices = {name: self._matrix(name, shape) for name, shape in expected_shapes(config).items()}
        return weights_from_tensors(config, matrices, self.storage.precision)

    def _matrix(self, name: str, shape: tuple[int, ...]) -> Matrix:
        values, *more = (self._tensors[name + ending] for ending in self.storage.parts(name, shape))
        match more:
            case scale, zero:
                return Int4(values, scale, zero, inputs=shape[0])
            case [scale]:
                return Int8(values, scale)
        return values if values.dtype == np.float32 else BFloat16(values)
