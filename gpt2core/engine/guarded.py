"""The scheduler behind a lock: changed by one thread at a time, and repaired when a change is interrupted."""

import threading
import time
from collections import deque
from collections.abc import Callable
from typing import TypeVar

from gpt2core.engine.request import Request
from gpt2core.engine.scheduler import Scheduler

T = TypeVar("T")


class GuardedScheduler:
    """Lets one thread at a time change the scheduler and its requests, and cancels.

    The lock is held for microseconds. It is re-entrant, because a finaliser that cancels may run in the very
    thread that holds it; such a request ends once the change under way is done.
    """

    def __init__(self, scheduler: Scheduler) -> None:
        self.scheduler = scheduler
        self._lock = threading.RLock()
        self._changing = False
        self._to_cancel: deque[Request] = deque()

    def change(self, change: Callable[..., T], *args: object) -> T:
        """Call `change`, which may change the scheduler's and the requests' state."""
        with self._lock:
            self._changing = True
            try:
                return change(*args)
            except BaseException:
                self.scheduler.repair()
                raise
            finally:
                self._changing = False
                if self._to_cancel:
                    self.change(self._end_cancelled)

    def cancel(self, request: Request) -> None:
        """See `Engine.cancel`."""
        if request.finished:
            return
        self._to_cancel.append(request)
        with self._lock:
            if not self._changing:  # otherwise this thread is in the middle of `change`, which ends it
                self.change(self._end_cancelled)

    def cancel_all(self) -> None:
        """End whatever waits or runs; only within a change."""
        scheduler = self.scheduler
        self._to_cancel.extend((*scheduler.waiting, *scheduler.prefilling, *scheduler.decoding))
        self._end_cancelled()

    def _end_cancelled(self) -> None:
        while self._to_cancel:
            request = self._to_cancel.popleft()
            for member in request.together:
                if not member.finished:
                    member.cancel(time.perf_counter())
                    if member.beams is not None:  # its text was not chosen, and may not be copied yet
                        del member.token_ids[member.prompt_tokens :]
                        member.cached = 0
                    self.scheduler.remove(member)
