"""Runs the compiled steps: `JaxBackend` and its cache."""

# N new tokens in all, M wanted logits, V vocabulary
# L layers, S cache slots, H heads, C cache capacity, K head width

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, Final, final

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.sharding import Mesh

from gpt2core._files import cache_folder
from gpt2core._shapes import Float32
from gpt2core.backends._shared.caches import check_cache, check_copy, check_size
from gpt2core.backends._shared.threads import check_threads
from gpt2core.backends.jax.executables import executable_key, load, save
from gpt2core.backends.jax.module import MODEL_AXIS, Gpt2Module, plain_activation
from gpt2core.backends.jax.placement import Placement, choose_placement
from gpt2core.backends.jax.runs import Buckets, Run, StepShape, plan_runs
from gpt2core.backends.jax.step import copy_positions, make_step, make_trace
from gpt2core.batch import Batch, whole_sequence
from gpt2core.config import ModelConfig
from gpt2core.errors import BackendError, RequestError
from gpt2core.kernels import layer_norm
from gpt2core.trace import Trace
from gpt2core.weights import Weights

_KV_CUT: Final = (None, None, None, MODEL_AXIS, None, None)  # by heads
_SMALL_MODEL_PARAMETERS: Final = 5_000_000  # padding costs less than a further compilation
_FEWEST_TRACED: Final = 16  # likewise


@final
class JaxCache:
    """Keys and values as one array (L, 2, S, H, C, K), handed to each step for good (donated).

    A step that fails may have consumed that array. The cache therefore remembers the token ids as well, 4
    bytes per position: whatever is lost is computed again from them, when it is needed next.
    """

    def __init__(self, config: ModelConfig, slots: int, capacity: int, placement: Placement) -> None:
        self.config, self.slots, self.capacity = config, slots, capacity
        self.shape = (config.n_layer, 2, slots, config.n_head, capacity, config.head_dim)
        self.sharding = placement.sharding(self.shape, _KV_CUT)
        self.kv: Array | None = self._empty()
        small = config.parameters < _SMALL_MODEL_PARAMETERS
        self.buckets = Buckets(slots, capacity, 4, (128,)) if small else Buckets(slots, capacity)
        self.tokens = np.zeros((slots, capacity), np.int32)
        self.held = np.full(slots, capacity, np.int32)
        """Per slot, positions below this are in `kv` if they ever were."""
        self.copy = jax.jit(copy_positions, donate_argnums=0, out_shardings=self.sharding)

    @property
    def nbytes(self) -> int:
        """Bytes that keys and values take."""
        return int(np.prod(self.shape)) * 4

    def alive(self) -> Array:
        """The array, a new empty one where the last was lost."""
        if self.kv is None:
            self.kv = self._empty()
        return self.kv

    def survived(self) -> bool:
        """After a failed step: is the array still whole? If not, all slots count as lost."""
        try:
            if self.kv is not None and not self.kv.is_deleted():
                self.kv.block_until_ready()
                return True
        except RuntimeError:  # the step failed while it ran: so did what it was to return
            pass
        self.kv = None
        self.held[:] = 0
        return False

    def _empty(self) -> Array:
        return jnp.zeros(self.shape, jnp.float32, device=self.sharding)


@final
class JaxBackend:
    """GPT-2 in JAX: a Flax NNX module, compiled per padded shape by XLA, over a static cache.

    Steps are compiled for a bounded set of shapes (`runs.Buckets`) and kept in the user's cache folder,
    see `executables` for which folder and why it must be the user's alone. JAX's global configuration is
    neither changed nor relied on.

    Args:
        weights: float32 weights. XLA wants arrays at multiples of 64 bytes, which those of a checkpoint file
            seldom are, so on the CPU too they are copied once.
        device: "cpu", "gpu", "cuda" or "tpu", with ":N" for the N-th.
        threads: checked, but without effect: XLA's pool on the CPU is as large as the number of processors
            that the process may use when JAX starts (`taskset` limits it), and cannot be resized.
        mesh: devices in a mesh, over whose last axis heads and MLPs are cut; instead of `device`.
        devices: so many devices, from `device` on, as such a mesh.
        keep_compiled: whether to read and write compiled steps in the cache folder.

    Raises:
        BackendUnavailableError: the device is unknown or not there.
        RequestError: an option is out of range.
    """

    name = "jax"

    def __init__(
        self,
        weights: Weights,
        *,
        device: str = "cpu",
        threads: int | None = None,
        mesh: Mesh | None = None,
        devices: int | None = None,
        keep_compiled: bool = True,
    ) -> None:
        check_threads(threads)
        self.config = weights.config
        self.compilations = 0
        """Steps that this backend compiled."""
        self.loaded = 0
        """Steps that it read from the cache folder instead."""
        self._placement = choose_placement(device, mesh, devices)
        self._keep_compiled = keep_compiled
        with _own_settings():
            self._ln_f = weights.ln_f.weight.copy(), weights.ln_f.bias.copy()
            self._module: Gpt2Module | None = Gpt2Module(weights, self._placement.put)
        self._graph, state = nnx.split(self._module)
        leaves, self._treedef = jax.tree.flatten(state)
        self._leaves: tuple[Array, ...] = tuple(leaves)
        self._trace = jax.jit(make_trace(self._graph, self._treedef), out_shardings=self._placement.whole)
        self._steps: dict[tuple[StepShape, tuple[int, ...]], Callable[..., tuple[Array, Array]]] = {}

    def new_cache(self, slots: int, capacity: int) -> JaxCache:
        """An empty cache for `slots` sequences of up to `capacity` tokens."""
        check_size(self.config, slots, capacity)
        return JaxCache(self.config, slots, capacity, self._placement)

    def forward(self, batch: Batch, cache: JaxCache) -> Float32[np.ndarray, "M V"]:
        """See `gpt2core.backends.base.Backend.forward`."""
        if self._module is None:
            raise RequestError("the jax backend is closed; load the model again")
        check_cache(cache, JaxCache, self.config)
        batch.check(vocab_size=self.config.vocab_size, slots=cache.slots, capacity=cache.capacity)
        lost = [
            (cache.tokens[slot, cache.held[slot] : start].tolist(), int(cache.held[slot]), slot)
            for slot, start in zip(batch.slots.tolist(), batch.starts.tolist(), strict=True)
            if start > cache.held[slot]
        ]
        if lost:
            again = Batch.of(lost, [])
            self._run_all(again, cache)
            cache.held[again.slots] = again.ends
        logits = self._run_all(batch, cache)
        firsts = batch.firsts
        for slot, first, start, end in zip(batch.slots, firsts, batch.starts, batch.ends, strict=True):
            cache.tokens[slot, start:end] = batch.tokens[first : first + end - start]
        cache.held[batch.slots] = np.maximum(cache.held[batch.slots], batch.ends)
        return logits

    def copy_cache(self, cache: JaxCache, source: int, target: int, start: int, end: int) -> None:
        """See `gpt2core.backends.base.CopiesCache.copy_cache`; compiled once per cache, in this process."""
        check_cache(cache, JaxCache, self.config)
        check_copy(cache, source, target, start, end)
        try:
            if start <= cache.held[target] and end <= cache.held[source]:
                with _own_settings():
                    cache.kv = cache.copy(cache.alive(), *np.array([source, target, start, end], np.int32))
            else:  # lost: computed again when the slot goes on
                cache.held[target] = min(start, int(cache.held[target]))
        except BaseException as error:
            cache.survived()
            if not isinstance(error, RuntimeError):
                raise
            where = self._placement.devices[0]
            raise BackendError(f"the jax backend failed to copy on {where}: {error}") from error
        cache.tokens[target, start:end] = cache.tokens[source, start:end]

    def extra_tokens_cost(self, tokens: int, rows: int) -> float:
        """See `gpt2core.backends.base.EstimatesCost.extra_tokens_cost`; rows are padded to 16 tokens."""
        return (2.2 if rows == 1 else 3.2) + 0.01 * tokens

    def trace(self, token_ids: Sequence[int]) -> Trace:
        """See `gpt2core.backends.base.Traces.trace`.

        Compiled per power of two of T, from 16 on, in this process only.
        """
        if self._module is None:
            raise RequestError("the jax backend is closed; load the model again")
        batch = whole_sequence(self.config, token_ids)
        count = len(batch.tokens)
        # Padded with its own last token: a later one may be NaN, and weight 0 times NaN is NaN.
        padded = max(_FEWEST_TRACED, 1 << (count - 1).bit_length())
        at = np.minimum(np.arange(padded, dtype=np.int32), count - 1)
        try:
            with _own_settings():
                hidden, attentions, logits = self._trace(self._leaves, batch.tokens[at], at)
            return Trace(
                np.asarray(hidden)[:, :count].copy(),
                np.asarray(attentions)[:, :, :count, :count].copy(),
                np.asarray(logits)[:count].copy(),
            )
        except RuntimeError as error:
            raise BackendError(f"the jax backend failed on {self._placement.devices[0]}: {error}") from error

    def hidden_states(self, token_ids: Sequence[int]) -> Float32[np.ndarray, "T D"]:
        """See `gpt2core.backends.base.Embeds.hidden_states`; costs what `trace` does."""
        return layer_norm(
            self.trace(token_ids).hidden_states[-1], *self._ln_f, self.config.layer_norm_epsilon
        )

    def close(self) -> None:
        """Let go of the weights and the compiled steps."""
        self._module, self._leaves = None, ()
        self._steps.clear()

    def _run_all(self, batch: Batch, cache: JaxCache) -> Float32[np.ndarray, "M V"]:
        logits = np.empty((len(batch.logits_at), self.config.vocab_size), np.float32)
        try:
            for run in plan_runs(batch, cache.buckets):
                logits[run.answers] = self._run(run, cache)[run.place]
        except BaseException as error:  # also an interrupt after the old array has gone
            kept = cache.survived()
            if not isinstance(error, RuntimeError):
                raise
            after = (
                "what was cached is untouched"
                if kept
                else "the failed step consumed the cache; its sequences are computed again when they go on"
            )
            where = self._placement.devices[0]
            raise BackendError(f"the jax backend failed on {where}: {error}; {after}") from error
        return logits

    def _run(self, run: Run, cache: JaxCache) -> np.ndarray:
        step = self._step(run.shape, cache)
        logits, cache.kv = step(self._leaves, cache.alive(), run.rows, run.wanted)
        return np.asarray(logits)

    def _step(self, shape: StepShape, cache: JaxCache) -> Callable[..., tuple[Array, Array]]:
        found = self._steps.get((shape, cache.shape))
        if found is None:
            found = self._steps[shape, cache.shape] = self._load_or_compile(shape, cache)
        return found

    def _load_or_compile(self, shape: StepShape, cache: JaxCache) -> Callable[..., tuple[Array, Array]]:
        whole, devices = self._placement.whole, self._placement.devices
        arguments = (
            tuple(_abstract(x.shape, x.dtype, x.sharding) for x in self._leaves),
            _abstract(cache.shape, jnp.float32, cache.sharding),
            _abstract((shape.rows, 3 + shape.tokens), jnp.int32, whole),
            _abstract((shape.wanted,), jnp.int32, whole),
        )
        folder = cache_folder("jax")
        # "swish" and "silu" are one function, and so one compiled step.
        config = replace(self.config, activation_function=plain_activation(self.config.activation_function))
        key = executable_key(devices, config, shape, cache.shape, _layout(self._placement))
        if self._keep_compiled:
            trees = jax.tree.structure((arguments, {})), jax.tree.structure((0, 0))
            kept = load(folder, key, *trees, devices)
            if kept is not None:
                self.loaded += 1
                return kept
        step = jax.jit(
            make_step(self._graph, self._treedef, shape.read),
            donate_argnums=1,
            out_shardings=(whole, cache.sharding),
        )
        with _own_settings():
            compiled = step.lower(*arguments).compile()
        self.compilations += 1
        if self._keep_compiled:
            save(folder, key, compiled)
        return compiled


def _abstract(shape: tuple[int, ...], dtype: Any, sharding: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)  # type: ignore[no-untyped-call]


def _layout(placement: Placement) -> Sequence[Any]:
    mesh = placement.mesh
    return () if mesh is None else (mesh.axis_names, mesh.devices.shape)


@contextlib.contextmanager
def _own_settings() -> Iterator[None]:
    """What tracing depends on, whatever the user's global settings are; in this thread and for now only."""
    with (
        jax.enable_x64(False),
        jax.default_matmul_precision("highest"),  # GPUs and TPUs would round float32 to 10 or 7 bits
        jax.numpy_rank_promotion("allow"),
        jax.numpy_dtype_promotion("standard"),
    ):
        yield
