"""What a prefix cache has decided, done on the backend: copies, and positions to and from other places."""

from collections.abc import Sequence

import numpy as np

from gpt2core.backends.base import Backend, Cache, CopiesCache, MovesCache
from gpt2core.engine.guarded import GuardedScheduler
from gpt2core.engine.prefix_cache import PrefixCache


class PrefixMoves:
    """Called in a step, or between two, when nobody else uses the cache.

    Args:
        backend: whose cache it is.
        prefixes: what its slots hold; None: nobody knows.
        guarded: changes that.
    """

    def __init__(self, backend: Backend, prefixes: PrefixCache | None, guarded: GuardedScheduler) -> None:
        self._backend = backend
        self._prefixes = prefixes
        self._guarded = guarded

    def copy_all(self, cache: Cache | None) -> None:
        """Make the copies that were planned; an interrupted one is made again."""
        prefixes, backend = self._prefixes, self._backend
        while prefixes is not None and prefixes.copies:
            assert isinstance(backend, CopiesCache)
            assert cache is not None
            copy = prefixes.copies[0]
            backend.copy_cache(cache, copy.source, copy.target, copy.start, copy.end)
            self._guarded.change(prefixes.note_copied, copy)

    def read(self, cache: Cache | None, token_ids: Sequence[int], key: str) -> np.ndarray | None:
        """See `Engine.read_prefix`."""
        if self._prefixes is None or cache is None or not isinstance(self._backend, MovesCache):
            return None
        slot = self._guarded.change(self._prefixes.find, token_ids, key)
        return None if slot is None else self._backend.read_cache(cache, slot, len(token_ids))

    def write(self, cache: Cache | None, token_ids: Sequence[int], positions: np.ndarray, key: str) -> bool:
        """See `Engine.write_prefix`."""
        if self._prefixes is None or cache is None or not isinstance(self._backend, MovesCache):
            return False
        slot = self._guarded.change(self._prefixes.begin_keeping)
        if slot is None:
            return False
        self._backend.write_cache(cache, slot, positions)
        self._guarded.change(self._prefixes.keep, slot, token_ids, key)
        return True
