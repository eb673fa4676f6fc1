"""Numbers as people read them: a unit that fits, and enough digits."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from gpt2core.bench.statistics import Interval


@dataclass(frozen=True, slots=True)
class Unit:
    """A unit of display: a value times `factor` is in `name`."""

    name: str
    factor: float

    def number(self, value: float) -> str:
        """The value in this unit, three significant digits or all before the point."""
        scaled = value * self.factor
        size = abs(scaled)
        if size < 0.00995:
            return f"{scaled:.2g}"
        digits = 0 if size >= 99.95 else 1 if size >= 9.995 else 2 if size >= 0.9995 else 3
        return f"{scaled:.{digits}f}"

    def text(self, value: float) -> str:
        """The value with its unit."""
        return f"{self.number(value)} {self.name}".strip()

    def interval(self, value: Interval) -> str:
        """An estimate and its interval, with the unit; the estimate alone where the interval has no width."""
        if value.low == value.high:
            return self.text(value.mid)
        ends = f"[{self.number(value.low)}, {self.number(value.high)}]"
        return f"{self.number(value.mid)} {ends} {self.name}".strip()


_SCALES: Final = {
    "s": (("s", 1.0), ("ms", 1e3), ("µs", 1e6), ("ns", 1e9)),
    "bytes": (("GB", 1e-9), ("MB", 1e-6), ("kB", 1e-3), ("bytes", 1.0)),
    "bytes/s": (("GB/s", 1e-9), ("MB/s", 1e-6)),
    "tok/s": (("tok/s", 1.0),),
}


def unit_for(unit: str, values: Iterable[float]) -> Unit:
    """The largest scale of `unit` in which the greatest of the values is 1 or more."""
    greatest = max((abs(value) for value in values), default=0.0)
    scales = _SCALES.get(unit, ((unit, 1.0),))
    for name, factor in scales:
        if greatest * factor >= 1:
            return Unit(name, factor)
    return Unit(*scales[-1] if greatest else scales[0])


def of(unit: str, value: Interval) -> str:
    """An interval in the scale that fits it."""
    decisive = [value.low, value.high] if value.covers(0) else [value.mid]
    return unit_for(unit, decisive).interval(value)
