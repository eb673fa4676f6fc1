"""One client's connection: HTTP/1.1 by h11, with a bound on all that a client sends and leaves unread.

Always h11, also where httptools is installed: that one keeps headers of any length, and answers HTTP/1.0 in
chunks. What it would save is in docs/robustness.md.

The guard bounds a request's body. What comes before a request's headers are complete, and after its answer
has been handed over, is bounded here, on each request of a connection:

- Headers that are not complete within `receipt_s` of their first byte close the connection.
- Bytes that come while an answer is made are kept, up to one largest request, so that reading never pauses
  and a client that leaves is seen.
- What the doorkeeper knows to be refused is refused without a look at it.
- A client that takes nothing of what waits for it for `stall_s` is let go.
"""

import asyncio
import math
import time
from typing import Any, ClassVar

import h11
from uvicorn import Config
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState

from gpt2core.serve import logs
from gpt2core.serve.doorkeeper import MOST_NBYTES, Doorkeeper, Hold
from gpt2core.serve.errors import Refusal, headers_too_large, json_text, slow_body, unavailable
from gpt2core.serve.settings import Settings
from gpt2core.serve.state import look_for_state

LOG_PAUSE_S = 1.0
"""Between two lines about too many connections."""


class Connection(H11Protocol):
    """Uvicorn's protocol with the limits of `settings`, which None takes from the environment.

    `uvicorn --factory gpt2core.serve:create_app --http gpt2core.serve.connection:Connection` has them too.
    """

    settings: ClassVar[Settings | None] = None
    most: ClassVar[int | None] = None  # connections, where less is possible than the settings allow
    doorkeeper: ClassVar[Doorkeeper | None] = None
    _logged_s: ClassVar[float] = -LOG_PAUSE_S

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        if type(self).settings is None:
            type(self).settings = Settings()
        assert self.settings is not None
        self._limits = self.settings
        self.conn = h11.Connection(h11.SERVER, self._limits.max_header_nbytes)
        self.timeout_keep_alive = self._limits.keep_alive_s  # type: ignore[assignment]
        self._early = bytearray()  # of requests that follow the one that is answered
        self._begun: bytes | None = b""  # of the request that is received; None: more than is worth keeping
        self._held = b""  # the same, as long as the parser has nothing of it
        self._arrival: asyncio.TimerHandle | None = None  # runs while headers are awaited
        self._stall: asyncio.TimerHandle | None = None  # runs while a client leaves bytes unread
        self._has_read = False  # since the timer began

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to wait for a request, or refuse one connection too many."""
        super().connection_made(transport)
        if len(self.connections) > min(self._limits.max_connections, self.most or math.inf):
            self._refuse_connection()
        self._watch_arrival()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the timers: each would keep the whole connection in memory."""
        for timer in (self._arrival, self._stall):
            if timer is not None:
                timer.cancel()
        self._early.clear()
        self._begun, self._held = None, b""
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Parse, or keep for later what comes while an answer is made."""
        if self._is_answering():
            self._early += data
            if len(self._early) > self._limits.max_header_nbytes + self._limits.max_body_nbytes:
                self.transport.abort()
            return
        if self.doorkeeper is not None:
            if self._is_between():
                data = self._begun = self._held + data
                if self._refuse_again(self.doorkeeper, data):
                    return
                self._held = b""
            elif self._begun:
                self._begun += data
            if self._begun is not None and len(self._begun) > MOST_NBYTES:
                self._begun = None
        super().data_received(data)
        self._watch_arrival()

    def on_response_complete(self) -> None:
        """Go on with what came meanwhile."""
        state = look_for_state(self.scope)
        if self.doorkeeper is not None and self._begun and self.client and state is not None:
            path, closes = self.scope["path"], self.transport.is_closing()
            self.doorkeeper.remember(self.client[0], self._begun, state, path, closes=closes)
        self._begun = b""
        super().on_response_complete()
        self._watch_reader()
        if self._early and not self.transport.is_closing() and not self._is_answering():
            data = bytes(self._early)
            self._early.clear()
            self.data_received(data)

    def pause_writing(self) -> None:
        """More waits for the client than should."""
        super().pause_writing()
        self._watch_reader()

    def resume_writing(self) -> None:
        """The client has read on."""
        self._has_read = True
        super().resume_writing()

    def send_400_response(self, msg: str) -> None:
        """Refuse what is not HTTP, or headers that are too long, with the body that every refusal has."""
        refusal = Refusal(400, "invalid_request_error", "malformed_request", "the request is not HTTP/1.1")
        if len(self.conn.trailing_data[0]) > self._limits.max_header_nbytes:
            refusal = headers_too_large(self._limits.max_header_nbytes, self._limits.max_headers)
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            self._write(refusal)
        self.transport.close()
        self._watch_reader()

    def timeout_keep_alive_handler(self) -> None:
        """Nothing came: close, whether or not the client reads what it has got."""
        super().timeout_keep_alive_handler()
        self._watch_reader()

    def _is_between(self) -> bool:
        """Whether the parser has nothing of a request."""
        ended = self.cycle is None or self.cycle.response_complete
        return ended and self.conn.our_state is h11.IDLE and not self.conn.trailing_data[0]

    def _refuse_again(self, doorkeeper: Doorkeeper, data: bytes) -> bool:
        """Whether nothing more is to be done with what came.

        A client that leaves answers unread is not served so: the app waits until they are gone.
        """
        if self.client is None or self.transport.get_write_buffer_size():
            return False
        answer = doorkeeper.answer(self.client[0], data)
        if answer is None:
            return False
        self._unset_keepalive_if_required()
        if isinstance(answer, Hold):
            self._held = data
            self._watch_arrival()
            return True
        self._held = b""
        if self._arrival is not None:
            self._arrival.cancel()
            self._arrival = None
        refusal, closes = answer
        self.transport.write(refusal)
        self.server_state.total_requests += 1
        if closes:
            self.transport.close()
        else:
            wait_s, end = self.timeout_keep_alive, self.timeout_keep_alive_handler
            self.timeout_keep_alive_task = self.loop.call_later(wait_s, end)
        self._watch_reader()
        return True

    def _is_answering(self) -> bool:
        """Whether a request is here whole, and its answer is not."""
        return self.cycle is not None and not self.cycle.response_complete and not self.cycle.more_body

    def _watch_arrival(self) -> None:
        """Let a request's headers take no longer than they may."""
        if self.cycle is not None and not self.cycle.response_complete:
            if self._arrival is not None:
                self._arrival.cancel()
                self._arrival = None
        elif self._arrival is None:
            self._arrival = self.loop.call_later(self._limits.receipt_s, self._end_arrival)

    def _end_arrival(self) -> None:
        self._arrival = None
        if not self.transport.is_closing():
            if self._held:
                self._write(slow_body(self._limits.receipt_s))
            self.transport.close()
            self._watch_reader()

    def _watch_reader(self) -> None:
        """Let a client that reads nothing go; as long as it takes anything it may take its time."""
        waiting_nbytes = self.transport.get_write_buffer_size()
        if self._stall is None and waiting_nbytes:
            self._has_read = False
            self._stall = self.loop.call_later(self._limits.stall_s, self._look_at_reader, waiting_nbytes)

    def _look_at_reader(self, before_nbytes: int) -> None:
        self._stall = None
        if self._has_read or self.transport.get_write_buffer_size() < before_nbytes:
            self._watch_reader()
            return
        client = self.client[0] if self.client else None
        logs.event("info", "reader_stalled", client=client, stall_s=self._limits.stall_s)
        self.transport.abort()

    def _refuse_connection(self) -> None:
        now_s = time.monotonic()
        if now_s - Connection._logged_s >= LOG_PAUSE_S:
            Connection._logged_s = now_s
            logs.event("warning", "too_many_connections", connections=len(self.connections) - 1)
        self._write(unavailable("too_many_connections", "the server has too many connections; close some"))
        self.transport.close()

    def _write(self, refusal: Refusal) -> None:
        """Answer without an app, for good."""
        body = json_text(refusal.body)
        headers = {**refusal.headers, "Content-Type": "application/json", "Content-Length": str(len(body))}
        headers.pop("Connection", None)
        lines = [f"{name}: {value}\r\n" for name, value in headers.items()]
        head = f"HTTP/1.1 {refusal.status} \r\n{''.join(lines)}Connection: close\r\n\r\n"
        self.transport.write(head.encode() + body)


def connection_class(
    settings: Settings, most: int | None = None, doorkeeper: Doorkeeper | None = None
) -> type[Connection]:
    """`Connection` with these limits, as uvicorn's `http`; `most` bounds the connections further."""
    return type("Connection", (Connection,), {"settings": settings, "most": most, "doorkeeper": doorkeeper})
