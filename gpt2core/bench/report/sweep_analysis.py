"""The classic benchmark analysed: how fast is it, and is time linear in length?"""

import dataclasses
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final, Literal

import numpy as np
from scipy import stats

from gpt2core.bench.components import breakdown_tables
from gpt2core.bench.records import Records, Run
from gpt2core.bench.report.machine import MachineState, describe_machine, weigh_other_work
from gpt2core.bench.statistics import Interval, LinearFit, drift, linear_fit, mean_interval
from gpt2core.bench.sweep.summary import Summary, summarize, summary_table
from gpt2core.bench.tables import TOKENS_PER_SECOND, Table, Unit, short, show, show_interval, text_of

LEAST_TOKENS: Final = 20
"""Of a run whose steps are looked at one by one."""


@dataclass(frozen=True, slots=True)
class WithinRun:
    """How the time of a token changes with its position inside one generation."""

    slope: Interval  # seconds per token and position, the mean over `units`
    step_s: float  # median time of a token
    units: Literal["prompts", "runs"]  # what is independent: runs where there are fewer than three prompts
    count: int  # how many units
    positions: tuple[int, int]  # the first and the last

    @property
    def verdict(self) -> str:
        """Whether later tokens differ from earlier ones."""
        if self.slope.covers(0):
            return "no growth is visible"
        return "later tokens take longer" if self.slope.mid > 0 else "later tokens are faster"


@dataclass(frozen=True, slots=True)
class ClassicAnalysis:
    """What the classic benchmark says."""

    records: Records
    cells: tuple[Summary, ...]
    regressor: Literal["new tokens", "total length"]  # the x of `line`
    line: LinearFit | None
    within_run: WithinRun | None
    warm_up_ratio: float | None  # a warm-up's time over the median of its cell; the median over the cells
    failures: tuple[tuple[str, int], ...]
    machine: MachineState

    def to_dict(self) -> dict[str, Any]:
        """For strict JSON."""
        parts = asdict(dataclasses.replace(self, records=None))  # type: ignore[arg-type]
        del parts["records"]
        return {"kind": "classic", "folder": str(self.records.folder), **parts}

    def text(self) -> str:
        """For a terminal."""
        return text_of(self.tables, self.findings)

    @property
    def tables(self) -> list[Table]:
        """The means, and where the time goes if that was measured."""
        return [summary_table(self.cells), *breakdown_tables(self.records.components)]

    @property
    def findings(self) -> list[str]:
        """One sentence per question."""
        lines = [*self._say_speed(), self._say_linear(), self._say_within()]
        if warm := sum(run.warm_up for run in self.records.runs):
            took = f"; they took {self.warm_up_ratio:.2f} times the usual time" if self.warm_up_ratio else ""
            lines.append(f"Warm-up: {warm} runs, not counted above{took}.")
        if early := sum(run.finish_reason == "stop" for run in self.records.measured):
            lines.append(f"{early} runs ended before their length, at an end-of-text token or stop string.")
        lines += [f"Failed: {count} x {short(error, 200)}" for error, count in self.failures]
        return [*lines, *describe_machine(self.machine, self.records)]

    def at_longest(self) -> list[Summary]:
        """Those cells of the greatest length whose speed is known, the fastest first."""
        cells = [c for c in self.cells if c.length == max(self.records.lengths) and c.tokens_per_s]
        return sorted(cells, key=lambda cell: -(cell.tokens_per_s or 0.0))

    def _say_speed(self) -> list[str]:
        ranked = self.at_longest()
        if not ranked:
            return []
        best, worst = ranked[0], ranked[-1]
        fastest, slowest = best.tokens_per_s or 0.0, worst.tokens_per_s or 0.0
        at = f"At {best.length} tokens"
        if best is worst:
            return [f"{at} the only prompt runs at {fastest:.1f} {TOKENS_PER_SECOND}."]
        said = (
            f"{at} prompt {best.prompt_index + 1} is the fastest with {fastest:.1f} {TOKENS_PER_SECOND}, "
            f"{fastest / slowest:.2f} times prompt {worst.prompt_index + 1} with {slowest:.1f}"
        )
        if best.runs < 2 or worst.runs < 2 or best.interval is None or worst.interval is None:
            return [f"{said}; one run has no interval, so this may be noise."]
        verb = "overlap" if best.interval.overlaps(worst.interval) else "do not overlap"
        return [f"{said}; the intervals of their times {verb}."]

    def _say_linear(self) -> str:
        if self.line is None:
            return "Linear fit: not possible; it needs at least two lengths and more runs."
        per_token = "new token" if self.regressor == "new tokens" else "token of length"
        return (
            f"Linear fit over {self.line.points} points: {show_interval('s', self.line.slope)} per "
            f"{per_token}, and {show_interval('s', self.line.intercept)} beside it; "
            f"R² {self.line.r_squared:.5f}."
        )

    def _say_within(self) -> str:
        within = self.within_run
        if within is None:
            needs = f"it needs two runs of {LEAST_TOKENS} tokens with a time for each token"
            return f"Within a run: not known; {needs}."
        percent = 1e4 * within.slope.mid / within.step_s if within.step_s else 0.0
        first, last = within.positions
        return (
            f"Within a run: a token takes {show('s', within.step_s)}, and per 100 positions "
            f"{Unit('µs', 1e8).interval(within.slope)} more ({percent:+.2g} %; "
            f"{within.count} {within.units}, positions {first} to {last}): {within.verdict}."
        )


def analyse_classic(records: Records) -> ClassicAnalysis:
    """Analyse; what the data do not allow to say is None."""
    measured = records.measured
    known = bool(measured) and all(run.completion_tokens is not None for run in measured)
    cells: dict[tuple[int, int], list[Run]] = defaultdict(list)
    for run in measured:
        cells[run.prompt_index, run.length].append(run)
    groups = list(cells.values())  # runs of one cell are no independent witnesses
    if len({run.prompt_index for run in measured}) == 1:  # its cells alone leave no error to judge by
        groups = [[run] for run in measured]
    tokens = [np.mean([(r.completion_tokens or 0) if known else r.length for r in group]) for group in groups]
    failures = Counter(run.error for run in records.runs if run.error is not None)
    weights = [run.elapsed_s or 0.0 for run in measured]
    warm_ups = [run for run in records.runs if run.warm_up and run.elapsed_s]
    ratios = [
        (warm.elapsed_s or 0.0) / float(np.median([run.elapsed_s or 0.0 for run in cell]))
        for warm in warm_ups
        if (cell := cells.get((warm.prompt_index, warm.length)))
    ]
    return ClassicAnalysis(
        records=records,
        cells=tuple(summarize(records.prompts, records.lengths, records.runs)),
        regressor="new tokens" if known else "total length",
        line=linear_fit(tokens, [np.mean([run.elapsed_s or 0.0 for run in group]) for group in groups]),
        within_run=_within_run(measured),
        warm_up_ratio=float(np.median(ratios)) if ratios else None,
        failures=tuple(failures.most_common()),
        machine=MachineState(
            others_cores=weigh_other_work([run.others_cores for run in measured], weights),
            steal_share=weigh_other_work([run.steal_share for run in measured], weights),
            drift=drift({run.run: run.elapsed_s or 0.0 for run in cell} for cell in cells.values()),
        ),
    )


def _within_run(measured: Sequence[Run]) -> WithinRun | None:
    """Each run's line through its tokens' times, robust against pauses (Theil-Sen), then a mean."""
    slopes: dict[int, list[float]] = defaultdict(list)
    steps, ends = [], []
    for run in measured:
        if len(run.token_times_s) < LEAST_TOKENS:
            continue
        step_s = np.diff(np.array(run.token_times_s))  # without the first token, whose time is the prompt's
        positions = (run.prompt_tokens or 0) + 1 + np.arange(len(step_s))
        slopes[run.prompt_index].append(float(stats.theilslopes(step_s, positions).slope))
        steps.append(float(np.median(step_s)))
        ends += [int(positions[0]), int(positions[-1])]
    units: Literal["prompts", "runs"] = "prompts" if len(slopes) >= 3 else "runs"
    values = [float(np.mean(each)) for each in slopes.values()]
    if units == "runs":
        values = [value for each in slopes.values() for value in each]
    if len(values) < 2:
        return None
    span = (min(ends), max(ends))
    return WithinRun(mean_interval(values), float(np.median(steps)), units, len(values), span)
