"""What a folder of measurements holds, read strictly, as types."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple

from gpt2core.bench.errors import BenchmarkError
from gpt2core.bench.store import ENVIRONMENT, RUNS, SETTINGS, read_json, read_numbered_log
from gpt2core.errors import RequestError, in_short

COMPONENTS: Final = "components.json"


@dataclass(frozen=True, slots=True)
class Run:
    """One generation of the classic benchmark; what was measured is None where it failed."""

    prompt_index: int
    length: int  # prompt and new tokens that were asked for
    run: int  # -1: warm-up
    prompt: str
    error: str | None
    elapsed_s: float | None = None
    ttft_s: float | None = None
    token_times_s: tuple[float, ...] = ()
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    finish_reason: str | None = None
    others_cores: float | None = None
    steal_share: float | None = None

    @property
    def ok(self) -> bool:
        """Whether it has a time."""
        return self.error is None

    @property
    def warm_up(self) -> bool:
        """Whether it is kept apart from what is measured."""
        return self.run < 0


@dataclass(frozen=True, slots=True)
class Cell:
    """What the comparison measures of an engine, once a round; what does not apply is None."""

    measure: str
    batch: int | None = None
    length: int | None = None
    position: int | None = None

    @property
    def x(self) -> int | None:
        """The number that it depends on, if it depends on one."""
        return next((n for n in (self.batch, self.length, self.position) if n is not None), None)

    @property
    def at(self) -> str:
        """The same with its name, such as "batch 8"; empty for what depends on nothing."""
        names = {"batch": self.batch, "length": self.length, "position": self.position}
        return ", ".join(f"{name} {n}" for name, n in names.items() if n is not None)


class LineKey(NamedTuple):
    """What makes a line of the comparison one of its kind: no two have the same."""

    engine: str
    precision: str
    round: int
    cell: Cell
    variant: str | None = None


@dataclass(frozen=True, slots=True)
class Measurement:
    """One line of the comparison."""

    key: LineKey
    value: float | None
    unit: str
    status: str  # "ok", "failed" or "skipped"
    error: str | None
    difference: float | None


@dataclass(frozen=True, slots=True)
class Records:
    """A folder of measurements."""

    folder: Path
    kind: Literal["classic", "comparison"]
    settings: dict[str, Any]
    environment: dict[str, Any]
    runs: tuple[Run, ...] = ()  # of the classic benchmark, warm-up included
    measurements: tuple[Measurement, ...] = ()  # of the comparison
    components: dict[str, Any] = field(default_factory=dict)

    @property
    def measured(self) -> tuple[Run, ...]:
        """The runs that are neither warm-up nor failed."""
        return tuple(run for run in self.runs if run.ok and not run.warm_up)

    @property
    def prompts(self) -> dict[int, str]:
        """Prompt by index, in order."""
        return dict(sorted({run.prompt_index: run.prompt for run in self.runs}.items()))

    @property
    def lengths(self) -> list[int]:
        """Total lengths, ascending."""
        return sorted({run.length for run in self.runs})


def read_records(folder: str | Path) -> Records:
    """Read a folder that `gpt2core bench` wrote.

    A torn last line, which a kill leaves, is passed over. Where a cell stands twice the later line counts.

    Raises:
        RequestError: there is no such folder, it has no runs, or a file in it is not what it should be.
    """
    folder = Path(folder)
    log, remedy = folder / RUNS, "name the output folder of a `gpt2core bench` run"
    if not folder.is_dir():
        raise RequestError(f"{folder} {'is not a folder' if folder.exists() else 'does not exist'}; {remedy}")
    if not log.is_file():
        raise RequestError(f"{folder} has no {RUNS}; {remedy}")
    names = (SETTINGS, ENVIRONMENT, COMPONENTS)
    try:
        lines = read_numbered_log(log)
        documents = [read_json(folder / name) if (folder / name).is_file() else {} for name in names]
    except BenchmarkError as error:  # the folder is the caller's choice, and so is what is in it
        raise RequestError(f"{error}; remove it or restore the file") from error
    kinds = {str(line.get("kind")) for _, line in lines}
    if not lines:
        raise RequestError(f"{log} holds no runs; run `gpt2core bench` with this folder first")
    if len(kinds) != 1 or not kinds <= {"classic", "comparison"}:
        expected = "expected are all 'classic' or all 'comparison'"
        raise RequestError(f"{log} holds lines of kind {', '.join(sorted(kinds))}; {expected}")
    runs: dict[tuple[int, int, int], Run] = {}
    measurements = []
    for number, line in lines:
        try:
            if line["kind"] == "classic":
                run = parse_run(line)
                runs[run.prompt_index, run.length, run.run] = run
            else:
                measurements.append(_parse_measurement(line))
        except (KeyError, TypeError, ValueError) as error:
            wrong = f"has no {error}" if isinstance(error, KeyError) else f"holds a wrong value: {error}"
            raise RequestError(f"{log}, line {number}, {wrong}") from error
    kind: Literal["classic", "comparison"] = "classic" if runs else "comparison"
    settings, environment, components = documents
    known = tuple(runs.values()), tuple(measurements)
    return Records(folder, kind, settings, environment, *known, components)


def parse_run(line: Mapping[str, Any]) -> Run:
    """One line of the classic benchmark.

    Raises:
        KeyError, TypeError, ValueError: something is missing or wrong.
    """
    prompt_index, length, run = (_whole(value) for value in line["cell"])
    ok = line["status"] == "ok"
    if ok and line["elapsed_s"] is None:
        raise ValueError("elapsed_s of a run that did not fail is null")
    numbers = ("elapsed_s", "ttft_s", "others_cores", "steal_share")
    figures: dict[str, Any] = {name: _number(line.get(name)) for name in numbers}
    figures |= {name: _whole_or_none(line.get(name)) for name in ("prompt_tokens", "completion_tokens")}
    return Run(
        prompt_index,
        length,
        run,
        prompt=str(line["prompt"]),
        error=None if ok else str(line.get("error") or "failed"),
        token_times_s=tuple(float(t) for t in line.get("token_times_s") or ()),
        finish_reason=line.get("finish_reason"),
        **figures,
    )


def key_of(line: Mapping[str, Any]) -> LineKey:
    """The key of a line of the comparison; errors as of `parse_run`."""
    cell = Cell(str(line["measure"]), *(_whole_or_none(line.get(n)) for n in ("batch", "length", "position")))
    precision, number = str(line.get("precision", "float32")), _whole(line.get("round") or 0)
    return LineKey(str(line["engine"]), precision, number, cell, line.get("variant"))


def _parse_measurement(line: Mapping[str, Any]) -> Measurement:
    value, status = _number(line["value"]), str(line["status"])
    if status == "ok" and value is None:
        raise ValueError("value of a measurement that did not fail is null")
    unit, difference = str(line.get("unit") or ""), _number(line.get("difference"))
    return Measurement(key_of(line), value, unit, status, line.get("error"), difference)


def _whole(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{in_short(value)} is not a whole number")
    return value


def _whole_or_none(value: Any) -> int | None:
    return None if value is None else _whole(value)


def _number(value: Any) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise TypeError(f"{in_short(value)} is not a finite number")
    return float(value)
