"""The seam between the library and its engines: one verb, `forward`.

A backend owns nothing but arithmetic. It sees token ids and returns logits; text, sampling, scheduling and
stopping are decided outside, once, for all backends.
"""

# N new tokens in all, B rows, M wanted logits, V vocabulary, S cache slots

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import numpy as np

from gpt2core._shapes import Float32
from gpt2core.batch import Batch
from gpt2core.config import ModelConfig
from gpt2core.token_scores import TokenQuery, TokenScores
from gpt2core.trace import Trace
from gpt2core.weights import Weights


class Cache(Protocol):
    """Keys and values of up to `slots` sequences of up to `capacity` tokens; opaque to callers."""

    @property
    def slots(self) -> int: ...
    @property
    def capacity(self) -> int: ...
    @property
    def nbytes(self) -> int: ...


@runtime_checkable
class Backend(Protocol):
    """An engine that holds one model's weights."""

    @property
    def name(self) -> str: ...
    @property
    def config(self) -> ModelConfig: ...

    def new_cache(self, slots: int, capacity: int) -> Cache:
        """An empty cache of 1 slot or more, for `capacity` tokens each, at most the model's context.

        Raises:
            RequestError: `slots` or `capacity` is out of range.
        """
        ...

    def forward(self, batch: Batch, cache: Cache) -> Float32[np.ndarray, "M V"]:
        """Append the batch's tokens to `cache` and return the logits at `batch.logits_at`.

        The result belongs to the caller. Only positions from `start` on of the batch's own slots are
        written. A call that raises has committed nothing: what was cached before each row's `start`
        still holds, and the same batch may be tried again.

        Raises:
            RequestError: the batch does not fit the vocabulary or the cache, or the cache is of another
                backend or model.
            BackendError: the engine failed.
        """
        ...

    def close(self) -> None:
        """Free what the backend holds; calling it twice is harmless."""
        ...


@runtime_checkable
class Traces(Protocol):
    """A capability: show what a pass computes on the way."""

    def trace(self, token_ids: Sequence[int]) -> Trace:
        """Hidden states, attention maps and logits of one sequence from its beginning, in float32.

        Shapes: `token_ids` (T,) with T at most the context; see `Trace`. Caches are not touched.

        Raises:
            RequestError: no tokens, more than the context, or an id outside the vocabulary.
            BackendError: the engine failed.
        """
        ...


@runtime_checkable
class Embeds(Protocol):
    """A capability: give what the logits are made from, for embeddings of texts."""

    def hidden_states(self, token_ids: Sequence[int]) -> Float32[np.ndarray, "T D"]:
        """The hidden states of one sequence after the final layer norm, transformers' `last_hidden_state`.

        Shapes: `token_ids` (T,) with T at most the context; result (T, D) float32. Caches are not touched.

        Raises:
            RequestError: no tokens, more than the context, or an id outside the vocabulary.
            BackendError: the engine failed.
        """
        ...


class LoadProgress(Protocol):
    """Is told what takes long while a model is loaded, and how much of it is done where that is known."""

    def __call__(self, what: str, done: int | None = None, all: int | None = None, /) -> None: ...


@runtime_checkable
class PortableBits(Protocol):
    """A capability: logits are the same to the last bit on every machine, in every batch and chunking."""

    @property
    def bits_version(self) -> int:
        """Changes whenever a release computes other bits than those before it; 0 to 255."""
        ...

    @property
    def precision(self) -> str:
        """Of the weights."""
        ...


@runtime_checkable
class ScoresTokens(Protocol):
    """A capability: say what logits say of given tokens, without keeping the logits.

    Of other backends the engine takes the logits, and `gpt2core.token_scores.score_logits` does the rest.
    """

    def score(
        self, batch: Batch, cache: Cache, query: TokenQuery
    ) -> tuple[Float32[np.ndarray, "N V"], TokenScores]:
        """`forward`, but for the last logits: the query is answered from these, as `score_logits` does.

        Shapes: of P targets (P,) and M indices in `logits_at`, the logits of the first N = M - P and the
        scores of the others. Errors are those of `forward`; a logit that is not finite makes the entropy of
        its position not finite either.
        """
        ...


@runtime_checkable
class CopiesCache(Protocol):
    """A capability: copy what a cache holds, so that texts that begin alike are read once."""

    def copy_cache(self, cache: Cache, source: int, target: int, start: int, end: int) -> None:
        """Let slot `target` hold at the positions `start` to `end` - 1 what slot `source` holds there.

        `source` holds at least `end` positions and `target` at least `start`, of a text that begins with the
        same tokens. No other position and no other slot changes, but for what `target` held from `end` on,
        which is lost. Like `forward` it must not run while another call uses the cache.

        Raises:
            RequestError: no such slot, `source` is `target`, or not 0 <= `start` < `end` <= the capacity.
            BackendError: the engine failed; `target` holds nothing from `start` on.
        """
        ...


@runtime_checkable
class MovesCache(Protocol):
    """A capability: hand out what a cache holds, and take it back, also in another process."""

    def read_cache(self, cache: Cache, slot: int, tokens: int) -> np.ndarray:
        """What a slot holds of its first `tokens` positions, T: a copy.

        Shapes: (L, 2, H, T, K), keys and values of each layer and head, float32, or uint16 for bfloat16.

        Raises:
            RequestError: no such slot, or `tokens` is not from 1 to the capacity.
        """
        ...

    def write_cache(self, cache: Cache, slot: int, positions: np.ndarray) -> None:
        """Let a slot hold what `read_cache` has returned, and nothing after it.

        Raises:
            RequestError: no such slot, or the array is not of this model's shape and type.
        """
        ...


@runtime_checkable
class RunsPrecisions(Protocol):
    """A factory's capability: it also takes quantized weights, of the precisions that it names."""

    precisions: tuple[str, ...]

    def __call__(self, weights: Weights, *, device: str = "cpu", threads: int | None = None) -> Backend: ...


@runtime_checkable
class BuildsOnce(Protocol):
    """A factory's capability: it compiles something on its first use here and keeps it."""

    def build(self) -> None:
        """Compile it now, unless it is kept already."""
        ...


@runtime_checkable
class EstimatesCost(Protocol):
    """A capability: say what extra tokens cost; else `engine.speculation.guess_extra_tokens_cost` holds."""

    def extra_tokens_cost(self, tokens: int, rows: int) -> float:
        """What a decode step of `rows` rows takes longer when one of them has `tokens` further tokens.

        In passes of one token and rather too high: refused guesses may cost so much (docs/performance.md).
        """
        ...


class BackendFactory(Protocol):
    """What an entry point of the group `gpt2core.backends` names."""

    def __call__(self, weights: Weights, *, device: str = "cpu", threads: int | None = None) -> Backend: ...
