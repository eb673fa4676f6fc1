"""Threads that wait for an engine take turns in running its steps: none has to run in the background."""

import threading
from collections.abc import Callable
from typing import Final

from gpt2core.engine.engine import Engine
from gpt2core.engine.request import Request

LOOK_AGAIN_S: Final = 1.0


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


def raise_error(requests: list[Request]) -> None:
    """Raise the first error with which a request has ended."""
    for request in requests:
        if request.error is not None:
            raise request.error
