"""What the comparison says, as frozen data, as sentences and as tables."""

from dataclasses import dataclass
from typing import Any, Final

from gpt2core.bench.breakdown import breakdown_tables
from gpt2core.bench.records import Records
from gpt2core.bench.statistics import Interval
from gpt2core.bench.tables import Table, plain, short
from gpt2core.bench.units import Unit, unit_for

MEASURES: Final = {
    "decode_tok_s": "Decoding: new tokens per second, by batch",
    "prefill_s": "Prefill: time to the first token, by prompt length",
    "step_s": "One decoding step, by position",
    "ttft_s": "Time to first token, warm",
    "first_token_cold_s": "From the start of the process to the first token",
    "start_s": "Start: until its imports are done",
    "load_s": "Load: until the engine is made",
    "compile_s": "Compile: what the first call takes beyond a warm one",
    "peak_memory_nbytes": "Peak memory of the process",
}
"""What is tabulated, in this order. Others stand in runs.jsonl alone."""
ONCE: Final = {
    "start_s": "start",
    "load_s": "load",
    "compile_s": "compile",
    "first_token_cold_s": "process start to first token",
    "ttft_s": "first token, warm",
    "peak_memory_nbytes": "peak memory",
}
"""Those that depend on nothing, with their columns in the one table that they share."""
SHORT_NAMES: Final = {
    "decode_tok_s": "decode",
    "prefill_s": "prefill",
    "step_s": "step",
    "ttft_s": "first token",
    "first_token_cold_s": "cold first token",
    "peak_memory_nbytes": "memory",
}
"""Those of which there are ratios to the baseline."""


@dataclass(frozen=True, slots=True)
class Engine:
    """One engine at one precision.

    Attributes:
        name, precision, peer: as measured.
        label: how it is called in tables: its name, and its precision where that is not float32.
        wrong: what of its answers is wrong: variant and how it differs.
        checked: how many variants were checked.
        failures: of its measurements, with how often; skipped ones are no failures.
        skipped: why it was not measured at all; None where it was.
    """

    name: str
    precision: str
    peer: bool
    label: str
    wrong: tuple[tuple[str, str], ...]
    checked: int
    failures: tuple[tuple[str, int], ...]
    skipped: str | None

    @property
    def marked(self) -> str:
        """The label, with a mark where its answers are wrong."""
        return f"{self.label} (WRONG)" if self.wrong else self.label


@dataclass(frozen=True, slots=True)
class Point:
    """One engine's measure at one batch, length or position.

    Attributes:
        engine: its label.
        measure, unit: which.
        at: what it depends on, such as "batch 8"; empty for what depends on nothing.
        x: the number in `at`.
        value: median over the rounds with its 95 % interval.
        rounds: how many.
        ratio: how many times as fast as the baseline (for memory: how many times as much), round by round;
            None for the baseline and where there is no such ratio.
    """

    engine: str
    measure: str
    unit: str
    at: str
    x: int | None
    value: Interval
    rounds: int
    ratio: Interval | None


@dataclass(frozen=True, slots=True)
class Roof:
    """How near an engine's decoding, one sequence at a time, comes to the memory's speed."""

    engine: str
    achieved_bytes_s: Interval
    share: Interval | None  # of the measured read bandwidth


@dataclass(frozen=True, slots=True)
class ComparisonAnalysis:
    """What the comparison says."""

    records: Records
    baseline: str | None
    engines: tuple[Engine, ...]
    points: tuple[Point, ...]
    roofs: tuple[Roof, ...]
    bandwidth_bytes_s: Interval | None

    def of(self, measure: str) -> list[Point]:
        """The points of one measure."""
        return [point for point in self.points if point.measure == measure]

    def to_dict(self) -> dict[str, Any]:
        """For strict JSON."""
        parts = {name: getattr(self, name) for name in self.__dataclass_fields__ if name != "records"}
        return {"kind": "comparison", "folder": str(self.records.folder), **plain(parts)}

    @property
    def findings(self) -> list[str]:
        """What a reader must know of each engine."""
        return [*_correctness(self), *_troubles(self)]

    @property
    def tables(self) -> list[Table]:
        """A table per measure, then ratios, roofline, and where the time goes if that was measured."""
        tables = [_table(self, measure) for measure in MEASURES if self.of(measure) and measure not in ONCE]
        components = breakdown_tables(self.records.components)
        return [*tables, *_once(self), *_ratios(self), *_roofline(self), *components]

    def text(self) -> str:
        """For a terminal."""
        findings = "".join(f"- {line}\n" for line in self.findings)
        return "\n".join([*(table.text() for table in self.tables), *([findings] if findings else [])])


def _correctness(a: ComparisonAnalysis) -> list[str]:
    lines = []
    for engine in a.engines:
        for variant, how in engine.wrong:
            lines.append(f"{engine.label} is WRONG on {variant}: {short(how, 200)}")
    right = [engine.label for engine in a.engines if engine.checked and not engine.wrong]
    if right:
        lines.append(f"Right on every variant that was checked: {', '.join(right)}.")
    unchecked = [engine.label for engine in a.engines if not engine.checked and engine.skipped is None]
    if unchecked:
        lines.append(f"Answers not checked: {', '.join(unchecked)}.")
    return lines


def _troubles(a: ComparisonAnalysis) -> list[str]:
    skipped = [f"{e.label} was skipped: {short(e.skipped, 200)}" for e in a.engines if e.skipped is not None]
    failed = [
        f"{engine.label} failed {count} x: {short(error, 200)}"
        for engine in a.engines
        for error, count in engine.failures
    ]
    return skipped + failed


def _grid(a: ComparisonAnalysis, points: list[Point], texts: list[str]) -> tuple[tuple[str, ...], ...]:
    """A row for each engine, a column for each of `_columns(points)`."""
    cells = {(p.engine, p.measure, p.at): text for p, text in zip(points, texts, strict=True)}
    columns = _columns(points)
    return tuple(
        (engine.marked, *(cells.get((engine.label, *column), "-") for column in columns))
        for engine in a.engines
        if any((engine.label, *column) in cells for column in columns)
    )


def _columns(points: list[Point]) -> list[tuple[str, str]]:
    return list(dict.fromkeys((point.measure, point.at) for point in points))


def _table(a: ComparisonAnalysis, measure: str) -> Table:
    points = a.of(measure)
    unit = unit_for(points[0].unit, [point.value.mid for point in points])
    texts = [_bare(unit, point.value) for point in points]
    rounds = max(point.rounds for point in points)
    return Table(
        title=f"{MEASURES[measure]} ({unit.name}; median of up to {rounds} rounds, 95 % interval)",
        columns=("engine", *(at or unit.name for _, at in _columns(points))),
        rows=_grid(a, points, texts),
    )


def _once(a: ComparisonAnalysis) -> list[Table]:
    points = [point for measure in ONCE for point in a.of(measure) if not point.at]
    if not points:
        return []
    units = {m: unit_for(a.of(m)[0].unit, [p.value.mid for p in a.of(m)]) for m, _ in _columns(points)}
    texts = [_bare(units[point.measure], point.value) for point in points]
    return [
        Table(
            title="Start-up, first token and peak memory (medians, 95 % intervals)",
            columns=("engine", *(f"{ONCE[m]} ({units[m].name})" for m, _ in _columns(points))),
            rows=_grid(a, points, texts),
            note="compile: what the first call takes beyond a warm one of the same shape",
        )
    ]


def _bare(unit: Unit, value: Interval) -> str:
    """Without the unit's name, which stands in a heading."""
    return Unit("", unit.factor).interval(value)


def _ratios(a: ComparisonAnalysis) -> list[Table]:
    tables = []
    for unit, title in (("speed", "Times as fast as"), ("bytes", "Times the memory of")):
        points = [p for p in a.points if p.ratio is not None and (p.unit == "bytes") == (unit == "bytes")]
        if points:
            texts = [Unit("", 1).interval(point.ratio) for point in points if point.ratio is not None]
            columns = [f"{SHORT_NAMES[measure]} {at}".strip() for measure, at in _columns(points)]
            tables.append(
                Table(
                    title=f"{title} {a.baseline} (median of the rounds' ratios, 95 % interval)",
                    columns=("engine", *columns),
                    rows=_grid(a, points, texts),
                )
            )
    return tables


def _roofline(a: ComparisonAnalysis) -> list[Table]:
    if not a.roofs:
        return []
    unit, marked = Unit("GB/s", 1e-9), {engine.label: engine.marked for engine in a.engines}
    rows = [
        (
            marked[roof.engine],
            _bare(unit, roof.achieved_bytes_s),
            "-" if roof.share is None else Unit("%", 100).interval(roof.share),
        )
        for roof in a.roofs
    ]
    roof = "not measured" if a.bandwidth_bytes_s is None else unit.interval(a.bandwidth_bytes_s)
    return [
        Table(
            title="Roofline: weights read per second while one sequence is decoded",
            columns=("engine", "GB/s", "of the bandwidth"),
            rows=tuple(rows),
            note=f"read bandwidth of this machine: {roof}",
        )
    ]
