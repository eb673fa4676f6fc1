"""What a comparison found: the data that analysis, sentences, tables and figures share."""

from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from typing import Any, Final

from gpt2core.bench.records import Records
from gpt2core.bench.report.machine import MachineState
from gpt2core.bench.statistics import Interval, ratio_interval
from gpt2core.bench.tables import (
    PLAIN,
    TOKENS_PER_SECOND,
    fitting_unit,
    short,
)

MEASURES: Final = {
    "decode_tok_s": f"Decoding: {TOKENS_PER_SECOND}, by batch",
    "prefill_s": "Prefill: time to the first token, by prompt length",
    "step_s": "One decoding step, by position",
    "ttft_s": "Time to first token, warm",
    "first_token_cold_s": "From the start of the process to the first token",
    "build_s": "Build: compiling the kernels, once per machine",
    "start_s": "Start: until its imports are done",
    "load_s": "Load: until the engine is made",
    "compile_s": "Compile: what the first call takes beyond a warm one",
    "peak_memory_nbytes": "Peak memory of the process",
}
"""What is tabulated, in this order. Others stand in runs.jsonl alone."""
ONCE: Final = {
    "build_s": "build",
    "start_s": "start",
    "load_s": "load",
    "compile_s": "compile",
    "first_token_cold_s": "first token, cold",
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
_VERDICTS: Final = {
    "decode_tok_s": "decodes fastest",
    "prefill_s": "reads prompts fastest",
    "step_s": "has the fastest step",
    "ttft_s": "is the first to answer when warm",
    "first_token_cold_s": "is the first to answer after a cold start",
    "peak_memory_nbytes": "needs the least memory",
}


@dataclass(frozen=True, slots=True)
class EngineResult:
    """One engine at one precision.

    Attributes:
        name, precision: as measured.
        label: how it is called in tables: its name, and its precision where that is not float32.
        wrong: what of its answers is wrong: variant and how it differs.
        checked: how many variants were checked.
        difference: the largest of a logit where its answers were right; None where nothing was checked.
        unanswered: variants that could not be checked, with the reason.
        failures: of its measurements, with how often; skipped ones are no failures.
        skipped: why it was not measured at all; None where it was.
        lacking: what was skipped of an engine that was measured, with the reason.
    """

    name: str
    precision: str
    label: str
    wrong: tuple[tuple[str, str], ...]
    checked: int
    difference: float | None
    unanswered: tuple[tuple[str, str], ...]
    failures: tuple[tuple[str, int], ...]
    skipped: str | None
    lacking: tuple[str, ...]

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
        value: mean over the rounds with its 95 % interval.
        by_round: what was measured.
        ratio: how many times as fast as the baseline (for memory: how many times as much), round by round;
            None for the baseline and where there is no such ratio.
    """

    engine: str
    measure: str
    unit: str
    at: str
    x: int | None
    value: Interval
    by_round: dict[int, float]
    ratio: Interval | None

    @property
    def rounds(self) -> int:
        """How often it was measured."""
        return len(self.by_round)


@dataclass(frozen=True, slots=True)
class Roof:
    """How near an engine's decoding, one sequence at a time, comes to the memory's speed.

    `share` is of the read bandwidth that was measured in the same round.
    """

    engine: str
    achieved_bytes_s: Interval
    share: Interval | None


@dataclass(frozen=True, slots=True)
class Ranking:
    """Who is the best of those whose answers are right, at one place.

    Attributes:
        measure, at: where.
        labels: the best first.
        best: its value.
        lead: how many times as good as the second, round by round; None with one engine.
        overlapping: neighbors in `labels` whose intervals overlap.
        rounds: how many the best has.
    """

    measure: str
    at: str
    unit: str
    labels: tuple[str, ...]
    best: Interval
    lead: Interval | None
    overlapping: tuple[tuple[str, str], ...]
    rounds: int

    def title(self) -> str:
        """The finding in one line, for a figure."""
        at = f" at {self.at}" if self.at else ""
        said = f"{short(self.labels[0], 30)} {_VERDICTS[self.measure]}{at}: {self.shown()}"
        if self.lead is None:
            return said
        second = short(self.labels[1], 30)
        if self.lead.covers(1):
            return f"{said}; {second} may be as good"
        if self.unit == "bytes":
            return f"{said}, {second} {self.lead.mid:.2f} times as much"
        return f"{said}, {self.lead.mid:.2f} times as fast as {second}"

    def sentence(self) -> str:
        """The finding with its uncertainty."""
        at = f" at {self.at}" if self.at else ""
        said = f"{self.labels[0]} {_VERDICTS[self.measure]}{at}: {self.shown()}"
        if self.lead is not None:
            times, second = f"{PLAIN.numbers(self.lead)} times", f"{self.labels[1]}, the next"
            if self.unit == "bytes":
                said += f"; {second}, needs {times} as much"
            else:
                said += f", {times} as fast as {second}"
            if self.lead.low != self.lead.high and self.lead.covers(1):
                said += ", which may be chance"
        pairs = [f"{a} and {b}" for a, b in self.overlapping]
        if self.rounds < 2:
            return f"{said}. One round gives no intervals, so small differences may be chance."
        if len(self.labels) < 2:
            return f"{said}."
        return f"{said}. Intervals overlap: {', '.join(pairs) if pairs else 'none'}."

    def shown(self) -> str:
        """The best value in its unit."""
        return fitting_unit(self.unit, [self.best.mid]).text(self.best.mid)


@dataclass(frozen=True, slots=True)
class ComparisonResults:
    """What the comparison says.

    Attributes:
        baseline: the label of the engine that ratios are over; None where nothing was measured.
        missing_baseline: the one that was asked for, where it was not measured.
    """

    records: Records
    baseline: str | None
    missing_baseline: str | None
    engines: tuple[EngineResult, ...]
    points: tuple[Point, ...]
    roofs: tuple[Roof, ...]
    bandwidth_bytes_s: Interval | None
    machine: MachineState

    def points_of(self, measure: str) -> list[Point]:
        """The points of one measure."""
        return [point for point in self.points if point.measure == measure]

    def failed(self) -> bool:
        """Whether a measurement or a check of any engine failed; a skip is no failure."""
        return any(engine.failures for engine in self.engines)

    def to_dict(self) -> dict[str, Any]:
        """For strict JSON."""
        parts = asdict(replace(self, records=None))  # type: ignore[arg-type]
        del parts["records"]
        return {"kind": "comparison", "folder": str(self.records.folder), **parts}

    def ranking(self, measure: str, *, last: bool = True) -> Ranking | None:
        """Of a measure at its last (or first) place; None where nobody right was measured."""
        places = list(dict.fromkeys(point.at for point in self.points_of(measure)))
        wrong = {engine.label for engine in self.engines if engine.wrong}
        if not places:
            return None
        at = places[-1 if last else 0]
        here = [p for p in self.points_of(measure) if p.at == at and p.engine not in wrong]
        here.sort(key=lambda p: -p.value.mid if p.unit == TOKENS_PER_SECOND else p.value.mid)
        if not here:
            return None
        best = here[0]
        lead = ratio_of(best.unit, best.by_round, here[1].by_round) if len(here) > 1 else None
        if lead is not None and best.unit == "bytes":
            lead = Interval(1 / lead.high, 1 / lead.mid, 1 / lead.low)
        overlapping = tuple((a.engine, b.engine) for a, b in pairwise(here) if a.value.overlaps(b.value))
        labels = tuple(point.engine for point in here)
        return Ranking(measure, at, best.unit, labels, best.value, lead, overlapping, best.rounds)


def ratio_of(unit: str, own: dict[int, float], others: dict[int, float]) -> Interval | None:
    """How many times as fast as the others, or for bytes how many times as much."""
    common = [i for i in own if i in others and own[i] > 0 and others[i] > 0]
    if not common:
        return None
    mine, theirs = [own[i] for i in common], [others[i] for i in common]
    return ratio_interval(theirs, mine) if unit == "s" else ratio_interval(mine, theirs)
