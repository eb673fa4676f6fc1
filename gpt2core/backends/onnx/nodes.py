"""GPT-2 as a list of ONNX nodes: what it computes in which order, whatever operators say it."""

# R rows, S new tokens per row, N = R S, M wanted logits, D width, H heads, K head width, E = H K

from typing import Any, Protocol, final

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from gpt2core.backends.onnx.activations import activate
from gpt2core.config import ModelConfig


class Operators(Protocol):
    """The part of the network that has more than one wording."""

    @property
    def head_dim(self) -> int:
        """K: the head width of the graph, at least the configuration's."""
        ...

    def attention(self, g: "Graph", layer: int, qkv: str) -> str:
        """Causal attention (R, S, E) of the new tokens' queries, keys and values (R, S, 3 E) and the past."""
        ...


class Products(Protocol):
    """The matrix products, which depend on the weights' encoding."""

    @property
    def flat(self) -> bool:
        """Whether tokens have to come as (N, I); else they come by rows, (R, S, I), with no reshaping."""
        ...

    @property
    def widened(self) -> bool:
        """Whether the attention's matrices have heads of the width of `Operators` already."""
        ...

    def linear(self, g: "Graph", x: str, name: str) -> str:
        """A product and its bias, (N, O) or (R, S, O)."""
        ...

    def head(self, g: "Graph", x: str, name: str) -> None:
        """The node that gives "logits" (M, V)."""
        ...


@final
class FloatProducts:
    """Products of float32 weights, in the ONNX standard's words."""

    flat = widened = True

    def linear(self, g: "Graph", x: str, name: str) -> str:
        """See `Products`; in ONNX Runtime no slower with the bias than without."""
        return g.op("Gemm", x, f"{name}.weight", f"{name}.bias")

    def head(self, g: "Graph", x: str, name: str) -> None:
        """See `Products`."""
        g.ops("Gemm", (x, name), ["logits"], transB=1)


class Graph:
    """Nodes in the order in which they compute.

    Args:
        config: what the model computes.
        products: how matrices are multiplied; None for float32 ones.
    """

    def __init__(self, config: ModelConfig, products: Products | None = None) -> None:
        self.config = config
        self.products: Products = products or FloatProducts()
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[TensorProto] = []
        self.sums: list[str] = []  # the residual stream after each attention and each MLP
        self._count = 0

    def op(self, kind: str, *inputs: str, domain: str = "", **attributes: Any) -> str:
        """Append a node of one output; the name of that."""
        return self.ops(kind, inputs, [f"{kind}_{self.next()}"], domain, **attributes)[0]

    def ops(
        self, kind: str, inputs: tuple[str, ...], outputs: list[str], domain: str = "", **attributes: Any
    ) -> list[str]:
        """Append a node with named outputs."""
        name = f"{kind}_{self.next()}"
        self.nodes.append(helper.make_node(kind, inputs, outputs, name=name, domain=domain, **attributes))
        return outputs

    def constant(self, value: float | int | list[int]) -> str:
        """A small constant: a float32 scalar, or int64, a scalar or a list."""
        array = np.array(value, np.float32 if isinstance(value, float) else np.int64)
        name = f"constant_{self.next()}"
        self.constants.append(numpy_helper.from_array(array, name))
        return name

    def next(self) -> int:
        """A number that no name has had."""
        self._count += 1
        return self._count

    def norm(self, x: str, name: str) -> str:
        """The layer norm of x (..., D)."""
        epsilon = self.config.layer_norm_epsilon
        return self.op("LayerNormalization", x, f"{name}.weight", f"{name}.bias", epsilon=epsilon)

    def body(self, operators: Operators, embedded: str, wanted: str) -> str:
        """From embeddings (R, S, D) to the head's input (M, D) of the tokens `wanted` (M,)."""
        config, linear, flat = self.config, self.products.linear, self.products.flat
        inner = config.n_head * operators.head_dim  # E
        by_rows = ""
        if flat:
            by_rows = self.op("Concat", self.op("Shape", embedded, end=2), self.constant([3 * inner]), axis=0)
        x = self.op("Reshape", embedded, self.constant([-1, config.n_embd])) if flat else embedded
        h = self.norm(x, "h.0.ln_1")
        for i in range(config.n_layer):
            at, last = f"h.{i}.", i == config.n_layer - 1
            after = "ln_f" if last else f"h.{i + 1}.ln_1"
            qkv = self._widened(linear(self, h, f"{at}attn.c_attn"), operators.head_dim)
            if flat:
                qkv = self.op("Reshape", qkv, by_rows)
            y = operators.attention(self, i, qkv)  # (R, S, E)
            y = self._narrowed(y, operators.head_dim)
            width = inner if self.products.widened else config.n_embd
            if flat or last:
                y = self.op("Reshape", y, self.constant([-1, width]))
            if last:  # from here on only the wanted tokens matter
                x = x if flat else self.op("Reshape", x, self.constant([-1, config.n_embd]))
                x, y = self.op("Gather", x, wanted), self.op("Gather", y, wanted)  # (M, D), (M, E)
            x = self.op("Add", x, linear(self, y, f"{at}attn.c_proj"))
            self.sums.append(x)
            h = linear(self, self.norm(x, f"{at}ln_2"), f"{at}mlp.c_fc")
            h = activate(self, h, config.activation_function)
            x = self.op("Add", x, linear(self, h, f"{at}mlp.c_proj"))
            self.sums.append(x)
            h = self.norm(x, after)
        return h

    def _widened(self, qkv: str, head_dim: int) -> str:
        """Fill every head of (R, S, 3 D) up with zeros to the width K of the graph."""
        config = self.config
        extra = head_dim - config.head_dim
        if self.products.widened or not extra:
            return qkv
        heads = self.op("Reshape", qkv, self.constant([0, 0, 3 * config.n_head, config.head_dim]))
        padded = self.op("Pad", heads, self.constant([0] * 7 + [extra]))
        return self.op("Reshape", padded, self.constant([0, 0, 3 * config.n_head * head_dim]))

    def _narrowed(self, y: str, head_dim: int) -> str:
        """Undo `_widened` for the result (R, S, E) of attention."""
        config = self.config
        if self.products.widened or head_dim == config.head_dim:
            return y
        heads = self.op("Reshape", y, self.constant([0, 0, config.n_head, head_dim]))
        axis = self.constant([0]), self.constant([config.head_dim]), self.constant([3])
        return self.op("Reshape", self.op("Slice", heads, *axis), self.constant([0, 0, config.n_embd]))
