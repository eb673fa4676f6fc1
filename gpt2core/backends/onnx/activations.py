"""The MLP's activation functions as ONNX nodes."""

import math
from collections.abc import Callable
from typing import Any, Final, Protocol


class Nodes(Protocol):
    """What an activation needs of a graph."""

    def op(self, kind: str, *inputs: str, **attributes: Any) -> str:
        """Append a node of one output; the name of that."""
        ...

    def constant(self, value: float) -> str:
        """A float32 scalar."""
        ...


def activate(g: Nodes, x: str, name: str) -> str:
    """The activation function `name`, of `gpt2core.config.ACTIVATIONS`."""
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


def _clip(g: Nodes, x: str, low: float, high: float) -> str:
    return g.op("Clip", x, g.constant(low), g.constant(high))


def _laplace(g: Nodes, x: str) -> str:
    z = g.op("Div", g.op("Sub", x, g.constant(0.707107)), g.constant(0.282095 * math.sqrt(2)))
    return g.op("Mul", g.op("Add", g.op("Erf", z), g.constant(1.0)), g.constant(0.5))


def _relu2(g: Nodes, x: str) -> str:
    x = g.op("Relu", x)
    return g.op("Mul", x, x)


_ACTIVATIONS: Final[dict[str, Callable[[Nodes, str], str]]] = {
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
