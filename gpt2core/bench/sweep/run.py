"""The classic benchmark: prompts x total lengths x runs, on one model or server; resumable at any moment."""

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import partial
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from gpt2core.bench.errors import ALWAYS, FOR_REPORTS, FOR_SERVERS, BenchmarkError, check_installed
from gpt2core.bench.progress import Progress
from gpt2core.bench.records import parse_run
from gpt2core.bench.store import RUNS, OtherWorkWatch, ResultsFolder, check_folder, fingerprint
from gpt2core.bench.sweep.model_target import ModelTarget, TimedGeneration, measure_with_retries
from gpt2core.bench.sweep.summary import Summary, summarize, write_results
from gpt2core.bench.sweep.workload import ClassicSettings, Trial
from gpt2core.errors import RequestError

if TYPE_CHECKING:
    from gpt2core.bench.sweep.server_target import ServerTarget

MAX_ERROR_CHARACTERS: Final = 500


@dataclass(frozen=True, slots=True)
class ClassicResult:
    """A benchmark that has ended."""

    output: Path  # the folder with its files
    settings: Mapping[str, Any]  # what settings.json says
    environment: Mapping[str, Any]
    records: Sequence[Mapping[str, Any]]  # the lines of runs.jsonl
    times_s: np.ndarray[Any, Any]  # (prompts, lengths, runs) float64, NaN where a run failed
    summaries: Sequence[Summary]  # one for each prompt and length
    resumed: int  # how many measured cells were there before
    report: bool  # whether report.html and the plots were written

    @property
    def failures(self) -> list[Mapping[str, Any]]:
        """The lines of measured cells that failed."""
        return [record for record in self.records if record["status"] == "failed" and record["run"] >= 0]

    @property
    def failed(self) -> bool:
        """Whether no measured cell succeeded."""
        return len(self.failures) == self.times_s.size

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it; the runs themselves are in runs.jsonl."""
        return {
            "output": str(self.output),
            "settings": dict(self.settings),
            "environment": dict(self.environment),
            "cells": self.times_s.size,
            "resumed": self.resumed,
            "failed": len(self.failures),
            "errors": sorted({record["error"] for record in self.failures}),
            "summary": [asdict(summary) for summary in self.summaries],
            "files": sorted(path.name for path in self.output.iterdir() if path.is_file()),
        }


def run_classic(
    settings: ClassicSettings | None = None,
    *,
    output: str | PathLike[str],
    resume: bool = False,
    force: bool = False,
    report: bool = True,
    on_progress: Callable[[Progress], None] | None = None,
) -> ClassicResult:
    """Measure every cell, and write what was measured, its summary and the report into a folder.

    A cell that fails is recorded and does not end the run. Each line of runs.jsonl is on the disk before the
    next cell begins, so that a run that was killed can be resumed: finished cells stay, failed ones and those
    that are missing are run. A resumed process warms up again what it has to measure, without recording that
    twice.

    Args:
        settings: what to measure; by default the demo model with the default prompts and lengths.
        output: the folder; is made.
        resume: go on with what is there; it must be of this machine, these versions and these settings, or of
            fewer runs.
        force: replace an earlier benchmark that is there.
        report: also draw the plots and write report.html.
        on_progress: is called before each cell and at the end.

    Raises:
        BenchmarkError: the folder is refused, the server does not answer, a file cannot be written, or a
            package of the extra `bench` is missing.
        RequestError, CheckpointError, BackendUnavailableError: the model cannot be loaded, or does not fit
            the prompts and lengths.
    """
    settings = settings or ClassicSettings()
    if resume and force:
        raise RequestError("resume and force contradict each other; give one of them")
    check_installed(*ALWAYS, *(FOR_REPORTS if report else ()), *(FOR_SERVERS if settings.url else ()))
    path, environment = Path(output), fingerprint()
    check_folder(path, environment, resume=resume, force=force)
    with closing(open_target(settings)) as target:
        document = settings.document() | target.describe()
        with ResultsFolder(path, document, environment, resume=resume, force=force) as folder:
            resumed = _keep_finished(folder, settings)
            _run(settings, target, folder, on_progress or (lambda progress: None))
            records = folder.records
            runs = [parse_run(record) for record in records]
            times_s = write_results(path, document, runs)
    drawn = report and not np.isnan(times_s).all()  # there is nothing to draw of a run without a success
    if drawn:
        from gpt2core.bench.report.page import write_report  # loads matplotlib, so only now

        write_report(path)
    summaries = summarize(dict(enumerate(settings.prompts)), settings.lengths, runs)
    return ClassicResult(path, document, environment, records, times_s, summaries, resumed, drawn)


def open_target(settings: ClassicSettings) -> "ModelTarget | ServerTarget":
    """The model, loaded, or the server, asked once; errors as of `run_classic`."""
    if settings.url is None:
        return ModelTarget(settings)
    from gpt2core.bench.sweep.server_target import ServerTarget

    return ServerTarget(settings)


def _keep_finished(folder: ResultsFolder, settings: ClassicSettings) -> int:
    """Drop the lines of failed cells, which are tried again; returns how many measured cells stay."""
    possible, seen = set(settings.trials()), set()
    for line, record in enumerate(folder.records, 1):
        where = f"{folder.path / RUNS}, line {line}"
        try:
            trial, status = Trial(*record["cell"]), record["status"]
            known = trial in possible and record["environment"] == folder.environment["id"]
            known = known and record["run"] == trial.run and status in ("ok", "failed")
            known = known and (status == "failed" or record["elapsed_s"] > 0)
        except (KeyError, TypeError) as error:
            raise BenchmarkError(f"{where} is no line of this benchmark; give another --output") from error
        if not known or trial in seen:
            what = "repeats a cell" if known else "is of another benchmark"
            raise BenchmarkError(f"{where} {what} ({list(trial)}); give another --output, or --force")
        seen.add(trial)
    finished = [record for record in folder.records if record["status"] == "ok"]
    if len(finished) < len(folder.records):
        folder.keep(finished)
    return sum(record["run"] >= 0 for record in finished)


def _run(
    settings: ClassicSettings,
    target: "ModelTarget | ServerTarget",
    folder: ResultsFolder,
    on_progress: Callable[[Progress], None],
) -> None:
    recorded, trials = {Trial(*record["cell"]) for record in folder.records}, settings.trials()
    missing = {trial[:2] for trial in trials if not trial.is_warm_up and trial not in recorded}
    waiting = [t for t in trials if t not in recorded or (t.is_warm_up and t[:2] in missing)]
    all_tokens, tokens, began_s = sum(trial.length for trial in waiting), 0, time.monotonic()
    described = target.describe()
    for done, trial in enumerate(waiting):
        name = "warm-up" if trial.is_warm_up else f"run {trial.run + 1}"
        what = f"{name}, {done} of {len(waiting)}"
        on_progress(Progress(what, tokens, all_tokens, time.monotonic() - began_s))
        started_at, watch = datetime.now(UTC).isoformat(timespec="milliseconds"), OtherWorkWatch()
        result, tries = measure_with_retries(settings, partial(target.measure, trial))
        others_cores, steal_share = watch.read()
        tokens += trial.length
        if trial in recorded:
            continue
        folder.append(
            {
                "kind": "classic",
                "cell": list(trial),
                "prompt": settings.prompts[trial.prompt_index],
                "length": trial.length,
                "run": trial.run,
                **_outcome(result),
                "attempts": tries,
                "seed": settings.seed_of(trial.run),
                **{name: described[name] for name in ("backend", "precision", "model", "url")},
                "environment": folder.environment["id"],
                "started_at": started_at,
                # a server on this machine is no other work, but cannot be told from it
                "others_cores": None if settings.url else others_cores,
                "steal_share": steal_share,
            }
        )
    on_progress(Progress("", tokens, all_tokens, time.monotonic() - began_s))


def _outcome(result: TimedGeneration | Exception) -> dict[str, Any]:
    if isinstance(result, TimedGeneration):
        return {"status": "ok", "error": None, **asdict(result)}
    message = " ".join(f"{type(result).__name__}: {result}".split())[:MAX_ERROR_CHARACTERS]
    return {"status": "failed", "error": message, **dict.fromkeys(TimedGeneration.__slots__)}
