"""How far a benchmark is and how long it will take: a line on a terminal, occasional lines on a pipe."""

import sys
import time
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from gpt2core.bench import Progress

PIPE_INTERVAL_S = 30.0


class ProgressLine:
    """Use it as a context; on a terminal the line is gone at the end."""

    def __init__(self) -> None:
        self._begin_s = self._shown_s = time.monotonic()
        self._terminal = sys.stderr.isatty()

    def show(self, progress: "Progress") -> None:
        """What comes next, how much is done, and how long the rest will take as far as one can tell."""
        now_s = time.monotonic()
        left = "" if progress.left_s is None else f", {clock(progress.left_s)} left"
        share = progress.done / progress.all if progress.all else 1.0
        text = f"{progress.what or 'done'}; {share:.0%} done, {clock(now_s - self._begin_s)} so far{left}"
        if self._terminal:
            sys.stderr.write(f"\r\x1b[K{text}")
        elif now_s - self._shown_s >= PIPE_INTERVAL_S:
            self._shown_s = now_s
            sys.stderr.write(f"gpt2core: {text}\n")
        sys.stderr.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        if self._terminal:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()


def clock(seconds: float) -> str:
    """4:05, or 1:04:05 from an hour on."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
