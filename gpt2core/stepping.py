"""Threads that wait for an engine take turns in running its steps: none has to run in the background."""

import threading
from collections.abc import Callable

from gpt2core.engine import Engine


class Stepping:
    """One of the threads that wait leads: it runs the steps, for all. When it leaves, another takes over."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._turn = threading.Condition()
        self._led = False

    def run_until(self, ready: Callable[[], bool]) -> None:
        """Return once `ready()`, which must become true by steps of the engine, or with `wake`."""
        leading = False
        try:
            with self._turn:
                while self._led and not ready():
                    self._turn.wait()
                if ready():
                    return
                leading = self._led = True
            while not ready():
                updates = self._engine.step()
                # Waking everybody costs more than a small model's step, so only when somebody may be ready.
                if any(u.finish_reason or u.error or u.sequence.pieces is not None for u in updates):
                    self.wake()
        finally:  # also after an interrupt: the others must not wait for a leader who is gone
            if leading:
                self._led = False
                self.wake()

    def wake(self) -> None:
        """Let those who wait look again whether they are ready."""
        with self._turn:
            self._turn.notify_all()
