"""The classic benchmark analysed: how fast is it, and is time linear in length?"""

import dataclasses
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final, Literal

import numpy as np
from scipy import stats

from gpt2core.bench.components import breakdown_tables
from gpt2core.bench.records import Records, Run
from gpt2core.bench.report.machine import MachineState, describe_machine, weigh_other_work
from gpt2core.bench.statistics import Interval, LinearFit, drift, linear_fit, mean_interval
from gpt2core.bench.sweep.summary import Summary, summarise, summary_table
from gpt2core.bench.tables import (
    TOKENS_PER_SECOND,
    Table,
    Unit,
    fitting_unit,
    short,
    show_interval,
    text_of,
)

LEAST_TOKENS: Final = 20
"""Of a run whose steps are looked at one by one."""


@dataclass(frozen=True, slots=True)
class WithinRun:
    """How the time of a token changes with its position inside one generation.

    Attributes:
        slope: seconds per token and position, the mean over `units`, with its 95 % interval.
        step_s: median time of a token.
        units: what is independent: "prompts", or "runs" where there are fewer than three prompts.
        count: how many units.
        positions: the first and the last position.
    """

    slope: Interval
    step_s: float
    units: Literal["prompts", "runs"]
    count: int
    positions: tuple[int, int]


@dataclass(frozen=True, slots=True)
class ClassicAnalysis:
    """What the classic benchmark says; `x` of its fits is `regressor`.

    Attributes:
        warm_up_ratio: of a warm-up's time to the median of its cell's measured runs; the median over the
            cells, or None without any.
    """

    records: Records
    cells: tuple[Summary, ...]
    regressor: Literal["new tokens", "total length"]
    line: LinearFit | None
    within_run: WithinRun | None
    warm_up_ratio: float | None
    failures: tuple[tuple[str, int], ...]
    machine: MachineState

    def to_dict(self) -> dict[str, Any]:
        """For strict JSON."""
        parts = asdict(dataclasses.replace(self, records=None))  # type: ignore[arg-type]
        del parts["records"]
        return {"kind": "classic", "folder": str(self.records.folder), **parts}

    @property
    def findings(self) -> list[str]:
        """One sentence per question."""
        return [
            *_say_speed(self), _say_linear(self), _say_within(self),
            *_say_rest(self), *describe_machine(self.machine, self.records),
        ]  # fmt: skip

    @property
    def tables(self) -> list[Table]:
        """The means, and where the time goes if that was measured."""
        return [summary_table(self.cells), *breakdown_tables(self.records.components)]

    def text(self) -> str:
        """For a terminal."""
        return text_of(self.tables, self.findings)

    def at_longest(self) -> list[Summary]:
        """Those cells of the greatest length whose speed is known, the fastest first."""
        cells = [c for c in self.cells if c.length == max(self.records.lengths) and c.tokens_per_s]
        return sorted(cells, key=lambda cell: -(cell.tokens_per_s or 0.0))


def analyse_classic(records: Records) -> ClassicAnalysis:
    """Analyse; what the data do not allow to say is None."""
    measured = records.measured
    known = bool(measured) and all(run.completion_tokens is not None for run in measured)
    x, y = _cell_means(records, known)
    if len({run.prompt_index for run in measured}) == 1:  # its cells alone leave no error to judge by
        x = [_tokens(run, known) for run in measured]
        y = [run.elapsed_s or 0.0 for run in measured]
    failures: dict[str, int] = defaultdict(int)
    for run in records.runs:
        if run.error is not None:
            failures[run.error] += 1
    return ClassicAnalysis(
        records=records,
        cells=tuple(summarise(records.prompts, records.lengths, records.runs)),
        regressor="new tokens" if known else "total length",
        line=linear_fit(x, y),
        within_run=_within_run(measured),
        warm_up_ratio=_warm_up_ratio(records),
        failures=tuple(sorted(failures.items(), key=lambda item: -item[1])),
        machine=_machine(measured),
    )


def _tokens(run: Run, known: bool) -> float:
    return float(run.completion_tokens or 0) if known else float(run.length)


def _cell_means(records: Records, known: bool) -> tuple[list[float], list[float]]:
    """Tokens and time of each cell, averaged over its runs: runs of one cell are no independent witnesses."""
    x, y = [], []
    for prompt in records.prompts:
        for length in records.lengths:
            runs = [run for run in records.measured if (run.prompt_index, run.length) == (prompt, length)]
            if runs:
                x.append(float(np.mean([_tokens(run, known) for run in runs])))
                y.append(float(np.mean([run.elapsed_s for run in runs if run.elapsed_s is not None])))
    return x, y


def _within_run(measured: Sequence[Run]) -> WithinRun | None:
    """Each run's line through its tokens' times, robust against pauses (Theil-Sen), then a mean."""
    slopes: dict[int, list[float]] = defaultdict(list)
    steps, first, last = [], 2**31, 0
    for run in measured:
        if len(run.token_times_s) < LEAST_TOKENS:
            continue
        step_s = np.diff(np.array(run.token_times_s))  # without the first token, whose time is the prompt's
        positions = (run.prompt_tokens or 0) + 1 + np.arange(len(step_s))
        slopes[run.prompt_index].append(float(stats.theilslopes(step_s, positions).slope))
        steps.append(float(np.median(step_s)))
        first, last = min(first, int(positions[0])), max(last, int(positions[-1]))
    by_prompt = [float(np.mean(values)) for values in slopes.values()]
    by_run = [value for values in slopes.values() for value in values]
    enough = len(by_prompt) >= 3
    values = by_prompt if enough else by_run
    if len(values) < 2:
        return None
    return WithinRun(
        slope=mean_interval(values),
        step_s=float(np.median(steps)),
        units="prompts" if enough else "runs",
        count=len(values),
        positions=(first, last),
    )


def _warm_up_ratio(records: Records) -> float | None:
    ratios = []
    for warm in (run for run in records.runs if run.warm_up):
        cell = [
            run.elapsed_s
            for run in records.measured
            if (run.prompt_index, run.length) == (warm.prompt_index, warm.length) and run.elapsed_s
        ]
        if warm.elapsed_s and cell:
            ratios.append(warm.elapsed_s / float(np.median(cell)))
    return float(np.median(ratios)) if ratios else None


def _machine(measured: Sequence[Run]) -> MachineState:
    cells: dict[tuple[int, int], dict[int, float]] = defaultdict(dict)
    for run in measured:
        cells[run.prompt_index, run.length][run.run] = run.elapsed_s or 0.0
    weights = [run.elapsed_s or 0.0 for run in measured]
    return MachineState(
        others_cores=weigh_other_work([run.others_cores for run in measured], weights),
        steal_share=weigh_other_work([run.steal_share for run in measured], weights),
        drift=drift(cells.values()),
    )


def _say_speed(a: ClassicAnalysis) -> list[str]:
    ranked = a.at_longest()
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
    ends = [cell.interval for cell in (best, worst)]
    if best.runs < 2 or worst.runs < 2 or ends[0] is None or ends[1] is None:
        return [f"{said}; one run has no interval, so this may be noise."]
    verb = "overlap" if ends[0].overlaps(ends[1]) else "do not overlap"
    return [f"{said}; the intervals of their times {verb}."]


def _say_linear(a: ClassicAnalysis) -> str:
    if a.line is None:
        return "Linear fit: not possible; it needs at least two lengths and more runs."
    per_token = "new token" if a.regressor == "new tokens" else "token of length"
    return (
        f"Linear fit over {a.line.points} points: {show_interval('s', a.line.slope)} per {per_token}, and "
        f"{show_interval('s', a.line.intercept)} beside it; R² {a.line.r_squared:.5f}."
    )


def _say_within(a: ClassicAnalysis) -> str:
    within = a.within_run
    if within is None:
        return (
            f"Within a run: not known; it needs two runs of {LEAST_TOKENS} tokens with a time for each token."
        )
    verdict = "no growth is visible"
    if not within.slope.covers(0):
        verdict = "later tokens take longer" if within.slope.mid > 0 else "later tokens are faster"
    percent = 1e4 * within.slope.mid / within.step_s if within.step_s else 0.0
    return (
        f"Within a run: a token takes {fitting_unit('s', [within.step_s]).text(within.step_s)}, and per 100 "
        f"positions {Unit('µs', 1e8).interval(within.slope)} more ({percent:+.2g} %; {within.count} "
        f"{within.units}, positions {within.positions[0]} to {within.positions[1]}): {verdict}."
    )


def _say_rest(a: ClassicAnalysis) -> list[str]:
    lines = []
    warm = sum(run.warm_up for run in a.records.runs)
    if warm:
        ratio = "" if a.warm_up_ratio is None else f"; they took {a.warm_up_ratio:.2f} times the usual time"
        lines.append(f"Warm-up: {warm} runs, not counted above{ratio}.")
    early = sum(run.finish_reason == "stop" for run in a.records.measured)
    if early:
        lines.append(f"{early} runs ended before their length, at an end-of-text token or stop string.")
    return lines + [f"Failed: {count} x {short(error, 200)}" for error, count in a.failures]
