"""GPT-2 as a list of ONNX nodes: what it computes in which order, whatever operators say it."""

# R rows, S new tokens per row, N = R S, M wanted logits, D width, H heads, K head width, E = H K

from typing import Any, Protocol

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from gpt2core.config import ModelConfig


class Operators(Protocol):
    """The parts of the network that a set of operators words in its own way."""

    @property
    def head_dim(self) -> int:
        """K: the head width of the graph, at least the configuration's."""
        ...

    def attention(self, g: "Graph", layer: int, qkv: str) -> str:
        """Causal attention (R, S, E) of the new tokens' queries, keys and values (R, S, 3 E) and the past."""
        ...

    def add_and_norm(self, g: "Graph", x: str, y: str, bias: str, norm: str) -> tuple[str, str]:
        """The layer norm of x + y + bias, and the sum itself."""
        ...

    def activate(self, g: "Graph", x: str, bias: str) -> str:
        """The MLP's activation of x + bias."""
        ...


class Graph:
    """Nodes in the order in which they compute."""

    def __init__(self, config: ModelConfig) -> None:
        self.config = config
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

    def body(self, operators: Operators, embedded: str, wanted: str, head: str) -> None:
        """From embeddings (R, S, D) to "logits" (M, V) of the tokens `wanted` (M,), by the matrix `head`."""
        config = self.config
        inner = config.n_head * operators.head_dim  # E
        qkv_shape = self.op("Concat", self.op("Shape", embedded, end=2), self.constant([3 * inner]), axis=0)
        out_shape = self.constant([-1, inner])
        x = self.op("Reshape", embedded, self.constant([-1, config.n_embd]))  # (N, D)
        epsilon = config.layer_norm_epsilon
        h = self.op("LayerNormalization", x, "h.0.ln_1.weight", "h.0.ln_1.bias", epsilon=epsilon)
        for i in range(config.n_layer):
            at, last = f"h.{i}.", i == config.n_layer - 1
            after = "ln_f" if last else f"h.{i + 1}.ln_1"
            qkv = self.op("Gemm", h, f"{at}attn.c_attn.weight", f"{at}attn.c_attn.bias")  # (N, 3 E)
            y = operators.attention(self, i, self.op("Reshape", qkv, qkv_shape))  # (R, S, E)
            y = self.op("Reshape", y, out_shape)  # (N, E)
            if last:  # from here on only the wanted tokens matter
                x, y = self.op("Gather", x, wanted), self.op("Gather", y, wanted)  # (M, D), (M, E)
            y = self.op("MatMul", y, f"{at}attn.c_proj.weight")
            h, x = operators.add_and_norm(self, x, y, f"{at}attn.c_proj.bias", f"{at}ln_2")
            self.sums.append(x)
            h = self.op("MatMul", h, f"{at}mlp.c_fc.weight")
            h = operators.activate(self, h, f"{at}mlp.c_fc.bias")
            h = self.op("MatMul", h, f"{at}mlp.c_proj.weight")
            h, x = operators.add_and_norm(self, x, h, f"{at}mlp.c_proj.bias", after)
            self.sums.append(x)
        self.ops("Gemm", (h, head), ["logits"], transB=1)
