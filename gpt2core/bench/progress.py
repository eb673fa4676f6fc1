"""How far a benchmark is."""

from typing import NamedTuple


class Progress(NamedTuple):
    """How far a run is."""

    what: str  # comes next; empty at the end
    done: int  # work of this process, warm-up included, in units of which each takes about as long
    all: int
    elapsed_s: float = 0.0

    @property
    def left_s(self) -> float | None:
        """About how long it will take, from what was done so far; None before the first."""
        return self.elapsed_s / self.done * (self.all - self.done) if self.done else None
