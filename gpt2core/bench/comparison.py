"""What the lines of a comparison say: medians with intervals, ratios pair by pair, bytes per second."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from gpt2core.bench.statistics import Interval

Line = Mapping[str, Any]
Who = tuple[str, str]
"""An engine and its precision."""

Cell = tuple[str, int | None, int | None, int | None]
"""(measure, batch, length, position)."""

MORE_IS_BETTER: Final = ("decode_tok_s",)
SUMMARY: Final = (
    "first_token_cold_s",
    "load_s",
    "compile_s",
    "ttft_s",
    "prefill_s",
    "decode_tok_s",
    "peak_memory_nbytes",
)
"""The measures of the table, in this order."""


_CELL: Final = ("measure", "batch", "length", "position")


@dataclass(frozen=True, slots=True)
class Row:
    """One engine in one precision.

    Attributes:
        engine, family, precision: which.
        values: by cell, the median over rounds and its bootstrap interval.
        ratios: by cell, how many times faster (or, for memory, smaller) than the baseline, from pairs of
            the same round; empty for the baseline itself.
        achieved: by batch, bytes of weights read per second while decoding.
        difference: the largest of a logit where the answers were right, or None.
        checked, wrong, unanswered: variants on which its answers were compared, were wrong, or were not to be
            had; the last two with the reason.
        reasons: why cells have no value, each once.
    """

    engine: str
    family: str
    precision: str
    values: dict[Cell, "Interval"]
    ratios: dict[Cell, "Interval"]
    achieved: dict[int, float]
    difference: float | None
    checked: tuple[str, ...]
    wrong: dict[str, str]
    unanswered: dict[str, str]
    reasons: tuple[str, ...]

    @property
    def correct(self) -> str:
        """One word or two for a table."""
        if self.wrong:
            return f"WRONG on {len(self.wrong)} of {len(self.checked)}"
        if not self.checked:
            return "-"
        within = "" if self.difference is None else f", within {self.difference:.0e}"
        return f"{len(self.checked)} of {len(self.checked)}{within}"


@dataclass(frozen=True, slots=True)
class Table:
    """The comparison of a folder, ready to be shown.

    Attributes:
        cells: those that any engine has a value for, in the order of `SUMMARY`, then ascending.
        rows: engines in the order of the lines.
        baseline: what ratios are over, or None with one engine.
        read_bandwidth: of the machine, bytes per second, or None where it was not measured.
    """

    cells: tuple[Cell, ...]
    rows: tuple[Row, ...]
    baseline: Who | None
    read_bandwidth: "Interval | None"

    def to_dict(self) -> dict[str, Any]:
        """For JSON: values and ratios as lists, since a cell is no key there."""

        def shown(found: Mapping[Cell, "Interval"]) -> list[dict[str, Any]]:
            return [dict(zip(_CELL, cell, strict=True)) | one.to_dict() for cell, one in found.items()]

        return {
            "baseline": self.baseline and list(self.baseline),
            "read_bandwidth": self.read_bandwidth and self.read_bandwidth.to_dict(),
            "engines": [
                asdict(row) | {"values": shown(row.values), "ratios": shown(row.ratios)} for row in self.rows
            ],
        }


def comparison_table(lines: Iterable[Line], *, baseline: str | None = None) -> Table:
    """Summarize a comparison's lines.

    Args:
        lines: of `runs.jsonl`.
        baseline: the engine that ratios are over, in its first precision; by default transformers, or else
            the first engine with values.
    """
    from gpt2core.bench.statistics import bootstrap_interval, paired_ratio

    samples: dict[Who, dict[Cell, dict[int, float]]] = {}
    others: dict[Who, list[Line]] = {}
    families: dict[Who, str] = {}
    bandwidth = []
    for line in lines:
        if line["kind"] != "comparison":
            continue
        if line["measure"] == "read_bandwidth":
            bandwidth += [line["value"]] if line["status"] == "ok" else []
            continue
        who = (line["engine"], line["precision"])
        families[who] = line["family"]
        others.setdefault(who, []).append(line)
        if line["status"] == "ok" and line["measure"] != "correct":
            cell = (line["measure"], line["batch"], line["length"], line["position"])
            samples.setdefault(who, {}).setdefault(cell, {})[line["round"]] = line["value"]
    base = _baseline(samples, baseline)
    rows = []
    for who, about in others.items():
        mine, ratios = samples.get(who, {}), {}
        if base is not None and who != base:
            for cell, theirs in samples.get(base, {}).items():
                if cell[0] not in (*SUMMARY, "step_s") or cell[0] == "compile_s":  # often 0
                    continue
                rounds = sorted(theirs.keys() & mine.get(cell, {}).keys())
                pair = [mine[cell][i] for i in rounds], [theirs[i] for i in rounds]
                above, below = pair if cell[0] in MORE_IS_BETTER else pair[::-1]
                if rounds and all(value > 0 for value in [*above, *below]):
                    ratios[cell] = paired_ratio(above, below)
        rows.append(_row(who, families[who], about, mine, ratios, bootstrap_interval))
    found = {cell for row in rows for cell in row.values if cell[0] in SUMMARY}
    order = sorted(found, key=lambda cell: (SUMMARY.index(cell[0]), *(part or 0 for part in cell[1:])))
    return Table(
        cells=tuple(order),
        rows=tuple(rows),
        baseline=base if len(rows) > 1 else None,
        read_bandwidth=bootstrap_interval(bandwidth) if bandwidth else None,
    )


def _baseline(samples: Mapping[Who, Any], named: str | None) -> Who | None:
    candidates = [who for who in samples if named in (None, who[0])]
    usual = [who for who in candidates if who[0] == "transformers"]
    return next(iter([*usual, *candidates]), None)


def _row(
    who: Who,
    family: str,
    about: list[Line],
    mine: Mapping[Cell, Mapping[int, float]],
    ratios: dict[Cell, "Interval"],
    interval: Any,
) -> Row:
    checks = [line for line in about if line["measure"] == "correct"]
    values = {cell: interval(list(by_round.values())) for cell, by_round in mine.items()}
    weight = next((line["value"] for line in about if line["measure"] == "weight_nbytes"), None)
    rates = {cell[1]: one.mid for cell, one in values.items() if cell[0] == "decode_tok_s"}
    reasons = [line["error"] for line in about if line["status"] != "ok" and line["measure"] != "correct"]
    return Row(
        engine=who[0],
        family=family,
        precision=who[1],
        values=values,
        ratios=ratios,
        achieved={batch: weight * rate / batch for batch, rate in rates.items() if batch and weight},
        difference=max((line["difference"] or 0.0 for line in checks if line["value"] == 1.0), default=None),
        checked=tuple(line["variant"] for line in checks if line["value"] is not None),
        wrong={line["variant"]: line["error"] for line in checks if line["value"] == 0.0},
        unanswered={line["variant"]: line["error"] for line in checks if line["value"] is None},
        reasons=tuple(dict.fromkeys(reasons)),
    )
