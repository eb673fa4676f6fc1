"""A backend that computes nothing, for tests of everything above the backend: engines, samplers, servers.

Its logits are a function of a row's whole history, which it reads from its own cache. So a mixed-up slot, a
wrong start or a chunk out of order shows in the tokens.
"""

# V vocabulary, M wanted logits

import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import final

import numpy as np

from gpt2core._shapes import Float32
from gpt2core.backends._shared.caches import (
    check_cache,
    check_copy,
    check_read,
    check_size,
    check_slot,
)
from gpt2core.batch import Batch
from gpt2core.config import ModelConfig
from gpt2core.errors import RequestError

LogitsOf = Callable[[tuple[int, ...], int], np.ndarray]
"""A row's history and the vocabulary's size -> its logits (V,)."""
_SURE = 50  # a logit beside zeros that leaves the others e^-50 of the probability


def hashed(history: tuple[int, ...], vocab_size: int) -> Float32[np.ndarray, "V"]:
    """Logits that depend on every token of the history and on nothing else."""
    rng = np.random.default_rng(zlib.crc32(np.array(history, np.int32).tobytes()))
    return 3 * rng.standard_normal(vocab_size, np.float32)


def scripted(continuations: Mapping[Sequence[int], Sequence[int]], *, end: int) -> LogitsOf:
    """After a prompt comes its continuation, with near certainty; after that `end`, the end of text.

    Args:
        continuations: token ids of prompts -> token ids of what follows them.
        end: a token id; `eos_token_ids` of the configuration should hold it.
    """
    scripts = {tuple(prompt): tuple(tokens) for prompt, tokens in continuations.items()}

    def logits_of(history: tuple[int, ...], vocab_size: int) -> np.ndarray:
        logits = np.zeros(vocab_size, np.float32)
        for prompt, tokens in scripts.items():
            if history[: len(prompt)] == prompt:
                done = len(history) - len(prompt)
                logits[tokens[done] if done < len(tokens) else end] = _SURE
        return logits

    return logits_of


@final
class FakeCache:
    """The token ids of each slot's tenant."""

    def __init__(self, config: ModelConfig, slots: int, capacity: int) -> None:
        self.config = config
        self.slots = slots
        self.capacity = capacity
        self.nbytes = 0
        self.histories: list[list[int]] = [[] for _ in range(slots)]


class FakeBackend:
    """A `Backend` whose logits you write yourself, and which remembers what it was asked.

        >>> from gpt2core import Batch, ModelConfig
        >>> from gpt2core.testing import FakeBackend, scripted
        >>> config = ModelConfig(vocab_size=9, n_positions=8, n_embd=4, n_layer=1, n_head=1)
        >>> backend = FakeBackend(config, scripted({(5, 6): (7, 8)}, end=0))
        >>> cache = backend.new_cache(slots=2, capacity=8)
        >>> int(backend.forward(Batch.of([([5, 6], 0, 1)]), cache).argmax())
        7
        >>> int(backend.forward(Batch.of([([7], 2, 1)]), cache).argmax())
        8
        >>> [batch.tokens.tolist() for batch in backend.batches]
        [[5, 6], [7]]

    Args:
        config: what it pretends to be.
        logits_of: history, vocabulary size -> (V,) logits, such as `hashed` or `scripted(...)`.
        before: is called with each batch before anything is committed; may raise, wait, or cancel somebody.
        after: is called with each batch and its logits, (M, V), and may change them.

    Attributes:
        batches: every batch that it was given.
        caches: every cache that it made.
        closed: how often it was closed.
    """

    name = "fake"

    def __init__(
        self,
        config: ModelConfig,
        logits_of: LogitsOf = hashed,
        *,
        before: Callable[[Batch], None] | None = None,
        after: Callable[[Batch, np.ndarray], None] | None = None,
    ) -> None:
        self.config = config
        self.logits_of = logits_of
        self.before = before
        self.after = after
        self.batches: list[Batch] = []
        self.caches: list[FakeCache] = []
        self.closed = 0

    def new_cache(self, slots: int, capacity: int) -> FakeCache:
        """See `gpt2core.backends.base.Backend.new_cache`."""
        check_size(self.config, slots, capacity)
        self.caches.append(FakeCache(self.config, slots, capacity))
        return self.caches[-1]

    def forward(self, batch: Batch, cache: FakeCache) -> Float32[np.ndarray, "M V"]:
        """See `gpt2core.backends.base.Backend.forward`.

        Raises:
            AssertionError: a row starts behind what its slot holds, which no real backend would notice.
        """
        if self.closed:
            raise RequestError("the fake backend is closed; make another")
        self.batches.append(batch)
        check_cache(cache, FakeCache, self.config)
        batch.check(vocab_size=self.config.vocab_size, slots=cache.slots, capacity=cache.capacity)
        if self.before is not None:
            self.before(batch)
        tokens = batch.tokens.tolist()
        histories: list[list[int]] = []
        owners: list[tuple[int, int]] = []  # of each token: its row, and how many tokens it sees
        first = 0
        for length, start, slot in zip(batch.lengths, batch.starts, batch.slots, strict=True):
            cached = cache.histories[slot]
            assert start <= len(cached), f"slot {slot} holds {len(cached)} tokens, the row starts at {start}"
            histories.append([*cached[:start], *tokens[first : first + length]])
            owners += [(len(histories) - 1, int(start) + i + 1) for i in range(length)]
            first += length
        logits = np.empty((len(batch.logits_at), self.config.vocab_size), np.float32)
        for m, at in enumerate(batch.logits_at):
            row, seen = owners[at]
            logits[m] = self.logits_of(tuple(histories[row][:seen]), self.config.vocab_size)
        if self.after is not None:
            self.after(batch, logits)
        for slot, history in zip(batch.slots, histories, strict=True):
            cache.histories[slot] = history
        return logits

    def copy_cache(self, cache: FakeCache, source: int, target: int, start: int, end: int) -> None:
        """See `gpt2core.backends.base.CopiesCache.copy_cache`.

        Raises:
            AssertionError: a slot holds too little, which no real backend would notice.
        """
        check_cache(cache, FakeCache, self.config)
        check_copy(cache, source, target, start, end)
        given, taken = cache.histories[source], cache.histories[target]
        assert end <= len(given), f"slot {source} holds {len(given)} tokens, {end} were to be copied"
        assert start <= len(taken), f"slot {target} holds {len(taken)} tokens, the copy starts at {start}"
        cache.histories[target] = [*taken[:start], *given[start:end]]

    def read_cache(self, cache: FakeCache, slot: int, tokens: int) -> np.ndarray:
        """See `gpt2core.backends.base.MovesCache.read_cache`: the token ids, in the place of keys."""
        check_cache(cache, FakeCache, self.config)
        check_read(cache, slot, tokens)
        return np.array(cache.histories[slot][:tokens], np.float32).reshape(1, 1, 1, tokens, 1)

    def write_cache(self, cache: FakeCache, slot: int, positions: np.ndarray) -> None:
        """See `gpt2core.backends.base.MovesCache.write_cache`."""
        check_cache(cache, FakeCache, self.config)
        check_slot(cache, slot)
        cache.histories[slot] = positions.reshape(-1).astype(int).tolist()

    def close(self) -> None:
        """See `gpt2core.backends.base.Backend.close`."""
        self.closed += 1
