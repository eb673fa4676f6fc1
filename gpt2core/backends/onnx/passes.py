"""Sessions of ONNX Runtime: weights handed over in memory, inputs and the cache bound by address."""

# R rows of a run, S new tokens per row, M wanted logits, H heads, K head width, D width, V vocabulary
# L layers, C cache capacity

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, final
from weakref import WeakKeyDictionary

import numpy as np
import onnx
import onnxruntime

from gpt2core._shapes import Float32
from gpt2core.backends._shared.memory import lazy_zeros
from gpt2core.backends.onnx.operators import padded_head_dim
from gpt2core.backends.onnx.products import packs_whole_numbers, sums_overflow
from gpt2core.backends.onnx.runs import Run
from gpt2core.config import ModelConfig

_MOST_BINDINGS: Final = 64  # per cache; one for each set of neighbouring slots that ran together
_SLOWER_FUSIONS: Final = ["SkipLayerNormFusion"]  # 67 us instead of 30 us for 32 rows of 768 on 2 cores


@dataclass(frozen=True, slots=True)
class Settings:
    """How sessions run; see `OnnxBackend`."""

    threads: int | None
    spinning: bool
    providers: list[Any]

    def options(self, *, spinning: bool) -> Any:
        """ONNX Runtime's own form of it."""
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = self.threads or 0
        options.inter_op_num_threads = 1
        options.enable_cpu_mem_arena = False  # it takes up to twice what is needed, and is no faster
        options.log_severity_level = 3
        options.add_session_config_entry("session.intra_op.allow_spinning", str(int(spinning)))
        options.add_session_config_entry("session.force_spinning_stop", "1")  # idle between passes
        if sums_overflow():
            options.add_session_config_entry("session.x64quantprecision", "1")
        return options


@final
class OnnxCache:
    """Keys and values as one array (L, 2, S, H, C, K); zeroed lazily, so unused slots take no memory."""

    def __init__(self, config: ModelConfig, slots: int, capacity: int) -> None:
        shape = (config.n_layer, 2, slots, config.n_head, capacity, padded_head_dim(config))
        self.config, self.slots, self.capacity = config, slots, capacity
        self.kv = lazy_zeros(shape)

    @property
    def nbytes(self) -> int:
        """Bytes that a full cache takes."""
        return self.kv.nbytes


@final
class Passes:
    """A session of the whole graph or of its body.

    Args:
        model: of `build_model`.
        arrays: its initializers. ONNX Runtime keeps a rearranged copy of the matrices.
        settings: how it runs.
    """

    def __init__(self, model: onnx.ModelProto, arrays: Mapping[str, np.ndarray], settings: Settings) -> None:
        self._session, self._kept = start(model, arrays, settings)
        self._result = model.graph.output[0].name
        self._bindings: WeakKeyDictionary[OnnxCache, dict[tuple[int, int], Any]] = WeakKeyDictionary()

    def run(
        self,
        run: Run,
        cache: OnnxCache,
        embedded: Float32[np.ndarray, "R S D"],
        wanted: np.ndarray,
        result: Float32[np.ndarray, "M _"],
    ) -> None:
        """Append the run's tokens to the cache; the result is that of the tokens `wanted` (M,)."""
        binding = self._binding(cache, run.slots)
        total = np.array(run.seqlens_k.max() + 1, np.int32)
        feeds = (
            ("embedded", embedded),
            ("seqlens_k", run.seqlens_k),
            ("total", total),
            ("wanted", wanted),
        )
        for name, array in feeds:
            binding.bind_input(name, *_there(array))
        binding.bind_output(self._result, *_there(result))
        if not len(run.bridged):
            self._session.run_with_iobinding(binding)
            return
        kept = cache.kv[:, :, :, :, 0][:, :, run.bridged]  # (L, 2, G, H, K): a copy
        try:
            self._session.run_with_iobinding(binding)
        finally:
            cache.kv[:, :, :, :, 0][:, :, run.bridged] = kept

    def _binding(self, cache: OnnxCache, slots: slice) -> Any:
        """Inputs and outputs with the cache's part of `slots` bound, made once."""
        bindings = self._bindings.setdefault(cache, {})
        key = slots.start, slots.stop
        if key not in bindings:
            if len(bindings) >= _MOST_BINDINGS:
                bindings.clear()
            bindings[key] = binding = self._session.io_binding()
            for i, layer in enumerate(cache.kv):
                for kind, array in zip(("key", "value"), layer[:, slots], strict=True):  # (R, H, C, K) each
                    binding.bind_input(f"past_{kind}_{i}", *_there(array))
                    binding.bind_output(f"present_{kind}_{i}", *_there(array))
        return bindings[key]


@final
class Heads:
    """A session of the head alone; arguments as of `Passes`."""

    def __init__(self, model: onnx.ModelProto, arrays: Mapping[str, np.ndarray], settings: Settings) -> None:
        self._session, self._kept = start(model, arrays, settings)

    def run(self, hidden: Float32[np.ndarray, "M D"], logits: Float32[np.ndarray, "M V"]) -> None:
        """The logits of final hidden states."""
        binding = self._session.io_binding()  # one a call: two threads must not bind to the same
        binding.bind_input("hidden", *_there(hidden))
        binding.bind_output("logits", *_there(logits))
        self._session.run_with_iobinding(binding)


def start(
    model: onnx.ModelProto, arrays: Mapping[str, np.ndarray], settings: Settings, *, packed: bool = True
) -> tuple[Any, list[Any]]:
    """A session of a graph and its initializers, and what has to live as long.

    With `packed` False it uses the weights where they lie, and does not spin: slower, and little memory.
    """
    options = settings.options(spinning=settings.spinning and packed)
    if not packed:
        options.add_session_config_entry("session.disable_prepacking", "1")
    values = {
        name: onnxruntime.OrtValue.ortvalue_from_numpy(_contiguous(array)) for name, array in arrays.items()
    }
    options.add_external_initializers(list(values), list(values.values()))
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, settings.providers, disabled_optimizers=_SLOWER_FUSIONS
    )
    if packed and packs_whole_numbers():  # then nobody reads the int8 and int4 matrices any more
        values = {
            name: value
            for name, value in values.items()
            if not name.endswith(".weight") or arrays[name].dtype.kind == "f"
        }
    return session, [values]


def _there(array: np.ndarray) -> tuple[Any, ...]:
    return "cpu", 0, array.dtype.type, array.shape, array.ctypes.data


def _contiguous(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array, np.float32 if array.dtype.kind == "f" else None)
