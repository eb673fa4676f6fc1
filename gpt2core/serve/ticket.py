"""One request's way through the engine: its requests, what they have given so far, and how it ends.

Belongs to the event loop. The engine thread only appends to `requests` and reads `cancelled`.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from types import TracebackType
from typing import Self

from gpt2core import Request, Update
from gpt2core.serve.errors import deadline_exceeded
from gpt2core.serve.state import Client


class Ticket:
    """A place in the engine for `count` requests, held until `close`."""

    def __init__(self, count: int, *, begun_s: float, deadline_s: float, release: Callable[["Ticket"], None]):
        loop = asyncio.get_running_loop()
        self.count = count
        self.client: Client | None = None  # who holds the places
        self.begun_s = begun_s
        self.requests: list[Request] = []
        self.cancelled = False
        self.stream = False
        self.route = "none"
        self.waits_for_token = True
        self.token_s: dict[Request, float] = {}  # when each text's last token came
        self._open = count
        self._updates: list[Update] = []
        self._error: BaseException | None = None
        self._silence: asyncio.TimerHandle | None = None  # runs while a stream is read
        self._waiter: asyncio.Future[None] | None = None
        self._release = release
        left_s = begun_s + deadline_s - time.perf_counter()
        self.deadline = loop.time() + left_s
        self._timer = loop.call_at(self.deadline, lambda: self.fail(deadline_exceeded(deadline_s)))

    @property
    def closed(self) -> bool:
        """Whether its place is free again."""
        return self._timer.cancelled()

    @property
    def error(self) -> BaseException | None:
        """Why it failed."""
        return self._error

    def take(self, update: Update) -> None:
        """What a step did to one of its requests."""
        if update.error is not None:
            self.fail(update.error)
            return
        if self.stream:
            self._updates.append(update)
        self._open -= update.finish_reason is not None
        if self.stream or self._open == 0:
            self._wake()

    def fail(self, error: BaseException) -> None:
        """End it with an error, wherever it stands."""
        if self._error is None and not self.closed:
            self._error = error
            self._release(self)
            self._wake()

    async def done(self) -> None:
        """Wait until all requests have ended.

        Raises:
            Exception: what it failed with.
        """
        while self._open and self._error is None:
            await self._wait()
        if self._error is not None:
            raise self._error

    async def updates(self, silence_s: float) -> AsyncIterator[list[Update]]:
        """What the steps gave, as it comes; of several steps together where the reader is slow.

        After each `silence_s` without anything comes an empty list.

        Raises:
            Exception: what it failed with.
        """
        loop = asyncio.get_running_loop()
        given = loop.time()

        def look() -> None:  # one timer for all waits: one for each would cost every token something
            due, now = given + silence_s, loop.time()
            self._silence = loop.call_at(due if due > now else now + silence_s, look)
            if due <= now:
                self._wake()

        self._silence = loop.call_later(silence_s, look)
        while True:
            if self._updates:
                updates, self._updates = self._updates, []
                given = loop.time()
                yield updates
            elif self._error is not None:
                raise self._error
            elif not self._open:
                return
            elif loop.time() - given >= silence_s:
                given = loop.time()
                yield []
            else:
                await self._wait()

    def close(self) -> None:
        """Give its place back; what still runs is cancelled."""
        if self._silence is not None:
            self._silence.cancel()
        if not self.closed:
            self._timer.cancel()
            self._release(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    async def _wait(self) -> None:
        self._waiter = asyncio.get_running_loop().create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
