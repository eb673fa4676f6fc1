"""The classic benchmark analysed: is time linear in length, and does the prompt itself matter?"""

from collections import defaultdict
from collections.abc import Sequence
from typing import Final

import numpy as np

from gpt2core.bench.findings_classic import LEAST_TOKENS, Cell, ClassicAnalysis, WarmUp, WithinRun
from gpt2core.bench.permutation import GroupEffect, group_effect
from gpt2core.bench.records import Records, Run
from gpt2core.bench.statistics import bootstrap_interval, linear_fit, mean_interval, quadratic_term

_BINS: Final = 10  # of positions within one run


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
        cells=tuple(_cell(records, p, length) for p in records.prompts for length in records.lengths),
        regressor="new tokens" if known else "total length",
        line=linear_fit(x, y, blocks) if len(set(x)) > 1 else None,
        curvature=quadratic_term(x, y, blocks) if x else None,
        longest_s=max(y, default=0.0),
        within_run=_within_run(measured),
        prompt_effect=effect,
        prompt_reason=reason,
        warm_up=_warm_up(records),
        failures=tuple(sorted(failures.items(), key=lambda item: -item[1])),
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


def _cell(records: Records, prompt: int, length: int) -> Cell:
    runs = [
        run for run in records.runs if (run.prompt_index, run.length) == (prompt, length) and not run.warm_up
    ]
    ok = [run for run in runs if run.ok]
    elapsed = [run.elapsed_s for run in ok if run.elapsed_s is not None]
    ttft = [run.ttft_s for run in ok if run.ttft_s is not None]
    speeds = [run.completion_tokens / run.elapsed_s for run in ok if run.completion_tokens and run.elapsed_s]
    return Cell(
        prompt_index=prompt,
        length=length,
        runs=len(ok),
        failed=len(runs) - len(ok),
        elapsed_s=bootstrap_interval(elapsed, statistic="mean") if elapsed else None,
        ttft_s=float(np.median(ttft)) if ttft else None,
        tokens_per_s=float(np.median(speeds)) if speeds else None,
    )


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
        centres = [float(positions[part].mean()) for part in bins]
        medians = [float(np.median(step_s[part])) for part in bins]  # a pause of the machine is one step
        slopes[run.prompt_index].append(float(np.polyfit(centres, medians, 1)[0]))
        steps.append(float(np.median(step_s)))
        first, last = min(first, int(positions[0])), max(last, int(positions[-1]))
    by_prompt = [float(np.mean(values)) for values in slopes.values()]
    by_run = [value for values in slopes.values() for value in values]
    units, values = ("prompts", by_prompt) if len(by_prompt) >= 3 else ("runs", by_run)
    slope = mean_interval(values)
    if slope is None:
        return None
    return WithinRun(
        slope=slope,
        step_s=float(np.median(steps)),
        units="prompts" if units == "prompts" else "runs",
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
    effect = group_effect(
        [run.elapsed_s or 0.0 for run in measured],
        prompts,
        [(run.length, run.run) for run in measured],
        covariates,
    )
    if effect is not None:
        return effect, "" if covariates else "token counts are unknown, so they are not controlled for"
    if covariates and len(set(prompts)) == 2:
        return None, "two prompts of different token counts cannot be told from their token counts"
    return None, "there are too few runs"


def _warm_up(records: Records) -> WarmUp:
    warm = [run for run in records.runs if run.warm_up]
    ratios = []
    for run in warm:
        cell = [
            one.elapsed_s
            for one in records.measured
            if (one.prompt_index, one.length) == (run.prompt_index, run.length) and one.elapsed_s
        ]
        if run.elapsed_s and cell:
            ratios.append(run.elapsed_s / float(np.median(cell)))
    return WarmUp(len(warm), float(np.median(ratios)) if ratios else None)
