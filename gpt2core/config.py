"""ModelConfig: a strict reading of Hugging Face's `config.json` for GPT-2.

Every field that changes the mathematics is implemented or refused by name. A field that transformers' GPT-2
does not read cannot change what its checkpoints compute: it is left out with a warning, or refused if asked.
"""

import dataclasses
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from gpt2core._json import listed, shown, shown_name
from gpt2core._json import parse_json_object as parse_json_object  # other modules import it from here
from gpt2core.errors import CheckpointError, CheckpointWarning, UnsupportedCheckpointError

ACTIVATIONS: Final = frozenset({
    "gelu", "gelu_10", "gelu_accurate", "gelu_fast", "gelu_new", "gelu_python", "gelu_python_tanh",
    "gelu_pytorch_tanh", "hardswish", "laplace", "leaky_relu", "linear", "mish", "quick_gelu", "relu",
    "relu2", "relu6", "sigmoid", "silu", "sqrtsoftplus", "swish", "tanh",
})  # fmt: skip
"""The parameter-free activations that transformers' GPT-2 accepts."""

_ALIASES: Final = {
    "hidden_size": "n_embd",
    "max_position_embeddings": "n_positions",
    "num_attention_heads": "n_head",
    "num_hidden_layers": "n_layer",
}

MODEL_TYPES: Final = ("gpt2", "gpt-sw3")
"""The second has another tokenizer; transformers computes both with its GPT-2."""

_OUR_ARCHITECTURES: Final = re.compile(r"AutoModel\w*|\w*GPT2\w*", re.ASCII)

# Fields of Hugging Face's config that do not change what inference computes.
_IGNORED: Final = frozenset({
    "_attn_implementation", "_attn_implementation_autoset", "_commit_hash", "_experts_implementation",
    "_flash_attn_2_enabled", "_name_or_path", "_num_labels", "architectures",
    "assistant_confidence_threshold", "assistant_lookbehind", "attn_implementation", "attn_pdrop",
    "bad_words_ids", "begin_suppress_tokens", "chunk_size_feed_forward", "classifier_dropout",
    "decoder_start_token_id", "diversity_penalty", "do_sample", "dtype", "early_stopping", "embd_pdrop",
    "encoder_no_repeat_ngram_size", "encoder_repetition_penalty", "eos_token_ids", "epsilon_cutoff",
    "eta_cutoff", "experts_implementation", "exponential_decay_length_penalty", "finetuning_task",
    "forced_bos_token_id", "forced_eos_token_id", "gradient_checkpointing", "hidden_dropout",
    "id2label", "initializer_range", "is_decoder", "label2id", "length_penalty", "max_length",
    "max_new_tokens", "min_length", "min_new_tokens", "model_type", "n_ctx", "n_special",
    "name_or_path", "no_repeat_ngram_size", "num_assistant_tokens", "num_assistant_tokens_schedule",
    "num_beam_groups", "num_beams", "num_labels", "num_return_sequences", "output_attentions",
    "output_hidden_states", "output_past", "output_scores", "pad_token_id", "predict_special_tokens",
    "prefix", "problem_type", "remove_invalid_values", "repetition_penalty", "resid_pdrop",
    "return_dict", "return_dict_in_generate", "sep_token_id", "summary_activation",
    "summary_first_dropout", "summary_proj_to_labels", "summary_type", "summary_use_proj",
    "suppress_tokens", "target_lookbehind", "task_specific_params", "temperature", "tf_legacy_loss",
    "tie_last_hidden_states", "tokenizer_class", "top_k", "top_p", "torch_dtype", "torchscript",
    "transformers.js_config", "transformers_version", "typical_p", "unsloth_fixed", "unsloth_version",
    "use_bfloat16", "use_cache", "use_return_dict", "xla_device",
    "scale_attn_by_layer_idx",  # CodeParrot's recipe misspelt it; transformers computes as if it were absent
})  # fmt: skip

# Fields that would change the mathematics, with the values at which they do not.
_NEUTRAL: Final[dict[str, tuple[Any, ...]]] = {
    "add_cross_attention": (False, None),
    "auto_map": (None,),
    "cross_attention_hidden_size": (None,),
    "is_encoder_decoder": (False, None),
    "per_layer_config": (None, {}),
    "pruned_heads": (None, {}),
    "quantization_config": (None,),
    "rope_scaling": (None,),
    "rope_parameters": (None,),
    "sliding_window": (None,),
    "tie_encoder_decoder": (False, None),
}

QUANTIZATION_FIELD: Final = "gpt2core_quantization"
"""How the weights are stored; says nothing about the mathematics, and is read by `quantized_folder`."""

_END_OF_TEXT: Final = 50256  # what transformers takes for bos and eos where config.json is silent


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
        values = {name: getattr(self, name) for name in self.__slots__}
        _raise_if_any(_value_faults(values), _unsupported_activation(values))

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
    def from_json(cls, text: str | bytes, *, strict: bool = False) -> "ModelConfig":
        """Read the text of a `config.json`; JSON is read strictly (no NaN, no key twice)."""
        return cls.from_dict(parse_json_object(text, "config.json"), strict=strict)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any], *, strict: bool = False) -> "ModelConfig":
        """Read Hugging Face's fields against the allow-list.

        Args:
            fields: of `config.json`.
            strict: refuse every field that is not known. Otherwise those that transformers' GPT-2 does not
                read are left out, with one `CheckpointWarning` that names them.

        Raises:
            UnsupportedCheckpointError: the file names another model or other code, or asks for something that
                is not implemented; every such field is named.
            CheckpointError: a value has the wrong type or range.
        """
        if fields.get("model_type", "gpt2") not in MODEL_TYPES:
            raise UnsupportedCheckpointError(
                f'config.json: model_type is {shown(fields["model_type"])}; gpt2core runs "gpt2" only'
            )
        known: dict[str, Any] = {}
        faults, refused = [], _foreign_architectures(fields.get("architectures"))
        unread = unread_fields(fields)
        for name, value in fields.items():
            field = _ALIASES.get(name, name)
            if field in _READ:
                if known.setdefault(field, value) != value:
                    both = f"{shown(known[field])} and {shown(value)}"
                    faults.append(f"{field} is given twice, as {both}; remove the wrong one")
            elif name in _NEUTRAL:
                if not any(value is neutral or value == neutral for neutral in _NEUTRAL[name]):
                    refused.append(f"{shown_name(name)} = {shown(value)}")
            elif strict and name in unread:
                refused.append(f"{shown_name(name)} = {shown(value)} (unknown field)")
        values: dict[str, Any] = {field.name: field.default for field in dataclasses.fields(cls)} | known
        eos = values.pop("eos_token_id", _END_OF_TEXT)
        values["eos_token_ids"] = known_token_ids(eos, values["vocab_size"])
        values["bos_token_id"] = known.get("bos_token_id", _END_OF_TEXT)
        if _is_foreign(values["bos_token_id"], values["vocab_size"]):
            values["bos_token_id"] = None
        if _is_int(values["layer_norm_epsilon"], 1):
            values["layer_norm_epsilon"] = float(values["layer_norm_epsilon"])
        _raise_if_any(faults + _value_faults(values), refused + _unsupported_activation(values))
        if unread:
            warnings.warn(
                f"config.json has fields that GPT-2 does not read, which are left out: {unread_text(unread)}",
                CheckpointWarning,
                stacklevel=2,
            )
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """The `config.json` that reads back as this configuration, also by transformers."""
        values: dict[str, Any] = {name: getattr(self, name) for name in _READ if name != "eos_token_id"}
        eos = self.eos_token_ids
        values["eos_token_id"] = None if not eos else eos[0] if len(eos) == 1 else list(eos)
        return {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", **values}


_READ: Final = (*(name for name in ModelConfig.__slots__ if name != "eos_token_ids"), "eos_token_id")
_BOOLEANS: Final = (
    "scale_attn_weights", "scale_attn_by_inverse_layer_idx", "reorder_and_upcast_attn", "tie_word_embeddings",
)  # fmt: skip


def unread_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Those fields of a `config.json` that neither transformers' GPT-2 nor gpt2core knows."""
    known = {*_READ, *_ALIASES, *_NEUTRAL, *_IGNORED, QUANTIZATION_FIELD}
    return {name: value for name, value in fields.items() if name not in known}


def unread_text(unread: Mapping[str, Any]) -> str:
    """Fields that are not read as one line."""
    return listed([f"{shown_name(name)} = {shown(value)}" for name, value in unread.items()], 10)


def _foreign_architectures(names: Any) -> list[str]:
    """What is refused where `architectures` names classes, and none of them is a GPT-2."""
    names = [name for name in names if isinstance(name, str)] if isinstance(names, list) else []
    if not names or any(_OUR_ARCHITECTURES.fullmatch(name) for name in names):
        return []
    return [f"architectures = {shown(names)}"]


def known_token_ids(value: Any, vocab_size: Any) -> tuple[Any, ...]:
    """A config's token id, list of ids or null as a tuple, without ids that the vocabulary does not hold.

    Fine-tunes exist that name an eos_token_id of -1 or past their vocabulary; the model never emits it, so
    leaving it out changes nothing. What is no id at all (a string, true) is kept, for validation to refuse.
    """
    ids = () if value is None else tuple(value) if isinstance(value, list) else (value,)
    return tuple(i for i in ids if not _is_foreign(i, vocab_size))


def _is_foreign(token_id: Any, vocab_size: Any) -> bool:
    whole = isinstance(token_id, int) and not isinstance(token_id, bool)
    return whole and not 0 <= token_id < (vocab_size if _is_int(vocab_size, 1) else 2**31)


def _value_faults(values: Mapping[str, Any]) -> list[str]:
    faults = []
    for name in ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head"):
        if not _is_int(values[name], 1):
            faults.append(f"{name} is {shown(values[name])}, expected a whole number from 1 to {2**31 - 1}")
    if values["n_inner"] is not None and not _is_int(values["n_inner"], 1):
        faults.append(f"n_inner is {shown(values['n_inner'])}, expected null or a whole number of 1 or more")
    epsilon = values["layer_norm_epsilon"]
    if isinstance(epsilon, bool) or not isinstance(epsilon, int | float) or not 0 < epsilon <= 1e38:
        faults.append(f"layer_norm_epsilon is {shown(epsilon)}, expected a positive number up to 1e38")
    for name in _BOOLEANS:
        if not isinstance(values[name], bool):
            faults.append(f"{name} is {shown(values[name])}, expected true or false")
    if not isinstance(values["activation_function"], str):
        faults.append(f"activation_function is {shown(values['activation_function'])}, expected a name")
    width, heads = values["n_embd"], values["n_head"]
    if _is_int(width, 1) and _is_int(heads, 1) and width % heads:
        faults.append(f"n_embd {width} is not a multiple of n_head {heads}")
    limit = values["vocab_size"] if _is_int(values["vocab_size"], 1) else 2**31
    if not isinstance(values["eos_token_ids"], tuple):
        faults.append(f"eos_token_ids is {shown(values['eos_token_ids'])}, expected a tuple of token ids")
    else:
        bad = [i for i in values["eos_token_ids"] if not _is_int(i, 0) or i >= limit]
        faults += [f"eos_token_id is {shown(i)}, expected a token id below vocab_size {limit}" for i in bad]
    bos = values["bos_token_id"]
    if bos is not None and not (_is_int(bos, 0) and bos < limit):
        faults.append(f"bos_token_id is {shown(bos)}, expected null or a token id below vocab_size {limit}")
    return faults


def _unsupported_activation(values: Mapping[str, Any]) -> list[str]:
    name = values["activation_function"]
    if not isinstance(name, str) or name in ACTIVATIONS:
        return []
    return [f"activation_function = {shown(name)} (supported are {', '.join(sorted(ACTIVATIONS))})"]


def _raise_if_any(faults: list[str], refused: list[str]) -> None:
    if refused:
        raise UnsupportedCheckpointError(
            f"config.json asks for what gpt2core does not implement: {listed(refused)}; "
            "remove a field only if you are sure that it does not change what the model computes"
            + (f"; also: {listed(faults)}" if faults else "")
        )
    if faults:
        raise CheckpointError(f"config.json: {listed(faults)}")


def _is_int(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value < 2**31
