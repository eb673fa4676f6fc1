"""The comparison: every engine in a process of its own, round by round, so that drift hits all alike.

Within a round the engines run one after the other, and each round begins with another one. Each measured
value is one line of `runs.jsonl`; a failure or a skip is a line with its reason and no value. The lines that
a comparison will have are known before it starts, so that resuming it measures what is missing, and nothing
twice.
"""

import dataclasses
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from gpt2core import ModelConfig, open_checkpoint
from gpt2core._files import cache_folder
from gpt2core.backends import PRECISIONS as OWN_PRECISIONS
from gpt2core.backends import available, resolve_precision
from gpt2core.bench.compare import bandwidth, correctness, worker
from gpt2core.bench.compare.plan import (
    BANDWIDTH,
    BUILD,
    CORRECT,
    MACHINE,
    OTHERS,
    STEAL,
    WEIGHT,
    Comparison,
    LineKey,
    key_of,
    plan_lines,
    weight_nbytes,
)
from gpt2core.bench.compare.worker import EngineSetup, Workload
from gpt2core.bench.progress import Progress
from gpt2core.bench.records import Cell
from gpt2core.bench.store import OtherWorkWatch, ResultsFolder, fingerprint
from gpt2core.bench.sweep.model_target import model_id
from gpt2core.testing import VARIANTS

Line = dict[str, Any]


def compare(
    comparison: Comparison,
    output: Path,
    *,
    resume: bool = False,
    force: bool = False,
    local_files_only: bool = False,
    on_progress: Callable[[Progress], None] | None = None,
) -> list[Line]:
    """Run a comparison, or what is missing of it, and return all of its lines.

    Args:
        comparison: what to do.
        output: the folder, which gets `settings.json`, `environment.json` and `runs.jsonl`.
        resume: go on with the comparison that `output` holds, perhaps with more rounds.
        force: replace it.
        local_files_only: never ask the hub for the model.
        on_progress: is called before each step and at the end.

    Raises:
        CheckpointError: the model cannot be read.
        RequestError: a precision is asked for that the checkpoint does not have.
        BenchmarkError: `output` holds something else, or cannot be written.
    """
    checkpoint = open_checkpoint(
        comparison.model, revision=comparison.revision, local_files_only=local_files_only
    )
    stored = resolve_precision(checkpoint.stored, "auto")
    precisions = tuple(dict.fromkeys(stored if p == "auto" else p for p in comparison.precisions))
    comparison = dataclasses.replace(comparison, precisions=precisions)
    config, folder = checkpoint.config, checkpoint.folder.absolute()
    del checkpoint
    identity = model_id(folder)
    settings = {"kind": "comparison", "model_id": identity, **asdict(comparison)}
    for name, value in settings.items():
        settings[name] = list(value) if isinstance(value, tuple) else value
    environment = fingerprint()
    with ResultsFolder(output, settings, environment, resume=resume, force=force) as results:
        run = _Run(comparison, config, folder, identity, environment["id"], results)
        steps, began_s = run.steps(), time.monotonic()
        for number, (what, step) in enumerate([*steps, ("", lambda: None)]):
            if on_progress is not None:
                on_progress(Progress(what, number, len(steps), time.monotonic() - began_s))
            step()
        return results.records


class _Run:
    def __init__(
        self,
        comparison: Comparison,
        config: ModelConfig,
        checkpoint: Path,
        identity: str,
        environment: str,
        results: ResultsFolder,
    ) -> None:
        self.comparison, self.config, self.checkpoint = comparison, config, checkpoint
        self.identity, self.environment, self.results = identity, environment, results
        self.done = {key_of(line) for line in results.records}
        self.missing = set(plan_lines(comparison, config.n_positions)) - self.done
        self.workload = Workload.for_model(config.vocab_size, config.n_positions, comparison.new_tokens)
        self.ready: dict[EngineSetup, tuple[str, str | None]] = {}
        self.watch = OtherWorkWatch()

    def steps(self) -> list[tuple[str, Callable[[], None]]]:
        """What is to be done, with its name, in order."""
        return list(self._steps())

    def _steps(self) -> Iterator[tuple[str, Callable[[], None]]]:
        engines, rounds = self.comparison.engines(), self.comparison.rounds
        for engine in engines:
            if self.lacks(engine, 0, [WEIGHT]):
                self.write(engine, 0, WEIGHT, _ok(weight_nbytes(self.config, engine.precision), "bytes"))
            if variants := self.unchecked(engine):
                yield f"checking {engine.name} on {len(variants)} variants", partial(self.check, engine)
            if self.lacks(engine, 0, [BUILD]):
                yield f"building {engine.name}", partial(self.build, engine)
        for number in range(rounds):
            name = f"round {number + 1} of {rounds}"
            if any(LineKey(MACHINE, "", number, cell) in self.missing for cell in (BANDWIDTH, OTHERS, STEAL)):
                yield f"{name}: the read bandwidth", partial(self.measure_bandwidth, number)
            start = number % len(engines)
            for engine in engines[start:] + engines[:start]:
                if self.lacks(engine, number, self.comparison.cells(self.config.n_positions)):
                    what = f"{name}: {engine.name} in {engine.precision}"
                    yield what, partial(self.measure, engine, number)
            if LineKey(MACHINE, "", number, OTHERS) in self.missing:
                yield f"{name}: other work", partial(self.write_other_work, number)

    def lacks(self, engine: EngineSetup, number: int, cells: Iterable[Cell]) -> list[Cell]:
        """Those of the cells whose lines are missing."""
        keys = {cell: LineKey(engine.name, engine.precision, number, cell) for cell in cells}
        return [cell for cell, key in keys.items() if key in self.missing]

    def unchecked(self, engine: EngineSetup) -> list[str]:
        """The variants on which its answers are yet to be checked."""
        keys = {v: LineKey(engine.name, engine.precision, 0, CORRECT, v) for v in self.comparison.variants}
        return [variant for variant, key in keys.items() if key in self.missing]

    def check(self, engine: EngineSetup) -> None:
        answers = correctness.check(
            engine,
            threads=self.comparison.threads,
            variants={name: VARIANTS[name] for name in self.unchecked(engine)},
            timeout_s=self.comparison.timeout_s,
        )
        for answer in answers:
            self.write(engine, 0, CORRECT, {**answer, "unit": "bool"})

    def build(self, engine: EngineSetup) -> None:
        reason = _reason_against(engine)
        found: Line = {"status": "skipped", "error": reason}
        if reason is None:
            found = worker.build(engine, timeout_s=self.comparison.timeout_s)
        self.write(engine, 0, BUILD, found)

    def measure(self, engine: EngineSetup, number: int) -> None:
        context = self.config.n_positions
        cells = self.lacks(engine, number, self.comparison.cells(context))
        for cell in cells:
            if (cell.length or 0) > context:
                reason = f"the model's context is {context}"
                self.write(engine, number, cell, {"status": "skipped", "error": reason})
        cells = [cell for cell in cells if (cell.length or 0) <= context]
        for cell, found in zip(cells, self.measured(engine, cells), strict=True):
            self.write(engine, number, cell, found)

    def measured(self, engine: EngineSetup, cells: Sequence[Cell]) -> Iterable[Line]:
        """A result for each cell."""
        reason = _reason_against(engine)
        if reason is not None or not cells:
            return [{"status": "skipped", "error": reason}] * len(cells)
        own = engine.family != "peer"
        parts = (self.identity, "gpt2core" if own else engine.name, engine.precision)
        work = cache_folder("bench").joinpath(*parts)
        timeout_s, threads = self.comparison.timeout_s, self.comparison.threads
        if not own or engine.precision != "float32":
            if engine not in self.ready:  # in a process of its own: converting may need more memory
                self.ready[engine] = worker.prepare(
                    engine, checkpoint=self.checkpoint, work=work, threads=threads, timeout_s=timeout_s
                )
            status, error = self.ready[engine]
            if status != "ok":
                return [{"status": status, "error": error}] * len(cells)
        return worker.measure(
            engine,
            checkpoint=self.checkpoint,
            work=work,
            cells=cells,
            workload=self.workload,
            threads=threads,
            timeout_s=timeout_s,
        )

    def measure_bandwidth(self, number: int) -> None:
        """How fast memory is read, at the beginning of a round; from here other work is watched, too."""
        self.watch = OtherWorkWatch()
        if LineKey(MACHINE, "", number, BANDWIDTH) not in self.missing:
            return
        try:
            found = bandwidth.read_bandwidth(self.comparison.threads)
            line = _ok(found.pop("value"), "bytes/s", settings=found)
        except Exception as error:  # the engines' times are worth having without it
            line = {"status": "failed", "error": f"{type(error).__name__}: {error}"}
        self.write(None, number, BANDWIDTH, line)

    def write_other_work(self, number: int) -> None:
        """What else the machine did during the round."""
        other, unknown = self.watch.read(), {"status": "skipped", "error": "the system does not tell"}
        for cell, value, unit in (
            (OTHERS, other.others_cores, "cores"),
            (STEAL, other.steal_share, "of the processors' time"),
        ):
            if LineKey(MACHINE, "", number, cell) in self.missing:
                self.write(None, number, cell, unknown if value is None else _ok(value, unit))

    def write(self, engine: EngineSetup | None, number: int, cell: Cell, found: Mapping[str, Any]) -> None:
        """Add a line, of an engine or (None) of the machine."""
        line = {
            "kind": "comparison",
            "engine": engine.name if engine else MACHINE,
            "family": engine.family if engine else MACHINE,
            "precision": engine.precision if engine else "",
            "round": number,
            **asdict(cell),
            "value": None,
            "unit": None,
            "tokens": None,
            "status": "ok",
            "error": None,
            "settings": {},
            **found,
            "environment": self.environment,
            "started_at": datetime.now(UTC).isoformat(timespec="milliseconds"),
        }
        key = key_of(line)
        assert key not in self.done, f"{key} was measured before"
        self.results.append(line)
        self.done.add(key)
        self.missing.discard(key)


def _ok(value: float, unit: str, **more: Any) -> Line:
    return {"status": "ok", "value": value, "unit": unit, **more}


def _reason_against(engine: EngineSetup) -> str | None:
    """Why one of gpt2core's own engines cannot run; None for those that may."""
    if engine.family == "peer":
        return None
    info = available(load_plugins=False)[engine.name]
    if not info.available:
        return info.reason
    if engine.precision not in OWN_PRECISIONS:
        return f"gpt2core offers {', '.join(OWN_PRECISIONS)}, not {engine.precision}"
    return None
