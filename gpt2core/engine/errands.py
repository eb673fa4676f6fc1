"""What needs the backend for itself, done between two steps."""

import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, Final, TypeVar

from gpt2core.errors import RequestError

T = TypeVar("T")
_LOOK_AGAIN_S: Final = 0.005


class Errands:
    """Work that waits for the end of a step.

    Args:
        stepping: is held during a step.
        closed: says whether the engine is.
    """

    def __init__(self, stepping: threading.Lock, closed: Callable[[], bool]) -> None:
        self._stepping = stepping
        self._closed = closed
        self._waiting: deque[tuple[Future[Any], Callable[[], Any]]] = deque()

    def run(self, work: Callable[[], T]) -> T:
        """See `Engine.between_steps`."""
        errand: Future[T] = Future()
        self._waiting.append((errand, work))
        while not errand.done():  # a lock is not fair: steps, one after the other, may run this errand too
            if self._stepping.acquire(timeout=_LOOK_AGAIN_S):
                try:
                    self.run_next()
                finally:
                    self._stepping.release()
        return errand.result()

    def run_next(self) -> None:
        """Do one thing that waits; only while `stepping` is held."""
        if not self._waiting:
            return
        errand, work = self._waiting.popleft()
        if not errand.set_running_or_notify_cancel():
            return
        try:
            if self._closed():
                raise RequestError("this model is closed; load it again")
            errand.set_result(work())
        except BaseException as error:
            errand.set_exception(error)
