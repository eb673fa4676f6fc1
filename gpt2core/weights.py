"""Weights: a GPT-2's parameters, read-only and in the checkpoint's own layout, of any precision.

A matrix or table is a float32 array or an encoding of `gpt2core.encodings`; what is small is always float32.
"""

# V vocabulary, P positions, D width, I inputs, O outputs

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from gpt2core._shapes import Float, Int
from gpt2core.config import ModelConfig
from gpt2core.encodings import BFloat16, Int4, Int8

Table = Float[np.ndarray, "V D"] | Int8 | BFloat16
Matrix = Float[np.ndarray, "I O"] | Int8 | Int4 | BFloat16


@dataclass(frozen=True, slots=True)
class LayerNorm:
    """Scale and shift after normalising to mean 0 and variance 1."""

    weight: Float[np.ndarray, "D"]
    bias: Float[np.ndarray, "D"]


@dataclass(frozen=True, slots=True)
class Linear:
    """`x @ weight + bias`: the weight lies (in, out), as in GPT-2's checkpoints."""

    weight: Matrix
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
    """All parameters; `lm_head is wte` when the head is tied.

    Attributes:
        config: what the model computes.
        wte, lm_head: tables (V, D).
        wpe: always float32.
        blocks: in the order in which they compute.
        ln_f: the last layer norm.
        precision: of the matrices: "float32", "int8", "int4" (tables then are int8) or "bfloat16".
    """

    config: ModelConfig
    wte: Table
    wpe: Float[np.ndarray, "P D"]
    blocks: tuple[Block, ...]
    ln_f: LayerNorm
    lm_head: Table
    precision: str = "float32"

    def named(self) -> Iterator[tuple[str, np.ndarray]]:
        """Each array once, with its name in a Hugging Face checkpoint (without the `transformer.` prefix).

        An encoding's arrays are `NAME`, `NAME_scale` and `NAME_zero`, as far as it has them.
        """
        yield from named_arrays("wte.weight", self.wte)
        yield "wpe.weight", self.wpe
        for i, block in enumerate(self.blocks):
            for field, name in BLOCK_NAMES.items():
                part = getattr(block, field)
                yield from named_arrays(f"h.{i}.{name}.weight", part.weight)
                yield f"h.{i}.{name}.bias", part.bias
        yield "ln_f.weight", self.ln_f.weight
        yield "ln_f.bias", self.ln_f.bias
        if self.lm_head is not self.wte:
            yield from named_arrays("lm_head.weight", self.lm_head)

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return sum(array.nbytes for _, array in self.named())

    def convert(
        self, precision: str, matrix: Callable[[Any], Matrix], table: Callable[[Any], Table]
    ) -> "Weights":
        """The same model with each layer's matrix and each table replaced; a tied head stays tied."""

        def block(old: Block) -> Block:
            linear = {
                field: replace(getattr(old, field), weight=matrix(getattr(old, field).weight))
                for field in LINEAR
            }
            return replace(old, **linear)

        wte = table(self.wte)
        lm_head = wte if self.lm_head is self.wte else table(self.lm_head)
        blocks = tuple(map(block, self.blocks))
        return replace(self, precision=precision, wte=wte, blocks=blocks, lm_head=lm_head)


def named_arrays(
    name: str, matrix: Float[np.ndarray, "..."] | Int8 | Int4 | BFloat16
) -> Iterator[tuple[str, np.ndarray]]:
    """The arrays of a matrix, table or vector of this name, with their own names."""
    if isinstance(matrix, np.ndarray):
        yield name, matrix
    else:
        yield from ((name + ending, array) for ending, array in matrix.arrays())


def as_array(matrix: Float[np.ndarray, "..."] | Int8 | Int4 | BFloat16) -> Float[np.ndarray, "..."]:
    """The array itself, or what the encoding stands for."""
    return matrix if isinstance(matrix, np.ndarray) else matrix.float32()


def look_up(table: Table, ids: Int[np.ndarray, "..."]) -> Float[np.ndarray, "... D"]:
    """The rows of token ids, the caller's own."""
    return table[ids] if isinstance(table, np.ndarray) else table.rows(ids)


BLOCK_NAMES = {
    "ln_1": "ln_1",
    "c_attn": "attn.c_attn",
    "attn_c_proj": "attn.c_proj",
    "ln_2": "ln_2",
    "c_fc": "mlp.c_fc",
    "mlp_c_proj": "mlp.c_proj",
}
"""Field of `Block` -> name in a Hugging Face checkpoint."""
LINEAR = ("c_attn", "attn_c_proj", "c_fc", "mlp_c_proj")
"""The fields of `Block` that are a `Linear`, in the order in which they compute."""


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


def weights_from_tensors(
    config: ModelConfig, tensors: Mapping[str, Any], precision: str = "float32"
) -> Weights:
    """Arrange arrays and encodings that have the names and shapes of `expected_shapes`."""

    def part(kind: Callable[..., Any], name: str) -> Any:
        return kind(tensors[f"{name}.weight"], tensors[f"{name}.bias"])

    def block(i: int) -> Block:
        return Block(
            **{
                field: part(Linear if field in LINEAR else LayerNorm, f"h.{i}.{name}")
                for field, name in BLOCK_NAMES.items()
            }
        )

    wte = tensors["wte.weight"]
    return Weights(
        config=config,
        wte=wte,
        wpe=tensors["wpe.weight"],
        blocks=tuple(map(block, range(config.n_layer))),
        ln_f=part(LayerNorm, "ln_f"),
        lm_head=wte if config.tie_word_embeddings else tensors["lm_head.weight"],
        precision=precision,
    )
