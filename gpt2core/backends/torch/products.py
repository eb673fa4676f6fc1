"""Linear layers of the PyTorch backend: `product(x)` is `activation(x @ weight + bias)`.

In float32 on the CPU they call oneDNN's product directly. PyTorch itself sends float32 products to MKL, which
on some processors reaches less than half of the memory bandwidth with one to 32 rows; oneDNN also reads the
checkpoint's (in, out) layout in place and fuses the usual activations.

In int8 they call the product of whole numbers that PyTorch's compiler calls, whose weights oneDNN rearranges
once. The inputs are rounded to 8 bits with a scale for each row, so that a text does not depend on those that
share its pass, and what is not finite in a row stays there.
"""

# N rows, I inputs, O outputs

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor

from gpt2core.errors import BackendUnavailableError

Product = Callable[[Tensor], Tensor]
"""(N, I) -> (N, O), a new tensor."""

_ONEDNN_LINEAR: Final[Callable[..., Tensor] | None] = (
    torch.ops.mkldnn._linear_pointwise
    if torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    else None
)
_INT8_PRODUCT: Final[Callable[..., Tensor] | None] = (
    torch.ops.onednn.qlinear_pointwise.default
    if torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    and hasattr(torch.ops.onednn, "qlinear_pointwise")
    else None
)
_LEAST: Final = 1e-30  # of a row's largest number: a row of zeros is not divided by 0
_MANY_ROWS: Final = 16
_GELU_LINEAR: Final = 2 * (2 / math.pi) ** 0.5
_GELU_CUBIC: Final = 0.044715 * _GELU_LINEAR


def _laplace(x: Tensor) -> Tensor:
    return 0.5 * (1 + torch.erf((x - 0.707107) / (0.282095 * 2**0.5)))


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


ACTIVATIONS: Final[dict[str, Callable[[Tensor], Tensor]]] = {
    "gelu": F.gelu,
    "gelu_10": lambda x: F.gelu(x).clamp_(-10, 10),
    "gelu_accurate": _gelu_tanh,
    "gelu_fast": _gelu_tanh,
    "gelu_new": _gelu_tanh,
    "gelu_python": F.gelu,
    "gelu_python_tanh": _gelu_tanh,
    "gelu_pytorch_tanh": _gelu_tanh,
    "hardswish": F.hardswish,
    "laplace": _laplace,
    "leaky_relu": F.leaky_relu,
    "linear": lambda x: x,
    "mish": F.mish,
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square_(),
    "relu6": F.relu6,
    "sigmoid": torch.sigmoid,
    "silu": F.silu,
    "sqrtsoftplus": lambda x: F.softplus(x).sqrt_(),
    "swish": F.silu,
    "tanh": torch.tanh,
}
# What oneDNN computes in the same pass as the product: (attribute, algorithm).
_FUSED: Final[dict[Callable[[Tensor], Tensor], tuple[str, str]]] = {
    _gelu_tanh: ("gelu", "tanh"),
    F.gelu: ("gelu", "none"),
    F.relu: ("relu", ""),
}


def linear(weight: Tensor, bias: Tensor | None, activation: Callable[[Tensor], Tensor] | None) -> Product:
    """The product of float32 weights; `weight` is (O, I) in any strides."""
    if weight.device.type != "cpu" or _ONEDNN_LINEAR is None:
        if activation is None:
            return lambda x: F.linear(x, weight, bias)
        return lambda x: activation(F.linear(x, weight, bias))
    onednn = _ONEDNN_LINEAR
    if activation is None:
        return lambda x: onednn(x, weight, bias, "none", [], "")
    if activation in _FUSED:
        attribute, algorithm = _FUSED[activation]
        return lambda x: onednn(x, weight, bias, attribute, [], algorithm)
    return lambda x: activation(onednn(x, weight, bias, "none", [], ""))


@dataclass(frozen=True, slots=True)
class Pieces:
    """What stands between the products: PyTorch's own operators one by one, or the same compiled.

    Attributes:
        rounded: (N, I) in float32 and the steps -> uint8 (N, I) and the scale (N, 1) of each row.
        finished: a product (N, O) of whole numbers, its rows' scale, bias and activation -> (N, O).
        added: x, y (N, D), a layer norm's weight and bias (D,) and epsilon -> x + y and its layer norm.
    """

    rounded: Callable[[Tensor, int], tuple[Tensor, Tensor]]
    finished: Callable[[Tensor, Tensor, Tensor | None, Callable[[Tensor], Tensor] | None], Tensor]
    added: Callable[[Tensor, Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]]

    def compiled(self) -> "Pieces":
        """Compiled by `torch.compile`, for every number of rows at once; that happens when first called."""
        compiled: Any = partial(torch.compile, dynamic=True)
        return Pieces(compiled(self.rounded), compiled(self.finished), compiled(self.added))


def _rounded(x: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    scale = x.abs().amax(1, keepdim=True).clamp_(min=_LEAST).div_(steps)
    # Signed first, since only that conversion is vectorised; oneDNN is fast with unsigned inputs only.
    return (x / scale).round_().to(torch.int8).view(torch.uint8).add_(steps + 1), scale


def _finished(
    y: Tensor, scale: Tensor, bias: Tensor | None, activation: Callable[[Tensor], Tensor] | None
) -> Tensor:
    y.mul_(scale)
    if bias is not None:
        y.add_(bias)
    if activation is None:
        return y
    if activation is _gelu_tanh and len(y) >= _MANY_ROWS:
        return _gelu_by_sigmoid(y)
    return activation(y)


def _added(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    x = y.add_(x)
    return x, F.layer_norm(x, weight.shape, weight, bias, epsilon)


EAGER: Final = Pieces(_rounded, _finished, _added)


@dataclass(frozen=True, slots=True)
class Int8Product:
    """The product of int8 weights with inputs that are rounded to 8 bits, row by row."""

    multiply: Callable[..., Tensor]
    packed: Tensor  # (I, O) in oneDNN's layout
    scale: Tensor  # (O,)
    zeros: Tensor  # (O,): weights are symmetric
    bias: Tensor | None
    activation: Callable[[Tensor], Tensor] | None
    steps: int  # a row's largest number is rounded to so many
    pieces: Pieces

    def __call__(self, x: Tensor) -> Tensor:
        """See `Product`."""
        q, scale = self.pieces.rounded(x, self.steps)
        y = self.multiply(
            *(q, 1.0, self.steps + 1, self.packed, self.scale, self.zeros, None),
            *(1.0, 0, torch.float32, "none", [], ""),
        )
        return self.pieces.finished(y, scale, self.bias, self.activation)


def int8_product(
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    activation: Callable[[Tensor], Tensor] | None = None,
    pieces: Pieces = EAGER,
) -> Int8Product:
    """The product of `weight`, int8 (O, I), times `scale` (O,).

    Raises:
        BackendUnavailableError: this build of PyTorch lacks the product.
    """
    if _INT8_PRODUCT is None:
        raise BackendUnavailableError(
            f"PyTorch {torch.__version__} was built without oneDNN's int8 product, so the torch backend does "
            "not run precision 'int8' here; use backend='onnx' or 'numpy'"
        )
    packed = torch.ops.onednn.qlinear_prepack(weight.contiguous(), None)
    zeros = torch.zeros(len(scale), dtype=torch.int32)
    return Int8Product(_INT8_PRODUCT, packed, scale, zeros, bias, activation, _steps(_capabilities()), pieces)


def _capabilities() -> dict[str, Any]:
    found: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return found


def _steps(capabilities: dict[str, Any]) -> int:
    """How finely inputs may be rounded: 127 steps, or 63 where the processor may add two products in 16 bits.

    x86 without VNNI does, and saturates; 2 x 127 x 127 just fits. Where PyTorch
    does not tell, the answer is the safe one.
    """
    if capabilities.get("architecture", "x86_64") != "x86_64":
        return 127
    return 127 if capabilities.get("avx512_vnni") or capabilities.get("avx_vnni") else 63


def _gelu_by_sigmoid(x: Tensor) -> Tensor:
    """The tanh approximation of GELU, in half the time for many rows: 1 + tanh(z) is 2 sigmoid(2 z)."""
    inner = x * x
    return inner.mul_(_GELU_CUBIC).add_(_GELU_LINEAR).mul_(x).sigmoid_().mul_(x)
