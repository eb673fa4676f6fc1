"""What the server knows of one HTTP request while it answers it."""

from dataclasses import dataclass, field
from typing import Any, Final

from starlette.types import Scope

_KEY: Final = "gpt2core.request"


@dataclass(frozen=True, slots=True)
class Client:
    """Who asks: an address, and which key it brought; without an address nobody can be told apart."""

    address: str | None
    key: int | None = None  # from 1; None until a route has asked for it

    @property
    def cache_key(self) -> str:
        """Whom it shares a prefix cache with: whoever has the same key, or without keys the same address."""
        return f"address {self.address}" if self.key is None else f"key {self.key}"


@dataclass(slots=True)
class RequestState:
    """Made by the guard, for the routes and the log."""

    request_id: str
    begun_s: float  # of `time.perf_counter()`
    client: Client
    has_given_id: bool = False  # whether `request_id` is the client's
    refused_with: list[tuple[bytes, bytes]] | None = None  # header lines, of a refusal for want of a place
    body_nbytes: int | None = None  # as announced, of such a request
    log_fields: dict[str, Any] = field(default_factory=dict)  # that routes add to the request's log line

    def attach(self, scope: Scope) -> None:
        """Let `find_state` find it."""
        scope[_KEY] = self


def look_for_state(scope: Any) -> RequestState | None:
    """The same; None if the guard has not seen the request, or there is none."""
    state = None if scope is None else scope.get(_KEY)
    assert state is None or isinstance(state, RequestState)
    return state


def find_state(scope: Scope) -> RequestState:
    """The state of the request that came with `scope`."""
    state = scope[_KEY]
    assert isinstance(state, RequestState)
    return state
