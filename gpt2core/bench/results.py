"""From the lines of a run to benchmark_results.npy, its axes, and the summary of each prompt and length."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from gpt2core.bench.files import write_array, write_json
from gpt2core.bench.workload import Cell

ARRAY: Final = "benchmark_results.npy"
AXES: Final = "benchmark_results.json"
CONFIDENCE: Final = 0.95


@dataclass(frozen=True, slots=True)
class Summary:
    """All runs of one prompt and length; the fields from `mean_s` on are None where no run succeeded.

    Attributes:
        low_s, high_s: the 95 % interval of the mean, by bootstrap; None with fewer than two runs.
        tokens_per_s: new tokens divided by time, over all runs together; prompt and first token included.
        ttft_s: mean time to the first token, where it was seen.
        ended_early: runs that an end-of-text token ended before the length was reached.
    """

    prompt_index: int
    prompt: str
    length: int
    runs: int
    failed: int
    ended_early: int
    mean_s: float | None
    low_s: float | None
    high_s: float | None
    tokens_per_s: float | None
    ttft_s: float | None

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return asdict(self)


def summarise(settings: Mapping[str, Any], records: Sequence[Mapping[str, Any]]) -> list[Summary]:
    """One summary for each prompt and length, prompt after prompt; the warm-up is not counted."""
    found = []
    for i, prompt in enumerate(settings["prompts"]):
        for length in settings["lengths"]:
            mine = [r for r in records if r["cell"][:2] == [i, length] and r["run"] >= 0]
            found.append(_summary(i, prompt, length, mine))
    return found


def mean_interval(values: Sequence[float]) -> tuple[float, float] | None:
    """The 95 % confidence interval of the mean, as the report has it; None for fewer than two values."""
    if len(values) < 2:
        return None
    from gpt2core.bench.statistics import bootstrap_interval

    interval = bootstrap_interval(values, statistic="mean", level=CONFIDENCE)
    return interval.low, interval.high


def write_results(
    folder: Path, settings: Mapping[str, Any], records: Sequence[Mapping[str, Any]]
) -> np.ndarray[Any, Any]:
    """Write the times as an array (prompts, lengths, runs), seconds, NaN where a run failed, and its axes."""
    prompts, lengths, runs = settings["prompts"], settings["lengths"], settings["runs"]
    times_s = np.full((len(prompts), len(lengths), runs), np.nan)  # (prompts, lengths, runs)
    for record in records:
        cell = Cell(*record["cell"])
        if record["status"] == "ok" and not cell.is_warm_up:
            times_s[cell.prompt_index, lengths.index(cell.length), cell.run] = record["elapsed_s"]
    write_array(folder / ARRAY, times_s)
    write_json(
        folder / AXES,
        {
            "array": ARRAY,
            "quantity": "elapsed_s",
            "unit": "s",
            "dtype": str(times_s.dtype),
            "shape": list(times_s.shape),
            "nan": "the run failed; see runs.jsonl",
            "axes": [
                {"name": "prompt", "values": prompts},
                {"name": "length", "unit": "tokens, prompt and new", "values": lengths},
                {"name": "run", "values": list(range(runs))},
            ],
        },
    )
    return times_s


def _summary(prompt_index: int, prompt: str, length: int, records: Sequence[Mapping[str, Any]]) -> Summary:
    good = [record for record in records if record["status"] == "ok"]
    times_s = [record["elapsed_s"] for record in good]
    interval = mean_interval(times_s)
    counted = [record for record in good if record["completion_tokens"] is not None]
    counted_s = sum(record["elapsed_s"] for record in counted)
    ttfts_s = [record["ttft_s"] for record in good if record["ttft_s"] is not None]
    return Summary(
        prompt_index=prompt_index,
        prompt=prompt,
        length=length,
        runs=len(good),
        failed=len(records) - len(good),
        ended_early=sum(record["finish_reason"] == "stop" for record in good),
        mean_s=float(np.mean(times_s)) if good else None,
        low_s=interval[0] if interval else None,
        high_s=interval[1] if interval else None,
        tokens_per_s=sum(r["completion_tokens"] for r in counted) / counted_s if counted_s else None,
        ttft_s=float(np.mean(ttfts_s)) if ttfts_s else None,
    )
