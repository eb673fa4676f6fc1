"""The PyTorch backend: CPU and CUDA, float32 weights shared with NumPy on the CPU, int8 on the CPU."""

# N new tokens in all, B rows, R rows of a run, M wanted logits, D width, H heads, K head width, V vocabulary
# L layers, S cache slots, C cache capacity

import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final, final

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from gpt2core._machine import limit_threads
from gpt2core._shapes import Float32
from gpt2core.backends._shared.caches import check_cache, check_copy, check_size
from gpt2core.backends._shared.memory import give_back, lazy_zeros
from gpt2core.backends._shared.ragged import note_filled, plan_attention
from gpt2core.backends._shared.threads import check_threads
from gpt2core.backends.torch.attention import attend, places_of
from gpt2core.backends.torch.products import ACTIVATIONS, EAGER, Pieces, Product, int8_product, linear
from gpt2core.backends.torch.trace import Notes
from gpt2core.batch import Batch, whole_sequence
from gpt2core.config import ModelConfig
from gpt2core.encodings import Int8
from gpt2core.errors import BackendError, BackendUnavailableError, RequestError
from gpt2core.trace import Trace
from gpt2core.weights import Linear, Matrix, Table, Weights, look_up

COMPILE_VARIABLE: Final = "GPT2CORE_TORCH_COMPILE"


@dataclass(frozen=True, slots=True)
class _Layer:
    """One block's parameters; each linear layer is a function of its input."""

    ln_1: tuple[Tensor, Tensor]
    c_attn: Product
    attn_c_proj: Product
    ln_2: tuple[Tensor, Tensor]
    c_fc: Product  # with the activation
    mlp_c_proj: Product
    scale: float


@dataclass(frozen=True, slots=True)
class _Model:
    wte: Tensor | Table  # in int8 it stays in the checkpoint's file, of which a pass reads a few rows
    wpe: Tensor
    layers: tuple[_Layer, ...]
    ln_f: tuple[Tensor, Tensor]
    lm_head: Product


@final
class TorchCache:
    """Keys and values as one tensor (L, 2, S, H, C, K); on the CPU, unused slots take no memory."""

    def __init__(self, config: ModelConfig, slots: int, capacity: int, device: torch.device) -> None:
        shape = (config.n_layer, 2, slots, config.n_head, capacity, config.head_dim)
        self.config, self.slots, self.capacity = config, slots, capacity
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
        weights: float32, shared on the CPU and copied to a GPU; or int8, of which oneDNN keeps a rearranged
            copy, while pages of a memory-mapped checkpoint are given back.
        device: "cpu", "cuda" or "cuda:N"; int8 runs on "cpu".
        threads: PyTorch's intra-operator threads during a forward pass (the former count is put back); None
            leaves them as they are.
        compiled: whether `torch.compile` compiles what stands between the products, at the first passes;
            it needs a C++ compiler, and docs/performance.md tells what it costs and gains. None takes the
            environment variable GPT2CORE_TORCH_COMPILE ("0" or "1"), or else False.

    Raises:
        BackendUnavailableError: the device is unknown, not there, or does not run the precision.
    """

    name = "torch"
    precisions = ("float32", "int8")

    def __init__(
        self,
        weights: Weights,
        *,
        device: str = "cpu",
        threads: int | None = None,
        compiled: bool | None = None,
    ) -> None:
        check_threads(threads)
        self.config = weights.config
        self.precision = weights.precision
        self._device = _device(device)
        if self.precision != "float32" and self._device.type != "cpu":
            raise BackendUnavailableError(
                f"the torch backend runs precision {self.precision!r} on device 'cpu' only, not {device!r}"
            )
        self._threads, self._quota = threads, limit_threads(None)
        with warnings.catch_warnings():  # from_numpy warns of read-only arrays; nothing here writes to them
            warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
            self._pieces = EAGER.compiled() if _compiled(compiled) else EAGER
            self._model: _Model | None = _to_torch(weights, self._device, self._pieces)

    def new_cache(self, slots: int, capacity: int) -> TorchCache:
        """An empty cache for `slots` sequences of up to `capacity` tokens."""
        check_size(self.config, slots, capacity)
        return TorchCache(self.config, slots, capacity, self._device)

    def forward(self, batch: Batch, cache: TorchCache) -> Float32[np.ndarray, "M V"]:
        """See `gpt2core.backends.base.Backend.forward`."""
        if self._model is None:
            raise RequestError("the torch backend is closed; load the model again")
        check_cache(cache, TorchCache, self.config)
        batch.check(vocab_size=self.config.vocab_size, slots=cache.slots, capacity=cache.capacity)
        with self._running():
            for slot, positions in note_filled(cache.filled, batch):
                cache.kv[:, :, slot, :, positions] = 0
            return self._logits(self._model, batch, cache, None).cpu().numpy()

    def copy_cache(self, cache: TorchCache, source: int, target: int, start: int, end: int) -> None:
        """See `gpt2core.backends.base.CopiesCache.copy_cache`."""
        check_cache(cache, TorchCache, self.config)
        check_copy(cache, source, target, start, end)
        cache.kv[:, :, target, :, start:end] = cache.kv[:, :, source, :, start:end]
        cache.filled[target] = max(int(cache.filled[target]), end)

    def extra_tokens_cost(self, tokens: int, rows: int) -> float:
        """See `gpt2core.backends.base.EstimatesCost.extra_tokens_cost`."""
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

    def hidden_states(self, token_ids: Sequence[int]) -> Float32[np.ndarray, "T D"]:
        """See `gpt2core.backends.base.Embeds.hidden_states`."""
        if self._model is None:
            raise RequestError("the torch backend is closed; load the model again")
        batch = whole_sequence(self.config, token_ids)
        with self._running():
            hidden = self._hidden(self._model, batch, self.new_cache(1, len(token_ids)), None)
            return hidden.float().cpu().numpy()

    @contextmanager
    def _running(self) -> Iterator[None]:
        """No gradients, this backend's threads, and PyTorch's errors as one of this library's."""
        before = torch.get_num_threads()
        threads = self._threads or min(before, self._quota or before)
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
        h = self._hidden(model, batch, cache, notes)
        if len(h) == 0:
            return h.new_empty(0, self.config.vocab_size)
        return model.lm_head(h)  # (M, V)

    def _hidden(self, model: _Model, batch: Batch, cache: TorchCache, notes: Notes | None) -> Tensor:
        """What the head reads, of the wanted tokens, (M, D)."""
        config, width, epsilon = self.config, (self.config.n_embd,), self.config.layer_norm_epsilon
        plan = plan_attention(batch)
        wanted = self._index(batch.logits_at)
        places = [places_of(run, self._device) for run in plan.decode]
        added = self._pieces.added
        x = self._embedded(model, batch)  # (N, D)
        h = F.layer_norm(x, width, *model.layers[0].ln_1, epsilon)
        if notes is not None:
            notes.add_hidden_state(x)
        for i, layer in enumerate(model.layers):
            qkv = layer.c_attn(h).view(len(x), 3, config.n_head, -1)  # (N, 3, H, K)
            y = attend(qkv, cache.kv[i], places, plan.prefill, layer.scale)  # (N, D)
            if i == config.n_layer - 1:  # from here on only the wanted tokens matter
                if len(wanted) == 0:
                    return x.new_empty(0, config.n_embd)
                x, y = x[wanted], y[wanted]  # (M, D)
            x, h = added(x, layer.attn_c_proj(y), *layer.ln_2, epsilon)
            if notes is not None:
                notes.add_attention(qkv, layer.scale)
                notes.add_hidden_state(x)
            following = model.ln_f if i == config.n_layer - 1 else model.layers[i + 1].ln_1
            x, h = added(x, layer.mlp_c_proj(layer.c_fc(h)), *following, epsilon)
            if notes is not None:
                notes.add_hidden_state(x)
        return h

    def _embedded(self, model: _Model, batch: Batch) -> Tensor:
        if isinstance(model.wte, Tensor):
            tokens = model.wte[self._index(batch.tokens)]
        else:
            tokens = torch.from_numpy(look_up(model.wte, batch.tokens))
        return tokens.add_(model.wpe[self._index(batch.positions)])

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


def _compiled(wanted: bool | None) -> bool:
    if wanted is not None:
        return wanted
    value = os.environ.get(COMPILE_VARIABLE, "0")
    if value not in ("0", "1"):
        raise RequestError(f"{COMPILE_VARIABLE} is {value!r}; use '0' or '1'")
    return value == "1"


def _to_torch(weights: Weights, device: torch.device, pieces: Pieces) -> _Model:
    config = weights.config
    act = ACTIVATIONS[config.activation_function]

    def tensor(array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(device)

    def norm(part: Any) -> tuple[Tensor, Tensor]:
        return tensor(part.weight), tensor(part.bias)

    def product(
        weight: Matrix, bias: np.ndarray | None = None, activation: Callable[[Tensor], Tensor] | None = None
    ) -> Product:
        offset = None if bias is None else tensor(bias)
        if isinstance(weight, np.ndarray):
            return linear(tensor(weight).T, offset, activation)
        assert isinstance(weight, Int8)
        packed = int8_product(tensor(weight.values).T, tensor(weight.scale), offset, activation, pieces)
        give_back(weight.values)
        return packed

    def layer(part: Linear, activation: Callable[[Tensor], Tensor] | None = None) -> Product:
        return product(part.weight, part.bias, activation)

    lm_head = product(weights.lm_head.T)  # first, since it is the largest and packing it takes as much again
    return _Model(
        wte=tensor(weights.wte) if isinstance(weights.wte, np.ndarray) else weights.wte,
        wpe=tensor(weights.wpe),
        layers=tuple(
            _Layer(
                ln_1=norm(block.ln_1),
                c_attn=layer(block.c_attn),
                attn_c_proj=layer(block.attn_c_proj),
                ln_2=norm(block.ln_2),
                c_fc=layer(block.c_fc, act),
                mlp_c_proj=layer(block.mlp_c_proj),
                scale=config.attention_scale(i),
            )
            for i, block in enumerate(weights.blocks)
        ),
        ln_f=norm(weights.ln_f),
        lm_head=lm_head,
    )
