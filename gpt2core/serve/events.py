"""Server-sent events over a job: one chunk per engine step, an error event where it fails, then the end."""

import asyncio
from collections.abc import Callable, Iterable
from typing import Final

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from gpt2core import Update
from gpt2core.serve.errors import Disconnected, json_text, to_refusal
from gpt2core.serve.service import Job

DONE: Final = b"data: [DONE]\n\n"
PING: Final = b": ping\n\n"
"""A comment, which clients skip: it keeps proxies and clients from taking a long wait for a lost server."""
SEND_GRACE_S: Final = 5.0
"""After the deadline, for a client that reads slowly."""


def event(value: object) -> bytes:
    """One event."""
    return b"data: " + json_text(value) + b"\n\n"


class EventStream(Response):
    """Streams a job. Its client may go at any time: then the job ends, and nothing more is sent.

    Args:
        job: is closed at the end.
        ping_s: the longest silence; then comes a comment.
        render: events for one update.
        closing: events after the last one, before `[DONE]`.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        job: Job,
        render: Callable[[Update], bytes],
        closing: Callable[[], Iterable[bytes]],
        *,
        ping_s: float,
    ) -> None:
        super().__init__(headers={"X-Accel-Buffering": "no", **job.headers})
        del self.headers["content-length"]
        self._job = job
        self._ping_s = ping_s
        self._render = render
        self._closing = closing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Stream until the end, an error or the client's leaving."""
        try:
            async with asyncio.timeout_at(self._job.ticket.deadline + SEND_GRACE_S):
                await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
                try:
                    async for updates in self._job.ticket.updates(self._ping_s):
                        await _send(send, b"".join(map(self._render, updates)) if updates else PING)
                except Disconnected:
                    return  # without an end: there is nobody to be told
                except asyncio.CancelledError:
                    raise
                except Exception as error:
                    await _send(send, event(to_refusal(error).body))
                else:
                    await _send(send, b"".join((*self._closing(), DONE)))
                await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            self._job.close()


async def _send(send: Send, data: bytes) -> None:
    if data:
        await send({"type": "http.response.body", "body": data, "more_body": True})
