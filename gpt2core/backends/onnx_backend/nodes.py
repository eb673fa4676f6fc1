"""GPT-2 as a list of ONNX nodes: what it computes in which order, whatever operators say it."""

# R rows, S new tokens per row, N = R S, M wanted logits, D width, H heads, K head width, E = H K

from typing import Any, Protocol, final

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from gpt2core.backends.onnx_backend.activations import activate
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

    def linear(self, g: "Graph", x: str, name: str) -> str:
        """A product and its bias (N, O)."""
        ...

    def head(self, g: "Graph", x: str, name: str) -> None:
        """The node that gives "logits" (M, V)."""
        ...


@final
class FloatProducts:
    """Products of float32 weights, in the ONNX standard's words."""

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
        products: how matrices are multiplied; None for float32 ones, whose heads are widened in the weights.
    """

    def __init__(self, config: ModelConfig, products: Products | None = None) -> None:
        self.config = config
        self.products: Products = products or FloatProducts()
        self._narrow = products is not None  # weights of unwidened heads
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

    def linear(self, x: str, name: str) -> str:
        """A product and its bias (N, O)."""
        return self.products.linear(self, x, name)

    def norm(self, x: str, name: str) -> str:
        """The layer norm of x (N, D)."""
        epsilon = self.config.layer_norm_epsilon
        return self.op("LayerNormalization", x, f"{name}.weight", f"{name}.bias", epsilon=epsilon)

    def body(self, operators: Operators, embedded: str, wanted: str, head: str) -> None:
        """From embeddings (R, S, D) to "logits" (M, V) of the tokens `wanted` (M,), by the matrix `head`."""
        config = self.config
        inner = config.n_head * operators.head_dim  # E
        qkv_shape = self.op("Concat", self.op("Shape", embedded, end=2), self.constant([3 * inner]), axis=0)
        out_shape = self.constant([-1, inner])
        x = self.op("Reshape", embedded, self.constant([-1, config.n_embd]))  # (N, D)
        h = self.norm(x, "h.0.ln_1")
        for i in range(config.n_layer):
            at, last = f"h.{i}.", i == config.n_layer - 1
            after = "ln_f" if last else f"h.{i + 1}.ln_1"
            qkv = self.linear(h, f"{at}attn.c_attn")  # (N, 3 E)
            if self._narrow:
                qkv = self._widened(qkv, operators.head_dim)
            y = operators.attention(self, i, self.op("Reshape", qkv, qkv_shape))  # (R, S, E)
            y = self.op("Reshape", y, out_shape)  # (N, E)
            if self._narrow:
                y = self._narrowed(y, operators.head_dim)
            if last:  # from here on only the wanted tokens matter
                x, y = self.op("Gather", x, wanted), self.op("Gather", y, wanted)  # (M, D), (M, E)
            x = self.op("Add", x, self.linear(y, f"{at}attn.c_proj"))
            self.sums.append(x)
            h = self.linear(self.norm(x, f"{at}ln_2"), f"{at}mlp.c_fc")
            h = activate(self, h)
            x = self.op("Add", x, self.linear(h, f"{at}mlp.c_proj"))
            self.sums.append(x)
            h = self.norm(x, after)
        self.products.head(self, h, head)

    def _widened(self, qkv: str, head_dim: int) -> str:
        """Fill every head of (N, 3 D) up with zeros to the width K of the graph."""
        config = self.config
        if head_dim == config.head_dim:
            return qkv
        heads = self.op("Reshape", qkv, self.constant([-1, 3 * config.n_head, config.head_dim]))
        return self.op("Pad", heads, self.constant([0, 0, 0, 0, 0, head_dim - config.head_dim]))

    def _narrowed(self, y: str, head_dim: int) -> str:
        """Undo `_widened` for the result (N, E) of attention."""
        config = self.config
        if head_dim == config.head_dim:
            return y
        heads = self.op("Reshape", y, self.constant([-1, config.n_head, head_dim]))
        axis = self.constant([0]), self.constant([config.head_dim]), self.constant([2])
        return self.op("Reshape", self.op("Slice", heads, *axis), self.constant([-1, config.n_embd]))
