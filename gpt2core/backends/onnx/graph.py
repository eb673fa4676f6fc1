"""The graph that the backend runs, built from a configuration; its weights are named and stay outside."""

# R rows, S new tokens per row, N = R S, M wanted logits, D width, H heads, K head width
# V vocabulary, C cache capacity, T positions that a row sees

from collections.abc import Iterable, Iterator, Mapping
from typing import Final, Literal

import numpy as np
import onnx
from onnx import TensorProto, helper

from gpt2core._shapes import Float
from gpt2core.backends.onnx.nodes import Graph
from gpt2core.backends.onnx.operators import MICROSOFT, Fused, padded_head_dim
from gpt2core.backends.onnx.products import QuantizedProducts
from gpt2core.config import ModelConfig
from gpt2core.weights import Linear, Weights, as_array

OPSET: Final = 21
IR_VERSION: Final = 10
FLOAT: Final = TensorProto.FLOAT
Part = Literal["whole", "body", "head"]


def named_weights(weights: Weights, head_dim: int) -> Iterator[tuple[str, Float[np.ndarray, "..."]]]:
    """`weights.named()` for heads of width `head_dim`: the checkpoint's arrays themselves.

    Only where heads have to be widened are the attention's matrices copied, zeros filling the gaps.
    """
    widened: dict[str, np.ndarray] = {}
    if head_dim != weights.config.head_dim:
        for i, block in enumerate(weights.blocks):
            widened |= _widen(weights.config, head_dim, f"h.{i}.attn.", block.c_attn, block.attn_c_proj)
    for name, array in weights.named():
        yield name, widened.get(name, array)


def _widen(
    config: ModelConfig, head_dim: int, prefix: str, qkv: Linear, out: Linear
) -> dict[str, np.ndarray]:
    d, heads, k = config.n_embd, config.n_head, config.head_dim
    extra = head_dim - k
    weight = as_array(qkv.weight).reshape(d, 3, heads, k)
    weight = np.pad(weight, ((0, 0), (0, 0), (0, 0), (0, extra)))  # (D, 3, H, K)
    bias = np.pad(qkv.bias.reshape(3, heads, k), ((0, 0), (0, 0), (0, extra)))  # (3, H, K)
    projection = np.pad(as_array(out.weight).reshape(heads, k, d), ((0, 0), (0, extra), (0, 0)))  # (H, K, D)
    return {
        f"{prefix}c_attn.weight": weight.reshape(d, -1),
        f"{prefix}c_attn.bias": bias.reshape(-1),
        f"{prefix}c_proj.weight": projection.reshape(-1, d),
    }


def graph_weights(
    weights: Weights, products: QuantizedProducts | None = None, *, part: Part = "whole"
) -> Iterator[tuple[str, np.ndarray]]:
    """The initializers of `build_model` by name: no embeddings, but always a head where the part has one."""
    if products is not None:
        if part != "head":
            yield from products.arrays()
            yield from ((name, array) for name, array in weights.named() if "ln_" in name)
        if part != "body":
            yield from products.head_arrays()
        return
    for name, array in named_weights(weights, padded_head_dim(weights.config)):
        if name == "wte.weight" and weights.lm_head is weights.wte:
            yield "lm_head.weight", array
        elif name not in ("wte.weight", "wpe.weight"):  # looked up outside the graph
            yield name, array


def build_model(
    config: ModelConfig,
    arrays: Mapping[str, np.ndarray],
    products: QuantizedProducts | None = None,
    *,
    part: Part = "whole",
    trace: bool = False,
) -> onnx.ModelProto:
    """The graph, with `arrays` as external initializers that say only name, type and shape.

    Embeddings are looked up by the caller: a table that a graph looks things up in is a copy that stays,
    while the same table as the head is rearranged and let go.

    Inputs: embedded (R, S, D) the tokens' and positions' embeddings, seqlens_k (R,) positions that each row
    sees less one, total () the most positions that a row sees, wanted (M,) indices into the N tokens, and per
    layer past_key_i and past_value_i (R, H, C, K).
    Outputs: logits (M, V), and per layer present_key_i and present_value_i: the same buffers as the past.
    With `trace` instead of the cache: residual_0 to residual_(2L-1), the residual stream after each attention
    and each MLP (N, D), but of the wanted tokens only (M, D) in the last layer, and per layer
    attention_probabilities_i (R, H, S, T).
    The part "body" gives hidden (M, D) instead of logits, and the part "head" makes logits of that.
    """
    value, ints = helper.make_tensor_value_info, TensorProto.INT32
    hidden = value("hidden", FLOAT, ["wanted", config.n_embd])
    logits = value("logits", FLOAT, ["wanted", config.vocab_size])
    g = Graph(config, products)
    initializers = [external(name, array, location="handed over in memory") for name, array in arrays.items()]
    if part == "head":
        g.products.head(g, "hidden", "lm_head.weight")
        return finished(g, [hidden], [logits], initializers)
    operators = Fused(config, seqlens_k="seqlens_k", total="total", probabilities=trace)
    h = g.body(operators, "embedded", "wanted")
    if part == "body":
        g.ops("Identity", (h,), ["hidden"])
    else:
        g.products.head(g, h, "lm_head.weight")
    outputs = cache_values(config, "present", "capacity", operators.head_dim)
    if trace:
        for i, name in enumerate(g.sums):
            flat = g.op("Reshape", name, g.constant([-1, config.n_embd]))
            g.ops("Identity", (flat,), [f"residual_{i}"])
        outputs = [value(f"residual_{i}", FLOAT, [None, config.n_embd]) for i in range(len(g.sums))]
        seen: list[str | int | None] = ["rows", config.n_head, "new", "seen"]
        outputs += [value(f"attention_probabilities_{i}", FLOAT, seen) for i in range(config.n_layer)]
    inputs = [
        value("embedded", FLOAT, ["rows", "new", config.n_embd]),
        value("seqlens_k", ints, ["rows"]),
        value("total", ints, []),
        value("wanted", ints, ["wanted"]),
        *cache_values(config, "past", "capacity", operators.head_dim),
    ]
    return finished(g, inputs, [hidden if part == "body" else logits, *outputs], initializers)


def cache_values(config: ModelConfig, when: str, length: str, head_dim: int) -> list[onnx.ValueInfoProto]:
    """Keys and values (R, H, length, K) of every layer, `when` being past or present."""
    shape: list[str | int | None] = ["rows", config.n_head, length, head_dim]
    return [
        helper.make_tensor_value_info(f"{when}_{kind}_{i}", FLOAT, shape)
        for i in range(config.n_layer)
        for kind in ("key", "value")
    ]


def finished(
    g: Graph,
    inputs: list[onnx.ValueInfoProto],
    outputs: list[onnx.ValueInfoProto],
    initializers: Iterable[TensorProto],
) -> onnx.ModelProto:
    """A model of the graph's nodes, naming the operator sets that they use."""
    opsets = [helper.make_opsetid("", OPSET)]
    if any(node.domain == MICROSOFT for node in g.nodes):
        opsets.append(helper.make_opsetid(MICROSOFT, 1))
    return helper.make_model(
        helper.make_graph(g.nodes, "gpt2", inputs, outputs, [*g.constants, *initializers]),
        opset_imports=opsets,
        ir_version=IR_VERSION,
        producer_name="gpt2core",
    )


def external(name: str, array: np.ndarray, **where: str | int) -> TensorProto:
    """An initializer whose numbers are elsewhere."""
    kind = helper.np_dtype_to_tensor_dtype(array.dtype)
    tensor = TensorProto(name=name, data_type=kind, dims=array.shape)
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in where.items():
        tensor.external_data.add(key=key, value=str(value))
    return tensor
