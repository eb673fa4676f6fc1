"""A table as terminal, report and tests share it."""

from dataclasses import dataclass
from typing import Any

from gpt2core.bench.statistics import Interval


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of text under headings; the first column names what the others tell."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""

    def text(self) -> str:
        """For a terminal: columns side by side, the first aligned left, the others right."""
        rows = [self.columns, *self.rows]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [f"{self.title}\n"]
        for row in rows:
            first, *others = zip(row, widths, strict=True)
            cells = [first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in others)]
            lines.append("  " + "  ".join(cells).rstrip() + "\n")
        if self.note:
            lines.append(f"  {self.note}\n")
        return "".join(lines)


def short(text: str, width: int = 40) -> str:
    """One line of at most `width` characters: white space becomes single spaces, the rest is cut off."""
    line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return line if len(line) <= width else line[: width - 1].rstrip() + "…"


def plain(value: Any) -> Any:
    """For strict JSON: intervals and other frozen data as objects, tuples as lists, keys as text."""
    if isinstance(value, Interval):
        return value.to_dict()
    if isinstance(value, dict):
        return {str(key): plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [plain(inner) for inner in value]
    if hasattr(value, "__dataclass_fields__"):
        return {name: plain(getattr(value, name)) for name in value.__dataclass_fields__}
    return value
