"""The NumPy backend: the readable one among the fast, and the default where no framework is installed.

One forward pass, top to bottom, is `NumpyBackend._logits`; the arithmetic is in `gpt2core.kernels`. Weights
are used where they lie: a memory-mapped float32 checkpoint is never copied.
"""

# N new tokens in all, B rows, M wanted logits, D width, H heads, K head width, V vocabulary
# L layers, S cache slots, C cache capacity

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import numpy as np

from gpt2core import kernels
from gpt2core._shapes import Float, Float32
from gpt2core.backends._shared.caches import (
    check_cache,
    check_copy,
    check_read,
    check_size,
    check_written,
)
from gpt2core.backends._shared.memory import lazy_zeros
from gpt2core.backends._shared.ragged import AttentionPlan, note_filled, plan_attention
from gpt2core.backends._shared.threads import blas_threads
from gpt2core.backends.numpy.products import linear, multiply
from gpt2core.batch import Batch, whole_sequence
from gpt2core.config import ModelConfig
from gpt2core.errors import BackendUnavailableError, RequestError
from gpt2core.quantization.rounding import PRECISIONS
from gpt2core.trace import Trace
from gpt2core.weights import Weights, look_up


@final
class NumpyCache:
    """Keys and values as one array (L, 2, S, H, C, K); zeroed lazily, so unused slots take no memory."""

    def __init__(self, config: ModelConfig, slots: int, capacity: int) -> None:
        shape = (config.n_layer, 2, slots, config.n_head, capacity, config.head_dim)
        self.config, self.slots, self.capacity = config, slots, capacity
        self.kv = lazy_zeros(shape)
        self.filled = np.zeros(slots, np.int32)

    @property
    def nbytes(self) -> int:
        """Bytes that a full cache takes."""
        return self.kv.nbytes


@dataclass(frozen=True, slots=True)
class _Notes:
    """What `trace` wants to know of a pass, collected layer by layer."""

    hidden_states: list[Float32[np.ndarray, "N D"]]
    attentions: list[Float32[np.ndarray, "H N N"]]


@final
class NumpyBackend:
    """GPT-2 in pure NumPy.

    Args:
        weights: float32 or quantized weights; they are shared, not copied. Quantized ones are multiplied by
            blocks that become float32 in the processor's cache, so they take less memory, not less time.
        device: only "cpu".
        threads: threads of NumPy's BLAS during a forward pass; None leaves them as they are.

    Raises:
        BackendUnavailableError: another device, or a NumPy whose BLAS cannot be told its threads.
    """

    name = "numpy"
    precisions = ("float32", *PRECISIONS)

    def __init__(self, weights: Weights, *, device: str = "cpu", threads: int | None = None) -> None:
        if device != "cpu":
            raise BackendUnavailableError(
                f"the numpy backend runs on device 'cpu' only, not {device!r}; use backend='torch' for it"
            )
        self.config = weights.config
        self.precision = weights.precision
        self._weights: Weights | None = weights
        self._threads = blas_threads(threads)

    def new_cache(self, slots: int, capacity: int) -> NumpyCache:
        """An empty cache for `slots` sequences of up to `capacity` tokens."""
        check_size(self.config, slots, capacity)
        return NumpyCache(self.config, slots, capacity)

    def forward(self, batch: Batch, cache: NumpyCache) -> Float32[np.ndarray, "M V"]:
        """See `gpt2core.backends.base.Backend.forward`."""
        if self._weights is None:
            raise RequestError("the numpy backend is closed; load the model again")
        check_cache(cache, NumpyCache, self.config)
        batch.check(vocab_size=self.config.vocab_size, slots=cache.slots, capacity=cache.capacity)
        for slot, positions in note_filled(cache.filled, batch):
            cache.kv[:, :, slot, :, positions] = 0
        with self._threads, np.errstate(all="ignore"):  # what is not finite is found in the logits, by name
            return self._logits(self._weights, batch, cache, None)

    def extra_tokens_cost(self, tokens: int, rows: int) -> float:
        """See `gpt2core.backends.base.EstimatesCost.extra_tokens_cost`; one row alone is a faster product."""
        return (1.2 if rows == 1 else 0) + 0.1 * tokens

    def copy_cache(self, cache: NumpyCache, source: int, target: int, start: int, end: int) -> None:
        """See `gpt2core.backends.base.CopiesCache.copy_cache`."""
        check_cache(cache, NumpyCache, self.config)
        check_copy(cache, source, target, start, end)
        cache.kv[:, :, target, :, start:end] = cache.kv[:, :, source, :, start:end]
        cache.filled[target] = max(int(cache.filled[target]), end)

    def read_cache(self, cache: NumpyCache, slot: int, tokens: int) -> np.ndarray:
        """See `gpt2core.backends.base.MovesCache.read_cache`."""
        check_cache(cache, NumpyCache, self.config)
        check_read(cache, slot, tokens)
        return cache.kv[:, :, slot, :, :tokens].copy()

    def write_cache(self, cache: NumpyCache, slot: int, positions: np.ndarray) -> None:
        """See `gpt2core.backends.base.MovesCache.write_cache`."""
        check_cache(cache, NumpyCache, self.config)
        config = self.config
        check_written(cache, slot, positions, (config.n_layer, config.n_head, config.head_dim), np.float32)
        tokens = positions.shape[3]
        cache.kv[:, :, slot, :, :tokens] = positions
        cache.filled[slot] = max(int(cache.filled[slot]), tokens)

    def trace(self, token_ids: Sequence[int]) -> Trace:
        """See `gpt2core.backends.base.Traces.trace`."""
        if self._weights is None:
            raise RequestError("the numpy backend is closed; load the model again")
        batch = whole_sequence(self.config, token_ids)
        notes = _Notes([], [])
        with self._threads, np.errstate(all="ignore"):
            logits = self._logits(self._weights, batch, self.new_cache(1, len(token_ids)), notes)
        return Trace(np.stack(notes.hidden_states), np.stack(notes.attentions), logits)

    def hidden_states(self, token_ids: Sequence[int]) -> Float32[np.ndarray, "T D"]:
        """See `gpt2core.backends.base.Embeds.hidden_states`."""
        if self._weights is None:
            raise RequestError("the numpy backend is closed; load the model again")
        batch = whole_sequence(self.config, token_ids)
        with self._threads, np.errstate(all="ignore"):
            return self._hidden(self._weights, batch, self.new_cache(1, len(token_ids)), None)

    def _logits(
        self, weights: Weights, batch: Batch, cache: NumpyCache, notes: "_Notes | None"
    ) -> Float32[np.ndarray, "M V"]:
        return multiply(self._hidden(weights, batch, cache, notes), weights.lm_head.T)

    def _hidden(
        self, weights: Weights, batch: Batch, cache: NumpyCache, notes: "_Notes | None"
    ) -> Float32[np.ndarray, "M D"]:
        """What the head reads, of the wanted tokens."""
        config, epsilon = self.config, self.config.layer_norm_epsilon
        plan = plan_attention(batch)
        x = look_up(weights.wte, batch.tokens)  # (N, D)
        x += weights.wpe[batch.positions]
        if notes is not None:
            notes.hidden_states.append(x.copy())
        for i, block in enumerate(weights.blocks):
            h = kernels.layer_norm(x, block.ln_1.weight, block.ln_1.bias, epsilon)
            qkv = linear(h, block.c_attn)  # (N, 3 D)
            qkv = qkv.reshape(len(x), 3, config.n_head, -1)  # (N, 3, H, K)
            y = _attention(qkv, cache.kv[i], plan, config.attention_scale(i))  # (N, D)
            if i == config.n_layer - 1:  # from here on only the wanted tokens matter
                if len(batch.logits_at) == 0:
                    return np.empty((0, config.n_embd), np.float32)
                x, y = x[batch.logits_at], y[batch.logits_at]  # (M, D)
            x += linear(y, block.attn_c_proj)
            if notes is not None:
                notes.hidden_states.append(x.copy())
                notes.attentions.append(_attention_map(qkv, cache.kv[i, 0, 0], config.attention_scale(i)))
            h = kernels.layer_norm(x, block.ln_2.weight, block.ln_2.bias, epsilon)
            h = linear(h, block.c_fc)  # (N, mlp_dim)
            kernels.activate(h, config.activation_function)
            x += linear(h, block.mlp_c_proj)
            if notes is not None:
                notes.hidden_states.append(x.copy())
        return kernels.layer_norm(x, weights.ln_f.weight, weights.ln_f.bias, epsilon)

    def close(self) -> None:
        """Let go of the weights."""
        self._weights = None


def _attention(
    qkv: Float[np.ndarray, "N 3 H K"],
    kv: Float[np.ndarray, "2 S H C K"],
    plan: AttentionPlan,
    scale: float,
) -> Float[np.ndarray, "N D"]:
    """Write the new keys and values into one layer's cache, then attend."""
    q = qkv[:, 0]  # (N, H, K)
    y = np.empty_like(q, order="C")  # (N, H, K)
    for run in plan.decode:
        kv[:, run.rows, :, run.ends - 1] = qkv[run.tokens, 1:]
        k, v = kv[:, run.slots, :, : run.longest]  # (R, H, T, K) each
        y[run.tokens] = kernels.attend_one(q[run.tokens], k, v, run.ends, scale)
    for row in plan.prefill:
        kv[:, row.slot, :, row.start : row.end] = qkv[row.tokens, 1:].transpose(1, 2, 0, 3)
        k, v = kv[:, row.slot, :, : row.end]  # (H, T, K) each
        y[row.tokens] = kernels.attend_causal(q[row.tokens], k, v, scale)
    return y.reshape(len(y), -1)


def _attention_map(
    qkv: Float[np.ndarray, "N 3 H K"], k: Float[np.ndarray, "H N K"], scale: float
) -> Float[np.ndarray, "H N N"]:
    """Probabilities of a whole sequence, which `_attention` has no need to hold at once."""
    scores = (qkv[:, 0].transpose(1, 0, 2) * qkv.dtype.type(scale)) @ k.transpose(0, 2, 1)  # (H, N, N)
    scores += np.triu(np.full(scores.shape[1:], -np.inf, scores.dtype), 1)
    scores -= scores.max(-1, keepdims=True)
    np.exp(scores, out=scores)
    scores /= scores.sum(-1, keepdims=True)
    return scores
