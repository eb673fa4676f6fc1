"""Pickled weights to safetensors: the one place that reads a pickle, on request, through PyTorch."""

import json
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np

from gpt2core._json import check_no_pointer, listed, read_json_object, shown, shown_name
from gpt2core._machine import install_hint
from gpt2core.checkpoint.folder import (
    SMALL_FILES,
    WEIGHTS,
    find_pickles,
    read_config,
    weights_from_files,
)
from gpt2core.checkpoint.names import is_mask, is_other_head, wrapping_prefix
from gpt2core.checkpoint.safetensors import (
    TORCH_DTYPES,
    SafetensorsFile,
    TensorData,
    replacing,
    write_safetensors,
)
from gpt2core.config import ModelConfig
from gpt2core.errors import BackendUnavailableError, CheckpointError, UnsupportedCheckpointError
from gpt2core.weights import expected_shapes

_PICKLE: Final = "pytorch_model.bin"
_PICKLE_INDEX: Final = "pytorch_model.bin.index.json"
_SHARD_NAME: Final = re.compile(r"\w[\w.-]*\.bin", re.ASCII)
_TORCH_FLOOR: Final = (2, 10)  # below 2.6, weights_only=True could be made to run code (CVE-2025-32434)
_NANOGPT: Final = "ckpt.pt"
_LINEAR: Final = re.compile(r"\.(c_attn|c_proj|c_fc)\.weight$")
_WRAPPERS: Final = ("state_dict", "model_state_dict", "model")  # where training loops put a model's tensors


def convert_pickle(folder: str | Path, output: str | Path | None = None, *, force: bool = False) -> Path:
    """Write `model.safetensors` from a folder's pickled weights, in their own dtype, and check it whole.

    Reads `pytorch_model.bin`, the shards of `pytorch_model.bin.index.json`, or else the only `*.bin` or
    `*.pt` file, through `torch.load(weights_only=True)`. Causal masks and a tied head's copy are left out.

    A folder with a nanoGPT's `ckpt.pt` needs no `config.json`: the file holds what it says. Prefixes of all
    names, as Lightning's `model.`, are taken off, and heads of other tasks left out.

    Args:
        folder: holds the pickle and `config.json`.
        output: another folder for the result, which then also gets config and tokenizer files.
        force: overwrite files that exist.

    Returns:
        The path of the new `model.safetensors`.

    Raises:
        CheckpointError: there is no pickle, or it does not hold just the tensors that config.json promises.
        BackendUnavailableError: PyTorch is missing or too old.
    """
    folder = Path(folder)
    target = folder if output is None else Path(output)
    pickles = _find(folder)
    torch = None
    if [path.name for path in pickles] == [_NANOGPT] and not (folder / "config.json").exists():
        torch = _import_torch()
        config, nanogpt = _read_nanogpt(torch, pickles[0])
    else:
        config, nanogpt = read_config(folder), None
    copies = (
        [] if target.resolve() == folder.resolve() else [f for f in SMALL_FILES if (folder / f).is_file()]
    )
    made = (WEIGHTS, *copies, *(["config.json"] if nanogpt else []))
    existing = [name for name in made if (target / name).exists()]
    if existing and not force:
        raise CheckpointError(
            f"{target} already holds {', '.join(existing)}; remove them, or pass force=True"
        )
    torch = torch or _import_torch()
    tensors: dict[str, Any] = {}
    held = [(path, nanogpt or _load(torch, path)) for path in pickles]
    wrapping = wrapping_prefix(name for _, content in held for name in content)
    for path, content in held:
        for full, tensor in content.items():
            name = full.removeprefix(wrapping)
            if is_other_head(name):
                continue
            _check_plain(torch, path, name, tensor)
            if name in tensors:
                raise CheckpointError(f"{path}: tensor {shown_name(name)} is in another shard too")
            if not is_mask(name):
                tensors[name] = tensor
    if config.tie_word_embeddings:
        _drop_tied_head(torch, tensors)
    try:
        target.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"{target} cannot be made: {error.strerror}") from error
    for name in copies:
        with replacing(target / name) as file:
            file.write((folder / name).read_bytes())
    if nanogpt:
        with replacing(target / "config.json") as file:
            file.write((json.dumps(config.to_dict(), indent=2) + "\n").encode())
    with replacing(target / WEIGHTS) as file:
        write_safetensors(file, {name: _tensor_data(torch, tensor) for name, tensor in tensors.items()})
        file.flush()
        label = pickles[0] if len(pickles) == 1 else folder / _PICKLE_INDEX
        weights_from_files(config, [SafetensorsFile(Path(file.name))], label)
    return target / WEIGHTS


def _read_nanogpt(torch: Any, path: Path) -> tuple[ModelConfig, dict[str, Any]]:
    """The configuration and the tensors of nanoGPT's `ckpt.pt`, as transformers would lay them out.

    Its layers are `nn.Linear`, whose weights lie (out, in), and its biases may be left out; its GELU is exact
    (https://github.com/karpathy/nanoGPT/blob/master/model.py).
    """
    content = _unpickle(torch, path)
    sizes = content.get("model_args") if isinstance(content, Mapping) else None
    held = content.get("model") if isinstance(content, Mapping) else None
    if not isinstance(sizes, Mapping) or not isinstance(held, Mapping):
        raise CheckpointError(f"{path} has no model_args and model, as nanoGPT's has; config.json is missing")
    names = {"vocab_size": "vocab_size", "block_size": "n_positions"}
    names |= {name: name for name in ("n_layer", "n_head", "n_embd")}
    fields = {ours: sizes[theirs] for theirs, ours in names.items() if theirs in sizes}
    if isinstance(vocab := fields.get("vocab_size"), int) and vocab < 50257:  # not GPT-2's own tokens
        fields |= {"eos_token_id": None, "bos_token_id": None}
    config = ModelConfig.from_dict({**fields, "activation_function": "gelu"})
    wrapping = wrapping_prefix(map(str, held))
    tensors = {str(name).removeprefix(wrapping): tensor for name, tensor in held.items()}
    for name, tensor in tensors.items():
        if _LINEAR.search(name) and isinstance(tensor, torch.Tensor) and tensor.ndim == 2:
            tensors[name] = tensor.T
    for name, shape in expected_shapes(config).items():
        full = f"transformer.{name}"
        if name.endswith(".bias") and full not in tensors and not sizes.get("bias", True):
            tensors[full] = torch.zeros(shape)
    return config, tensors


def _find(folder: Path) -> list[Path]:
    if (folder / _PICKLE).exists():
        return [folder / _PICKLE]
    index = folder / _PICKLE_INDEX
    if index.exists():
        weight_map = read_json_object(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError(
                f"{index}: weight_map is {shown(weight_map)}, expected tensor names and their files"
            )
        shards = sorted({shard if isinstance(shard, str) else shown(shard) for shard in weight_map.values()})
        bad = [shown(shard) for shard in shards if not _SHARD_NAME.fullmatch(shard)]
        if bad:
            raise CheckpointError(f"{index} names {listed(bad)}, which is no plain file name; expected *.bin")
        missing = [shard for shard in shards if not (folder / shard).is_file()]
        if missing:
            raise CheckpointError(f"{folder} lacks {listed(missing)}, which {_PICKLE_INDEX} names")
        return [folder / shard for shard in shards]
    names = find_pickles(folder)
    if len(names) != 1:
        found = (
            f"several pickles ({listed(names)}); name the one to convert {_PICKLE}"
            if names
            else "no pickled weights"
        )
        raise CheckpointError(f"{folder} holds {found}")
    return [folder / names[0]]


def _import_torch() -> Any:
    try:
        import torch
    except (ImportError, OSError) as error:  # OSError: of a library that PyTorch loads itself
        missing = isinstance(error, ModuleNotFoundError) and error.name == "torch"
        why = (
            f"which is not installed; {install_hint('torch')}"
            if missing
            else f"whose import failed: {type(error).__name__}: {error}; install it again"
        )
        raise BackendUnavailableError(f"converting pickled weights needs PyTorch, {why}") from error
    version = tuple(int(part) for part in re.findall(r"\d+", torch.__version__)[:2])
    if version < _TORCH_FLOOR:
        raise BackendUnavailableError(
            f"PyTorch {torch.__version__} is too old to read pickled weights safely, the least is "
            f"{'.'.join(map(str, _TORCH_FLOOR))}; {install_hint('torch')}"
        )
    return torch


def _unpickle(torch: Any, path: Path) -> Any:
    """What a pickle holds, read by PyTorch's unpickler of tensors and plain data."""
    with path.open("rb") as file:
        check_no_pointer(path, file.read(40))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of old storage types, which say nothing to who converts
            with path.open("rb") as file:
                zipped = file.read(4) == b"PK\x03\x04"  # the format since PyTorch 1.6, which can be mapped
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except Exception as error:  # from a broken file the unpickler raises nearly anything
        forbidden = re.search(r"(?:GLOBAL|global:?|class) ([\w.]+)", str(error))
        if forbidden:
            raise UnsupportedCheckpointError(
                f"{path} is refused: beyond tensors it asks for {forbidden[1]}, which could run code; "
                "save only the model's state_dict"
            ) from error
        raise CheckpointError(
            f"{path} is no pickle of tensors, or damaged ({type(error).__name__})"
        ) from error


def _load(torch: Any, path: Path) -> Mapping[str, Any]:
    """The mapping of names to tensors that a pickle holds."""
    content = _unpickle(torch, path)
    if isinstance(content, Mapping):
        inner = [content[key] for key in _WRAPPERS if isinstance(content.get(key), Mapping)]
        content = inner[0] if inner else content
    if not isinstance(content, Mapping) or not content or not all(isinstance(name, str) for name in content):
        raise CheckpointError(
            f"{path} holds a {type(content).__name__}, expected tensors by name (a state_dict)"
        )
    return content


def _check_plain(torch: Any, path: Path, name: str, tensor: Any) -> None:
    if not isinstance(tensor, torch.Tensor):
        raise CheckpointError(f"{path}: {shown_name(name)} is a {type(tensor).__name__}, expected a tensor")
    if _dtype(tensor) not in TORCH_DTYPES or tensor.layout != torch.strided or tensor.device.type != "cpu":
        raise CheckpointError(
            f"{path}: tensor {shown_name(name)} is {tensor.layout} {_dtype(tensor)} on {tensor.device}, "
            f"expected a plain tensor of {', '.join(TORCH_DTYPES)}"
        )


def _dtype(tensor: Any) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _drop_tied_head(torch: Any, tensors: dict[str, Any]) -> None:
    """Leave out a head that only repeats the embedding, as every pickle of a tied model holds one."""
    head = tensors.get("lm_head.weight")
    embedding = tensors.get("transformer.wte.weight", tensors.get("wte.weight"))
    if head is not None and embedding is not None and torch.equal(head, embedding):
        del tensors["lm_head.weight"]


def _tensor_data(torch: Any, tensor: Any) -> TensorData:
    def read() -> np.ndarray[Any, Any]:
        array: np.ndarray[Any, Any] = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
        return array

    return TensorData(TORCH_DTYPES[_dtype(tensor)], tuple(tensor.shape), read)
