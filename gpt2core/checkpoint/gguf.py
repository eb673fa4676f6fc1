"""GGUF, llama.cpp's format, of architecture gpt2: read into a folder, and written, by the package gguf.

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. Its linear layers lie (out, in), the
position embedding and what has one dimension stay float32, and its GPT-2 knows one activation, GELU by tanh.
"""

# V vocabulary, D width, I inputs, O outputs

import json
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np

from gpt2core._json import listed, shown, shown_name
from gpt2core.checkpoint.folder import SMALL_FILES, WEIGHTS, weights_from_files
from gpt2core.checkpoint.in_memory import HeldTensor, HeldTensors
from gpt2core.checkpoint.open import open_checkpoint, save_model
from gpt2core.checkpoint.safetensors import replacing
from gpt2core.config import ModelConfig
from gpt2core.errors import (
    BackendUnavailableError,
    CheckpointError,
    CheckpointWarning,
    RequestError,
    UnsupportedCheckpointError,
)
from gpt2core.quantization.rounding import dequantize
from gpt2core.tokenizer.byte_level import ByteLevelParts, byte_level_parts, byte_level_tokenizer
from gpt2core.tokenizer.tokenizer import Tokenizer
from gpt2core.weights import BLOCK_NAMES, LINEAR, Weights

GGUF_TYPES: Final = {"f32": 0, "f16": 1, "q8_0": 7}
"""Types that are written -> llama.cpp's number of a file of it."""
_TANH_GELUS: Final = ("gelu_accurate", "gelu_fast", "gelu_new", "gelu_python_tanh", "gelu_pytorch_tanh")
_BLOCK: Final = {
    "ln_1": "attn_norm",
    "c_attn": "attn_qkv",
    "attn_c_proj": "attn_output",
    "ln_2": "ffn_norm",
    "c_fc": "ffn_up",
    "mlp_c_proj": "ffn_down",
}
"""Field of `Block` -> name in GGUF."""
_WHOLE: Final = {
    "token_embd.weight": "wte.weight",
    "position_embd.weight": "wpe.weight",
    "output_norm.weight": "ln_f.weight",
    "output_norm.bias": "ln_f.bias",
    "output.weight": "lm_head.weight",
}
_FIELDS: Final = {
    "gpt2.context_length": "n_positions",
    "gpt2.embedding_length": "n_embd",
    "gpt2.feed_forward_length": "n_inner",
    "gpt2.block_count": "n_layer",
    "gpt2.attention.head_count": "n_head",
    "gpt2.attention.layer_norm_epsilon": "layer_norm_epsilon",
}
# Those whose texts llama.cpp splits as GPT-2's; files from before 2024 name none.
_SPLITS: Final = ("gpt-2", "default", "phi-2", "mpt", "olmo", "jais", None)
_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5  # llama.cpp's kinds of tokens
_Q8_0_BLOCK: Final = 32


def read_gguf(path: Path) -> tuple[Weights, Tokenizer | None]:
    """The weights of a GGUF file as float32, and its tokenizer; None, with a warning, where none is read.

    Raises:
        CheckpointError: the file is broken, or its tensors are not those of its own fields.
        UnsupportedCheckpointError: another architecture, or a type of numbers that the package cannot read.
        BackendUnavailableError: the package gguf is missing.
    """
    gguf = _import_gguf()
    if not path.is_file():
        raise CheckpointError(f"{path} {'is not a file' if path.exists() else 'does not exist'}")
    try:
        file = gguf.GGUFReader(path)
        fields = {name: field.contents() for name, field in file.fields.items()}
    except Exception as error:  # of a broken file the package raises nearly anything
        raise CheckpointError(
            f"{path} is no GGUF file, or broken ({type(error).__name__}: {error})"
        ) from error
    if (architecture := fields.get("general.architecture")) != "gpt2":
        raise UnsupportedCheckpointError(
            f'{path}: its architecture is {shown(architecture)}; gpt2core runs "gpt2" only'
        )
    if fields.get("split.count", 1) > 1:
        raise UnsupportedCheckpointError(
            f"{path} is one of {fields['split.count']} parts; join them with llama.cpp's llama-gguf-split"
        )
    entries = dict(_entries(gguf, path, file.tensors))
    config = _config(path, fields, entries)
    weights = weights_from_files(config, [HeldTensors(path.name, entries, {})], path)
    return weights, _read_tokenizer(path, fields)


def write_gguf(path: Path, weights: Weights, tokenizer: Tokenizer | None, *, kind: str = "f32") -> None:
    """Write a GGUF file that llama.cpp runs.

    Args:
        path: replaced as a whole.
        weights: of any precision; quantized ones are written as what their numbers stand for.
        tokenizer: left out, with a warning, where it is not GPT-2's byte-level BPE with merges; then
            llama.cpp takes token ids only.
        kind: "f32", "f16" or "q8_0" of the matrices; with the latter a matrix whose inputs are no multiple of
            32 is float16.

    Raises:
        RequestError: another kind.
        UnsupportedCheckpointError: the model computes what GGUF's gpt2 cannot say; all of it is named.
        CheckpointError: a number is too large for float16, or the file cannot be written.
        BackendUnavailableError: the package gguf is missing.
    """
    if kind not in GGUF_TYPES:
        raise RequestError(f"the type {shown(kind)} is not written; use {', '.join(GGUF_TYPES)}")
    _check_expressible(weights.config)
    gguf = _import_gguf()
    config = weights.config
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"{path.parent} cannot be made: {error.strerror}") from error
    with replacing(path) as file:
        out = gguf.GGUFWriter(None, "gpt2")
        for name, field in _FIELDS.items():
            value = config.mlp_dim if field == "n_inner" else getattr(config, field)
            out.add_float32(name, value) if field == "layer_norm_epsilon" else out.add_uint32(name, value)
        out.add_vocab_size(config.vocab_size)
        out.add_file_type(GGUF_TYPES[kind])
        out.add_quantization_version(gguf.GGML_QUANT_VERSION)
        _write_tokenizer(out, config, tokenizer)
        for name, array in _arrays(dequantize(weights)):
            stored = _stored_as(name, array, kind)
            if stored == "f16" and not np.abs(array).max() < 65520:
                raise CheckpointError(f"float16 cannot hold {name}; write f32")
            number = gguf.GGMLQuantizationType[stored.upper()]
            data = gguf.quants.quantize(np.ascontiguousarray(array), number)
            out.add_tensor(name, data, raw_dtype=number)
        out.write_header_to_file(Path(file.name))
        out.write_kv_data_to_file()
        out.write_tensors_to_file()
        out.close()


def convert_from_gguf(path: Path, folder: Path, *, force: bool = False) -> Path:
    """Write what a GGUF file holds to a folder; the path of its `model.safetensors`. Errors: `read_gguf`'s.

    Raises:
        CheckpointError: the folder holds a model already and `force` is not given, or cannot be written.
    """
    there = [name for name in (WEIGHTS, *SMALL_FILES) if (folder / name).exists()]
    if there and not force:
        raise CheckpointError(
            f"{folder} already holds {', '.join(there)}; name another folder, or pass force=True (--force)"
        )
    weights, tokenizer = read_gguf(path)
    save_model(folder, weights, {} if tokenizer is None else tokenizer.files())
    return folder / WEIGHTS


def convert_to_gguf(folder: Path, path: Path, *, kind: str = "f32", force: bool = False) -> Path:
    """Write the model of a folder as a GGUF file. Arguments and errors: those of `write_gguf`.

    Raises:
        CheckpointError: the file exists and `force` is not given, or the model cannot be read.
    """
    if path.exists() and not force:
        raise CheckpointError(f"{path} exists; name another file, or pass force=True (--force)")
    checkpoint = open_checkpoint(folder)
    try:
        tokenizer = Tokenizer.from_folder(checkpoint.tokenizer_folder)
    except CheckpointError as error:
        warnings.warn(
            f"the GGUF file is written without a tokenizer: {error}", CheckpointWarning, stacklevel=2
        )
        tokenizer = None
    write_gguf(path, checkpoint.stored, tokenizer, kind=kind)
    return path


def _import_gguf() -> Any:
    try:
        import gguf
    except ImportError as error:
        if getattr(error, "name", None) != "gguf":
            raise BackendUnavailableError(
                f"GGUF files need the package gguf, whose import failed: {error}; install it again"
            ) from error
        raise BackendUnavailableError(
            "GGUF files need the package gguf, which is not installed; pip install 'gpt2core[gguf]'"
        ) from error
    return gguf


def _entries(gguf: Any, path: Path, tensors: Any) -> Iterator[tuple[str, HeldTensor]]:
    """The file's tensors under the names of a Hugging Face checkpoint; without such a name, under its own."""
    names = dict(_WHOLE)
    for tensor in tensors:
        parts = tensor.name.split(".")
        for field, theirs in _BLOCK.items():
            if len(parts) == 4 and parts[0] == "blk" and parts[2] == theirs:
                names[tensor.name] = f"h.{parts[1]}.{BLOCK_NAMES[field]}.{parts[3]}"
        name = names.get(tensor.name, tensor.name)
        turned = len(tensor.shape) == 2 and tensor.name not in _WHOLE
        shape = tuple(map(int, tensor.shape))  # GGUF counts from the innermost: (I, O)
        read = _reader(gguf, path, tensor, turned)
        yield name, HeldTensor("F32", shape if turned else shape[::-1], read)


def _reader(gguf: Any, path: Path, tensor: Any, turned: bool) -> Any:
    def read() -> np.ndarray[Any, Any]:
        try:
            array = np.asarray(gguf.quants.dequantize(tensor.data, tensor.tensor_type), np.float32)
        except (NotImplementedError, ValueError) as error:
            raise UnsupportedCheckpointError(
                f"{path}: tensor {shown_name(tensor.name)} is {tensor.tensor_type.name}, which the package "
                "gguf does not read; convert the file with llama.cpp's llama-quantize to F16"
            ) from error
        return np.array(array.T if turned else array, np.float32, order="C")  # not mapped: the file may go

    return read


def _config(path: Path, fields: Mapping[str, Any], entries: Mapping[str, HeldTensor]) -> ModelConfig:
    missing = [name for name in _FIELDS if name not in fields and name != "gpt2.feed_forward_length"]
    missing += [name for name in ("wte.weight",) if name not in entries]
    if missing:
        raise CheckpointError(f"{path} lacks {listed(missing)}")
    values = {ours: fields[theirs] for theirs, ours in _FIELDS.items() if theirs in fields}
    if values.get("n_inner") == 4 * values["n_embd"]:
        values["n_inner"] = None
    values["layer_norm_epsilon"] = float(str(np.float32(values["layer_norm_epsilon"])))  # 1e-05, not its bits
    vocab_size = entries["wte.weight"].shape[0]
    eos, bos = (fields.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "bos"))
    try:
        return ModelConfig.from_dict({
            **values,
            "vocab_size": vocab_size,
            "tie_word_embeddings": "lm_head.weight" not in entries,
            "eos_token_id": eos,
            "bos_token_id": bos,
        })  # fmt: skip
    except CheckpointError as error:
        raise type(error)(str(error).replace("config.json", str(path), 1)) from error


def _read_tokenizer(path: Path, fields: Mapping[str, Any]) -> Tokenizer | None:
    model, split = fields.get("tokenizer.ggml.model"), fields.get("tokenizer.ggml.pre")
    tokens, kinds = fields.get("tokenizer.ggml.tokens"), fields.get("tokenizer.ggml.token_type")
    if model != "gpt2" or split not in _SPLITS or not tokens:
        if model not in (None, "no_vocab"):
            kind = f"{shown(model)} with the split {shown(split)}"
            warnings.warn(f"{path}: its tokenizer, {kind}, is left out", CheckpointWarning, stacklevel=3)
        return None
    kinds = kinds or [_NORMAL] * len(tokens)
    if len(kinds) != len(tokens):
        raise CheckpointError(f"{path} names {len(tokens)} tokens and {len(kinds)} kinds of them")
    parts = ByteLevelParts(
        tokens=[None if kind == _UNUSED else token for token, kind in zip(tokens, kinds, strict=True)],
        merges=[tuple(merge.split(" ")) for merge in fields.get("tokenizer.ggml.merges") or ()],
        special={i for i, kind in enumerate(kinds) if kind == _CONTROL},
        added={i for i, kind in enumerate(kinds) if kind == _USER_DEFINED},
    )
    named = {f"{name}_token": fields.get(f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos")}
    special = {name: tokens[i] for name, i in named.items() if i in parts.special}
    template = fields.get("tokenizer.chat_template")
    return byte_level_tokenizer(parts, special_tokens=special, chat_template=template, label=path)


def _write_tokenizer(out: Any, config: ModelConfig, tokenizer: Tokenizer | None) -> None:
    parts = None if tokenizer is None else byte_level_parts(tokenizer)
    why = ""
    if parts is None:
        why = "is not GPT-2's byte-level BPE"
    elif not parts.merges:
        why = "has no merges, which llama.cpp needs"
    elif len(parts.tokens) > config.vocab_size:
        why = "has more tokens than the model"
    if tokenizer is not None and why:
        warnings.warn(
            f"the tokenizer {why}, so the GGUF file is written without it, for token ids alone",
            CheckpointWarning,
            stacklevel=3,
        )
        parts = None
    if tokenizer is None or parts is None:
        out.add_tokenizer_model("no_vocab")
        return
    tokens, kinds = [], []
    for i in range(config.vocab_size):
        token = parts.tokens[i] if i < len(parts.tokens) else None
        tokens.append(f"[PAD{i}]" if token is None else token)
        control = _CONTROL if i in parts.special else _USER_DEFINED if i in parts.added else _NORMAL
        kinds.append(_UNUSED if token is None else control)
    out.add_tokenizer_model("gpt2")
    out.add_tokenizer_pre("gpt-2")
    out.add_token_list(tokens)
    out.add_token_types(kinds)
    out.add_token_merges([" ".join(merge) for merge in parts.merges])
    if config.eos_token_ids:
        out.add_eos_token_id(config.eos_token_ids[0])
    if config.bos_token_id is not None:
        out.add_bos_token_id(config.bos_token_id)
    out.add_add_bos_token(False)
    if tokenizer.chat_template is not None:
        out.add_chat_template(tokenizer.chat_template)


def _check_expressible(config: ModelConfig) -> None:
    faults = [
        f"{name} = {json.dumps(getattr(config, name))}"
        for name, differs in {
            "activation_function": config.activation_function not in _TANH_GELUS,
            "scale_attn_weights": not config.scale_attn_weights,
            "scale_attn_by_inverse_layer_idx": config.scale_attn_by_inverse_layer_idx,
        }.items()
        if differs
    ]
    if faults:
        raise UnsupportedCheckpointError(
            f"llama.cpp's gpt2 would compute other numbers: GGUF has no way to say {listed(faults)}"
        )


def _arrays(weights: Weights) -> Iterator[tuple[str, Any]]:
    """Each tensor of float32 weights in GGUF's name and layout."""
    yield "token_embd.weight", weights.wte
    yield "position_embd.weight", weights.wpe
    for i, block in enumerate(weights.blocks):
        for field, name in _BLOCK.items():
            part = getattr(block, field)
            yield f"blk.{i}.{name}.weight", part.weight.T if field in LINEAR else part.weight
            yield f"blk.{i}.{name}.bias", part.bias
    yield "output_norm.weight", weights.ln_f.weight
    yield "output_norm.bias", weights.ln_f.bias
    if weights.lm_head is not weights.wte:
        yield "output.weight", weights.lm_head


def _stored_as(name: str, array: np.ndarray[Any, Any], kind: str) -> str:
    if array.ndim == 1 or name == "position_embd.weight":
        return "f32"
    return "f16" if kind == "q8_0" and array.shape[1] % _Q8_0_BLOCK else kind
