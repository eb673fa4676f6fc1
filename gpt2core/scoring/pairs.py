"""Minimal pairs: how often the model finds the good sentence likelier than the bad one."""

import math
from dataclasses import dataclass
from typing import Final

_Z_95: Final = 1.959963984540054


@dataclass(frozen=True, slots=True)
class Accuracy:
    """How many of some pairs came out right.

    Attributes:
        name: of the phenomenon.
        pairs: how many there are.
        correct: how many have a good sentence that is likelier; equally likely ones count as wrong.
        low, high: the 95 % interval of the share, after Wilson (1927, "Probable inference", JASA 22).
    """

    name: str
    pairs: int
    correct: int
    low: float
    high: float

    @property
    def accuracy(self) -> float:
        """The share of pairs that came out right."""
        return self.correct / self.pairs


def wilson_interval(correct: int, pairs: int, z: float = _Z_95) -> tuple[float, float]:
    """The score interval of a share, which stays inside [0, 1] also at its ends."""
    share, square = correct / pairs, z * z
    center = (share + square / (2 * pairs)) / (1 + square / pairs)
    half = z / (1 + square / pairs) * math.sqrt(share * (1 - share) / pairs + square / (4 * pairs * pairs))
    low = 0.0 if correct == 0 else max(0.0, center - half)
    return low, 1.0 if correct == pairs else min(1.0, center + half)


def sum_pairs(outcomes: list[tuple[str, bool]]) -> list[Accuracy]:
    """The accuracy of each phenomenon, in order of appearance, and of all pairs together."""
    counts: dict[str, list[int]] = {}
    for name, correct in outcomes:
        both = counts.setdefault(name, [0, 0])
        both[0] += 1
        both[1] += correct
    rows = [_accuracy(name, *both) for name, both in counts.items()]
    if outcomes:
        rows.append(_accuracy("all", len(outcomes), sum(correct for _, correct in outcomes)))
    return rows


def _accuracy(name: str, pairs: int, correct: int) -> Accuracy:
    return Accuracy(name, pairs, correct, *wilson_interval(correct, pairs))
