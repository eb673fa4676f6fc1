"""What components.json says, for figure and table."""

from dataclasses import dataclass
from typing import Any

from gpt2core.bench.records import COMPONENTS
from gpt2core.bench.tables import Table
from gpt2core.bench.units import unit_for
from gpt2core.errors import RequestError


@dataclass(frozen=True, slots=True)
class Bar:
    """One line of components.json, for drawing."""

    label: str
    seconds: dict[str, float]
    total_s: float


def bars(components: dict[str, Any]) -> list[Bar]:
    """The lines of components.json; decoding first."""
    try:
        lines = sorted(components["lines"], key=lambda line: line["phase"])
        return [
            Bar(
                label=f"{line['backend']}, {line['phase']}",
                seconds={name: float(value["mid"]) for name, value in line["seconds"].items()},
                total_s=float(line["total_s"]),
            )
            for line in lines
        ]
    except (KeyError, TypeError, ValueError) as error:
        raise RequestError(f"{COMPONENTS} is not what it should be ({error!r}); measure it again") from error


def breakdown_tables(components: dict[str, Any]) -> list[Table]:
    """Time by component, a row for each backend and phase; no table where nothing was measured."""
    if not components:
        return []
    rows = bars(components)
    names = list(dict.fromkeys(name for row in rows for name in row.seconds))
    cells = []
    for row in rows:
        unit = unit_for("s", [row.total_s])
        times = [unit.number(row.seconds[name]) if name in row.seconds else "-" for name in names]
        cells.append((f"{row.label} ({unit.name})", *times, unit.number(row.total_s)))
    return [
        Table(
            title="Time by component",
            columns=("backend, phase", *names, "all"),
            rows=tuple(cells),
            note=str(components.get("method", "")),
        )
    ]
