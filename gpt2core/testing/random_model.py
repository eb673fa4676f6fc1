"""Checkpoints with random weights, of every size and mathematical variant of the GPT-2 family, for tests."""

import os
import pathlib
from typing import Any, Final

import numpy as np

from gpt2core.checkpoint.open import save_checkpoint
from gpt2core.config import ACTIVATIONS, ModelConfig
from gpt2core.weights import Weights, expected_shapes, weights_from_tensors

SIZES: Final[dict[str, dict[str, int]]] = {
    "tiny": {"vocab_size": 257, "n_positions": 96, "n_embd": 32, "n_layer": 3, "n_head": 4},
    "small": {"n_embd": 768, "n_layer": 12, "n_head": 12},
    "medium": {"n_embd": 1024, "n_layer": 24, "n_head": 16},
    "large": {"n_embd": 1280, "n_layer": 36, "n_head": 20},
    "xl": {"n_embd": 1600, "n_layer": 48, "n_head": 25},
}
"""The published sizes of GPT-2, and one for tests, as fields of `ModelConfig`."""

VARIANTS: Final[dict[str, dict[str, Any]]] = {
    "plain": {},
    "inverse_layer_scaling": {"scale_attn_by_inverse_layer_idx": True},
    "reorder_and_upcast": {"reorder_and_upcast_attn": True},
    "both_mistral_flags": {"scale_attn_by_inverse_layer_idx": True, "reorder_and_upcast_attn": True},
    "unscaled_attention": {"scale_attn_weights": False},
    "unscaled_but_inverse": {"scale_attn_weights": False, "scale_attn_by_inverse_layer_idx": True},
    "narrow_mlp": {"n_inner": 40},
    "wide_epsilon": {"layer_norm_epsilon": 1e-2},
    "separate_head": {"tie_word_embeddings": False},
    "odd_head_size": {"n_embd": 35, "n_head": 5},
    "one_head": {"n_head": 1},
    "one_layer": {"n_layer": 1},
    **{f"activation_{name}": {"activation_function": name} for name in sorted(ACTIVATIONS)},
}
"""Every mathematical variant of the GPT-2 family, as fields of `ModelConfig`."""


def random_config(size: str = "tiny", **fields: Any) -> ModelConfig:
    """A configuration of one of `SIZES`, with `fields` of `ModelConfig` changed."""
    return ModelConfig(**{"bos_token_id": 0, "eos_token_ids": (0,), **SIZES[size], **fields})


def random_weights(config: ModelConfig, *, seed: int = 0) -> Weights:
    """Normally distributed weights under which attention is not flat and logits spread by about 1.5."""
    rng = np.random.default_rng(seed)
    tensors = {}
    for name, shape in expected_shapes(config).items():
        array = rng.standard_normal(shape, np.float32)
        if name.endswith("bias"):
            array *= 0.1
        elif len(shape) == 1:  # a layer norm's scale
            array *= 0.1
            array += 1
        elif name in ("wte.weight", "lm_head.weight"):
            array *= 1.5 / config.n_embd**0.5
        elif name == "wpe.weight":
            array *= 0.5 / config.n_embd**0.5
        else:
            array *= (1.5 if "c_attn" in name else 1.0) / shape[0] ** 0.5
        array.flags.writeable = False
        tensors[name] = array
    return weights_from_tensors(config, tensors)


def random_checkpoint(
    folder: str | os.PathLike[str],
    size: str = "tiny",
    *,
    seed: int = 0,
    dtype: str = "float32",
    **fields: Any,
) -> pathlib.Path:
    """Write a checkpoint with random weights in Hugging Face layout and return its folder.

    The tokenizer has one token per byte and `<|endoftext|>` (id 0), so it fits any vocabulary of 257 or more.

    Args:
        folder: made where it does not exist.
        size: one of `SIZES`.
        seed: of the weights.
        dtype: of the file, "float32", "float16" or "bfloat16".
        fields: fields of `ModelConfig`, for example those of one of `VARIANTS`.
    """
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_checkpoint(folder, random_weights(random_config(size, **fields), seed=seed), dtype=dtype)
    _byte_tokenizer().save(str(folder / "tokenizer.json"))
    return folder


def _byte_tokenizer() -> Any:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    end = "<|endoftext|>"
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate([end, *alphabet])}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(end, special=True, normalized=False)])
    return tokenizer
