"""How many requests an engine may run at once."""

from gpt2core.backends.base import Backend
from gpt2core.config import ModelConfig
from gpt2core.engine.draft import draft_nbytes
from gpt2core.errors import RequestError


def count_slots(config: ModelConfig, draft: Backend | None, **limits: int) -> int:
    """The slots of the cache.

    Args:
        config: the model's.
        draft: the draft model, whose cache counts too.
        **limits: `max_slots`, `cache_nbytes` and `step_tokens`, as of `Engine`.

    Raises:
        RequestError: a limit is not a whole number of 1 or more, or not even one request fits `cache_nbytes`.
    """
    for name, value in limits.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise RequestError(f"{name} is {value!r}; it must be a whole number of 1 or more")
    cache_nbytes = limits["cache_nbytes"]
    request_nbytes = config.cache_nbytes(1, config.n_positions) + draft_nbytes(draft, config)
    if cache_nbytes < request_nbytes:
        raise RequestError(
            f"cache_nbytes is {cache_nbytes!r}; one request of this model's context of "
            f"{config.n_positions} tokens needs {request_nbytes} bytes; raise cache_nbytes to that much"
        )
    return min(limits["max_slots"], cache_nbytes // request_nbytes)
