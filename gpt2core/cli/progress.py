"""What takes long says so on stderr: a line that is redrawn on a terminal, a line now and then elsewhere."""

import sys
import threading
import time
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from gpt2core.bench import Progress

TERMINAL_DELAY_S = 1.0
TERMINAL_INTERVAL_S = 1.0
PIPE_DELAY_S = 2.0
PIPE_INTERVAL_S = 20.0
_LEAST_WAIT_S = 0.1


class Status:
    """Use it as a context.

    On a terminal the line appears after a second, says how much time is left as far as one can tell, and is
    gone at the end. Elsewhere there is a line after two seconds, and then one every 20.

    Args:
        text: what is being done.
        quiet: until the first `update` or `show` only a terminal shows it: what begins so, such as loading,
            is mostly too quick to be told in a log.
    """

    def __init__(self, text: str, *, quiet: bool = False) -> None:
        self._terminal = sys.stderr.isatty()
        self._quiet = quiet and not self._terminal
        self._text = text
        self._share: float | None = None  # of the work that is done
        self._left_s: float | None = None  # as of `_updated_s`
        self._begun_s = self._updated_s = time.monotonic()
        self._due_s = self._begun_s + (TERMINAL_DELAY_S if self._terminal else PIPE_DELAY_S)
        self._drawn = False
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="gpt2core-status", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        self._thread.join()
        if self._drawn and self._terminal:
            _draw("")

    def update(self, text: str, done: int | None = None, all: int | None = None) -> None:
        """Replace the text; with `done` of `all` units of work, each of which takes about as long."""
        now_s = time.monotonic()
        share = done / all if done is not None and all else None
        left_s = (now_s - self._begun_s) * (1 - share) / share if share else None
        self._set(text, share, left_s, now_s)

    def show(self, progress: "Progress") -> None:
        """The same, of a run that measures itself; it will be long, so that a terminal shows it at once."""
        if self._terminal:
            self._due_s = self._begun_s
        share = progress.done / progress.all if progress.all else 1.0
        self._set(progress.what or "done", share, progress.left_s, time.monotonic())

    def _set(self, text: str, share: float | None, left_s: float | None, now_s: float) -> None:
        with self._lock:
            self._quiet = False
            self._text, self._share, self._left_s, self._updated_s = text, share, left_s, now_s
            if now_s >= self._due_s or (self._drawn and self._terminal):
                self._write(now_s)

    def _run(self) -> None:
        while not self._ended.wait(max(_LEAST_WAIT_S, self._due_s - time.monotonic())):
            with self._lock:
                due = not self._quiet and time.monotonic() >= self._due_s
                if due and not self._ended.is_set():
                    self._write(time.monotonic())

    def _write(self, now_s: float) -> None:
        self._drawn = True
        self._due_s = now_s + (TERMINAL_INTERVAL_S if self._terminal else PIPE_INTERVAL_S)
        parts = [] if self._share is None else [f"{self._share:.0%} done"]
        parts.append(f"{clock(now_s - self._begun_s)} so far")
        if self._left_s is not None:
            parts.append(f"{clock(max(0.0, self._left_s - (now_s - self._updated_s)))} left")
        line = f"{self._text}; {', '.join(parts)}"
        if self._terminal:
            _draw(line)
        else:
            sys.stderr.write(f"gpt2core: {line}\n")
            sys.stderr.flush()


def clock(seconds: float) -> str:
    """4:05, or 1:04:05 from an hour on."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _draw(text: str) -> None:
    sys.stderr.write(f"\r\x1b[K{text}")
    sys.stderr.flush()
