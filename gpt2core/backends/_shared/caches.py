"""What every backend asks of a cache before it computes."""

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
