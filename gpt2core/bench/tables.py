"""Numbers, units and tables as terminal, report and figures share them."""

import textwrap
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from gpt2core.bench.statistics import Interval

WIDTH: Final = 100
"""Columns of a terminal that a table may take."""
TOKENS_PER_SECOND: Final = "tok/s"
"""New tokens over the time of the whole call, prompt and first token included; so spelled everywhere."""


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

    def numbers(self, value: Interval) -> str:
        """An estimate and its interval; the estimate alone where the interval has no width."""
        if value.low == value.high:
            return self.number(value.mid)
        return f"{self.number(value.mid)} [{self.number(value.low)}, {self.number(value.high)}]"

    def interval(self, value: Interval) -> str:
        """The same with the unit."""
        return f"{self.numbers(value)} {self.name}".strip()


PLAIN: Final = Unit("", 1.0)
_SCALES: Final = {
    "s": (("s", 1.0), ("ms", 1e3), ("µs", 1e6), ("ns", 1e9)),
    "bytes": (("GB", 1e-9), ("MB", 1e-6), ("kB", 1e-3), ("bytes", 1.0)),
    "bytes/s": (("GB/s", 1e-9), ("MB/s", 1e-6)),
}


def fitting_unit(unit: str, values: Iterable[float]) -> Unit:
    """The largest scale of `unit` in which the greatest of the values is 1 or more."""
    greatest = max((abs(value) for value in values), default=0.0)
    scales = _SCALES.get(unit, ((unit, 1.0),))
    for name, factor in scales:
        if greatest * factor >= 1:
            return Unit(name, factor)
    return Unit(*scales[-1] if greatest else scales[0])


def show(unit: str, value: float) -> str:
    """A value in the scale that fits it."""
    return fitting_unit(unit, [value]).text(value)


def show_interval(unit: str, value: Interval) -> str:
    """An interval in the scale that fits it."""
    return fitting_unit(unit, [value.low, value.high] if value.covers(0) else [value.mid]).interval(value)


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of text under headings; the first column names what the others tell."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""

    def text(self) -> str:
        """For a terminal of `WIDTH` columns: what does not fit beside the first column goes below."""
        rows = [self.columns, *self.rows]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        parts: list[list[int]] = [[]]
        for i in range(1, len(widths)):
            taken = 2 + widths[0] + sum(2 + widths[k] for k in parts[-1])
            if parts[-1] and taken + 2 + widths[i] > WIDTH:
                parts.append([])
            parts[-1].append(i)
        lines = _wrap(self.title)
        for part in parts:
            for row in rows:
                cells = [row[0].ljust(widths[0]), *(row[i].rjust(widths[i]) for i in part)]
                lines.append(("  " + "  ".join(cells)).rstrip())
        return "\n".join([*lines, *_wrap(self.note, "  ")]) + "\n"


def text_of(tables: Iterable[Table], findings: Iterable[str]) -> str:
    """An analysis for a terminal: tables, then a list of what they say."""
    said = [line for finding in findings for line in _wrap(finding, "- ")]
    return "\n".join([*(table.text() for table in tables), *(["\n".join(said) + "\n"] if said else [])])


def short(text: str, width: int = 40) -> str:
    """One line of at most `width` characters: white space becomes single spaces, the rest is cut off."""
    line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return line if len(line) <= width else line[: width - 1].rstrip() + "…"


def _wrap(text: str, indent: str = "") -> list[str]:
    return textwrap.wrap(text, WIDTH, initial_indent=indent, subsequent_indent=" " * len(indent))
