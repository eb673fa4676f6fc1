"""The classic benchmark analysed: is time linear in length, and does the prompt itself matter?"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

import numpy as np

from gpt2core.bench.report.breakdown import breakdown_tables
from gpt2core.bench.report.machine import MachineState, describe_machine, weigh_other_work
from gpt2core.bench.statistics import (
    GroupEffect,
    Interval,
    LinearFit,
    drift,
    group_effect,
    linear_fit,
    mean_interval,
)
from gpt2core.bench.store.records import Records, Run
from gpt2core.bench.sweep.summary import Summary, summarise, summary_table
from gpt2core.bench.tables import (
    TOKENS_PER_SECOND,
    Table,
    Unit,
    fitting_unit,
    plain,
    short,
    show_interval,
    text_of,
)

SIGNIFICANT: Final = 0.05
LEAST_TOKENS: Final = 20
"""Of a run whose steps are looked at one by one."""
_BINS: Final = 10  # of positions within one run


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
    """What the classic benchmark says; `x` of its fits is `regressor`, each prompt has its own intercept.

    Attributes:
        warm_up_ratio: of a warm-up's time to the median of its cell's measured runs; the median over the
            cells, or None without any.
    """

    records: Records
    cells: tuple[Summary, ...]
    regressor: Literal["new tokens", "total length"]
    line: LinearFit | None
    within_run: WithinRun | None
    prompt_effect: GroupEffect | None
    prompt_reason: str
    warm_up_ratio: float | None
    failures: tuple[tuple[str, int], ...]
    machine: MachineState

    def to_dict(self) -> dict[str, Any]:
        """For strict JSON."""
        parts = {name: getattr(self, name) for name in self.__dataclass_fields__ if name != "records"}
        return {"kind": "classic", "folder": str(self.records.folder), **plain(parts)}

    @property
    def findings(self) -> list[str]:
        """One sentence per question."""
        return [
            *_say_speed(self), _say_linear(self), _say_within(self), _say_prompts(self),
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
    x, y, blocks = _cell_means(records, known)
    if len(set(blocks)) == 1 and measured:  # one prompt: its cells alone leave no error to judge by
        x = [_tokens(run, known) for run in measured]
        y = [run.elapsed_s or 0.0 for run in measured]
        blocks = [run.prompt_index for run in measured]
    effect, reason = _prompt_effect(measured, known)
    failures: dict[str, int] = defaultdict(int)
    for run in records.runs:
        if run.error is not None:
            failures[run.error] += 1
    return ClassicAnalysis(
        records=records,
        cells=tuple(summarise(records.prompts, records.lengths, records.runs)),
        regressor="new tokens" if known else "total length",
        line=linear_fit(x, y, blocks) if len(set(x)) > 1 else None,
        within_run=_within_run(measured),
        prompt_effect=effect,
        prompt_reason=reason,
        warm_up_ratio=_warm_up_ratio(records),
        failures=tuple(sorted(failures.items(), key=lambda item: -item[1])),
        machine=_machine(measured),
    )


def _tokens(run: Run, known: bool) -> float:
    return float(run.completion_tokens or 0) if known else float(run.length)


def _cell_means(records: Records, known: bool) -> tuple[list[float], list[float], list[int]]:
    """Tokens and time of each cell, averaged over its runs: runs of one cell are no independent witnesses."""
    x, y, blocks = [], [], []
    for prompt in records.prompts:
        for length in records.lengths:
            runs = [run for run in records.measured if (run.prompt_index, run.length) == (prompt, length)]
            if runs:
                x.append(float(np.mean([_tokens(run, known) for run in runs])))
                y.append(float(np.mean([run.elapsed_s for run in runs if run.elapsed_s is not None])))
                blocks.append(prompt)
    return x, y, blocks


def _within_run(measured: Sequence[Run]) -> WithinRun | None:
    """Each run's time per token in bins of positions, a line through the bins' medians, then a mean."""
    slopes: dict[int, list[float]] = defaultdict(list)
    steps, first, last = [], 2**31, 0
    for run in measured:
        if len(run.token_times_s) < LEAST_TOKENS:
            continue
        step_s = np.diff(np.array(run.token_times_s))  # without the first token, whose time is the prompt's
        positions = (run.prompt_tokens or 0) + 1 + np.arange(len(step_s))
        bins = np.array_split(np.arange(len(step_s)), _BINS)
        centers = [float(positions[part].mean()) for part in bins]
        medians = [float(np.median(step_s[part])) for part in bins]  # a pause of the machine is one step
        slopes[run.prompt_index].append(float(np.polyfit(centers, medians, 1)[0]))
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


def _prompt_effect(measured: Sequence[Run], known: bool) -> tuple[GroupEffect | None, str]:
    """Runs of one length and round form a stratum, so that neither length nor drift passes for a prompt."""
    prompts = [run.prompt_index for run in measured]
    if len(set(prompts)) < 2:
        return None, "there is only one prompt"
    covariates = None
    if known and all(run.prompt_tokens is not None for run in measured):
        covariates = [[run.completion_tokens or 0, run.prompt_tokens or 0] for run in measured]
    times_s = [run.elapsed_s or 0.0 for run in measured]
    effect = group_effect(times_s, prompts, [(run.length, run.run) for run in measured], covariates)
    if effect is not None:
        return effect, "" if covariates else "token counts are unknown, so they are not controlled for"
    if covariates and len(set(prompts)) == 2:
        return None, "two prompts of different token counts cannot be told from their token counts"
    return None, "there are too few runs"


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
        f"{show_interval('s', a.line.intercept)} beside it; R² {a.line.r_squared:.5f}, residual spread "
        f"{fitting_unit('s', [a.line.residual_std]).text(a.line.residual_std)}."
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
    hundred = within.slope.scaled(100)
    percent = 100 * hundred.mid / within.step_s if within.step_s else 0.0
    return (
        f"Within a run: a token takes {fitting_unit('s', [within.step_s]).text(within.step_s)}, and per 100 "
        f"positions {Unit('µs', 1e6).interval(hundred)} more ({percent:+.2g} %; {within.count} "
        f"{within.units}, positions {within.positions[0]} to {within.positions[1]}): {verdict}."
    )


def _say_prompts(a: ClassicAnalysis) -> str:
    effect = a.prompt_effect
    if effect is None:
        return f"Effect of the prompt beyond its token count: cannot be told; {a.prompt_reason}."
    verdict = "no effect is visible"
    if effect.p_value < SIGNIFICANT:
        most = max(effect.deviations, key=lambda i: abs(effect.deviations[i]))
        by = effect.deviations[most]
        named = f"{most + 1 if isinstance(most, int) else most} ({fitting_unit('s', [by]).text(by)})"
        verdict = f"the prompt matters; furthest from the others is prompt {named}"
    reason = f" ({a.prompt_reason})" if a.prompt_reason else ""
    return (
        f"Effect of the prompt beyond its token count{reason}: p = {effect.p_value:.2g} (analysis of "
        f"covariance), {100 * effect.share:.1f} % of the variance that length and token counts leave: "
        f"{verdict}."
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
