"""Where the time goes."""

from dataclasses import dataclass
from typing import Any

from gpt2core.bench.tables import Table


@dataclass(frozen=True, slots=True)
class Bar:
    label: str
    seconds: dict[str, float]
    total_s: float


def bars(components: dict[str, Any]) -> list[Bar]:
    return []


def table(components: dict[str, Any]) -> Table:
    return Table("", (), ())
