"""How far a benchmark is and how long it will take: a line on a terminal, occasional lines on a pipe."""

import sys
import time
from typing import Self

PIPE_INTERVAL_S = 30.0


class ProgressLine:
    """Use it as a context; on a terminal the line is gone at the end."""

    def __init__(self) -> None:
        self._begin_s = self._shown_s = time.monotonic()
        self._terminal = sys.stderr.isatty()

    def show(self, what: str, share: float, left_s: float | None) -> None:
        """`what` comes next, `share` of all is done; `left_s` is None where nothing is known yet."""
        now_s = time.monotonic()
        left = "" if left_s is None else f", {clock(left_s)} left"
        text = f"{what}; {share:.0%} done, {clock(now_s - self._begin_s)} so far{left}"
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
