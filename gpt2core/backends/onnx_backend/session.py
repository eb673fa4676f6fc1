"""Running the graph in ONNX Runtime: weights handed over in memory, the cache bound by address."""

# R rows of a run, M wanted logits, H heads, K head width, V vocabulary
# L layers, S cache slots, C cache capacity, T tokens of a trace, D width

import mmap
import os
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final, final
from weakref import WeakKeyDictionary

import numpy as np
import onnxruntime

from gpt2core._shapes import Float32
from gpt2core.backends.blas_threads import check_threads
from gpt2core.backends.memory import lazy_zeros
from gpt2core.backends.onnx_backend.graph import build_model, graph_weights
from gpt2core.backends.onnx_backend.operators import padded_head_dim
from gpt2core.backends.onnx_backend.products import sums_overflow
from gpt2core.backends.onnx_backend.runs import Run, plan_runs
from gpt2core.batch import Batch, whole_sequence
from gpt2core.config import ModelConfig
from gpt2core.errors import BackendError, BackendUnavailableError, RequestError
from gpt2core.quantized_weights import QuantizedWeights, look_up
from gpt2core.trace import Trace
from gpt2core.weights import Weights

SPINNING_VARIABLE: Final = "GPT2CORE_ONNX_SPINNING"
_MOST_BINDINGS: Final = 64  # per cache; one for each set of neighbouring slots that ran together
_SLOWER_FUSIONS: Final = ["SkipLayerNormFusion"]  # 67 us instead of 30 us for 32 rows of 768 on 2 cores
_RELEASE_EVERY_S: Final = 0.01


@final
class OnnxCache:
    """Keys and values as one array (L, 2, S, H, C, K); zeroed lazily, so unused slots take no memory."""

    def __init__(self, config: ModelConfig, slots: int, capacity: int) -> None:
        shape = (config.n_layer, 2, slots, config.n_head, capacity, padded_head_dim(config))
        self.slots, self.capacity = slots, capacity
        self.kv = lazy_zeros(shape)

    @property
    def nbytes(self) -> int:
        """Bytes that a full cache takes."""
        return self.kv.nbytes


@final
class OnnxBackend:
    """GPT-2 as an ONNX graph, run by ONNX Runtime with the cache in place.

    Args:
        weights: float32, int8 or int4. ONNX Runtime keeps a rearranged copy of the matrices; pages of a
            memory-mapped checkpoint are given back as they are copied, so that one copy stays.
        device: "cpu", "cuda" or "cuda:N"; on CUDA the cache stays in the host's memory.
        threads: ONNX Runtime's threads for one operator; None takes its default, one per core.
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
        weights: Weights | QuantizedWeights,
        *,
        device: str = "cpu",
        threads: int | None = None,
        spinning: bool | None = None,
    ) -> None:
        check_threads(threads)
        self.config = weights.config
        self.precision = weights.precision if isinstance(weights, QuantizedWeights) else "float32"
        if self.precision != "float32" and device != "cpu":
            raise BackendUnavailableError(
                f"the onnx backend runs precision {self.precision!r} on device 'cpu' only, not {device!r}"
            )
        self._weights: Weights | QuantizedWeights | None = weights
        self._device = device
        providers = _providers(device)
        options = _session_options(threads, _spinning(spinning))
        arrays = dict(graph_weights(weights))
        self._initializers = {
            name: onnxruntime.OrtValue.ortvalue_from_numpy(_contiguous(array))
            for name, array in arrays.items()
        }
        _hand_over(options, self._initializers)
        with _giving_back(arrays.values()):
            try:
                self._session: Any = onnxruntime.InferenceSession(
                    build_model(weights).SerializeToString(),
                    options,
                    providers,
                    disabled_optimizers=_SLOWER_FUSIONS,
                )
            except Exception as error:  # ONNX Runtime's exceptions share no base class of their own
                raise BackendError(f"the onnx backend could not start on {device}: {error}") from error
        self._settings = threads, providers
        self._tracer: Any = None
        self._bindings: WeakKeyDictionary[OnnxCache, dict[tuple[int, int], Any]] = WeakKeyDictionary()

    def new_cache(self, slots: int, capacity: int) -> OnnxCache:
        """An empty cache for `slots` sequences of up to `capacity` tokens."""
        return OnnxCache(self.config, slots, capacity)

    def forward(self, batch: Batch, cache: OnnxCache) -> Float32[np.ndarray, "M V"]:
        """See `gpt2core.backends.base.Backend.forward`."""
        session, weights = self._session, self._weights
        if session is None or weights is None:
            raise RequestError("the onnx backend is closed; load the model again")
        batch.check(vocab_size=self.config.vocab_size, slots=cache.slots, capacity=cache.capacity)
        logits = np.empty((len(batch.logits_at), self.config.vocab_size), np.float32)
        place = np.full(len(batch.tokens), -1, np.int32)
        runs = plan_runs(batch)
        for run in runs:
            place[run.source] = run.place
            wanted = place[batch.logits_at]
            if len(runs) == 1:
                self._run(session, weights, run, cache, wanted, logits)
            else:
                here = np.flatnonzero(wanted >= 0)
                part = np.empty((len(here), logits.shape[1]), np.float32)
                self._run(session, weights, run, cache, wanted[here], part)
                logits[here] = part
                place[run.source] = -1
        return logits

    def _run(
        self,
        session: Any,
        weights: Weights | QuantizedWeights,
        run: Run,
        cache: OnnxCache,
        wanted: np.ndarray,
        logits: np.ndarray,
    ) -> None:
        binding = self._binding(session, cache, run.slots)
        embedded = look_up(weights.wte, run.tokens)  # (R, S, D)
        embedded += weights.wpe[run.positions]
        total = np.array(run.seqlens_k.max() + 1, np.int32)
        feeds = (
            ("embedded", embedded),
            ("seqlens_k", run.seqlens_k),
            ("total", total),
            ("wanted", wanted),
        )
        for name, array in feeds:
            binding.bind_input(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)
        binding.bind_output("logits", "cpu", 0, np.float32, logits.shape, logits.ctypes.data)
        kept = cache.kv[:, :, :, :, 0][:, :, run.bridged]  # (L, 2, G, H, K): a copy
        try:
            session.run_with_iobinding(binding)
        except Exception as error:  # ONNX Runtime's exceptions share no base class of their own
            raise BackendError(f"the onnx backend failed on {self._device}: {error}") from error
        finally:
            cache.kv[:, :, :, :, 0][:, :, run.bridged] = kept

    def _binding(self, session: Any, cache: OnnxCache, slots: slice) -> Any:
        """Inputs and outputs with the cache's part of `slots` bound, made once."""
        bindings = self._bindings.setdefault(cache, {})
        key = slots.start, slots.stop
        if key not in bindings:
            if len(bindings) >= _MOST_BINDINGS:
                bindings.clear()
            bindings[key] = binding = session.io_binding()
            for i, layer in enumerate(cache.kv):
                for kind, array in zip(("key", "value"), layer[:, slots], strict=True):  # (R, H, C, K) each
                    where = ("cpu", 0, np.float32, array.shape, array.ctypes.data)
                    binding.bind_input(f"past_{kind}_{i}", *where)
                    binding.bind_output(f"present_{kind}_{i}", *where)
        return bindings[key]

    def further_cost(self, tokens: int, rows: int) -> float:
        """See `gpt2core.backends.base.PricesTokens.further_cost`; beside others it is a pass of its own."""
        return (0.1 if rows == 1 else 1.0) + 0.06 * tokens

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
        try:
            if self._tracer is None:
                self._tracer = self._new_tracer(weights)
            logits, *noted = self._tracer.run(None, feeds)
        except Exception as error:  # ONNX Runtime's exceptions share no base class of their own
            raise BackendError(f"the onnx backend failed to trace on {self._device}: {error}") from error
        sums, probabilities = noted[: 2 * config.n_layer], noted[2 * config.n_layer :]
        return Trace(np.stack([embedded, *sums]), np.concatenate(probabilities), logits)

    def _new_tracer(self, weights: Weights | QuantizedWeights) -> Any:
        threads, providers = self._settings
        options = _session_options(threads, spinning=False)
        options.add_session_config_entry("session.disable_prepacking", "1")  # that would copy the matrices
        _hand_over(options, self._initializers)
        model = build_model(weights, trace=True).SerializeToString()
        return onnxruntime.InferenceSession(model, options, providers)

    def close(self) -> None:
        """Let go of the sessions and the weights."""
        self._bindings.clear()
        self._session = self._tracer = self._weights = None
        self._initializers = {}


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


def _session_options(threads: int | None, spinning: bool) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or 0
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", str(int(spinning)))
    options.add_session_config_entry("session.force_spinning_stop", "1")  # idle between passes
    if sums_overflow():
        options.add_session_config_entry("session.x64quantprecision", "1")
    return options


def _hand_over(options: Any, initializers: dict[str, Any]) -> None:
    options.add_external_initializers(list(initializers), list(initializers.values()))


def _contiguous(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array, np.float32 if array.dtype.kind == "f" else None)


@contextmanager
def _giving_back(arrays: Iterable[np.ndarray]) -> Iterator[None]:
    """Meanwhile, return the pages of files mapped for reading to the system, which can read them again.

    While it starts, ONNX Runtime copies every matrix; without this, both copies would be resident at the end.
    """
    maps = {id(m): m for array in arrays if (m := _read_only_map(array)) is not None}
    done = threading.Event()

    def give_back() -> None:
        for mapped in maps.values():
            mapped.madvise(mmap.MADV_DONTNEED)

    def work() -> None:
        while not done.wait(_RELEASE_EVERY_S):
            give_back()

    if not maps or not hasattr(mmap, "MADV_DONTNEED"):
        yield
        return
    worker = threading.Thread(target=work, name="gpt2core-onnx-release", daemon=True)
    worker.start()
    try:
        yield
    finally:
        done.set()
        worker.join()
        give_back()


def _read_only_map(array: np.ndarray) -> mmap.mmap | None:
    base: Any = array
    while isinstance(base, np.ndarray | memoryview):
        base = base.base if isinstance(base, np.ndarray) else base.obj
    if (
        isinstance(base, mmap.mmap) and memoryview(base).readonly
    ):  # a writable map may hold changes of its own
        return base
    return None
