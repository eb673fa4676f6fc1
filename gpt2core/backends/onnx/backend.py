"""The backend: batches cut into runs, embeddings looked up, errors named; `networks` does the rest."""

# R rows of a run, S new tokens per row, M wanted logits, V vocabulary, T tokens of a trace, D width

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final, final

import numpy as np
import onnxruntime

from gpt2core._machine import limit_threads
from gpt2core._shapes import Float32
from gpt2core.backends._shared.caches import check_cache, check_copy, check_size
from gpt2core.backends._shared.threads import check_threads
from gpt2core.backends.onnx.networks import Quantized, Whole, start_tracer
from gpt2core.backends.onnx.operators import padded_head_dim
from gpt2core.backends.onnx.passes import OnnxCache, Settings
from gpt2core.backends.onnx.runs import Run, plan_runs
from gpt2core.batch import Batch, whole_sequence
from gpt2core.errors import BackendError, BackendUnavailableError, RequestError
from gpt2core.kernels import layer_norm
from gpt2core.trace import Trace
from gpt2core.weights import Weights, look_up

SPINNING_VARIABLE: Final = "GPT2CORE_ONNX_SPINNING"


@final
class OnnxBackend:
    """GPT-2 as an ONNX graph, run by ONNX Runtime with the cache in place.

    Args:
        weights: float32, int8 or int4. ONNX Runtime keeps a rearranged copy of the matrices; pages of a
            memory-mapped checkpoint are given back as they are copied, so that one copy stays. Of int8 and
            int4 weights there are two, one for few and one for many tokens, each made when first needed.
        device: "cpu", "cuda" or "cuda:N"; on CUDA the cache stays in the host's memory.
        threads: ONNX Runtime's threads for one operator; None takes its default, one per core, or
            as many as a quota of the container allows.
        spinning: whether its threads wait actively between two operators of a pass (never between passes):
            faster, at the cost of processor time. None takes the environment variable
            GPT2CORE_ONNX_SPINNING ("0" or "1"), or else True.

    Raises:
        BackendUnavailableError: the device is unknown, or this onnxruntime was built without it.
        BackendError: ONNX Runtime refused the graph.
    """

    name = "onnx"
    precisions = ("float32", "int8", "int4")

    def __init__(
        self,
        weights: Weights,
        *,
        device: str = "cpu",
        threads: int | None = None,
        spinning: bool | None = None,
    ) -> None:
        check_threads(threads)
        self.config = weights.config
        self.precision = weights.precision
        if self.precision != "float32" and device != "cpu":
            raise BackendUnavailableError(
                f"the onnx backend runs precision {self.precision!r} on device 'cpu' only, not {device!r}"
            )
        self._weights: Weights | None = weights
        self._device = device
        self._settings = Settings(limit_threads(threads), _spinning(spinning), _providers(device))
        with self._failing("could not start"):
            network = Whole if self.precision == "float32" else Quantized
            self._network: Whole | Quantized | None = network(weights, self._settings)
        self._tracer: Any = None

    def new_cache(self, slots: int, capacity: int) -> OnnxCache:
        """An empty cache for `slots` sequences of up to `capacity` tokens."""
        check_size(self.config, slots, capacity)
        return OnnxCache(self.config, slots, capacity)

    def forward(self, batch: Batch, cache: OnnxCache) -> Float32[np.ndarray, "M V"]:
        """See `gpt2core.backends.base.Backend.forward`."""
        network, weights = self._network, self._weights
        if network is None or weights is None:
            raise RequestError("the onnx backend is closed; load the model again")
        check_cache(cache, OnnxCache, self.config)
        batch.check(vocab_size=self.config.vocab_size, slots=cache.slots, capacity=cache.capacity)
        logits = np.empty((len(batch.logits_at), self.config.vocab_size), np.float32)
        runs = plan_runs(batch)
        if len(runs) == 1 and runs[0].place is runs[0].source:  # its tokens are the batch's, in its order
            self._run(network, weights, runs[0], cache, batch.logits_at, logits)
            return logits
        place = np.full(len(batch.tokens), -1, np.int32)
        for run in runs:
            place[run.source] = run.place
            wanted = place[batch.logits_at]
            here = np.flatnonzero(wanted >= 0)
            part = np.empty((len(here), logits.shape[1]), np.float32)
            self._run(network, weights, run, cache, wanted[here], part)
            logits[here] = part
            place[run.source] = -1
        return logits

    def _run(
        self,
        network: Whole | Quantized,
        weights: Weights,
        run: Run,
        cache: OnnxCache,
        wanted: np.ndarray,
        logits: np.ndarray,
    ) -> None:
        embedded = look_up(weights.wte, run.tokens)  # (R, S, D)
        embedded += weights.wpe[run.positions]
        with self._failing("failed"):
            network.run(run, cache, embedded, np.ascontiguousarray(wanted), logits)

    def copy_cache(self, cache: OnnxCache, source: int, target: int, start: int, end: int) -> None:
        """See `gpt2core.backends.base.CopiesCache.copy_cache`."""
        check_cache(cache, OnnxCache, self.config)
        check_copy(cache, source, target, start, end)
        cache.kv[:, :, target, :, start:end] = cache.kv[:, :, source, :, start:end]

    def extra_tokens_cost(self, tokens: int, rows: int) -> float:
        """See `EstimatesCost.extra_tokens_cost`; beside others it is a pass of its own."""
        first, each = (0.1, 0.06) if self.precision == "float32" else (0.25, 0.17)
        return (first if rows == 1 else 1.0) + each * tokens

    def trace(self, token_ids: Sequence[int]) -> Trace:
        """See `gpt2core.backends.base.Traces.trace`.

        The first call starts a second session, of the same operators with more outputs. It uses the weights
        where they lie and rearranges none, so it is slower than `forward` and takes little memory.
        """
        weights, config = self._weights, self.config
        if weights is None:
            raise RequestError("the onnx backend is closed; load the model again")
        batch = whole_sequence(config, token_ids)
        count = len(batch.tokens)
        embedded = look_up(weights.wte, batch.tokens) + weights.wpe[:count]  # (T, D)
        empty = np.zeros((1, config.n_head, count, padded_head_dim(config)), np.float32)
        feeds = {
            "embedded": embedded[None],
            "seqlens_k": np.array([count - 1], np.int32),
            "total": np.array(count, np.int32),
            "wanted": np.arange(count, dtype=np.int32),
            **{f"past_{kind}_{i}": empty for i in range(config.n_layer) for kind in ("key", "value")},
        }
        with self._failing("failed to trace"):
            if self._tracer is None:
                self._tracer = start_tracer(weights, self._settings)
            logits, *noted = self._tracer[0].run(None, feeds)
        sums, probabilities = noted[: 2 * config.n_layer], noted[2 * config.n_layer :]
        return Trace(np.stack([embedded, *sums]), np.concatenate(probabilities), logits)

    def hidden_states(self, token_ids: Sequence[int]) -> Float32[np.ndarray, "T D"]:
        """See `gpt2core.backends.base.Embeds.hidden_states`; costs what `trace` does."""
        if self._weights is None:
            raise RequestError("the onnx backend is closed; load the model again")
        norm, epsilon = self._weights.ln_f, self.config.layer_norm_epsilon
        return layer_norm(self.trace(token_ids).hidden_states[-1], norm.weight, norm.bias, epsilon)

    def close(self) -> None:
        """Let go of the sessions and the weights."""
        self._network = self._tracer = self._weights = None

    @contextmanager
    def _failing(self, what: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # ONNX Runtime's exceptions share no base class of their own
            raise BackendError(f"the onnx backend {what} on {self._device}: {error}") from error


def _providers(device: str) -> list[Any]:
    if device == "cpu":
        return ["CPUExecutionProvider"]
    kind, _, index = device.partition(":")
    if kind != "cuda" or not (index.isdecimal() or device == "cuda"):
        raise BackendUnavailableError(
            f"device {device!r} is unknown to the onnx backend; use 'cpu', 'cuda' or 'cuda:N'"
        )
    there = onnxruntime.get_available_providers()
    if "CUDAExecutionProvider" not in there:
        raise BackendUnavailableError(
            f"device {device!r} is not there: onnxruntime {onnxruntime.__version__} was built with "
            f"{', '.join(there)} only; use device='cpu' or install the package onnxruntime-gpu in its place"
        )
    return [("CUDAExecutionProvider", {"device_id": int(index or 0)}), "CPUExecutionProvider"]


def _spinning(wanted: bool | None) -> bool:
    if wanted is not None:
        return wanted
    value = os.environ.get(SPINNING_VARIABLE, "1")
    if value not in ("0", "1"):
        raise RequestError(f"{SPINNING_VARIABLE} is {value!r}; use '0' or '1'")
    return value == "1"
