"""What the server knows of one HTTP request while it answers it."""

from dataclasses import dataclass, field
from typing import Any, Final

from starlette.types import Scope

_KEY: Final = "gpt2core.request"


@dataclass(slots=True)
class RequestState:
    """Made by the guard, for the routes and the log."""

    request_id: str
    begun_s: float  # of `time.perf_counter()`
    client: str | None = None  # its address, as far as the connection tells
    key: int | None = None  # which of the keys it brought, from 1
    log_fields: dict[str, Any] = field(default_factory=dict)  # that routes add to the request's log line

    def attach(self, scope: Scope) -> None:
        """Let `find_state` find it."""
        scope[_KEY] = self


def find_state(scope: Scope) -> RequestState:
    """The state of the request that came with `scope`."""
    state = scope[_KEY]
    assert isinstance(state, RequestState)
    return state
