"""The comparison analysed, once for terminal, JSON and report: means over the rounds, ratios in pairs."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from typing import Any, Final, NamedTuple

from gpt2core.bench.components import breakdown_tables
from gpt2core.bench.records import Cell, Measurement, Records
from gpt2core.bench.report.machine import MachineState, describe_machine, weigh_other_work
from gpt2core.bench.statistics import Interval, drift, mean_interval, ratio_interval
from gpt2core.bench.tables import PLAIN, TOKENS_PER_SECOND, Table, Unit, fitting_unit, short, show, text_of


class Measure(NamedTuple):
    """How a measure is called; what is empty does not apply to it."""

    title: str
    column: str = ""  # in the one table of those that depend on nothing
    ratio: str = ""  # where there are ratios to the baseline
    verdict: str = ""  # of the best


MEASURES: Final = {
    "decode_tok_s": Measure(f"Decoding: {TOKENS_PER_SECOND}, by batch", "", "decode", "decodes fastest"),
    "prefill_s": Measure(
        "Prefill: time to the first token, by prompt length", "", "prefill", "reads prompts fastest"
    ),
    "step_s": Measure("One decoding step, by position", "", "step", "has the fastest step"),
    "ttft_s": Measure(
        "Time to first token, warm", "first token, warm", "first token", "is the first to answer when warm"
    ),
    "first_token_cold_s": Measure(
        "From the start of the process to the first token",
        "first token, cold",
        "cold first token",
        "is the first to answer after a cold start",
    ),
    "build_s": Measure("Build: compiling the kernels, once per machine", "build"),
    "start_s": Measure("Start: until its imports are done", "start"),
    "load_s": Measure("Load: until the engine is made", "load"),
    "compile_s": Measure("Compile: what the first call takes beyond a warm one", "compile"),
    "peak_memory_nbytes": Measure(
        "Peak memory of the process", "peak memory", "memory", "needs the least memory"
    ),
}
"""What is tabulated, in this order. Others stand in runs.jsonl alone."""

ONCE: Final = (
    "build_s",
    "start_s",
    "load_s",
    "compile_s",
    "first_token_cold_s",
    "ttft_s",
    "peak_memory_nbytes",
)
"""Those that depend on nothing, on the way from the start to the end."""

_CONTESTS: Final = (
    *(("decode_tok_s", "first"), ("decode_tok_s", "last"), ("prefill_s", "last")),
    *(("first_token_cold_s", "last"), ("peak_memory_nbytes", "last")),
)
"""Whose winners are named: a measure, at the first or the last place where it was taken."""

GIGABYTES_PER_SECOND: Final = Unit("GB/s", 1e-9)
_ASIDE: Final = ("correct", "weight_nbytes", "build_s")
"""Without these an engine was measured all the same."""

MACHINE: Final = "machine"
STEADY: Final = ("decode_tok_s", "prefill_s", "step_s")
"""What a quiet machine repeats in every round."""
ByRound = dict[int, float]


@dataclass(frozen=True, slots=True)
class EngineResult:
    """One engine at one precision."""

    name: str
    precision: str
    label: str  # its name, and its precision where that is not float32
    wrong: tuple[tuple[str, str], ...]  # variants that it answers wrong, and how its answers differ
    checked: int  # on how many variants it was
    difference: float | None  # the largest of a logit where its answers were right
    unanswered: tuple[tuple[str, str], ...]  # variants that could not be checked, with the reason
    failures: tuple[tuple[str, int], ...]  # of its measurements, with how often; a skip is none
    skipped: str | None  # why it was not measured at all
    lacking: tuple[str, ...]  # what was skipped of an engine that was measured, with the reason

    def is_named(self, name: str) -> bool:
        """Whether `name`, with or without a precision, means it."""
        return name in (self.name, f"{self.name} {self.precision}")

    @property
    def marked(self) -> str:
        """The label, with a mark where its answers are wrong."""
        return f"{self.label} (WRONG)" if self.wrong else self.label


@dataclass(frozen=True, slots=True)
class Point:
    """One engine's measure at one batch, length or position."""

    engine: str  # its label
    measure: str
    unit: str
    at: str  # what it depends on, such as "batch 8"; empty for what depends on nothing
    x: int | None  # the number in `at`
    value: Interval
    by_round: ByRound
    ratio: Interval | None  # how many times as fast as the baseline; of memory, how many times as much

    @property
    def rounds(self) -> int:
        """How often it was measured."""
        return len(self.by_round)


@dataclass(frozen=True, slots=True)
class Roof:
    """How near an engine's decoding, one sequence at a time, comes to the memory's speed."""

    engine: str
    achieved_bytes_s: Interval
    share: Interval | None  # of the read bandwidth that was measured in the same round


@dataclass(frozen=True, slots=True)
class Ranking:
    """Who is the best of those whose answers are right, at one place."""

    measure: str
    at: str
    labels: tuple[str, ...]  # the best first
    best: Point
    lead: Interval | None  # how many times as good as the second, round by round; None with one engine
    overlapping: tuple[tuple[str, str], ...]  # neighbors in `labels` whose intervals overlap

    def claim(self) -> str:
        """Who is the best, where, and by how much."""
        at = f" at {self.at}" if self.at else ""
        value = show(self.best.unit, self.best.value.mid)
        said = f"{short(self.labels[0], 30)} {MEASURES[self.measure].verdict}{at}: {value}"
        if self.lead is None:
            return said
        times, second = PLAIN.numbers(self.lead), short(self.labels[1], 30)
        if self.best.unit == "bytes":
            said += f"; {second} needs {times} times as much"
        else:
            said += f", {times} times as fast as {second}"
        return (
            f"{said}, which may be chance" if self.lead.low < self.lead.high and self.lead.covers(1) else said
        )

    def sentence(self) -> str:
        """The same with whose intervals overlap."""
        if self.best.rounds < 2:
            return f"{self.claim()}. One round gives no intervals, so small differences may be chance."
        pairs = ", ".join(f"{a} and {b}" for a, b in self.overlapping)
        overlap = "" if self.lead is None else f" Intervals overlap: {pairs or 'none'}."
        return f"{self.claim()}.{overlap}"


@dataclass(frozen=True, slots=True)
class ComparisonAnalysis:
    """The results with what they say, for a terminal, JSON and a report."""

    records: Records
    baseline: str | None  # the label of the engine that ratios are over; None where nothing was measured
    missing_baseline: str | None  # the one that was asked for, where it was not measured
    engines: tuple[EngineResult, ...]
    points: tuple[Point, ...]
    roofs: tuple[Roof, ...]
    bandwidth_bytes_s: Interval | None
    machine: MachineState

    def points_of(self, *measures: str) -> list[Point]:
        """The points of these measures."""
        return [point for measure in measures for point in self.points if point.measure == measure]

    def failed(self) -> bool:
        """Whether a measurement or a check of any engine failed; a skip is no failure."""
        return any(engine.failures for engine in self.engines)

    def to_dict(self) -> dict[str, Any]:
        """For strict JSON."""
        parts = asdict(replace(self, records=None))  # type: ignore[arg-type]
        del parts["records"]
        return {"kind": "comparison", "folder": str(self.records.folder), **parts}

    def text(self) -> str:
        """For a terminal."""
        return text_of(self.tables, self.findings)

    @property
    def findings(self) -> list[str]:
        """Who is the fastest, and what a reader must know of each engine and of the machine."""
        rankings = [self.ranking(measure, place) for measure, place in _CONTESTS]
        lines = list(dict.fromkeys(ranking.sentence() for ranking in rankings if ranking is not None))
        if self.missing_baseline is not None:
            instead = (
                f"ratios are over {self.baseline}" if self.baseline else "nothing else was measured either"
            )
            lines.append(f"The baseline {self.missing_baseline} was not measured; {instead}.")
        lines += [*_say_correctness(self.engines), *_say_troubles(self.engines)]
        return [*lines, *describe_machine(self.machine, self.records)]

    @property
    def tables(self) -> list[Table]:
        """A table per measure, then ratios, roofline, and where the time goes if that was measured."""
        measures = [table for m in MEASURES if m not in ONCE for table in self._tabulate_measure(m)]
        ratios = [*self._tabulate_ratios(of_bytes=False), *self._tabulate_ratios(of_bytes=True)]
        components = breakdown_tables(self.records.components)
        return [*measures, *self._tabulate_once(), *ratios, *self._tabulate_roofline(), *components]

    def ranking(self, measure: str, place: str = "last") -> Ranking | None:
        """Of a measure at its "first" or "last" place; None where nobody right was measured."""
        points = self.points_of(measure)
        places = list(dict.fromkeys(point.at for point in points))
        at = places[0 if place == "first" else -1] if places else ""
        wrong = {engine.label for engine in self.engines if engine.wrong}
        here = [point for point in points if point.at == at and point.engine not in wrong]
        here.sort(key=lambda p: -p.value.mid if p.unit == TOKENS_PER_SECOND else p.value.mid)
        if not here:
            return None
        lead = _ratio(here[0].unit, here[0].by_round, here[1].by_round) if len(here) > 1 else None
        if lead is not None and here[0].unit == "bytes":
            lead = Interval(1 / lead.high, 1 / lead.mid, 1 / lead.low)
        overlapping = tuple((a.engine, b.engine) for a, b in pairwise(here) if a.value.overlaps(b.value))
        return Ranking(measure, at, tuple(p.engine for p in here), here[0], lead, overlapping)

    def _tabulate(
        self,
        title: str,
        points: Sequence[Point],
        head: Callable[[str, str], str],
        text: Callable[[Point], str],
        note: str = "",
    ) -> list[Table]:
        """A row for each engine, a column for each measure and place; no table without points."""
        cells = {(point.engine, point.measure, point.at): text(point) for point in points}
        columns = list(dict.fromkeys((point.measure, point.at) for point in points))
        rows = tuple(
            (engine.marked, *(cells.get((engine.label, *column), "-") for column in columns))
            for engine in self.engines
            if any((engine.label, *column) in cells for column in columns)
        )
        return [Table(title, ("engine", *(head(*column) for column in columns)), rows, note)] if rows else []

    def _tabulate_measure(self, measure: str) -> list[Table]:
        """A measure at every place."""
        points = self.points_of(measure)
        if not points:
            return []
        unit = fitting_unit(points[0].unit, [point.value.mid for point in points])
        rounds = max(point.rounds for point in points)
        title = f"{MEASURES[measure].title} ({unit.name}; mean of up to {rounds} rounds, 95 % interval)"
        return self._tabulate(
            title, points, lambda _, at: at or unit.name, lambda point: unit.numbers(point.value)
        )

    def _tabulate_once(self) -> list[Table]:
        """What depends on nothing."""
        points, by_measure = self.points_of(*ONCE), defaultdict(list)
        for point in points:
            by_measure[point.measure].append(point.value.mid)
        units = {p.measure: fitting_unit(p.unit, by_measure[p.measure]) for p in points}
        return self._tabulate(
            "Start-up, first token and peak memory (means, 95 % intervals)",
            points,
            lambda measure, _: f"{MEASURES[measure].column} ({units[measure].name})",
            lambda point: units[point.measure].numbers(point.value),
            note="build: once, before the rounds, and near 0 where an earlier build was kept; compile: what "
            "the first call takes beyond a warm one of the same shape",
        )

    def _tabulate_ratios(self, *, of_bytes: bool) -> list[Table]:
        """Speed, or memory, over the baseline's."""
        title = f"{'Times the memory of' if of_bytes else 'Times as fast as'} {self.baseline}"
        return self._tabulate(
            f"{title} (geometric mean of the rounds' ratios, 95 % interval)",
            [p for p in self.points if p.ratio is not None and (p.unit == "bytes") == of_bytes],
            lambda measure, at: f"{MEASURES[measure].ratio} {at}".strip(),
            lambda point: PLAIN.numbers(point.ratio) if point.ratio else "-",
        )

    def _tabulate_roofline(self) -> list[Table]:
        """How near decoding comes to the memory's speed."""
        marked = {engine.label: engine.marked for engine in self.engines}
        gb, percent = GIGABYTES_PER_SECOND, Unit("%", 100)
        rows = tuple(
            (marked[r.engine], gb.numbers(r.achieved_bytes_s), percent.interval(r.share) if r.share else "-")
            for r in self.roofs
        )
        measured = self.bandwidth_bytes_s
        bandwidth = "not measured" if measured is None else gb.interval(measured)
        title = "Roofline: weights read per second while one sequence is decoded"
        note = f"read bandwidth of this machine: {bandwidth}; shares are of the same round's"
        return [Table(title, ("engine", gb.name, "of the bandwidth"), rows, note)] if rows else []


def analyse_comparison(records: Records) -> ComparisonAnalysis:
    """Analyse; a baseline that was not measured gives way to another, which the findings say."""
    lines: dict[str, list[Measurement]] = defaultdict(list)
    values: dict[Cell, dict[str, ByRound]] = defaultdict(lambda: defaultdict(dict))
    units: dict[str, str] = {}
    for line in records.measurements:
        name, precision, number, cell, _ = line.key
        label = name if precision in ("float32", "") else f"{name} {precision}"
        lines[label].append(line)
        if line.status == "ok" and line.value is not None:
            values[cell][label][number] = line.value
            units[cell.measure] = line.unit
    lines.pop(MACHINE, None)
    engines = {label: _judge_engine(label, mine) for label, mine in lines.items()}
    machine = {
        name: values[Cell(name)][MACHINE] for name in ("read_bandwidth", "others_cores", "steal_share")
    }
    timed = [cell for cell in values if cell.measure in MEASURES and MEASURES[cell.measure].ratio]
    named = records.settings.get("baseline")
    measured = [engine for label, engine in engines.items() if any(label in values[cell] for cell in timed)]
    base = _choose_baseline(named, measured)
    points = []
    for cell in sorted((cell for cell in values if cell.measure in MEASURES), key=_order):
        theirs = values[cell].get(base.label) if base and cell in timed else None
        for label, own in values[cell].items():
            unit, mean = units[cell.measure], mean_interval(list(own.values()), least=0.0)
            ratio = _ratio(unit, own, theirs) if base and theirs and label != base.label else None
            points.append(Point(label, cell.measure, unit, cell.at, cell.x, mean, dict(own), ratio))
    times = [
        {
            i: 1 / n if units[cell.measure] == TOKENS_PER_SECOND else n
            for i, n in values[cell][base.label].items()
        }
        for cell in timed
        if base and cell.measure in STEADY and base.label in values[cell]
    ]
    bandwidth = machine["read_bandwidth"]
    return ComparisonAnalysis(
        records=records,
        baseline=base.label if base else None,
        missing_baseline=None if named is None or (base and base.is_named(named)) else named,
        engines=tuple(engines.values()),
        points=tuple(points),
        roofs=tuple(_find_roofs(values, bandwidth)),
        bandwidth_bytes_s=mean_interval(list(bandwidth.values()), least=0.0) if bandwidth else None,
        machine=MachineState(
            others_cores=weigh_other_work(list(machine["others_cores"].values())),
            steal_share=weigh_other_work(list(machine["steal_share"].values())),
            drift=drift(times),
        ),
    )


def _order(cell: Cell) -> tuple[int, int]:
    return list(MEASURES).index(cell.measure), -1 if cell.x is None else cell.x


def _ratio(unit: str, own: ByRound, others: ByRound) -> Interval | None:
    """How many times as fast as the others, or for bytes how many times as much, round by round."""
    common = [i for i in own if i in others and own[i] > 0 and others[i] > 0]
    if not common:
        return None
    mine, theirs = [own[i] for i in common], [others[i] for i in common]
    return ratio_interval(theirs, mine) if unit == "s" else ratio_interval(mine, theirs)


def _judge_engine(label: str, lines: Sequence[Measurement]) -> EngineResult:
    checks = {
        line.key.variant or "this checkpoint": line for line in lines if line.key.cell.measure == "correct"
    }
    answered = {variant: line for variant, line in checks.items() if line.value is not None}
    failed: dict[str, list[str]] = defaultdict(list)
    for line in lines:
        if line.status == "failed":
            failed[line.error or "failed"].append(line.key.cell.measure)
    others = [line for line in lines if line.key.cell.measure not in _ASIDE]
    skips = [line for line in others if line.status == "skipped"]
    measured = len(skips) < len(others)
    lacking = dict.fromkeys(f"{f'{s.key.cell.measure} {s.key.cell.at}'.strip()}: {s.error}" for s in skips)
    return EngineResult(
        name=lines[0].key.engine,
        precision=lines[0].key.precision,
        label=label,
        wrong=tuple((v, line.error or "it differs") for v, line in answered.items() if line.value == 0),
        checked=len(answered),
        difference=max((line.difference or 0.0 for line in answered.values() if line.value), default=None),
        unanswered=tuple((v, line.error or "") for v, line in checks.items() if line.value is None),
        failures=tuple((f"{_list_few(names)}: {error}", len(names)) for error, names in failed.items()),
        skipped=None if measured or not skips else skips[-1].error or "no reason given",
        lacking=tuple(lacking) if measured else (),
    )


def _choose_baseline(named: str | None, measured: Sequence[EngineResult]) -> EngineResult | None:
    """What the settings name, else what people have: transformers; else the first engine."""
    wanted = [engine for engine in measured if named is not None and engine.is_named(named)]
    usual = [engine for engine in measured if engine.name == "transformers"]
    return next(iter([*wanted, *usual, *measured]), None)


def _find_roofs(values: dict[Cell, dict[str, ByRound]], bandwidth: ByRound) -> list[Roof]:
    roofs, weights = [], values.get(Cell("weight_nbytes"), {})
    for label, speeds in values.get(Cell("decode_tok_s", batch=1), {}).items():
        if label in weights:
            nbytes = next(iter(weights[label].values()))
            achieved = {i: nbytes * speed for i, speed in speeds.items()}
            mean = mean_interval(list(achieved.values()), least=0.0)
            roofs.append(Roof(label, mean, _ratio("bytes/s", achieved, bandwidth)))
    return roofs


def _list_few(names: Sequence[str]) -> str:
    """At most three of the names, each once, and how many more there are."""
    different = list(dict.fromkeys(names))
    more = f" and {len(different) - 3} more" if len(different) > 3 else ""
    return ", ".join(different[:3]) + more


def _say_correctness(engines: Sequence[EngineResult]) -> list[str]:
    """Whose answers are right, wrong or unknown."""
    lines = [
        f"{e.label} is WRONG on {variant}: {short(how, 200)}" for e in engines for variant, how in e.wrong
    ]
    right = [
        e.label + (f" (within {e.difference:.0e})" if e.difference else "")
        for e in engines
        if e.checked and not e.wrong
    ]
    if right:
        lines.append(f"Right on every variant that was checked: {', '.join(right)}.")
    for e in engines:
        reasons = defaultdict(list)
        for variant, why in e.unanswered if e.skipped is None else ():
            reasons[why].append(variant)
        lines += [f"{e.label} was not checked on {_list_few(v)}: {short(w, 200)}" for w, v in reasons.items()]
    unchecked = [e.label for e in engines if not e.checked and not e.unanswered and e.skipped is None]
    return [*lines, f"Answers not checked: {', '.join(unchecked)}."] if unchecked else lines


def _say_troubles(engines: Sequence[EngineResult]) -> list[str]:
    """What was skipped or failed, with the reason."""
    return [
        *(f"{e.label} was skipped: {short(e.skipped, 200)}" for e in engines if e.skipped is not None),
        *(f"{e.label} failed {n} x: {short(error, 200)}" for e in engines for error, n in e.failures),
        *(f"{e.label} has no {short(what, 200)}" for e in engines for what in e.lacking),
    ]
