"""GPT-2 as an ONNX graph, built from a configuration; the weights are named in it and stay outside.

Attention is ONNX Runtime's `GroupQueryAttention`, which takes queries, keys and values side by side, appends
to the cache in place and attends to each row's own length.
"""

# R rows, S new tokens per row, N = R S, M wanted logits, D width, H heads, K head width, E = H K
# V vocabulary, C cache capacity

import math
from collections.abc import Callable, Iterator
from typing import Any, Final

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from gpt2core._shapes import Float
from gpt2core.config import ModelConfig
from gpt2core.weights import Linear, Weights

MICROSOFT: Final = "com.microsoft"
OPSET: Final = 21
IR_VERSION: Final = 10
_HEAD_MULTIPLE: Final = 8  # GroupQueryAttention refuses other head widths


def padded_head_dim(config: ModelConfig) -> int:
    """K: the head width of the graph, the configuration's rounded up to what the operator takes."""
    return -(-config.head_dim // _HEAD_MULTIPLE) * _HEAD_MULTIPLE


def graph_weights(weights: Weights) -> Iterator[tuple[str, Float[np.ndarray, "..."]]]:
    """The graph's initializers by name: the checkpoint's arrays themselves.

    Only where heads have to be widened are the attention's matrices copied, zeros filling the gaps.
    """
    widened: dict[str, np.ndarray] = {}
    if padded_head_dim(weights.config) != weights.config.head_dim:
        for i, block in enumerate(weights.blocks):
            widened |= _widen(weights.config, f"h.{i}.attn.", block.c_attn, block.attn_c_proj)
    for name, array in weights.named():
        if name == "wte.weight" and weights.lm_head is weights.wte:
            yield "lm_head.weight", array
        elif name not in ("wte.weight", "wpe.weight"):  # looked up outside the graph
            yield name, widened.get(name, array)


def _widen(config: ModelConfig, prefix: str, qkv: Linear, out: Linear) -> dict[str, np.ndarray]:
    d, heads, k = config.n_embd, config.n_head, config.head_dim
    extra = padded_head_dim(config) - k
    weight = np.pad(qkv.weight.reshape(d, 3, heads, k), ((0, 0), (0, 0), (0, 0), (0, extra)))  # (D, 3, H, K)
    bias = np.pad(qkv.bias.reshape(3, heads, k), ((0, 0), (0, 0), (0, extra)))  # (3, H, K)
    projection = np.pad(out.weight.reshape(heads, k, d), ((0, 0), (0, extra), (0, 0)))  # (H, K, D)
    return {
        f"{prefix}c_attn.weight": weight.reshape(d, -1),
        f"{prefix}c_attn.bias": bias.reshape(-1),
        f"{prefix}c_proj.weight": projection.reshape(-1, d),
    }


def build_model(weights: Weights) -> onnx.ModelProto:
    """The graph, with its weights as external initializers that say only name, type and shape.

    Embeddings are looked up by the caller: a table that a graph looks things up in is a copy that stays,
    while the same table as the head is rearranged and let go.

    Inputs: embedded (R, S, D) the tokens' and positions' embeddings, seqlens_k (R,) positions that each row
    sees less one, total () the most positions that a row sees, wanted (M,) indices into the N tokens, and per
    layer past_key_i and past_value_i (R, H, C, K).
    Outputs: logits (M, V), and per layer present_key_i and present_value_i: the same buffers as the past.
    """
    config = weights.config
    graph = _Graph(config)
    graph.body()
    cache: list[str | int | None] = ["rows", config.n_head, "capacity", padded_head_dim(config)]
    ints, floats = TensorProto.INT32, TensorProto.FLOAT
    value = helper.make_tensor_value_info
    layers = range(config.n_layer)
    model = helper.make_model(
        helper.make_graph(
            graph.nodes,
            "gpt2",
            [
                value("embedded", floats, ["rows", "new", config.n_embd]),
                value("seqlens_k", ints, ["rows"]),
                value("total", ints, []),
                value("wanted", ints, ["wanted"]),
                *[value(f"past_{kv}_{i}", floats, cache) for i in layers for kv in ("key", "value")],
            ],
            [
                value("logits", floats, ["wanted", config.vocab_size]),
                *[value(f"present_{kv}_{i}", floats, cache) for i in layers for kv in ("key", "value")],
            ],
            [*graph.constants, *[_external(name, array) for name, array in graph_weights(weights)]],
        ),
        opset_imports=[helper.make_opsetid("", OPSET), helper.make_opsetid(MICROSOFT, 1)],
        ir_version=IR_VERSION,
        producer_name="gpt2core",
    )
    return model


def _external(name: str, array: np.ndarray) -> TensorProto:
    tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=array.shape)
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="handed over in memory")
    return tensor


class _Graph:
    """Nodes in the order in which they compute."""

    def __init__(self, config: ModelConfig) -> None:
        self.config = config
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[TensorProto] = []
        self._count = 0

    def op(self, kind: str, *inputs: str, domain: str = "", **attributes: Any) -> str:
        """Append a node of one output; the name of that."""
        return self.ops(kind, inputs, [f"{kind}_{self._next()}"], domain, **attributes)[0]

    def ops(
        self, kind: str, inputs: tuple[str, ...], outputs: list[str], domain: str = "", **attributes: Any
    ) -> list[str]:
        """Append a node with named outputs."""
        self.nodes.append(
            helper.make_node(
                kind, inputs, outputs, name=f"{kind}_{self._next()}", domain=domain, **attributes
            )
        )
        return outputs

    def constant(self, value: float | list[int]) -> str:
        """A small constant: a float32 scalar or a list of int64."""
        array = np.array(value, np.float32 if isinstance(value, float) else np.int64)
        name = f"constant_{self._next()}"
        self.constants.append(numpy_helper.from_array(array, name))
        return name

    def _next(self) -> int:
        self._count += 1
        return self._count

    def body(self) -> None:
        """Embeddings in, logits out."""
        config = self.config
        inner = config.n_head * padded_head_dim(config)  # E
        qkv_shape = self.op("Concat", self.op("Shape", "embedded", end=2), self.constant([3 * inner]), axis=0)
        out_shape = self.constant([-1, inner])
        x = self.op("Reshape", "embedded", self.constant([-1, config.n_embd]))  # (N, D)
        epsilon = config.layer_norm_epsilon
        h = self.op("LayerNormalization", x, "h.0.ln_1.weight", "h.0.ln_1.bias", epsilon=epsilon)
        for i in range(config.n_layer):
            at, last = f"h.{i}.", i == config.n_layer - 1
            after = "ln_f" if last else f"h.{i + 1}.ln_1"
            qkv = self.op("Gemm", h, f"{at}attn.c_attn.weight", f"{at}attn.c_attn.bias")  # (N, 3 E)
            y = self._attention(i, self.op("Reshape", qkv, qkv_shape))  # (R, S, E)
            y = self.op("Reshape", y, out_shape)  # (N, E)
            if last:  # from here on only the wanted tokens matter
                x, y = self.op("Gather", x, "wanted"), self.op("Gather", y, "wanted")  # (M, D), (M, E)
            y = self.op("MatMul", y, f"{at}attn.c_proj.weight")
            h, x = self._add_and_norm(x, y, f"{at}attn.c_proj.bias", f"{at}ln_2")
            h = self._activate(self.op("MatMul", h, f"{at}mlp.c_fc.weight"), f"{at}mlp.c_fc.bias")
            h = self.op("MatMul", h, f"{at}mlp.c_proj.weight")
            h, x = self._add_and_norm(x, h, f"{at}mlp.c_proj.bias", after)
        self.ops("Gemm", (h, "lm_head.weight"), ["logits"], transB=1)

    def _attention(self, layer: int, qkv: str) -> str:
        config = self.config
        present = [f"present_key_{layer}", f"present_value_{layer}"]
        past = (f"past_key_{layer}", f"past_value_{layer}")
        return self.ops(
            "GroupQueryAttention",
            (qkv, "", "", *past, "seqlens_k", "total"),
            [f"attention_{layer}", *present],
            MICROSOFT,
            num_heads=config.n_head,
            kv_num_heads=config.n_head,
            scale=config.attention_scale(layer),
        )[0]

    def _add_and_norm(self, x: str, y: str, bias: str, norm: str) -> tuple[str, str]:
        """The layer norm of x + y + bias, and the sum itself."""
        normed, total = f"normed_{self._next()}", f"sum_{self._next()}"
        self.ops(
            "SkipLayerNormalization",
            (x, y, f"{norm}.weight", f"{norm}.bias", bias),
            [normed, "", "", total],
            MICROSOFT,
            epsilon=self.config.layer_norm_epsilon,
        )
        return normed, total

    def _activate(self, x: str, bias: str) -> str:
        name = self.config.activation_function
        if name in _TANH_GELUS:
            return self.op("FastGelu", x, bias, domain=MICROSOFT)
        if name in ("gelu", "gelu_python"):
            return self.op("BiasGelu", x, bias, domain=MICROSOFT)
        return _ACTIVATIONS[name](self, self.op("Add", x, bias))


_TANH_GELUS: Final = ("gelu_accurate", "gelu_fast", "gelu_new", "gelu_python_tanh", "gelu_pytorch_tanh")


def _clip(g: _Graph, x: str, low: float, high: float) -> str:
    return g.op("Clip", x, g.constant(low), g.constant(high))


def _laplace(g: _Graph, x: str) -> str:
    z = g.op("Div", g.op("Sub", x, g.constant(0.707107)), g.constant(0.282095 * math.sqrt(2)))
    return g.op("Mul", g.op("Add", g.op("Erf", z), g.constant(1.0)), g.constant(0.5))


def _relu2(g: _Graph, x: str) -> str:
    x = g.op("Relu", x)
    return g.op("Mul", x, x)


_ACTIVATIONS: Final[dict[str, Callable[[_Graph, str], str]]] = {
    "gelu_10": lambda g, x: _clip(g, g.op("Gelu", x), -10.0, 10.0),
    "hardswish": lambda g, x: g.op("HardSwish", x),
    "laplace": _laplace,
    "leaky_relu": lambda g, x: g.op("LeakyRelu", x, alpha=0.01),
    "linear": lambda g, x: x,
    "mish": lambda g, x: g.op("Mish", x),
    "quick_gelu": lambda g, x: g.op("QuickGelu", x, domain=MICROSOFT, alpha=1.702),
    "relu": lambda g, x: g.op("Relu", x),
    "relu2": _relu2,
    "relu6": lambda g, x: _clip(g, x, 0.0, 6.0),
    "sigmoid": lambda g, x: g.op("Sigmoid", x),
    "silu": lambda g, x: g.op("QuickGelu", x, domain=MICROSOFT, alpha=1.0),
    "sqrtsoftplus": lambda g, x: g.op("Sqrt", g.op("Softplus", x)),
    "swish": lambda g, x: g.op("QuickGelu", x, domain=MICROSOFT, alpha=1.0),
    "tanh": lambda g, x: g.op("Tanh", x),
}
