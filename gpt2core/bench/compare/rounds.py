"""The comparison: every engine in a process of its own, round by round, so that drift hits all alike.

Within a round the engines run one after the other, and each round begins with another one. Each measured
value is one line of `runs.jsonl`; a failure or a skip is a line with its reason and no value. The lines that
a comparison will have are known before it starts, so that resuming it measures what is missing, and nothing
twice.
"""

import dataclasses
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from gpt2core import ModelConfig, open_checkpoint
from gpt2core._files import cache_folder
from gpt2core.backends import PRECISIONS as OWN_PRECISIONS
from gpt2core.backends import available, resolve_precision
from gpt2core.bench.compare import bandwidth, correctness, plan, worker
from gpt2core.bench.compare.plan import Comparison, Step
from gpt2core.bench.compare.worker import EngineSetup, Workload
from gpt2core.bench.progress import Progress
from gpt2core.bench.records import Cell, LineKey, key_of
from gpt2core.bench.store import OtherWorkWatch, ResultsFolder, fingerprint, model_id
from gpt2core.testing import VARIANTS

Line = dict[str, Any]
Keys = tuple[LineKey, ...]


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
    settings = {"kind": "comparison", "model_id": model_id(folder), **asdict(comparison)}
    settings = {name: list(v) if isinstance(v, tuple) else v for name, v in settings.items()}
    with ResultsFolder(output, settings, fingerprint(), resume=resume, force=force) as results:
        run = _Run(comparison, config, folder, settings["model_id"], results)
        steps, began_s = run.missing_steps(), time.monotonic()
        for number, step in enumerate(steps):
            if on_progress is not None:
                on_progress(Progress(step.what, number, len(steps), time.monotonic() - began_s))
            getattr(run, step.task)(step.engine, step.keys)
        if on_progress is not None:
            on_progress(Progress("", len(steps), len(steps), time.monotonic() - began_s))
        return results.records


class _Run:
    """What the steps of a comparison do: each writes a line for each of the keys."""

    def __init__(
        self,
        comparison: Comparison,
        config: ModelConfig,
        checkpoint: Path,
        identity: str,
        results: ResultsFolder,
    ) -> None:
        self.comparison, self.config, self.checkpoint = comparison, config, checkpoint
        self.identity, self.results = identity, results
        self.done = {key_of(line) for line in results.records}
        self.workload = Workload.for_model(config.vocab_size, config.n_positions, comparison.new_tokens)
        self.prepared: dict[EngineSetup, Line] = {}
        self.watch = OtherWorkWatch()

    def missing_steps(self) -> list[Step]:
        """What is left to do, with the keys of the lines that are missing."""
        steps = self.comparison.steps(self.config.n_positions)
        left = (s._replace(keys=tuple(key for key in s.keys if key not in self.done)) for s in steps)
        return [step for step in left if step.keys]

    def check(self, engine: EngineSetup, keys: Keys) -> None:
        variants = {key.variant or "": key for key in keys}
        shapes = {name: VARIANTS[name] for name in variants}
        threads, timeout_s = self.comparison.threads, self.comparison.timeout_s
        for answer in correctness.check(engine, threads=threads, variants=shapes, timeout_s=timeout_s):
            self.write(engine, variants[answer["variant"]], {**answer, "unit": "bool"})

    def build(self, engine: EngineSetup, keys: Keys) -> None:
        outcome = _refuse(engine) or worker.build(engine, timeout_s=self.comparison.timeout_s)
        self.write(engine, keys[0], outcome)

    def measure(self, engine: EngineSetup, keys: Keys) -> None:
        context, fitting = self.config.n_positions, []
        for key in keys:
            if key.cell == plan.WEIGHT:
                nbytes = plan.weight_nbytes(self.config, key.precision)
                self.write(engine, key, _ok(nbytes, "bytes"))
            elif (key.cell.length or 0) > context:
                self.write(engine, key, _skip(f"the model's context is {context}"))
            else:
                fitting.append(key)
        if fitting:
            cells = [key.cell for key in fitting]
            for key, found in zip(fitting, self.run_cells(engine, cells), strict=True):
                self.write(engine, key, found)

    def run_cells(self, engine: EngineSetup, cells: Sequence[Cell]) -> Iterable[Line]:
        """A result for each cell."""
        own = engine.family == "gpt2core"
        work = cache_folder("bench") / self.identity / ("gpt2core" if own else engine.name) / engine.precision
        how: Line = {"checkpoint": self.checkpoint, "work": work, "threads": self.comparison.threads}
        how["timeout_s"] = self.comparison.timeout_s
        refusal = _refuse(engine)
        if not refusal and (not own or engine.precision != "float32"):
            if engine not in self.prepared:
                self.prepared[engine] = worker.prepare(engine, **how)
            refusal = self.prepared[engine] if self.prepared[engine]["status"] != "ok" else None
        if refusal:
            return [refusal] * len(cells)
        return worker.measure(engine, cells=cells, workload=self.workload, **how)

    def measure_bandwidth(self, machine: None, keys: Keys) -> None:
        """How fast memory is read, at the beginning of a round; from here other work is watched, too."""
        self.watch, key = OtherWorkWatch(), keys[0]
        if key.cell != plan.BANDWIDTH:  # it was measured before this process began
            return
        try:
            found = bandwidth.read_bandwidth(self.comparison.threads)
            line = _ok(found.pop("value"), "bytes/s", settings=found)
        except Exception as error:  # the engines' times are worth having without it
            line = {"status": "failed", "error": f"{type(error).__name__}: {error}"}
        self.write(None, key, line)

    def note_other_work(self, machine: None, keys: Keys) -> None:
        """What else the machine did during the round."""
        other = self.watch.read()
        known = {
            plan.OTHERS: (other.others_cores, "cores"),
            plan.STEAL: (other.steal_share, "of the processors' time"),
        }
        for key in keys:
            value, unit = known[key.cell]
            self.write(None, key, _skip("the system does not tell") if value is None else _ok(value, unit))

    def write(self, engine: EngineSetup | None, key: LineKey, found: Mapping[str, Any]) -> None:
        """Add a line, of an engine or (None) of the machine."""
        assert key not in self.done, f"{key} was measured before"
        line = {
            "kind": "comparison",
            "engine": key.engine,
            "family": engine.family if engine else plan.MACHINE,
            "precision": key.precision,
            "round": key.round,
            **asdict(key.cell),
            **dict.fromkeys(("value", "unit", "tokens", "error")),
            "settings": {},
            **found,
            "environment": self.results.environment["id"],
            "started_at": datetime.now(UTC).isoformat(timespec="milliseconds"),
        }
        self.results.append(line)
        self.done.add(key)


def _ok(value: float, unit: str, **more: Any) -> Line:
    return {"status": "ok", "value": value, "unit": unit, **more}


def _skip(reason: str) -> Line:
    return {"status": "skipped", "error": reason}


def _refuse(engine: EngineSetup) -> Line | None:
    """A skip for one of gpt2core's own engines that cannot run; None for those that may."""
    if engine.family == "peer":
        return None
    info = available(load_plugins=False)[engine.name]
    if not info.available:
        return _skip(info.reason)
    if engine.precision not in OWN_PRECISIONS:
        return _skip(f"gpt2core offers {', '.join(OWN_PRECISIONS)}, not {engine.precision}")
    return None
