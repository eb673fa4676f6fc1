"""Two ways to say the same network: ONNX Runtime's fused operators, and the ONNX standard's alone."""

# R rows, S new tokens per row, P past positions, T = P + S, H heads, K head width, E = H K

import math
from collections.abc import Callable
from typing import Final, final

from gpt2core.backends.onnx_backend.nodes import Graph
from gpt2core.config import ModelConfig

MICROSOFT: Final = "com.microsoft"
_HEAD_MULTIPLE: Final = 8  # GroupQueryAttention refuses other head widths
_AFTER_SOFTMAX: Final = 2  # what its attribute qk_output calls the attention probabilities


def padded_head_dim(config: ModelConfig) -> int:
    """The head width of `Fused`, the configuration's rounded up to what the operator takes."""
    return -(-config.head_dim // _HEAD_MULTIPLE) * _HEAD_MULTIPLE


@final
class Fused:
    """ONNX Runtime's own operators.

    `GroupQueryAttention` takes queries, keys and values side by side, appends to the cache in place and
    attends to each row's own length.

    Args:
        config: what the model computes.
        seqlens_k: names an int32 (R,): positions that each row sees, less one.
        total: names an int32 (): the most positions that a row sees.
        probabilities: also give out attention probabilities (R, H, S, T), as "attention_probabilities_i".
    """

    def __init__(
        self, config: ModelConfig, *, seqlens_k: str, total: str, probabilities: bool = False
    ) -> None:
        self.head_dim = padded_head_dim(config)
        self._lengths = seqlens_k, total
        self._probabilities = probabilities

    def attention(self, g: Graph, layer: int, qkv: str) -> str:
        """See `Operators`."""
        outputs = [f"attention_{layer}", f"present_key_{layer}", f"present_value_{layer}"]
        qk_output = {}
        if self._probabilities:
            outputs.append(f"attention_probabilities_{layer}")
            qk_output = {"qk_output": _AFTER_SOFTMAX}
        return g.ops(
            "GroupQueryAttention",
            (qkv, "", "", f"past_key_{layer}", f"past_value_{layer}", *self._lengths),
            outputs,
            MICROSOFT,
            num_heads=g.config.n_head,
            kv_num_heads=g.config.n_head,
            scale=g.config.attention_scale(layer),
            **qk_output,
        )[0]

    def add_and_norm(self, g: Graph, x: str, y: str, bias: str, norm: str) -> tuple[str, str]:
        """See `Operators`."""
        normed, total = f"normed_{g.next()}", f"sum_{g.next()}"
        g.ops(
            "SkipLayerNormalization",
            (x, y, f"{norm}.weight", f"{norm}.bias", bias),
            [normed, "", "", total],
            MICROSOFT,
            epsilon=g.config.layer_norm_epsilon,
        )
        return normed, total

    def activate(self, g: Graph, x: str, bias: str) -> str:
        """See `Operators`."""
        name = g.config.activation_function
        if name in _TANH_GELUS:
            return g.op("FastGelu", x, bias, domain=MICROSOFT)
        if name in _EXACT_GELUS:
            return g.op("BiasGelu", x, bias, domain=MICROSOFT)
        x = g.op("Add", x, bias)
        if name in _SIGMOID_FACTORS:
            return g.op("QuickGelu", x, domain=MICROSOFT, alpha=_SIGMOID_FACTORS[name])
        return _ACTIVATIONS[name](g, x)


@final
class Standard:
    """Operators of the ONNX standard only; the cache grows by concatenation.

    Args:
        config: what the model computes.
        mask: names a bool (S, T): which positions each new token sees.
    """

    def __init__(self, config: ModelConfig, *, mask: str) -> None:
        self.head_dim = config.head_dim
        self._mask = mask

    def attention(self, g: Graph, layer: int, qkv: str) -> str:
        """See `Operators`."""
        heads = g.constant([0, 0, 3, g.config.n_head, self.head_dim])
        parts = g.op("Transpose", g.op("Reshape", qkv, heads), perm=[2, 0, 3, 1, 4])  # (3, R, H, S, K)
        q, k, v = (g.op("Gather", parts, g.constant(i), axis=0) for i in range(3))  # (R, H, S, K) each
        k, v = (
            g.ops("Concat", (f"past_{kind}_{layer}", new), [f"present_{kind}_{layer}"], axis=2)[0]
            for kind, new in (("key", k), ("value", v))
        )  # (R, H, T, K) each
        q = g.op("Mul", q, g.constant(float(g.config.attention_scale(layer))))
        scores = g.op("MatMul", q, g.op("Transpose", k, perm=[0, 1, 3, 2]))  # (R, H, S, T)
        scores = g.op("Where", self._mask, scores, g.constant(-math.inf))
        y = g.op("MatMul", g.op("Softmax", scores, axis=-1), v)  # (R, H, S, K)
        merged = g.constant([0, 0, g.config.n_head * self.head_dim])
        return g.op("Reshape", g.op("Transpose", y, perm=[0, 2, 1, 3]), merged)  # (R, S, E)

    def add_and_norm(self, g: Graph, x: str, y: str, bias: str, norm: str) -> tuple[str, str]:
        """See `Operators`."""
        total = g.op("Add", x, g.op("Add", y, bias))
        weights = f"{norm}.weight", f"{norm}.bias"
        return g.op("LayerNormalization", total, *weights, epsilon=g.config.layer_norm_epsilon), total

    def activate(self, g: Graph, x: str, bias: str) -> str:
        """See `Operators`."""
        name = g.config.activation_function
        x = g.op("Add", x, bias)
        if name in _TANH_GELUS:
            return g.op("Gelu", x, approximate="tanh")
        if name in _EXACT_GELUS:
            return g.op("Gelu", x)
        if name in _SIGMOID_FACTORS:
            factor = g.constant(_SIGMOID_FACTORS[name])
            return g.op("Mul", x, g.op("Sigmoid", g.op("Mul", x, factor)))
        return _ACTIVATIONS[name](g, x)


_TANH_GELUS: Final = ("gelu_accurate", "gelu_fast", "gelu_new", "gelu_python_tanh", "gelu_pytorch_tanh")
_EXACT_GELUS: Final = ("gelu", "gelu_python")
_SIGMOID_FACTORS: Final = {"quick_gelu": 1.702, "silu": 1.0, "swish": 1.0}  # x sigmoid(factor x)


def _clip(g: Graph, x: str, low: float, high: float) -> str:
    return g.op("Clip", x, g.constant(low), g.constant(high))


def _laplace(g: Graph, x: str) -> str:
    z = g.op("Div", g.op("Sub", x, g.constant(0.707107)), g.constant(0.282095 * math.sqrt(2)))
    return g.op("Mul", g.op("Add", g.op("Erf", z), g.constant(1.0)), g.constant(0.5))


def _relu2(g: Graph, x: str) -> str:
    x = g.op("Relu", x)
    return g.op("Mul", x, x)


_ACTIVATIONS: Final[dict[str, Callable[[Graph, str], str]]] = {
    "gelu_10": lambda g, x: _clip(g, g.op("Gelu", x), -10.0, 10.0),
    "hardswish": lambda g, x: g.op("HardSwish", x),
    "laplace": _laplace,
    "leaky_relu": lambda g, x: g.op("LeakyRelu", x, alpha=0.01),
    "linear": lambda g, x: x,
    "mish": lambda g, x: g.op("Mish", x),
    "relu": lambda g, x: g.op("Relu", x),
    "relu2": _relu2,
    "relu6": lambda g, x: _clip(g, x, 0.0, 6.0),
    "sigmoid": lambda g, x: g.op("Sigmoid", x),
    "sqrtsoftplus": lambda g, x: g.op("Sqrt", g.op("Softplus", x)),
    "tanh": lambda g, x: g.op("Tanh", x),
}
