"""A request that needs no slot of the engine: it holds places like the others while threads work for it."""

import asyncio
from collections.abc import Callable
from concurrent.futures import Executor
from types import TracebackType
from typing import Any, Self, TypeVar

from starlette.requests import Request as HttpRequest

from gpt2core.serve.errors import Disconnected
from gpt2core.serve.ticket import Ticket

T = TypeVar("T")


class Errand:
    """Ends when its deadline passes, its client leaves or the server stops, also while a thread works for it.

    Args:
        ticket: is closed at the end.
    """

    def __init__(self, ticket: Ticket, request: HttpRequest) -> None:
        self._ticket = ticket
        self._request = request

    async def __aenter__(self) -> Self:
        self._watch = asyncio.create_task(watch_client(self._request, self._ticket))
        self._failed = asyncio.create_task(self._ticket.done())  # in no other way: no step serves it
        self._failed.add_done_callback(_forget)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._watch.cancel()
        self._failed.cancel()
        self._ticket.close()

    async def run(self, threads: Executor, work: Callable[[], T]) -> T:
        """What `work` gives; what has not begun when the errand ends does not begin.

        Raises:
            Exception: of `work`, or why the errand has ended.
        """
        working = asyncio.get_running_loop().run_in_executor(threads, work)
        await asyncio.wait((working, self._failed), return_when=asyncio.FIRST_COMPLETED)
        if self._failed.done():
            working.cancel()
            working.add_done_callback(_forget)
            self._failed.result()
        return await working


def _forget(future: "asyncio.Future[Any]") -> None:
    """Nobody may be left to ask how it went, and asyncio would log that."""
    if not future.cancelled():
        future.exception()


async def watch_client(request: HttpRequest, ticket: Ticket) -> None:
    """End a request whose client has gone."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
    ticket.fail(Disconnected())
