"""ModelConfig: a strict reading of Hugging Face's `config.json` for GPT-2.

Every field that changes the mathematics is implemented or refused by name; a field that this file does not know
is refused too, since it might change the mathematics.
"""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from gpt2core.errors import CheckpointError, UnsupportedCheckpointError

ACTIVATIONS: Final = frozenset({
    "gelu", "gelu_10", "gelu_accurate", "gelu_fast", "gelu_new", "gelu_python", "gelu_python_tanh",
    "gelu_pytorch_tanh", "hardswish", "laplace", "leaky_relu", "linear", "mish", "quick_gelu", "relu", "relu2",
    "relu6", "sigmoid", "silu", "sqrtsoftplus", "swish", "tanh",
})  # fmt: skip
"""The parameter-free activations that transformers' GPT-2 accepts."""

_ALIASES: Final = {
    "hidden_size": "n_embd",
    "max_position_embeddings": "n_positions",
    "num_attention_heads": "n_head",
    "num_hidden_layers": "n_layer",
}

# Fields of Hugging Face's config that do not change what inference computes.
_IGNORED: Final = frozenset({
    "_attn_implementation_autoset", "_commit_hash", "_name_or_path", "_num_labels", "architectures",
    "attn_implementation", "attn_pdrop", "bad_words_ids", "begin_suppress_tokens", "chunk_size_feed_forward",
    "decoder_start_token_id", "diversity_penalty", "do_sample", "dtype", "early_stopping", "embd_pdrop",
    "encoder_no_repeat_ngram_size", "exponential_decay_length_penalty", "finetuning_task", "forced_bos_token_id",
    "forced_eos_token_id", "gradient_checkpointing", "id2label", "initializer_range", "is_decoder", "label2id",
    "length_penalty", "max_length", "min_length", "n_ctx", "no_repeat_ngram_size", "num_beam_groups", "num_beams",
    "num_labels", "num_return_sequences", "output_attentions", "output_hidden_states", "output_past",
    "output_scores", "pad_token_id", "prefix", "problem_type", "remove_invalid_values", "repetition_penalty",
    "resid_pdrop", "return_dict", "return_dict_in_generate", "sep_token_id", "summary_activation",
    "summary_first_dropout", "summary_proj_to_labels", "summary_type", "summary_use_proj", "suppress_tokens",
    "task_specific_params", "temperature", "tf_legacy_loss", "tokenizer_class", "top_k", "top_p", "torch_dtype",
    "torchscript", "transformers_version", "typical_p", "use_bfloat16", "use_cache",
})  # fmt: skip

# Fields that would change the mathematics, with the values at which they do not.
_NEUTRAL: Final[dict[str, tuple[Any, ...]]] = {
    "add_cross_attention": (False, None),
    "auto_map": (None,),
    "cross_attention_hidden_size": (None,),
    "is_encoder_decoder": (False, None),
    "pruned_heads": (None, {}),
    "quantization_config": (None,),
    "rope_scaling": (None,),
    "rope_parameters": (None,),
    "sliding_window": (None,),
    "tie_encoder_decoder": (False, None),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """What a GPT-2 computes, in the field names of Hugging Face's `GPT2Config`.

    Raises:
        CheckpointError: a value has the wrong type or lies outside its range; all faults are listed at once.
        UnsupportedCheckpointError: an activation that is not implemented.
    """

    vocab_size: int = 50257
    n_positions: int = 1024
    n_embd: int = 768
    n_layer: int = 12
    n_head: int = 12
    n_inner: int | None = None
    activation_function: str = "gelu_new"
    layer_norm_epsilon: float = 1e-5
    scale_attn_weights: bool = True
    scale_attn_by_inverse_layer_idx: bool = False
    reorder_and_upcast_attn: bool = False
    tie_word_embeddings: bool = True
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        faults = list(self._faults())
        if faults:
            raise CheckpointError("config.json: " + "; ".join(faults))
        if self.activation_function not in ACTIVATIONS:
            raise UnsupportedCheckpointError(
                f"config.json: activation_function {self.activation_function!r} is not supported; "
                f"supported are {', '.join(sorted(ACTIVATIONS))}"
            )

    def _faults(self) -> list[str]:
        faults = []
        for name in ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head"):
            if not _is_int(getattr(self, name), 1):
                faults.append(f"{name} is {getattr(self, name)!r}, expected a whole number of 1 or more")
        if self.n_inner is not None and not _is_int(self.n_inner, 1):
            faults.append(f"n_inner is {self.n_inner!r}, expected null or a whole number of 1 or more")
        epsilon = self.layer_norm_epsilon
        if isinstance(epsilon, bool) or not isinstance(epsilon, int | float) or not 0 < epsilon < math.inf:
            faults.append(f"layer_norm_epsilon is {epsilon!r}, expected a positive number")
        for name in _BOOLEANS:
            if not isinstance(getattr(self, name), bool):
                faults.append(f"{name} is {getattr(self, name)!r}, expected true or false")
        if not isinstance(self.activation_function, str):
            faults.append(f"activation_function is {self.activation_function!r}, expected a name")
        if not faults:
            if self.n_embd % self.n_head:
                faults.append(f"n_embd {self.n_embd} is not a multiple of n_head {self.n_head}")
            ids = (
                self.eos_token_ids if self.bos_token_id is None else (*self.eos_token_ids, self.bos_token_id)
            )
            if not all(_is_int(i, 0) for i in ids):
                faults.append(
                    f"bos_token_id {self.bos_token_id!r} or eos_token_id {self.eos_token_ids!r} is no token id"
                )
        return faults

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.n_embd // self.n_head

    @property
    def mlp_dim(self) -> int:
        """Width of the MLP's hidden layer: `n_inner`, or four times `n_embd`."""
        return 4 * self.n_embd if self.n_inner is None else self.n_inner

    @property
    def parameters(self) -> int:
        """How many numbers the weights hold; a tied head counts once."""
        d, m = self.n_embd, self.mlp_dim
        block = 4 * d + (d + 1) * 3 * d + (d + 1) * d + (d + 1) * m + (m + 1) * d
        head = 0 if self.tie_word_embeddings else self.vocab_size * d
        return (self.vocab_size + self.n_positions) * d + self.n_layer * block + 2 * d + head

    def attention_scale(self, layer: int) -> float:
        """What queries times keys are multiplied by in `layer` (counted from 0)."""
        scale = self.head_dim**-0.5 if self.scale_attn_weights else 1.0
        return scale / (layer + 1) if self.scale_attn_by_inverse_layer_idx else scale

    def cache_nbytes(self, slots: int, capacity: int) -> int:
        """Bytes of a float32 KV cache of `slots` sequences of up to `capacity` tokens."""
        return 2 * 4 * self.n_layer * slots * capacity * self.n_embd

    @classmethod
    def from_json(cls, text: str | bytes) -> "ModelConfig":
        """Read the text of a `config.json`; JSON is read strictly (no NaN, no key twice)."""
        return cls.from_dict(parse_json_object(text, "config.json"))

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> "ModelConfig":
        """Read Hugging Face's fields against the allow-list.

        Raises:
            UnsupportedCheckpointError: `model_type` is not `gpt2`, or a field is unknown or asks for something
                that is not implemented; every such field is named.
            CheckpointError: a value has the wrong type or range.
        """
        if fields.get("model_type", "gpt2") != "gpt2":
            raise UnsupportedCheckpointError(
                f"config.json: model_type is {fields['model_type']!r}; gpt2core runs 'gpt2' only"
            )
        known: dict[str, Any] = {}
        refused = []
        for name, value in fields.items():
            field = _ALIASES.get(name, name)
            if field in _READ:
                if field in known and known[field] != value:
                    raise CheckpointError(f"config.json: {name} is {value!r} and {field} is {known[field]!r}")
                known[field] = value
            elif name in _NEUTRAL:
                if not any(value is neutral or value == neutral for neutral in _NEUTRAL[name]):
                    refused.append(f"{name} = {_short(value)}")
            elif name not in _IGNORED and name != "model_type":
                refused.append(f"{name} = {_short(value)} (unknown field)")
        if refused:
            raise UnsupportedCheckpointError(
                f"config.json asks for what gpt2core does not implement: {', '.join(refused)}; "
                "remove a field only if you are sure that it does not change what the model computes"
            )
        eos = known.pop("eos_token_id", None)
        known["eos_token_ids"] = () if eos is None else tuple(eos) if isinstance(eos, list) else (eos,)
        return cls(**known)

    def to_dict(self) -> dict[str, Any]:
        """The `config.json` that reads back as this configuration, also by transformers."""
        fields: dict[str, Any] = {name: getattr(self, name) for name in _READ if name != "eos_token_id"}
        eos = self.eos_token_ids
        fields["eos_token_id"] = None if not eos else eos[0] if len(eos) == 1 else list(eos)
        return {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", **fields}


_READ: Final = tuple(f for f in ModelConfig.__slots__ if f != "eos_token_ids") + ("eos_token_id",)
_BOOLEANS: Final = (
    "scale_attn_weights", "scale_attn_by_inverse_layer_idx", "reorder_and_upcast_attn", "tie_word_embeddings",
)  # fmt: skip


def parse_json_object(text: str | bytes, name: str) -> dict[str, Any]:
    """Parse strict JSON whose top is an object.

    Raises:
        CheckpointError: `text` (of the file `name`) is not UTF-8, not JSON, nests too deep, holds NaN or
            infinity, or has a key twice.
    """
    try:
        value = json.loads(text, object_pairs_hook=_unique_keys, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{name} is not strict JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{name} holds a JSON {type(value).__name__}, expected an object")
    return value


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"key {next(k for k in keys if keys.count(k) > 1)!r} stands twice")
    return result


def _refuse_constant(name: str) -> Callable[[], None]:
    raise ValueError(f"{name} is not a JSON number")


def _is_int(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value < 2**31


def _short(value: object) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else text[:57] + "..."
