"""What every backend asks of a cache before it computes."""

import numpy as np

from gpt2core.backends.base import Cache
from gpt2core.config import ModelConfig
from gpt2core.errors import RequestError


def check_size(config: ModelConfig, slots: int, capacity: int) -> None:
    """Refuse a cache without slots, without room, or beyond the model's context.

    Raises:
        RequestError: so it is.
    """
    if slots < 1:
        raise RequestError(f"a cache of {slots} slots was asked for; it must have 1 or more")
    if not 1 <= capacity <= config.n_positions:
        raise RequestError(
            f"a cache for {capacity} tokens was asked for; it must be for 1 to {config.n_positions}, this "
            "model's context"
        )


def check_cache(cache: object, kind: type, config: ModelConfig) -> None:
    """Refuse a cache that `new_cache` of another backend, or of another model, has made.

    Args:
        cache: what `forward` was given.
        kind: the backend's own class of caches, which have a `config`.
        config: the backend's.

    Raises:
        RequestError: it is another's.
    """
    if not isinstance(cache, kind):
        raise RequestError(
            f"the cache is a {type(cache).__name__}, expected a {kind.__name__}; make it with new_cache of "
            "the backend that runs"
        )
    other = getattr(cache, "config", None)
    if other is not config and other != config:
        raise RequestError("the cache is of another model; make it with new_cache of the backend that runs")


def check_copy(cache: Cache, source: int, target: int, start: int, end: int) -> None:
    """Refuse a copy between slots or of positions that a cache does not have.

    Raises:
        RequestError: so it is, or a slot is to be copied to itself.
    """
    check_slot(cache, source)
    check_slot(cache, target)
    if source == target:
        raise RequestError(f"slot {source} was to be copied to itself; name two slots")
    if not 0 <= start < end <= cache.capacity:
        raise RequestError(
            f"positions {start} to {end} were to be copied; give a range that is not empty, of the "
            f"{cache.capacity} positions of a slot"
        )


def check_slot(cache: Cache, slot: int) -> None:
    """Refuse a slot that a cache does not have.

    Raises:
        RequestError: so it is.
    """
    if not 0 <= slot < cache.slots:
        raise RequestError(f"slot {slot} does not exist; this cache has the slots 0 to {cache.slots - 1}")


def check_read(cache: Cache, slot: int, tokens: int) -> None:
    """Refuse to read from a slot that does not exist, or more than a slot can hold.

    Raises:
        RequestError: so it is.
    """
    check_slot(cache, slot)
    if not 1 <= tokens <= cache.capacity:
        raise RequestError(f"{tokens} positions were to be read; a slot of this cache has {cache.capacity}")


def check_written(
    cache: Cache, slot: int, positions: np.ndarray, shape: tuple[int, int, int], dtype: type
) -> None:
    """Refuse what is not the content of a slot of this model.

    Args:
        cache, slot: where it is to be written.
        positions: what.
        shape: layers, heads and their width.
        dtype: of the cache.

    Raises:
        RequestError: so it is.
    """
    check_slot(cache, slot)
    layers, heads, width = shape
    count = positions.shape[3] if positions.ndim == 5 else 0
    if positions.shape != (layers, 2, heads, count, width) or positions.dtype != dtype:
        raise RequestError(
            f"the positions are {positions.dtype} {positions.shape}; this model's are {np.dtype(dtype)} "
            f"({layers}, 2, {heads}, tokens, {width})"
        )
    if not 1 <= count <= cache.capacity:
        raise RequestError(f"{count} positions were to be written; a slot of this cache has {cache.capacity}")
