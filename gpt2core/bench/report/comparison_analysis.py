"""The comparison analysed, once for terminal, JSON and report: means over the rounds, ratios in pairs."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from gpt2core.bench.components import breakdown_tables
from gpt2core.bench.records import Cell, Measurement, Records
from gpt2core.bench.report.comparison_results import (
    MEASURES,
    ONCE,
    SHORT_NAMES,
    ComparisonResults,
    EngineResult,
    Point,
    Roof,
    ratio_of,
)
from gpt2core.bench.report.comparison_text import (
    list_few,
    measure_table,
    once_table,
    ratio_tables,
    roofline_table,
    say_baseline,
    say_correctness,
    say_rankings,
    say_troubles,
)
from gpt2core.bench.report.machine import MachineState, describe_machine, weigh_other_work
from gpt2core.bench.statistics import drift, mean_interval, ratio_interval
from gpt2core.bench.tables import (
    Table,
    text_of,
)

_MACHINE: Final = "machine"
_ASIDE: Final = ("correct", "weight_nbytes", "build_s")
"""Without these an engine was measured all the same."""

Key = tuple[str, str]
"""An engine and its precision."""


@dataclass(frozen=True, slots=True)
class ComparisonAnalysis(ComparisonResults):
    """The results with what they say, for a terminal, JSON and a report."""

    @property
    def findings(self) -> list[str]:
        """Who is the fastest, and what a reader must know of each engine and of the machine."""
        return [
            *say_rankings(self), *say_baseline(self), *say_correctness(self), *say_troubles(self),
            *describe_machine(self.machine, self.records),
        ]  # fmt: skip

    @property
    def tables(self) -> list[Table]:
        """A table per measure, then ratios, roofline, and where the time goes if that was measured."""
        shared = [measure for measure in MEASURES if self.points_of(measure) and measure not in ONCE]
        components = breakdown_tables(self.records.components)
        tables = [measure_table(self, measure) for measure in shared]
        return [*tables, *once_table(self), *ratio_tables(self), *roofline_table(self), *components]

    def text(self) -> str:
        """For a terminal."""
        return text_of(self.tables, self.findings)


def analyse_comparison(records: Records) -> ComparisonAnalysis:
    """Analyse; a baseline that was not measured gives way to another, which the findings say."""
    lines: dict[Key, list[Measurement]] = defaultdict(list)
    values: dict[Cell, dict[Key, dict[int, float]]] = defaultdict(lambda: defaultdict(dict))
    units: dict[str, str] = {}
    machine: dict[str, dict[int, float]] = defaultdict(dict)
    for line in records.measurements:
        if line.engine == _MACHINE:
            if line.status == "ok" and line.value is not None:
                machine[line.cell.measure][line.round] = line.value
            continue
        key = (line.engine, line.precision)
        lines[key].append(line)
        if line.status == "ok" and line.value is not None and line.cell.measure != "correct":
            values[line.cell][key][line.round] = line.value
            units[line.cell.measure] = line.unit
    engines = {key: _judge_engine(key, mine) for key, mine in lines.items()}
    timed = [cell for cell in values if cell.measure in SHORT_NAMES]
    measured = [key for key in engines if any(key in values[cell] for cell in timed)]
    named = records.settings.get("baseline")
    base = _baseline(named, measured)
    points = []
    for cell in sorted((cell for cell in values if cell.measure in MEASURES), key=_order):
        for key, by_round in values[cell].items():
            theirs = values[cell].get(base) if base not in (None, key) else None
            points.append(
                Point(
                    engine=engines[key].label,
                    measure=cell.measure,
                    unit=units[cell.measure],
                    at=cell.at,
                    x=cell.x,
                    value=mean_interval(list(by_round.values()), least=0.0),
                    by_round=dict(by_round),
                    ratio=ratio_of(units[cell.measure], by_round, theirs)
                    if theirs and cell.measure in SHORT_NAMES
                    else None,
                )
            )
    bandwidth = machine["read_bandwidth"]
    repeated = [
        {i: 1 / value if cell.measure == "decode_tok_s" else value for i, value in values[cell][base].items()}
        for cell in timed
        if cell.measure in ("decode_tok_s", "prefill_s", "step_s") and base in values[cell]
    ]
    return ComparisonAnalysis(
        records=records,
        baseline=engines[base].label if base else None,
        missing_baseline=named
        if named is not None and (base is None or not _is_named(base, named))
        else None,
        engines=tuple(engines.values()),
        points=tuple(points),
        roofs=tuple(_roofs(values, engines, bandwidth)),
        bandwidth_bytes_s=mean_interval(list(bandwidth.values()), least=0.0) if bandwidth else None,
        machine=MachineState(
            others_cores=_mean_other_work(machine["others_cores"]),
            steal_share=_mean_other_work(machine["steal_share"]),
            drift=drift(repeated),
        ),
    )


def _mean_other_work(by_round: dict[int, float]) -> float | None:
    return weigh_other_work(list(by_round.values()), [1.0] * len(by_round))


def _order(cell: Cell) -> tuple[int, int]:
    return list(MEASURES).index(cell.measure), -1 if cell.x is None else cell.x


def _judge_engine(key: Key, lines: Sequence[Measurement]) -> EngineResult:
    name, precision = key
    checks = {line.variant or "this checkpoint": line for line in lines if line.cell.measure == "correct"}
    answered = {variant: line for variant, line in checks.items() if line.value is not None}
    others = [line for line in lines if line.cell.measure not in _ASIDE]
    failed: dict[str, list[str]] = defaultdict(list)
    for line in lines:
        if line.status == "failed":
            failed[line.error or "failed"].append(line.cell.measure)
    skips = [line for line in others if line.status == "skipped"]
    reasons = [line.error or "no reason given" for line in skips]
    lacking = dict.fromkeys(
        f"{' '.join(filter(None, (s.cell.measure, s.cell.at)))}: {s.error}" for s in skips
    )
    measured = any(line.status != "skipped" for line in others)
    return EngineResult(
        name=name,
        precision=precision,
        label=name if precision == "float32" else f"{name} {precision}",
        wrong=tuple((v, line.error or "it differs") for v, line in answered.items() if line.value == 0),
        checked=len(answered),
        difference=max((line.difference or 0.0 for line in answered.values() if line.value), default=None),
        unanswered=tuple((v, line.error or "") for v, line in checks.items() if line.value is None),
        failures=tuple((f"{list_few(names)}: {error}", len(names)) for error, names in failed.items()),
        skipped=None if measured or not reasons else reasons[-1],
        lacking=tuple(lacking) if measured else (),
    )


def _is_named(key: Key, named: str) -> bool:
    return named in (key[0], " ".join(key))


def _baseline(named: str | None, measured: Sequence[Key]) -> Key | None:
    """What the settings name, else what people have: transformers; else the first engine."""
    wanted = [key for key in measured if named is not None and _is_named(key, named)]
    usual = [key for key in measured if key[0] == "transformers"]
    return next(iter([*wanted, *usual, *measured]), None)


def _roofs(
    values: dict[Cell, dict[Key, dict[int, float]]],
    engines: dict[Key, EngineResult],
    bandwidth: dict[int, float],
) -> list[Roof]:
    roofs = []
    weights = values.get(Cell("weight_nbytes"), {})
    for key, speeds in values.get(Cell("decode_tok_s", batch=1), {}).items():
        if key in weights:
            nbytes = next(iter(weights[key].values()))
            achieved = {i: nbytes * speed for i, speed in speeds.items()}
            common = [i for i in achieved if i in bandwidth]
            share = None
            if common:
                share = ratio_interval([achieved[i] for i in common], [bandwidth[i] for i in common])
            roofs.append(Roof(engines[key].label, mean_interval(list(achieved.values()), least=0.0), share))
    return roofs
