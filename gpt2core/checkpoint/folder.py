"""A checkpoint's folder: its config, its weight files, and everything that can be wrong with its tensors."""

import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Final

import numpy as np

from gpt2core._json import listed, read_json_object, shown, shown_name
from gpt2core.checkpoint.safetensors import READABLE, SafetensorsFile, count_nonfinite, equal_arrays
from gpt2core.config import ModelConfig, known_token_ids
from gpt2core.errors import CheckpointError, UnsupportedCheckpointError
from gpt2core.weights import Weights, expected_shapes, weights_from_tensors

WEIGHTS: Final = "model.safetensors"
WEIGHTS_INDEX: Final = "model.safetensors.index.json"
SMALL_FILES: Final = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "vocab.json",
    "merges.txt", "special_tokens_map.json", "added_tokens.json",
)  # fmt: skip
"""What a checkpoint's folder may hold beside its weights; the first is needed, some tokenizer too."""

_PREFIX: Final = "transformer."
_HEAD: Final = "lm_head.weight"
_EMBEDDING: Final = "wte.weight"
_MASK: Final = re.compile(rf"({re.escape(_PREFIX)})?h\.\d+\.attn\.(bias|masked_bias)")
_SHARD_NAME: Final = re.compile(r"\w[\w.-]*\.safetensors", re.ASCII)
_TRAINING_STATE: Final = re.compile(r"(training_args|optimizer|scheduler|scaler|rng_state\w*)\.(bin|pt)")


def read_config(folder: Path) -> ModelConfig:
    """Read `config.json`; a `generation_config.json` that names eos_token_id overrides its.

    Raises:
        CheckpointError: a file is missing (config.json) or wrong.
        UnsupportedCheckpointError: config.json asks for what is not implemented.
    """
    try:
        config = ModelConfig.from_dict(read_json_object(folder / "config.json"))
    except UnsupportedCheckpointError as error:
        raise UnsupportedCheckpointError(_in_folder(folder, error)) from error
    except CheckpointError as error:
        raise CheckpointError(_in_folder(folder, error)) from error
    path = folder / "generation_config.json"
    if not path.exists():
        return config
    eos = read_json_object(path).get("eos_token_id")
    if eos is None:
        return config
    try:
        return replace(config, eos_token_ids=known_token_ids(eos, config.vocab_size))
    except CheckpointError as error:
        raise CheckpointError(str(error).replace("config.json", str(path), 1)) from error


def _in_folder(folder: Path, error: CheckpointError) -> str:
    text = str(error)
    return f"{folder}/{text}" if text.startswith("config.json") else text


def find_pickles(folder: Path) -> list[str]:
    """Names of files in `folder` that look like pickled weights."""
    names = sorted(path.name for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".pth", ".ckpt"))
    return [name for name in names if not _TRAINING_STATE.fullmatch(name)]


def is_mask(name: str) -> bool:
    """Whether a tensor is a causal mask, which older versions of transformers saved with the weights."""
    return bool(_MASK.fullmatch(name))


def read_weights(folder: Path, config: ModelConfig) -> Weights:
    """Read `model.safetensors`, or the shards that `model.safetensors.index.json` lists.

    The result's own config differs from `config` in one case: where that ties the head but the file holds a
    head with other numbers, the head is separate, as in transformers from version 5 on.

    Raises:
        CheckpointError: naming every missing, surplus, misshapen, non-finite, truncated or otherwise wrong
            tensor, in the file's own spelling.
    """
    if (folder / WEIGHTS).exists():
        return weights_from_files(config, [SafetensorsFile(folder / WEIGHTS)], folder / WEIGHTS)
    if (folder / WEIGHTS_INDEX).exists():
        files, faults = _open_shards(folder)
        return weights_from_files(config, files, folder / WEIGHTS_INDEX, faults)
    try:
        pickles = find_pickles(folder)
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be read: {error.strerror}") from error
    if pickles:
        raise UnsupportedCheckpointError(
            f"{folder} holds pickled weights ({listed(pickles, 3)}), which can run code when they are read; "
            f"run `gpt2core convert {folder}` once to make {WEIGHTS} of them"
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
    config: ModelConfig, files: list[SafetensorsFile], label: Path, faults: Iterable[str] = ()
) -> Weights:
    """Arrange the tensors of one checkpoint's files, of which `label` is how errors call it.

    Raises:
        CheckpointError: listing all `faults`, those of the files, and those of their tensors.
    """
    reader = _Reader(config, files)
    every = [*faults, *reader.faults]
    if every:
        count = f"{len(every)} faults" if len(every) > 1 else "a fault"
        raise CheckpointError(f"{label} has {count}: {listed(every)}")
    return reader.weights()


class _Reader:
    """Matches the tensors of files with those that a config promises, and collects what is wrong."""

    def __init__(self, config: ModelConfig, files: list[SafetensorsFile]) -> None:
        self.config = config
        self.faults: list[str] = []
        self._tensors: dict[str, np.ndarray] = {}  # by the name without prefix
        self._prefixed = False
        self._found: dict[str, tuple[SafetensorsFile, str]] = {}  # -> the file, its spelling
        self._sharded = len(files) > 1
        for file in files:
            self.faults += [self._in(file, fault) for fault in file.faults]
            for name in sorted(file.entries.keys() | file.faulty):
                self._find(file, name)
        self._match()

    def _find(self, file: SafetensorsFile, name: str) -> None:
        if is_mask(name):
            return
        bare = name if name == _PREFIX + _HEAD else name.removeprefix(_PREFIX)
        if bare != name:
            self._prefixed = True
        if bare in self._found:
            other = shown_name(self._found[bare][1])
            self.faults.append(self._in(file, f"tensor {shown_name(name)} stands twice, also as {other}"))
        else:
            self._found[bare] = file, name

    def _match(self) -> None:
        # One block has 12 tensors: a config that lies about n_layer cannot make this list a billion names.
        layers = min(self.config.n_layer, len(self._found) + 1)
        if layers < self.config.n_layer:
            self.faults.append(
                f"config.json promises {self.config.n_layer} blocks, the file has {len(self._found)} tensors"
            )
        expected = expected_shapes(replace(self.config, n_layer=layers))
        if self.config.tie_word_embeddings and _HEAD in self._found:
            expected[_HEAD] = expected[_EMBEDDING]
            if _EMBEDDING not in self._found:
                del expected[_EMBEDDING]
        for name, shape in expected.items():
            if name not in self._found:
                prefix = _PREFIX if self._prefixed and name != _HEAD else ""
                self.faults.append(f"tensor {prefix}{name} of shape {list(shape)} is missing")
            else:
                self._read(name, shape)
        self.faults += [
            self._in(file, f"tensor {shown_name(name)} is surplus, config.json has no place for it")
            for bare, (file, name) in self._found.items()
            if bare not in expected
        ]

    def _read(self, bare: str, shape: tuple[int, ...]) -> None:
        file, name = self._found[bare]
        if name in file.faulty:
            return  # among the file's own faults
        entry = file.entries[name]
        fault = ""
        if entry.dtype not in READABLE:
            fault = f"has dtype {entry.dtype}, expected {', '.join(READABLE[:-1])} or {READABLE[-1]}"
        elif entry.shape != shape:
            fault = f"has shape {list(entry.shape)}, expected {list(shape)}"
        else:
            self._tensors[bare] = file.float32(name)
            if bad := count_nonfinite(self._tensors[bare]):
                fault = f"holds {bad} of {self._tensors[bare].size} numbers that are not finite in float32"
        if fault:
            self.faults.append(self._in(file, f"tensor {shown_name(name)} {fault}"))

    def _in(self, file: SafetensorsFile, fault: str) -> str:
        return f"{file.path.name}: {fault}" if self._sharded else fault

    def weights(self) -> Weights:
        tensors, config = self._tensors, self.config
        if config.tie_word_embeddings and _HEAD in tensors:
            if _EMBEDDING not in tensors:
                tensors[_EMBEDDING] = tensors[_HEAD]
            elif not equal_arrays(tensors[_HEAD], tensors[_EMBEDDING]):
                config = replace(config, tie_word_embeddings=False)
        return weights_from_tensors(config, tensors)
