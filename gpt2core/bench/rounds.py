"""The comparison: every engine in a process of its own, round by round, so that drift hits all alike.

Within a round the engines run one after the other, and each round begins with another one. Each measured
value is one line of `runs.jsonl`; a failure or a skip is a line with its reason and no value. The lines that
a comparison will have are known before it starts, so that resuming it measures what is missing, and nothing
twice.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from gpt2core import ModelConfig, open_checkpoint
from gpt2core._files import cache_folder
from gpt2core.backends import PRECISIONS as OWN_PRECISIONS
from gpt2core.backends import available
from gpt2core.bench import bandwidth, correctness, worker
from gpt2core.bench.environment import fingerprint
from gpt2core.bench.folder import ResultsFolder
from gpt2core.bench.plan import BANDWIDTH, CORRECT, WEIGHT, Comparison, key, key_of, weight_nbytes
from gpt2core.bench.targets import model_id
from gpt2core.bench.worker import Cell, Engine, Workload
from gpt2core.testing import VARIANTS


def compare(
    comparison: Comparison,
    output: Path,
    *,
    resume: bool = False,
    force: bool = False,
    local_files_only: bool = False,
    on_progress: Callable[[str], None] | None = None,
) -> list[dict[str, Any]]:
    """Run a comparison, or what is missing of it, and return all of its lines.

    Args:
        comparison: what to do.
        output: the folder, which gets `settings.json`, `environment.json` and `runs.jsonl`.
        resume: go on with the comparison that `output` holds.
        force: replace it.
        local_files_only: never ask the hub for the model.
        on_progress: is called with what is being done.

    Raises:
        CheckpointError: the model cannot be read.
        BenchmarkError: `output` holds something else, or cannot be written.
    """
    checkpoint = open_checkpoint(
        comparison.model, revision=comparison.revision, local_files_only=local_files_only
    )
    config, folder = checkpoint.config, checkpoint.folder.absolute()
    del checkpoint
    identity = model_id(folder)
    settings = {"kind": "comparison", "model_id": identity, **asdict(comparison)}
    for name, value in settings.items():
        settings[name] = list(value) if isinstance(value, tuple) else value
    environment = fingerprint()
    with ResultsFolder(output, settings, environment, resume=resume, force=force) as results:
        _Run(comparison, config, folder, identity, environment["id"], results, on_progress or _nothing).run()
        return results.records


def _nothing(what: str) -> None:
    pass


class _Run:
    def __init__(
        self,
        comparison: Comparison,
        config: ModelConfig,
        checkpoint: Path,
        identity: str,
        environment: str,
        results: ResultsFolder,
        on_progress: Callable[[str], None],
    ) -> None:
        self.comparison, self.config, self.checkpoint = comparison, config, checkpoint
        self.identity, self.environment = identity, environment
        self.results, self.on_progress = results, on_progress
        self.done = {key(line) for line in results.records}
        self.workload = Workload.of(config.vocab_size, config.n_positions, comparison.new_tokens)

    def run(self) -> None:
        engines = self.comparison.engines()
        for engine in engines:
            if engine.family == "peer" and self.comparison.check:
                self.check(engine)
        ready: dict[Engine, tuple[str, str | None]] = {}
        for number in range(self.comparison.rounds):
            self.measure_bandwidth(number)
            start = number % len(engines)
            for engine in engines[start:] + engines[:start]:
                self.measure(engine, number, ready)

    def check(self, engine: Engine) -> None:
        wanted = [
            name for name in self.comparison.variants
            if key_of(engine, 0, CORRECT, name) not in self.done
        ]  # fmt: skip
        variants = {name: VARIANTS[name] for name in wanted}
        if not variants:
            return
        answers = correctness.check(
            engine,
            threads=self.comparison.threads,
            variants=variants,
            timeout_s=self.comparison.timeout_s,
            on_progress=self.on_progress,
        )
        for answer in answers:
            self.write(engine, 0, CORRECT, {**answer, "unit": "bool"})

    def measure(self, engine: Engine, number: int, ready: dict[Engine, tuple[str, str | None]]) -> None:
        cells = [
            cell for cell in self.comparison.cells(self.config.n_positions)
            if key_of(engine, number, cell) not in self.done
        ]  # fmt: skip
        too_long = [cell for cell in cells if (cell[2] or 0) > self.config.n_positions]
        for cell in too_long:
            reason = f"the model's context is {self.config.n_positions}"
            self.write(engine, number, cell, {"status": "skipped", "error": reason})
        cells = [cell for cell in cells if cell not in too_long]
        if number == 0 and key_of(engine, 0, WEIGHT) not in self.done:
            value = weight_nbytes(self.config, engine.precision)
            self.write(engine, 0, WEIGHT, {"status": "ok", "value": value, "unit": "bytes"})
        if not cells:
            return
        self.on_progress(
            f"round {number + 1} of {self.comparison.rounds}: {engine.name} in {engine.precision}"
        )
        for cell, found in zip(cells, self.found(engine, cells, ready), strict=True):
            self.write(engine, number, cell, found)

    def found(
        self, engine: Engine, cells: Sequence[Cell], ready: dict[Engine, tuple[str, str | None]]
    ) -> Iterable[dict[str, Any]]:
        reason = _unavailable(engine)
        if reason is not None:
            return [{"status": "skipped", "error": reason}] * len(cells)
        own = engine.family != "peer"
        parts = (self.identity, "gpt2core" if own else engine.name, engine.precision)
        work = cache_folder("bench").joinpath(*parts)
        timeout_s, threads = self.comparison.timeout_s, self.comparison.threads
        if not own or engine.precision != "float32":
            if engine not in ready:  # in a process of its own: converting may need more memory than running
                ready[engine] = worker.prepare(
                    engine, checkpoint=self.checkpoint, work=work, threads=threads, timeout_s=timeout_s
                )
            status, error = ready[engine]
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
        machine = Engine(
            name="machine", family="machine", precision="", python="", adapter=Path(bandwidth.__file__)
        )
        if key_of(machine, number, BANDWIDTH) in self.done:
            return
        self.on_progress("measuring the read bandwidth")
        try:
            found = bandwidth.read_bandwidth(self.comparison.threads)
            line = {"status": "ok", "value": found.pop("value"), "unit": "bytes/s", "settings": found}
        except Exception as error:  # the engines' times are worth having without it
            line = {"status": "failed", "error": f"{type(error).__name__}: {error}"}
        self.write(machine, number, BANDWIDTH, line)

    def write(self, engine: Engine, number: int, cell: Cell, found: Mapping[str, Any]) -> None:
        measure, batch, length, position = cell
        line = {
            "kind": "comparison",
            "engine": engine.name,
            "family": engine.family,
            "precision": engine.precision,
            "round": number,
            "measure": measure,
            "batch": batch,
            "length": length,
            "position": position,
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
        which = key(line)
        assert which not in self.done, f"{which} was measured before"
        self.results.append(line)
        self.done.add(which)


def _unavailable(engine: Engine) -> str | None:
    """Why one of gpt2core's own engines cannot run; None for those that may."""
    if engine.family == "peer":
        return None
    info = available(load_plugins=False)[engine.name]
    if not info.available:
        return info.reason
    if engine.precision not in OWN_PRECISIONS:
        return f"gpt2core offers {', '.join(OWN_PRECISIONS)}, not {engine.precision}"
    return None
