"""LoRA adapters as the package peft saves them, merged into a checkpoint's weights when it is loaded.

LoRA (https://arxiv.org/abs/2106.09685) adds to a matrix the product of two narrow ones, times alpha / r;
rsLoRA (https://arxiv.org/abs/2312.03732) times alpha / sqrt(r). DoRA (https://arxiv.org/abs/2402.09353) then
scales each output to a stored length.
"""

# V vocabulary, D width, I inputs, O outputs, R rank

import re
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import numpy as np

from gpt2core._json import listed, read_json_object, shown, shown_name
from gpt2core._shapes import Float32
from gpt2core.checkpoint.names import is_other_head
from gpt2core.checkpoint.safetensors import READABLE, SafetensorsFile, count_nonfinite, equal_arrays
from gpt2core.encodings import read_only
from gpt2core.errors import CheckpointError, CheckpointWarning, UnsupportedCheckpointError
from gpt2core.weights import Weights, expected_shapes, weights_from_tensors

ADAPTER_CONFIG: Final = "adapter_config.json"
ADAPTER_WEIGHTS: Final = "adapter_model.safetensors"

_READ: Final = frozenset({
    "peft_type", "r", "lora_alpha", "use_rslora", "use_dora", "lora_bias", "rank_pattern", "alpha_pattern",
    "init_lora_weights", "base_model_name_or_path", "revision",
})  # fmt: skip
# Of the training, or repeated by the file's tensors. peft itself sets fan_in_fan_out to what the layer is.
_IGNORED: Final = frozenset({
    "alora_invocation_string", "auto_mapping", "bias", "corda_config", "ensure_weight_tying", "eva_config",
    "exclude_modules", "fan_in_fan_out", "inference_mode", "layers_pattern", "layers_to_transform",
    "lora_dropout", "lora_ga_config", "loftq_config", "megatron_core", "modules_to_save", "peft_version",
    "qalora_group_size", "runtime_config", "target_modules", "task_type",
})  # fmt: skip
# The others (PiSSA, OLoRA, ...) change the base's own weights, which the adapter's file does not tell.
_PLAIN_STARTS: Final = (True, False, None, "gaussian", "eva", "orthogonal")
_PART: Final = re.compile(
    r"(?P<module>.+)\.(?P<part>lora_(?:A|B|embedding_A|embedding_B|magnitude_vector))"
    r"(?:\.default)?(?P<bias>\.bias)?(?:\.weight)?"
)
_WRAPPING: Final = re.compile(r"\.(?:base_layer|original_module|modules_to_save(?:\.default)?)\.(?=\w+$)")


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter, be it alone or beside a model."""
    return (folder / ADAPTER_CONFIG).is_file()


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """The fields of `adapter_config.json`.

    Raises:
        UnsupportedCheckpointError: the adapter is not LoRA or DoRA, or asks for what is not implemented.
        CheckpointError: the file is missing or broken.
    """
    fields = read_json_object(folder / ADAPTER_CONFIG)
    remedy = "merge it with peft (merge_and_unload, save_pretrained) and name the merged model"
    if fields.get("peft_type") != "LORA":
        raise UnsupportedCheckpointError(
            f"{folder}/{ADAPTER_CONFIG}: peft_type is {shown(fields.get('peft_type'))}; gpt2core merges "
            f'"LORA" only (with DoRA and rsLoRA); {remedy}'
        )
    refused = [
        f"{shown_name(name)} = {shown(value)}"
        for name, value in fields.items()
        if name not in _READ | _IGNORED and value
    ]
    if (start := fields.get("init_lora_weights", True)) not in _PLAIN_STARTS:
        refused.append(f"init_lora_weights = {shown(start)}")
    if refused:
        raise UnsupportedCheckpointError(
            f"{folder}/{ADAPTER_CONFIG} asks for what gpt2core does not implement: {listed(refused)}; "
            f"{remedy}"
        )
    return fields


def merge_adapter(weights: Weights, folder: Path) -> Weights:
    """New float32 weights with the adapter of `folder` merged, as peft's `merge_and_unload` computes them.

    Raises:
        UnsupportedCheckpointError: it is no LoRA adapter (see `read_adapter_config`), or the weights are
            quantized.
        CheckpointError: its tensors are not those of an adapter for this model; all faults at once.
    """
    fields = read_adapter_config(folder)
    if weights.precision != "float32":
        raise UnsupportedCheckpointError(
            f"{folder}: an adapter cannot be merged into {weights.precision} weights; load the float model "
            f"with it and round that, for example with --precision {weights.precision}"
        )
    path = folder / ADAPTER_WEIGHTS
    if not path.exists():
        pickled = (folder / "adapter_model.bin").exists()
        raise CheckpointError(
            f"{folder} holds no {ADAPTER_WEIGHTS}"
            + (", only a pickled adapter_model.bin; save it again with a newer peft" if pickled else "")
        )
    merger = _Merger(weights, fields, SafetensorsFile(path))
    if merger.faults:
        raise CheckpointError(f"{path} does not fit the model: {listed(merger.faults)}")
    return merger.weights()


class _Merger:
    """Sorts an adapter's tensors, applies them, and collects what is wrong."""

    def __init__(self, weights: Weights, fields: Mapping[str, Any], file: SafetensorsFile) -> None:
        self._config, self._fields = weights.config, fields
        self._tensors = dict(weights.named())
        self._base_embedding = self._tensors["wte.weight"]
        self._touched: set[str] = set()  # tensors that are copies already, which may be written to
        self.faults = list(file.faults)
        parts: dict[str, dict[str, np.ndarray]] = {}
        heads = []
        for name in sorted(file.entries):
            bare = name.removeprefix("base_model.model.").removeprefix("transformer.")
            if is_other_head(bare):
                heads.append(name)
            elif (array := self._read(file, name)) is None:
                continue
            elif match := _PART.fullmatch(bare):
                part = match["part"] + ("_bias" if match["bias"] else "")
                parts.setdefault(match["module"], {})[part.replace("embedding_", "")] = array
            else:
                self._replace(name, _WRAPPING.sub(".", bare), array)
        if heads:
            warnings.warn(
                f"{file.path} trains a head that is not the language model's, which is left out: "
                f"{listed([shown_name(name) for name in heads], 3)}",
                CheckpointWarning,
                stacklevel=2,
            )
        if not parts and not self._touched and not self.faults:
            self.faults.append("it holds no adapter's tensors")
        self._settle_head()
        for module, found in parts.items():
            self._add(module, found)

    def weights(self) -> Weights:
        for name in self._touched:
            read_only(self._tensors[name])
            if bad := count_nonfinite(self._tensors[name]):
                raise CheckpointError(f"the adapter makes {bad} numbers of {name} not finite; train it again")
        return weights_from_tensors(self._config, self._tensors)

    def _read(self, file: SafetensorsFile, name: str) -> np.ndarray | None:
        if (dtype := file.entries[name].dtype) not in READABLE:
            self.faults.append(f"tensor {shown_name(name)} has dtype {dtype}, expected {', '.join(READABLE)}")
            return None
        return file.float32(name)

    def _replace(self, name: str, bare: str, array: Float32[np.ndarray, "..."]) -> None:
        """Put a tensor that the adapter saved whole in the place of the base's."""
        shapes = expected_shapes(replace(self._config, tie_word_embeddings=False))
        if bare not in shapes:
            self.faults.append(f"tensor {shown_name(name)} has no place in a GPT-2")
        elif array.shape != shapes[bare] and not (
            bare in ("wte.weight", "lm_head.weight") and array.shape[1:] == shapes[bare][1:]
        ):
            self.faults.append(
                f"tensor {shown_name(name)} has shape {list(array.shape)}, expected {list(shapes[bare])}"
            )
        else:
            self._tensors[bare] = np.array(array)
            self._touched.add(bare)

    def _settle_head(self) -> None:
        """After whole tensors were replaced: the vocabulary's size, and whether the head is still tied."""
        wte, tied = self._tensors["wte.weight"], self._config.tie_word_embeddings
        if len(wte) != self._config.vocab_size:
            self._config = replace(self._config, vocab_size=len(wte))
        if not tied or not self._touched & {"wte.weight", "lm_head.weight"}:
            return
        head = self._tensors.get("lm_head.weight", self._base_embedding)
        if head.shape == wte.shape and not equal_arrays(head, wte):
            self._tensors["lm_head.weight"] = head
            self._config = replace(self._config, tie_word_embeddings=False)
        else:
            self._tensors.pop("lm_head.weight", None)
            self._touched.discard("lm_head.weight")

    def _add(self, module: str, parts: dict[str, np.ndarray]) -> None:
        """Add the product of a module's two matrices to its weight."""
        name = f"{module}.weight"
        table = module in ("wte", "wpe", "lm_head")
        target = "wte.weight" if module == "lm_head" and self._config.tie_word_embeddings else name
        if target not in self._tensors or self._tensors[target].ndim != 2:
            self.faults.append(f"module {shown_name(module)} is none of a GPT-2 that LoRA changes")
            return
        if not {"lora_A", "lora_B"} <= parts.keys():
            self.faults.append(f"module {module} has {', '.join(sorted(parts))} alone")
            return
        weight, a, b = self._tensors[target], parts["lora_A"], parts["lora_B"]  # (I, O), (R, I), (O, R)
        inputs, outputs = weight.shape[::-1] if module == "lm_head" else weight.shape
        scale, rank = self._scale(module)
        if a.shape != (rank, inputs) or b.shape != (outputs, rank):
            self.faults.append(
                f"module {module} has matrices {list(a.shape)} and {list(b.shape)}, expected "
                f"{[rank, inputs]} and {[outputs, rank]}"
            )
            return
        delta = (b @ a) * np.float32(scale) if module == "lm_head" else (b @ a).T * np.float32(scale)
        merged = weight + delta
        if (length := parts.get("lora_magnitude_vector")) is not None:
            if table or length.size != outputs:
                self.faults.append(
                    f"module {module} has a magnitude of {length.size} numbers, expected {outputs} of a layer"
                )
                return
            merged *= length.reshape(-1) / np.linalg.norm(merged, axis=0)
        elif self._fields.get("use_dora"):
            self.faults.append(f"module {module} lacks lora_magnitude_vector, which use_dora promises")
        self._tensors[target] = merged
        self._touched.add(target)
        if (bias := parts.get("lora_B_bias")) is not None and not table:
            self._tensors[f"{module}.bias"] = self._tensors[f"{module}.bias"] + bias * np.float32(scale)
            self._touched.add(f"{module}.bias")

    def _scale(self, module: str) -> tuple[float, int]:
        """What the product is multiplied by, and the rank."""
        full = module if module == "lm_head" else f"transformer.{module}"
        rank = _for_module(self._fields.get("rank_pattern"), full, self._fields.get("r", 8))
        alpha = _for_module(self._fields.get("alpha_pattern"), full, self._fields.get("lora_alpha", 8))
        if type(rank) is not int or rank < 1 or type(alpha) not in (int, float):
            self.faults.append(f"{ADAPTER_CONFIG} gives r {shown(rank)} and lora_alpha {shown(alpha)}")
            return 1.0, 1
        return alpha / (rank**0.5 if self._fields.get("use_rslora") else rank), rank


def _for_module(patterns: Any, module: str, default: Any) -> Any:
    """The value of the first pattern that is the module's name or ends it, as peft matches them."""
    for pattern, value in patterns.items() if isinstance(patterns, dict) else ():
        try:
            if re.match(rf"(.*\.)?({pattern})$", module):
                return value
        except re.error as error:
            raise CheckpointError(
                f"{ADAPTER_CONFIG}: {shown(pattern)} is no regular expression: {error}"
            ) from error
    return default
