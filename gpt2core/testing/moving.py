"""The checks of the conformance suite that copy cached positions, and move them to another cache."""

import numpy as np

from gpt2core.backends.base import Cache, CopiesCache, MovesCache
from gpt2core.errors import RequestError
from gpt2core.testing.subject import NotApplicable, Subject


def copied_positions_go_on_as_computed_ones(subject: Subject) -> None:
    """Where a backend has `CopiesCache`: a slot goes on from what it was given, and no other changes."""
    backend, cache = subject.backend, subject.cache()
    if not isinstance(backend, CopiesCache):
        raise NotApplicable("the backend has no CopiesCache")
    tokens, other = subject.tokens(30, seed=35), subject.tokens(40, seed=36)
    same = [*tokens[:5], *other]
    subject.forward(cache, (tokens, 0, 1), (other, 0, 3), (same, 0, 0), (other[:9], 0, 2), logits_at=[])
    backend.copy_cache(cache, 1, 3, 0, 21)
    got = subject.forward(cache, ([7], 21, 3), ([8], 30, 1))
    subject.expect("whole prefix, and its source", got, [*tokens[:21], 7], [*tokens, 8])
    backend.copy_cache(cache, 1, 0, 5, 23)
    subject.expect("a part", subject.forward(cache, ([9, 1], 23, 0)), [*tokens[:23], 9, 1])
    backend.copy_cache(cache, 1, 2, 3, 7)
    got = subject.forward(cache, ([2], 3, 2), ([3], 22, 3))
    subject.expect("what stands before a copy", got, [*other[:3], 2], [*tokens[:21], 7, 3])
    for bad in ((1, 1, 0, 5), (4, 0, 0, 5), (0, 4, 0, 5), (-1, 0, 0, 5), (1, 0, 5, 5), (1, 0, -1, 5)):
        _expect_copy_refused(backend, cache, *bad)
    _expect_copy_refused(backend, cache, 1, 0, 0, subject.config.n_positions + 1)


def _expect_copy_refused(backend: CopiesCache, cache: Cache, *where: int) -> None:
    try:
        backend.copy_cache(cache, *where)
    except RequestError:
        return
    raise AssertionError(f"copy_cache{where} was not refused with a RequestError")


def moved_positions_go_on_as_computed_ones(subject: Subject) -> None:
    """Where a backend has `MovesCache`: what was read from one cache goes on in another."""
    backend, cache, other = subject.backend, subject.cache(), subject.cache()
    if not isinstance(backend, MovesCache):
        raise NotApplicable("the backend has no MovesCache")
    tokens = subject.tokens(30, seed=37)
    subject.forward(cache, (tokens, 0, 1), logits_at=[])
    subject.forward(other, (tokens[::-1], 0, 2), (tokens[9::-1], 0, 3), logits_at=[])
    for count in (1, 21):
        positions = backend.read_cache(cache, 1, count)
        config = subject.config
        want = (config.n_layer, 2, config.n_head, count, config.head_dim)
        assert positions.shape == want, f"read_cache gave the shape {positions.shape}, expected {want}"
        backend.write_cache(other, 2, positions)
        got = subject.forward(other, ([4], count, 2))
        subject.expect(f"{count} moved positions", got, [*tokens[:count], 4])
    subject.expect("a slot beside them", subject.forward(other, ([5], 10, 3)), [*tokens[9::-1], 5])
    for bad in (positions[1:], positions[:, :1], positions.astype(np.float64), positions[..., 0]):
        try:
            backend.write_cache(other, 2, bad)
        except RequestError:
            continue
        raise AssertionError(f"positions {bad.dtype} {bad.shape} were not refused with a RequestError")
