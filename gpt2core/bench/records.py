"""What a folder of measurements holds, read strictly, as types."""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal, TypeVar

from gpt2core.bench.errors import BenchmarkError
from gpt2core.bench.files import read_json, read_numbered_log
from gpt2core.bench.folder import ENVIRONMENT, RUNS, SETTINGS
from gpt2core.errors import RequestError

Kind = Literal["classic", "comparison"]
COMPONENTS: Final = "components.json"
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Run:
    """One generation of the classic benchmark; what was measured is None where it failed."""

    prompt_index: int
    length: int  # prompt and new tokens that were asked for
    run: int  # -1: warm-up
    prompt: str
    error: str | None
    elapsed_s: float | None
    ttft_s: float | None
    token_times_s: tuple[float, ...]
    prompt_tokens: int | None
    completion_tokens: int | None
    finish_reason: str | None
    attempts: int

    @property
    def ok(self) -> bool:
        """Whether it has a time."""
        return self.error is None

    @property
    def warm_up(self) -> bool:
        """Whether it is kept apart from what is measured."""
        return self.run < 0


@dataclass(frozen=True, slots=True)
class Measurement:
    """One line of the comparison."""

    engine: str
    peer: bool
    precision: str
    round: int
    measure: str
    batch: int | None
    length: int | None
    position: int | None
    variant: str | None
    value: float | None
    unit: str
    status: str  # "ok", "failed" or "skipped"
    error: str | None


@dataclass(frozen=True, slots=True)
class Records:
    """A folder of measurements."""

    folder: Path
    kind: Kind
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
        return {i: text for i, text in sorted({run.prompt_index: run.prompt for run in self.runs}.items())}

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
    if not folder.is_dir():
        found = "is not a folder" if folder.exists() else "does not exist"
        raise RequestError(f"{folder} {found}; name the output folder of a `gpt2core bench` run")
    if not (folder / RUNS).is_file():
        raise RequestError(f"{folder} has no {RUNS}; name the output folder of a `gpt2core bench` run")
    with _as_request_errors():
        lines = read_numbered_log(folder / RUNS)
    kinds = {str(line.get("kind")) for _, line in lines}
    if not lines:
        raise RequestError(f"{folder / RUNS} holds no runs; run `gpt2core bench` with this folder first")
    if len(kinds) != 1 or not kinds <= {"classic", "comparison"}:
        raise RequestError(
            f"{folder / RUNS} holds lines of kind {', '.join(sorted(kinds))}; expected are all 'classic' or "
            "all 'comparison'"
        )
    with _as_request_errors():
        settings, environment, components = (
            read_json(folder / name) if (folder / name).is_file() else {}
            for name in (SETTINGS, ENVIRONMENT, COMPONENTS)
        )
    runs: tuple[Run, ...] = ()
    measurements: tuple[Measurement, ...] = ()
    if kinds == {"classic"}:
        latest = {(run.prompt_index, run.length, run.run): run for run in _parse(folder, lines, _run)}
        runs = tuple(latest.values())
    else:
        measurements = tuple(_parse(folder, lines, _measurement))
    return Records(
        folder=folder,
        kind="classic" if runs else "comparison",
        settings=settings,
        environment=environment,
        runs=runs,
        measurements=measurements,
        components=components,
    )


@contextmanager
def _as_request_errors() -> Iterator[None]:
    """The folder is the caller's choice, so what is wrong with its files is wrong with the request."""
    try:
        yield
    except BenchmarkError as error:
        raise RequestError(f"{error}; remove it or restore the file") from error


def _parse(
    folder: Path, lines: list[tuple[int, dict[str, Any]]], parse: Callable[[Mapping[str, Any]], T]
) -> list[T]:
    parsed = []
    for number, line in lines:
        try:
            parsed.append(parse(line))
        except (KeyError, TypeError, ValueError) as error:
            wrong = f"has no {error}" if isinstance(error, KeyError) else f"holds a wrong value: {error}"
            raise RequestError(f"{folder / RUNS}, line {number}, {wrong}") from error
    return parsed


def _run(line: Mapping[str, Any]) -> Run:
    prompt_index, length, run = (_whole(value) for value in line["cell"])
    ok = line["status"] == "ok"
    elapsed_s = _number(line["elapsed_s"]) if ok else None
    if ok and elapsed_s is None:
        raise ValueError("elapsed_s of a run that did not fail is null")
    tokens = [line.get(name) if ok else None for name in ("prompt_tokens", "completion_tokens")]
    return Run(
        prompt_index=prompt_index,
        length=length,
        run=run,
        prompt=str(line["prompt"]),
        error=None if ok else str(line.get("error") or "failed"),
        elapsed_s=elapsed_s,
        ttft_s=_number(line.get("ttft_s")) if ok else None,
        token_times_s=tuple(float(t) for t in line.get("token_times_s") or ()) if ok else (),
        prompt_tokens=None if tokens[0] is None else _whole(tokens[0]),
        completion_tokens=None if tokens[1] is None else _whole(tokens[1]),
        finish_reason=line.get("finish_reason"),
        attempts=_whole(line.get("attempts", 1)),
    )


def _measurement(line: Mapping[str, Any]) -> Measurement:
    numbers = {
        name: None if line.get(name) is None else _whole(line[name])
        for name in ("batch", "length", "position")
    }
    value, status = _number(line["value"]), str(line["status"])
    if status == "ok" and value is None:
        raise ValueError("value of a measurement that did not fail is null")
    return Measurement(
        engine=str(line["engine"]),
        peer=line.get("family") == "peer",
        precision=str(line.get("precision") or "float32"),
        round=_whole(line.get("round") or 0),
        measure=str(line["measure"]),
        variant=line.get("variant"),
        value=value,
        unit=str(line.get("unit", "")),
        status=status,
        error=line.get("error"),
        **numbers,
    )


def _whole(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{value!r:.40} is not a whole number")
    return value


def _number(value: Any) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise TypeError(f"{value!r:.40} is not a finite number")
    return float(value)
