"""From the lines of a run to benchmark_results.npy, its axes, and the summary of each prompt and length."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from gpt2core.bench.records import Run
from gpt2core.bench.statistics import Interval, mean_interval
from gpt2core.bench.store import write_array, write_json
from gpt2core.bench.tables import TOKENS_PER_SECOND, Table, short

ARRAY: Final = "benchmark_results.npy"
AXES: Final = "benchmark_results.json"


@dataclass(frozen=True, slots=True)
class Summary:
    """All runs of one prompt and length; the fields from `mean_s` on are None where no run succeeded."""

    prompt_index: int
    prompt: str
    length: int
    runs: int
    failed: int
    ended_early: int  # runs that an end-of-text token ended before the length was reached
    mean_s: float | None
    low_s: float | None  # ends of Student's 95 % interval of the mean; None with fewer than two runs
    high_s: float | None
    tokens_per_s: float | None  # new tokens over time, all runs together; prompt and first token included
    ttft_s: float | None  # mean time to the first token, where it was seen

    @property
    def interval(self) -> Interval | None:
        """The mean between the ends of its interval; without width where there is one run."""
        if self.mean_s is None:
            return None
        if self.low_s is None or self.high_s is None:
            return Interval(self.mean_s, self.mean_s, self.mean_s)
        return Interval(self.low_s, self.mean_s, self.high_s)


def summarize(prompts: Mapping[int, str], lengths: Sequence[int], runs: Sequence[Run]) -> list[Summary]:
    """One summary for each prompt and length, prompt after prompt; the warm-up is not counted."""
    cells: dict[tuple[int, int], list[Run]] = {(i, length): [] for i in prompts for length in lengths}
    for run in runs:
        if not run.warm_up:
            cells[run.prompt_index, run.length].append(run)
    return [_summarize_cell(i, prompts[i], length, mine) for (i, length), mine in cells.items()]


def _summarize_cell(index: int, prompt: str, length: int, runs: Sequence[Run]) -> Summary:
    good = [run for run in runs if run.ok]
    counted = [run for run in good if run.completion_tokens is not None]
    tokens, counted_s = (
        sum(getattr(r, name) for r in counted) for name in ("completion_tokens", "elapsed_s")
    )
    ttfts_s = [run.ttft_s for run in good if run.ttft_s is not None]
    mean = mean_interval([run.elapsed_s or 0.0 for run in good], least=0.0) if good else None
    return Summary(
        prompt_index=index,
        prompt=prompt,
        length=length,
        runs=len(good),
        failed=len(runs) - len(good),
        ended_early=sum(run.finish_reason == "stop" for run in good),
        mean_s=mean.mid if mean else None,
        low_s=mean.low if mean and len(good) > 1 else None,
        high_s=mean.high if mean and len(good) > 1 else None,
        tokens_per_s=tokens / counted_s if counted_s else None,
        ttft_s=float(np.mean(ttfts_s)) if ttfts_s else None,
    )


def summary_table(summaries: Sequence[Summary]) -> Table:
    """What terminal and report show of every prompt and length."""

    def seconds(value: float | None) -> str:
        return "-" if value is None else f"{value:.3f} s"

    rows = []
    for s in summaries:
        ends = "-" if s.low_s is None or s.high_s is None else f"{s.low_s:.3f} to {s.high_s:.3f} s"
        rate = "-" if s.tokens_per_s is None else f"{s.tokens_per_s:.1f}"
        prompt = f"{s.prompt_index + 1}  {short(s.prompt, 32)}"
        rows.append((prompt, str(s.length), seconds(s.mean_s), ends, rate, seconds(s.ttft_s), str(s.failed)))
    runs = max((summary.runs for summary in summaries), default=0)
    return Table(
        title=f"Mean generation time of up to {runs} runs with its 95 % interval (Student's t)",
        columns=("prompt", "length", "mean", "95 % interval", TOKENS_PER_SECOND, "first token", "failed"),
        rows=tuple(rows),
        note=f"length: tokens, prompt and new; {TOKENS_PER_SECOND}: new tokens over the whole time",
    )


def write_results(folder: Path, settings: Mapping[str, Any], runs: Sequence[Run]) -> np.ndarray[Any, Any]:
    """Write the times as an array (prompts, lengths, runs), seconds, NaN where a run failed, and its axes."""
    prompts, lengths, count = settings["prompts"], settings["lengths"], settings["runs"]
    times_s = np.full((len(prompts), len(lengths), count), np.nan)  # (prompts, lengths, runs)
    for run in runs:
        if run.elapsed_s is not None and not run.warm_up:
            times_s[run.prompt_index, lengths.index(run.length), run.run] = run.elapsed_s
    write_array(folder / ARRAY, times_s)
    axes = {
        "array": ARRAY,
        "quantity": "elapsed_s",
        "unit": "s",
        "dtype": str(times_s.dtype),
        "shape": list(times_s.shape),
        "nan": "the run failed; see runs.jsonl",
        "axes": [
            {"name": "prompt", "values": prompts},
            {"name": "length", "unit": "tokens, prompt and new", "values": lengths},
            {"name": "run", "values": list(range(count))},
        ],
    }
    write_json(folder / AXES, axes)
    return times_s
