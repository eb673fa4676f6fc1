"""How far a benchmark is."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a run is.

    Attributes:
        what: comes next; empty at the end.
        done, all: work of this process, in units of which each takes about as long; warm-up included.
        elapsed_s: so far.
    """

    what: str
    done: int
    all: int
    elapsed_s: float = 0.0

    @property
    def left_s(self) -> float | None:
        """About how long it will take, from what was done so far; None before the first."""
        return self.elapsed_s / self.done * (self.all - self.done) if self.done else None
