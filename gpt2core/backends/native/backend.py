"""The backend: what C is given and what it gives back."""

# M wanted logits, V vocabulary, L layers, S cache slots, H heads, K head width, C cache capacity, T tokens

import os
import threading
import weakref
from collections.abc import Sequence
from ctypes import byref, c_void_p
from typing import Final, final

import numpy as np

from gpt2core._machine import count_cores
from gpt2core._shapes import Float32
from gpt2core.backends._shared.caches import check_copy, check_read, check_written
from gpt2core.backends._shared.threads import check_threads
from gpt2core.backends.native.cache import Layout, NativeCache
from gpt2core.backends.native.packing import CModel, CTrace, PackedModel, point_to
from gpt2core.backends.native.prebuilt import load_kernels
from gpt2core.batch import Batch, whole_sequence
from gpt2core.errors import BackendError, BackendUnavailableError, RequestError, in_short
from gpt2core.quantization.rounding import PRECISIONS
from gpt2core.token_scores import TokenQuery, TokenScores
from gpt2core.trace import Trace
from gpt2core.weights import Weights

_CLOSED: Final = "the native backend is closed; load the model again"
_COST_OF_TOKEN: Final = {"float32": 0.06, "bfloat16": 0.1, "int8": 0.08, "int4": 0.13}
_MOST_TOKENS: Final = 512
"""Of one pass in C: what it works with stays small, and products gain nothing from more."""


@final
class NativeBackend:
    """GPT-2 in C, from a prebuilt library or compiled when first used; needs no framework.

    A sequence's logits do not depend, to the last bit, on what is computed beside it.

    Args:
        weights: float32 or quantized. A rearranged copy of the matrices is kept; pages of a memory-mapped
            checkpoint are given back as they are copied, so that one copy stays.
        device: only "cpu".
        threads: of a forward pass; None takes one per core. They wait actively within a pass and
            up to 0.2 ms after it.

    Attributes:
        variant: the prebuilt library that computes, such as "avx2"; else "compiled".

    Raises:
        BackendUnavailableError: another device; or no library fits, and there is no C compiler or it fails.
    """

    name = "native"
    precisions = ("float32", *PRECISIONS)
    bits_version = 1

    @staticmethod
    def build() -> None:
        """Compile the kernels, unless there is a library already; see `load_kernels`."""
        load_kernels()

    def __init__(self, weights: Weights, *, device: str = "cpu", threads: int | None = None) -> None:
        check_threads(threads)
        if device != "cpu":
            raise BackendUnavailableError(
                f"the native backend runs on device 'cpu' only, not {device!r}; use backend='torch' for it"
            )
        self.config = weights.config
        self.precision = weights.precision
        self._library = load_kernels()
        self.variant = self._library.variant
        self._layout = Layout(
            layers=self.config.n_layer,
            heads=self.config.n_head,
            head_dim=self.config.head_dim,
            itemsize=2 if self.precision in ("int8", "int4") else 4,
            lanes=self._library.lanes(),
            key_block=self._library.key_block(),
        )
        self._packed: PackedModel | None = PackedModel(weights, self._library, threads or count_cores())
        team = self._library.team_new(threads or count_cores())
        if not team:
            raise BackendError("the native backend found no memory for its threads")
        self._team = c_void_p(team)
        self._end_team = weakref.finalize(self, self._library.team_free, self._team)
        self._end_team.atexit = False  # a daemon thread may be in a pass; threads end with the process
        self._lock = threading.Lock()  # a team takes one pass at a time
        _alive.add(self)

    def new_cache(self, slots: int, capacity: int) -> NativeCache:
        """An empty cache for `slots` sequences of up to `capacity` tokens.

        Raises:
            RequestError: the backend is closed, or a size is no whole number of 1 or more, or `capacity` is
                beyond the model's context.
        """
        if self._packed is None:
            raise RequestError(_CLOSED)
        _check_size("slots", slots, None)
        _check_size("capacity", capacity, self.config.n_positions)
        try:
            return NativeCache(self._layout, int(slots), int(capacity))
        except (OSError, OverflowError) as error:
            raise BackendError(
                f"the native backend found no memory for a cache of {slots} slots of {capacity} tokens "
                f"({error}); use fewer"
            ) from error

    def forward(self, batch: Batch, cache: NativeCache) -> Float32[np.ndarray, "M V"]:
        """See `gpt2core.backends.base.Backend.forward`."""
        self._check(batch, cache)
        return self._run(batch, cache)[0]

    def score(
        self, batch: Batch, cache: NativeCache, query: TokenQuery
    ) -> tuple[Float32[np.ndarray, "N V"], TokenScores]:
        """See `gpt2core.backends.base.ScoresTokens.score`; scores too have the same bits in any batch."""
        self._check(batch, cache)
        vocab_size, most = self.config.vocab_size, len(batch.logits_at)
        targets = np.asarray(query.targets)
        if not 0 < len(targets) <= most or targets.min() < 0 or targets.max() >= vocab_size:
            raise RequestError(
                f"the query's targets are {in_short(targets.tolist())}; give from 1 to {most}, one for each "
                f"of the last positions, each at least 0 and below the vocabulary's size, {vocab_size}"
            )
        logits, scores = self._run(batch, cache, query=query)
        assert scores is not None
        return logits, scores

    def trace(self, token_ids: Sequence[int]) -> Trace:
        """See `gpt2core.backends.base.Traces.trace`; the logits have the bits of `forward`."""
        batch, config = whole_sequence(self.config, token_ids), self.config
        count = len(token_ids)
        hidden_states = np.zeros((2 * config.n_layer + 1, count, config.n_embd), np.float32)
        attentions = np.zeros((config.n_layer, config.n_head, count, count), np.float32)
        notes = CTrace(hidden_states.ctypes.data, attentions.ctypes.data, count)
        logits, _ = self._run(batch, self.new_cache(1, count), trace=notes)
        return Trace(hidden_states, attentions, logits)

    def hidden_states(self, token_ids: Sequence[int]) -> Float32[np.ndarray, "T D"]:
        """See `gpt2core.backends.base.Embeds.hidden_states`."""
        if self._packed is None:
            raise RequestError(_CLOSED)
        batch = whole_sequence(self.config, token_ids)
        return self._run(batch, self.new_cache(1, len(token_ids)), model=self._packed.without_head())[0]

    def copy_cache(self, cache: NativeCache, source: int, target: int, start: int, end: int) -> None:
        """See `gpt2core.backends.base.CopiesCache.copy_cache`."""
        self._check_cache(cache)
        check_copy(cache, source, target, start, end)
        cache.copy(source, target, start, end)

    def read_cache(self, cache: NativeCache, slot: int, tokens: int) -> np.ndarray:
        """See `gpt2core.backends.base.MovesCache.read_cache`; the same on every processor."""
        self._check_cache(cache)
        check_read(cache, slot, tokens)
        return cache.read(slot, tokens)

    def write_cache(self, cache: NativeCache, slot: int, positions: np.ndarray) -> None:
        """See `gpt2core.backends.base.MovesCache.write_cache`."""
        self._check_cache(cache)
        shape = self.config.n_layer, self.config.n_head, self.config.head_dim
        check_written(cache, slot, positions, shape, cache.dtype)
        cache.write(slot, positions)

    def _check(self, batch: Batch, cache: NativeCache) -> None:
        self._check_cache(cache)
        capacity = min(cache.capacity, self.config.n_positions)
        batch.check(vocab_size=self.config.vocab_size, slots=cache.slots, capacity=capacity)

    def _check_cache(self, cache: NativeCache) -> None:
        if not isinstance(cache, NativeCache) or cache.layout != self._layout:
            raise RequestError(
                f"the cache is {getattr(cache, 'layout', type(cache).__name__)}, and this model's is "
                f"{self._layout}; use what new_cache of this backend returned"
            )

    def _run(
        self,
        batch: Batch,
        cache: NativeCache,
        *,
        model: CModel | None = None,
        trace: CTrace | None = None,
        query: TokenQuery | None = None,
    ) -> tuple[Float32[np.ndarray, "N V"], TokenScores | None]:
        """The logits, but for the last ones, of which the query asks; and what it asks."""
        packed = self._packed
        if packed is None:
            raise RequestError(_CLOSED)
        model = packed.model if model is None else model
        given = len(batch.logits_at) - (0 if query is None else len(query.targets))
        logits = np.empty((given, model.vocabulary), np.float32)
        scores = None if query is None else query.empty_scores(model.vocabulary)
        firsts = batch.firsts
        pieces = np.stack([firsts, batch.lengths, batch.starts, batch.slots], 1)  # (B, 4)
        if len(batch.tokens) <= _MOST_TOKENS:
            notes = trace, query, scores
            self._pass(model, cache, batch.tokens, pieces, batch.logits_at, logits, *notes)
            return logits, scores
        for first in range(0, len(batch.tokens), _MOST_TOKENS):
            last = min(first + _MOST_TOKENS, len(batch.tokens))
            here = np.flatnonzero((batch.logits_at >= first) & (batch.logits_at < last))
            plain, asked = here[here < given], here[here >= given] - given
            part = np.empty((len(plain), logits.shape[1]), np.float32)
            wanted = (batch.logits_at[here] - first).astype(np.int32)
            own = None if query is None else query.at(asked)
            found = None if own is None else own.empty_scores(model.vocabulary)
            cut = _cut(pieces, first, last)
            self._pass(model, cache, batch.tokens[first:last], cut, wanted, part, trace, own, found)
            logits[plain] = part
            if scores is not None and found is not None:
                scores.put(asked, found)
        return logits, scores

    def _pass(
        self,
        model: CModel,
        cache: NativeCache,
        tokens: np.ndarray,
        pieces: np.ndarray,
        wanted: np.ndarray,
        logits: np.ndarray,
        trace: CTrace | None,
        query: TokenQuery | None,
        scores: TokenScores | None,
    ) -> None:
        tokens, pieces, wanted = map(np.ascontiguousarray, (tokens, pieces, wanted))
        asked = None if query is None or scores is None else point_to(query, scores, len(logits))
        with self._lock:
            if not self._end_team.alive:
                raise RequestError(_CLOSED)
            failed = self._library.forward(
                *(self._team, byref(model), byref(cache.there)),
                *(tokens.ctypes.data, len(tokens), pieces.ctypes.data, len(pieces)),
                *(wanted.ctypes.data, len(wanted), logits.ctypes.data),
                None if trace is None else byref(trace),
                None if asked is None else byref(asked),
            )
        if failed:
            raise BackendError(f"the native backend found no memory for a pass of {len(tokens)} tokens")

    def extra_tokens_cost(self, tokens: int, rows: int) -> float:
        """See `EstimatesCost.extra_tokens_cost`; the weights are read once for all rows."""
        return 0.05 + _COST_OF_TOKEN[self.precision] * tokens

    def close(self) -> None:
        """Let go of the weights and the threads."""
        with self._lock:
            self._end_team()
        self._packed = None


_alive: Final[weakref.WeakSet[NativeBackend]] = weakref.WeakSet()


def _unlock_all() -> None:
    """In a forked child, which lacks the thread that may have been in a pass."""
    for backend in _alive:
        backend._lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_unlock_all)


def _check_size(name: str, value: object, limit: int | None) -> None:
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
        raise RequestError(f"the cache's {name} is {value!r}; use a whole number of 1 or more")
    if limit is not None and value > limit:
        raise RequestError(
            f"the cache's {name} is {value}; this model's context is {limit}; use at most that many"
        )


def _cut(pieces: np.ndarray, first: int, last: int) -> np.ndarray:
    """The parts of pieces (B, 4) that lie in the tokens `first` to `last`."""
    begins = np.maximum(pieces[:, 0], first)
    counts = np.minimum(pieces[:, 0] + pieces[:, 1], last) - begins
    cut = np.stack([begins - first, counts, pieces[:, 2] + begins - pieces[:, 0], pieces[:, 3]], 1)
    return cut[counts > 0].astype(np.int32)
