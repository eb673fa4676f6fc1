"""Weights: a GPT-2's parameters as read-only arrays, in the checkpoint's own layout."""

# V vocabulary, P positions, D width, I inputs, O outputs

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from gpt2core._shapes import Float
from gpt2core.config import ModelConfig


@dataclass(frozen=True, slots=True)
class LayerNorm:
    """Scale and shift after normalising to mean 0 and variance 1."""

    weight: Float[np.ndarray, "D"]
    bias: Float[np.ndarray, "D"]


@dataclass(frozen=True, slots=True)
class Linear:
    """`x @ weight + bias`: the weight lies (in, out), as in GPT-2's checkpoints."""

    weight: Float[np.ndarray, "I O"]
    bias: Float[np.ndarray, "O"]


@dataclass(frozen=True, slots=True)
class Block:
    """One transformer block, in the order in which it computes."""

    ln_1: LayerNorm
    c_attn: Linear  # (D, 3 D): queries, keys and values side by side
    attn_c_proj: Linear  # (D, D)
    ln_2: LayerNorm
    c_fc: Linear  # (D, mlp_dim)
    mlp_c_proj: Linear  # (mlp_dim, D)


@dataclass(frozen=True, slots=True)
class Weights:
    """All parameters; `lm_head is wte` when the head is tied."""

    config: ModelConfig
    wte: Float[np.ndarray, "V D"]
    wpe: Float[np.ndarray, "P D"]
    blocks: tuple[Block, ...]
    ln_f: LayerNorm
    lm_head: Float[np.ndarray, "V D"]

    def named(self) -> Iterator[tuple[str, Float[np.ndarray, "..."]]]:
        """Each array once, with its name in a Hugging Face checkpoint (without the `transformer.` prefix)."""
        yield "wte.weight", self.wte
        yield "wpe.weight", self.wpe
        for i, block in enumerate(self.blocks):
            for field, name in BLOCK_NAMES.items():
                part = getattr(block, field)
                yield f"h.{i}.{name}.weight", part.weight
                yield f"h.{i}.{name}.bias", part.bias
        yield "ln_f.weight", self.ln_f.weight
        yield "ln_f.bias", self.ln_f.bias
        if self.lm_head is not self.wte:
            yield "lm_head.weight", self.lm_head

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return sum(array.nbytes for _, array in self.named())


BLOCK_NAMES = {
    "ln_1": "ln_1",
    "c_attn": "attn.c_attn",
    "attn_c_proj": "attn.c_proj",
    "ln_2": "ln_2",
    "c_fc": "mlp.c_fc",
    "mlp_c_proj": "mlp.c_proj",
}
"""Field of `Block` -> name in a Hugging Face checkpoint."""


def expected_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name (without prefix) and shape of each tensor that a checkpoint of this configuration must hold."""
    d, m = config.n_embd, config.mlp_dim
    linear = {"attn.c_attn": (d, 3 * d), "attn.c_proj": (d, d), "mlp.c_fc": (d, m), "mlp.c_proj": (m, d)}
    shapes: dict[str, tuple[int, ...]] = {
        "wte.weight": (config.vocab_size, d),
        "wpe.weight": (config.n_positions, d),
    }
    for i in range(config.n_layer):
        for name in BLOCK_NAMES.values():
            weight = linear.get(name, (d,))
            shapes[f"h.{i}.{name}.weight"] = weight
            shapes[f"h.{i}.{name}.bias"] = weight[-1:]
    shapes["ln_f.weight"] = shapes["ln_f.bias"] = (d,)
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, d)
    return shapes


def weights_from_tensors(config: ModelConfig, tensors: dict[str, np.ndarray]) -> Weights:
    """Arrange tensors that have the names and shapes of `expected_shapes`."""

    def block(i: int) -> Block:
        def part(kind: type[LayerNorm] | type[Linear], name: str) -> LayerNorm | Linear:
            return kind(tensors[f"h.{i}.{name}.weight"], tensors[f"h.{i}.{name}.bias"])

        kinds = {field: LayerNorm if field.startswith("ln") else Linear for field in BLOCK_NAMES}
        return Block(**{field: part(kinds[field], name) for field, name in BLOCK_NAMES.items()})  # type: ignore[arg-type]

    wte = tensors["wte.weight"]
    return Weights(
        config=config,
        wte=wte,
        wpe=tensors["wpe.weight"],
        blocks=tuple(block(i) for i in range(config.n_layer)),
        ln_f=LayerNorm(tensors["ln_f.weight"], tensors["ln_f.bias"]),
        lm_head=wte if config.tie_word_embeddings else tensors["lm_head.weight"],
    )
