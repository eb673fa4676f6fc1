"""The PyTorch backend: CPU and CUDA, weights shared with NumPy on the CPU.

On the CPU its linear layers call oneDNN's product directly. PyTorch itself sends float32 products to MKL,
which on some processors reaches less than half of the memory bandwidth with one to 32 rows; oneDNN also
reads the checkpoint's (in, out) layout in place and fuses the usual activations.
"""

# N new tokens in all, B rows, R rows of a run, M wanted logits, D width, H heads, K head width, V vocabulary
# L layers, S cache slots, C cache capacity, T cached positions

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final, final

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from gpt2core._shapes import Float32
from gpt2core.backends.blas_threads import check_threads
from gpt2core.backends.memory import lazy_zeros
from gpt2core.backends.ragged import AttentionPlan, note_filled, plan_attention
from gpt2core.backends.torch_trace import Notes
from gpt2core.batch import Batch, whole_sequence
from gpt2core.config import ModelConfig
from gpt2core.errors import BackendError, BackendUnavailableError, RequestError
from gpt2core.trace import Trace
from gpt2core.weights import Linear, Weights

_ONEDNN_LINEAR: Final[Callable[..., Tensor] | None] = (
    torch.ops.mkldnn._linear_pointwise
    if torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    else None
)


def _laplace(x: Tensor) -> Tensor:
    return 0.5 * (1 + torch.erf((x - 0.707107) / (0.282095 * 2**0.5)))


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


_ACTIVATIONS: Final[dict[str, Callable[[Tensor], Tensor]]] = {
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


@dataclass(frozen=True, slots=True)
class _Layer:
    """One block's parameters as tensors; each linear layer is a function of its input."""

    ln_1: tuple[Tensor, Tensor]
    c_attn: Callable[[Tensor], Tensor]
    attn_c_proj: Callable[[Tensor], Tensor]
    ln_2: tuple[Tensor, Tensor]
    c_fc: Callable[[Tensor], Tensor]  # with the activation
    mlp_c_proj: Callable[[Tensor], Tensor]
    scale: float


@dataclass(frozen=True, slots=True)
class _Model:
    wte: Tensor
    wpe: Tensor
    layers: tuple[_Layer, ...]
    ln_f: tuple[Tensor, Tensor]
    lm_head: Callable[[Tensor], Tensor]


@final
class TorchCache:
    """Keys and values as one tensor (L, 2, S, H, C, K); on the CPU, unused slots take no memory."""

    def __init__(self, config: ModelConfig, slots: int, capacity: int, device: torch.device) -> None:
        shape = (config.n_layer, 2, slots, config.n_head, capacity, config.head_dim)
        self.slots, self.capacity = slots, capacity
        if device.type == "cpu":
            self.kv = torch.from_numpy(lazy_zeros(shape))
        else:
            self.kv = torch.zeros(shape, device=device)
        self.filled = np.zeros(slots, np.int32)

    @property
    def nbytes(self) -> int:
        """Bytes that a full cache takes."""
        return self.kv.nbytes


@final
class TorchBackend:
    """GPT-2 in eager PyTorch with scaled dot-product attention and a static cache.

    Args:
        weights: float32 weights; shared on the CPU, copied to a GPU.
        device: "cpu", "cuda" or "cuda:N".
        threads: PyTorch's intra-operator threads during a forward pass (the former count is put back); None
        leaves
            them as they are.

    Raises:
        BackendUnavailableError: the device is unknown or not there.
    """

    name = "torch"

    def __init__(self, weights: Weights, *, device: str = "cpu", threads: int | None = None) -> None:
        check_threads(threads)
        self.config = weights.config
        self._device = _device(device)
        self._threads = threads
        with warnings.catch_warnings():  # from_numpy warns of read-only arrays; nothing here writes to them
            warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
            self._model: _Model | None = _to_torch(weights, self._device)

    def new_cache(self, slots: int, capacity: int) -> TorchCache:
        """An empty cache for `slots` sequences of up to `capacity` tokens."""
        return TorchCache(self.config, slots, capacity, self._device)

    def forward(self, batch: Batch, cache: TorchCache) -> Float32[np.ndarray, "M V"]:
        """See `gpt2core.backends.base.Backend.forward`."""
        if self._model is None:
            raise RequestError("the torch backend is closed; load the model again")
        batch.check(vocab_size=self.config.vocab_size, slots=cache.slots, capacity=cache.capacity)
        with self._running():
            for slot, positions in note_filled(cache.filled, batch):
                cache.kv[:, :, slot, :, positions] = 0
            return self._logits(self._model, batch, cache, None).cpu().numpy()

    def further_cost(self, tokens: int, rows: int) -> float:
        """See `gpt2core.backends.base.PricesTokens.further_cost`."""
        return 0.1 + 0.1 * tokens

    def trace(self, token_ids: Sequence[int]) -> Trace:
        """See `gpt2core.backends.base.Traces.trace`."""
        if self._model is None:
            raise RequestError("the torch backend is closed; load the model again")
        batch = whole_sequence(self.config, token_ids)
        with self._running():
            notes = Notes()
            logits = self._logits(self._model, batch, self.new_cache(1, len(token_ids)), notes)
            return notes.trace(logits)

    @contextmanager
    def _running(self) -> Iterator[None]:
        """No gradients, this backend's threads, and PyTorch's errors as one of this library's."""
        before = torch.get_num_threads()
        threads = before if self._threads is None else self._threads
        try:
            if threads != before:
                torch.set_num_threads(threads)
            with torch.inference_mode():
                yield
        except RuntimeError as error:
            raise BackendError(f"the torch backend failed on {self._device}: {error}") from error
        finally:
            if threads != before:
                torch.set_num_threads(before)

    def _logits(self, model: _Model, batch: Batch, cache: TorchCache, notes: Notes | None) -> Tensor:
        config, width, epsilon = self.config, (self.config.n_embd,), self.config.layer_norm_epsilon
        plan = plan_attention(batch)
        wanted = self._index(batch.logits_at)
        masks = [_beyond(run.ends, run.longest, self._device) for run in plan.decode]
        x = model.wte[self._index(batch.tokens)] + model.wpe[self._index(batch.positions)]  # (N, D)
        if notes is not None:
            notes.add_hidden_state(x)
        for i, layer in enumerate(model.layers):
            qkv = layer.c_attn(F.layer_norm(x, width, *layer.ln_1, epsilon))  # (N, 3 D)
            y = _attention(
                qkv.view(len(x), 3, config.n_head, -1), cache.kv[i], plan, masks, layer.scale
            )  # (N, D)
            if i == config.n_layer - 1:  # from here on only the wanted tokens matter
                if len(wanted) == 0:
                    return x.new_empty(0, config.vocab_size)
                x, y = x[wanted], y[wanted]  # (M, D)
            x = x + layer.attn_c_proj(y)
            if notes is not None:
                notes.add_attention(qkv.view(len(qkv), 3, config.n_head, -1), layer.scale)
                notes.add_hidden_state(x)
            x = x + layer.mlp_c_proj(layer.c_fc(F.layer_norm(x, width, *layer.ln_2, epsilon)))
            if notes is not None:
                notes.add_hidden_state(x)
        return model.lm_head(F.layer_norm(x, width, *model.ln_f, epsilon))  # (M, V)

    def _index(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(self._device)

    def close(self) -> None:
        """Let go of the weights."""
        self._model = None


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise BackendUnavailableError(
            f"device {name!r} is unknown to the torch backend; use 'cpu', 'cuda' or 'cuda:N'"
        )
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise BackendUnavailableError(
            f"device {name!r} is not there: PyTorch {torch.__version__} sees {torch.cuda.device_count()} "
            "CUDA devices; use device='cpu' or install a CUDA build of PyTorch"
        )
    return device


def _to_torch(weights: Weights, device: torch.device) -> _Model:
    config = weights.config
    act = _ACTIVATIONS[config.activation_function]

    def tensor(array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(device)

    def norm(part: Any) -> tuple[Tensor, Tensor]:
        return tensor(part.weight), tensor(part.bias)

    def linear(
        part: Linear, activation: Callable[[Tensor], Tensor] | None = None
    ) -> Callable[[Tensor], Tensor]:
        return _linear(tensor(part.weight).T, tensor(part.bias), activation)

    wte = tensor(weights.wte)
    return _Model(
        wte=wte,
        wpe=tensor(weights.wpe),
        layers=tuple(
            _Layer(
                ln_1=norm(block.ln_1),
                c_attn=linear(block.c_attn),
                attn_c_proj=linear(block.attn_c_proj),
                ln_2=norm(block.ln_2),
                c_fc=linear(block.c_fc, act),
                mlp_c_proj=linear(block.mlp_c_proj),
                scale=config.attention_scale(i),
            )
            for i, block in enumerate(weights.blocks)
        ),
        ln_f=norm(weights.ln_f),
        lm_head=_linear(wte if weights.lm_head is weights.wte else tensor(weights.lm_head), None, None),
    )


def _linear(
    weight: Tensor, bias: Tensor | None, activation: Callable[[Tensor], Tensor] | None
) -> Callable[[Tensor], Tensor]:
    """`activation(x @ weight.T + bias)`; `weight` is (O, I) in any strides."""
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


def _beyond(ends: np.ndarray, longest: int, device: torch.device) -> Tensor | None:
    """Mask (R, 1, 1, T) of the positions that each row sees, or None where all see all."""
    if ends.min() == longest:
        return None
    return torch.from_numpy(np.arange(longest) < ends[:, None, None, None]).to(device)


def _attention(
    qkv: Tensor, kv: Tensor, plan: AttentionPlan, masks: list[Tensor | None], scale: float
) -> Tensor:
    """Write keys and values (N, 3, H, K) into a layer's cache (2, S, H, C, K), then attend: (N, D)."""
    n, _, heads, width = qkv.shape
    y = torch.empty(n, heads, width, device=qkv.device)
    for run, mask in zip(plan.decode, masks, strict=True):
        q = qkv[run.tokens, 0, :, None]  # (R, H, 1, K)
        if len(run.ends) == 1:
            kv[:, run.slots.start, :, run.longest - 1] = qkv[run.tokens, 1:][0]
        else:
            rows = torch.arange(run.slots.start, run.slots.stop, device=qkv.device)
            last = torch.from_numpy(run.ends - 1).to(qkv.device)
            kv[:, rows, :, last] = qkv[run.tokens, 1:]
        k, v = kv[:, run.slots, :, : run.longest]  # (R, H, T, K) each
        y[run.tokens] = F.scaled_dot_product_attention(q, k, v, mask, scale=scale)[:, :, 0]
    for row in plan.prefill:
        kv[:, row.slot, :, row.start : row.end] = qkv[row.tokens, 1:].permute(1, 2, 0, 3)
        q = qkv[row.tokens, 0].transpose(0, 1)[None]  # (1, H, N, K)
        k, v = kv[:, row.slot, None, :, : row.end]  # (1, H, T, K) each
        seen = None
        if row.start:
            seen = torch.ones(row.end - row.start, row.end, dtype=torch.bool, device=qkv.device).tril_(
                row.start
            )
        attended = F.scaled_dot_product_attention(q, k, v, seen, is_causal=seen is None, scale=scale)
        y[row.tokens] = attended[0].transpose(0, 1)
    return y.view(n, heads * width)
