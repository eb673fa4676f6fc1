"""Threads that wait for an engine take turns in running its steps: none has to run in the background."""

import threading
from collections.abc import Callable, Generator, Iterator
from typing import Final, TypeVar

from gpt2core.engine.engine import Engine
from gpt2core.engine.request import Piece, Request

LOOK_AGAIN_S: Final = 1.0

T = TypeVar("T")


class StepLoop:
    """One of the threads that wait leads: it runs the steps, for all. When it leaves, another takes over.

    Ctrl-C may interrupt the main thread between any two operations. So this is built from plain locks, which
    `with` acquires and releases whole; a `threading.Condition` is written in Python and can be left locked.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._lock = threading.Lock()
        self._led = False
        self._bells: list[threading.Lock] = []  # one per thread that waits, locked until it is rung

    def run_until(self, ready: Callable[[], bool]) -> None:
        """Return once `ready()`, which steps of the engine must bring about, or its closing."""
        leading = False
        try:
            while not leading and not ready():
                bell = threading.Lock()
                with self._lock:
                    if self._led:
                        bell.acquire()
                        self._bells.append(bell)
                    else:
                        leading = self._led = True
                if not leading and not ready():
                    # The timeout is for the case that an interrupt hits the leader while it rings.
                    bell.acquire(timeout=LOOK_AGAIN_S)
            while not ready():
                updates = self._engine.step()
                # Waking everybody costs more than a small model's step, so only when somebody may be ready.
                if any(u.finish_reason or u.error or u.request.pieces is not None for u in updates):
                    self._ring()
        finally:
            if leading:
                self._led = False
                self._ring()

    def _ring(self) -> None:
        """Let those who wait look again whether they are ready."""
        with self._lock:
            for bell in self._bells:
                if bell.locked():
                    bell.release()
            self._bells.clear()


def all_done(requests: list[Request]) -> bool:
    """Whether there is nothing to wait for: all have ended, or one with an error."""
    return all(request.finished for request in requests) or any(request.error for request in requests)


def run_waiting(
    work: Generator[list[Request], None, T], run_until: Callable[[Callable[[], bool]], None]
) -> T:
    """What work returns that yields requests, and goes on when there is nothing more to wait for."""
    try:
        while True:
            requests = next(work)
            run_until(lambda requests=requests: all_done(requests))  # type: ignore[misc]
    except StopIteration as end:
        result: T = end.value
        return result
    finally:
        work.close()  # here, not when a traceback is let go: it cancels what runs


def has_news(requests: list[Request]) -> bool:
    """Whether one of them has a piece, or has ended."""
    return any(request.pieces or request.finished for request in requests)


def take_pieces(left: list[Request]) -> Iterator[Piece]:
    """The pieces that have come; those that have ended leave the list, which must not be empty.

    Raises:
        Gpt2CoreError: with which one of them has ended.
    """
    for request in list(left):
        finished = request.finished  # before its pieces are taken: no more can follow
        assert request.pieces is not None
        while request.pieces:
            yield request.pieces.popleft()
        if finished:
            left.remove(request)
            raise_error([request])


def raise_error(requests: list[Request]) -> None:
    """Raise the first error with which a request has ended."""
    for request in requests:
        if request.error is not None:
            raise request.error
