"""A model that is in memory as an object of transformers, read as the files that it would save."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from gpt2core._json import shown_name
from gpt2core._shapes import Float32
from gpt2core.checkpoint.folder import weights_from_files, with_generation_config
from gpt2core.checkpoint.safetensors import TORCH_DTYPES
from gpt2core.config import ModelConfig, parse_json_object
from gpt2core.encodings import read_only
from gpt2core.errors import CheckpointError, RequestError, in_short
from gpt2core.weights import Weights

_CALLED: Final = "hf_model"


@dataclass(frozen=True, slots=True)
class HeldTensor:
    """A tensor in memory; `read()` gives its numbers as float32."""

    dtype: str
    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]


class HeldTensors:
    """Tensors in memory under the names of a checkpoint, read as those of a file are."""

    def __init__(self, label: str, entries: Mapping[str, HeldTensor], faults: Mapping[str, str]) -> None:
        """`faults` says what is wrong with tensors that cannot be read."""
        self.path = Path(label)
        self.entries = dict(entries)
        self.faulty = set(faults)
        self.faults = [f"tensor {shown_name(name)} {fault}" for name, fault in faults.items()]

    def float32(self, name: str) -> Float32[np.ndarray, "..."]:
        """A tensor's numbers, read-only."""
        return read_only(self.entries[name].read())

    stored = float32


def read_transformers(model: Any, *, strict: bool = False) -> Weights:
    """The weights of a GPT-2 model of transformers as float32 copies.

    Its configuration and its tensors are checked as those of a folder, and nothing else of the object is
    used. A head that is tied is copied once.

    Args:
        model: `GPT2LMHeadModel` or a relative, also compiled or in DataParallel.
        strict: as of `ModelConfig.from_dict`.

    Raises:
        RequestError: it is no model of transformers, or an adapter that is not merged.
        CheckpointError: its configuration or its tensors are not those of a GPT-2 language model.
        UnsupportedCheckpointError: its configuration asks for what is not implemented.
    """
    while (inner := getattr(model, "_orig_mod", None) or getattr(model, "module", None)) is not None:
        model = inner  # torch.compile's, DataParallel's
    if hasattr(model, "merge_and_unload"):
        raise RequestError("hf_model is a model of peft; pass what its merge_and_unload() gives")
    if not hasattr(model, "state_dict") or not hasattr(getattr(model, "config", None), "to_json_string"):
        raise RequestError(
            f"hf_model is {in_short(model)}; expected a model of transformers, such as GPT2LMHeadModel"
        )
    fields = parse_json_object(model.config.to_json_string(), f"{_CALLED}.config")
    fields["architectures"] = [type(model).__name__]  # as its save_pretrained writes
    try:
        config = ModelConfig.from_dict(fields, strict=strict)
    except CheckpointError as error:
        raise type(error)(str(error).replace("config.json", f"{_CALLED}.config", 1)) from error
    generation = getattr(model, "generation_config", None)
    config = with_generation_config(
        config, getattr(generation, "eos_token_id", None), f"{_CALLED}.generation_config"
    )
    return weights_from_files(config, [_tensors(model.state_dict())], Path(_CALLED))


def _tensors(state: Mapping[str, Any]) -> HeldTensors:
    entries, faults = {}, {}
    copies: dict[tuple[Any, ...], np.ndarray] = {}
    for name, tensor in state.items():
        dtype = str(getattr(tensor, "dtype", type(tensor).__name__)).removeprefix("torch.")
        if not hasattr(tensor, "detach"):
            continue  # state of a layer that is no tensor
        if tensor.device.type == "meta":
            faults[name] = 'has no numbers, it is on device "meta"; load the model with its weights'
            continue
        entries[name] = HeldTensor(TORCH_DTYPES.get(dtype, dtype), tuple(tensor.shape), _Copy(tensor, copies))
    return HeldTensors(_CALLED, entries, faults)


@dataclass(frozen=True, slots=True)
class _Copy:
    """Reads a tensor of PyTorch; what lies at one place in memory is copied once."""

    tensor: Any
    copies: dict[tuple[Any, ...], np.ndarray]

    def __call__(self) -> np.ndarray:
        tensor = self.tensor
        place = (tensor.device, tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())
        if place not in self.copies:
            self.copies[place] = np.array(tensor.detach().cpu().float().numpy(), order="C")
        return self.copies[place]
