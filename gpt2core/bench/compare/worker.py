"""One engine in a process of its own, and how it died if it did."""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from gpt2core._machine import describe_exit
from gpt2core.bench.engines import OWN_ADAPTER, PEERS, PROCESS
from gpt2core.bench.records import Cell

PROMPT: Final = (818, 257, 16161, 1290, 11, 1290, 1497, 11)  # "In a galaxy far, far away,"
NEW_TOKENS: Final = 128
REPEATS: Final = 2

Line = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Workload:
    """What every engine is asked, in token ids that the model has."""

    prompt: tuple[int, ...]  # of the texts that are generated
    long: tuple[int, ...]  # of which a prefix is prefilled
    new_tokens: int  # of each text

    @classmethod
    def for_model(cls, vocab_size: int, context: int, new_tokens: int = NEW_TOKENS) -> "Workload":
        """The workload for a model of this vocabulary and context."""
        return cls(
            prompt=tuple(token % vocab_size for token in PROMPT)[: max(1, context // 2)],
            long=tuple(i * 7919 % min(50000, vocab_size) for i in range(context)),
            new_tokens=max(1, min(new_tokens, context - min(len(PROMPT), context // 2))),
        )


@dataclass(frozen=True, slots=True)
class EngineSetup:
    """An engine and how it is set up."""

    name: str  # of a backend of gpt2core or of a peer
    family: str  # "gpt2core" or "peer"
    precision: str = "float32"  # of the weights
    python: str = sys.executable  # the interpreter that it runs in

    @classmethod
    def own(cls, name: str, precision: str = "float32") -> "EngineSetup":
        """A backend of gpt2core."""
        return cls(name, "gpt2core", precision)

    @classmethod
    def peer(cls, name: str, precision: str = "float32", python: str | None = None) -> "EngineSetup":
        """A peer, in the interpreter given or in this one."""
        return cls(name, "peer", precision, python or sys.executable)


def measure(
    engine: EngineSetup,
    *,
    checkpoint: Path,
    work: Path,
    cells: Sequence[Cell],
    workload: Workload,
    threads: int | None,
    device: str = "cpu",
    timeout_s: float,
) -> Iterator[Line]:
    """Measure cells of one engine in a fresh process; yields exactly one result for each of `cells`.

    Each result has "measure", "batch", "length", "position", "value", "unit", "status", "error", "settings",
    and "samples_s" and "tokens" where there are some. A process that dies leaves the cells that it did not
    reach as failed, with the reason.
    """
    job = {
        "task": "measure",
        "cells": [asdict(cell) for cell in cells],
        "checkpoint": str(checkpoint),
        "work": str(work),
        **asdict(workload),
        "batches": [cell.batch for cell in cells if cell.batch is not None],
        "repeats": REPEATS,
        "threads": threads,
        "device": device,
    }
    lines, died = run_engine(engine, job, timeout_s=timeout_s)
    settings: Line = next((line["settings"] for line in reversed(lines) if "settings" in line), {})
    names = ("measure", "batch", "length", "position")
    found = {Cell(*(line[name] for name in names)): line for line in lines if "measure" in line}
    for cell in cells:
        unreached = {**asdict(cell), **_outcome(lines, died), "value": None, "unit": None}
        yield {"tokens": None, "samples_s": None, **found.get(cell, unreached), "settings": settings}


def prepare(engine: EngineSetup, *, checkpoint: Path, work: Path, threads: int, timeout_s: float) -> Line:
    """Let an engine convert the checkpoint into `work`, which is there if this was done before.

    Returns the "status" and "error". It has a process of its own: converting may need more memory than
    running.
    """
    if work.exists():
        return {"status": "ok", "error": None}
    work.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=work.parent, prefix=".") as name:  # half a conversion counts as none
        converted = Path(name, "converted")
        converted.mkdir()
        job = {"task": "prepare", "checkpoint": str(checkpoint), "work": str(converted), "threads": threads}
        outcome = _outcome(*run_engine(engine, job, timeout_s=timeout_s))
        if outcome["status"] == "ok":
            converted.rename(work)
    return {name: outcome[name] for name in ("status", "error")}


def build(engine: EngineSetup, *, timeout_s: float) -> Line:
    """Let an engine compile what it keeps, and time it; near 0 where that was done before."""
    return _outcome(*run_engine(engine, {"task": "build"}, timeout_s=timeout_s))


def _outcome(lines: Sequence[Line], died: str | None) -> Line:
    """The line that is of no cell: how the job as a whole ended."""
    whole = next((line for line in lines if "status" in line and "measure" not in line), None)
    return whole or {"status": "failed", "error": died or "the engine gave no result"}


def run_engine(
    engine: EngineSetup, job: Mapping[str, Any], *, timeout_s: float, folder: Path | None = None
) -> tuple[list[Line], str | None]:
    """Run an engine's process; the lines that it wrote, and how it died, or None if it ended well."""
    if folder is None:
        with tempfile.TemporaryDirectory(prefix="gpt2core-bench-") as name:
            return run_engine(engine, job, timeout_s=timeout_s, folder=Path(name))
    adapter, packages, install = PEERS[engine.name] if engine.family == "peer" else (OWN_ADAPTER, (), "")
    about: Line = {"engine": engine.name, "precision": engine.precision, "adapter": str(adapter)}
    about |= {
        "packages": packages,
        "remedy": f"pip install {install}, or name its interpreter with --peer-python",
    }
    (folder / "job.json").write_text(json.dumps(about | dict(job)), encoding="utf-8")
    lines_path = folder / "lines.jsonl"
    lines_path.write_bytes(b"")
    with (folder / "output").open("wb") as output:
        command = [engine.python, str(PROCESS), str(folder), repr(time.monotonic())]
        died = _wait(command, output, timeout_s)
    lines = [json.loads(line) for line in lines_path.read_bytes().split(b"\n")[:-1]]
    if lines and lines[-1].get("done"):
        return lines[:-1], None
    said = (folder / "output").read_text(errors="replace").strip().splitlines()
    return lines, f"{died}; it said: {said[-1][:300]}" if said else died


def _wait(command: list[str], output: Any, timeout_s: float) -> str:
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, timeout=timeout_s
        )
    except subprocess.TimeoutExpired:
        return f"its process was stopped after {timeout_s:g} s; allow it more time"
    except OSError as error:
        return f"its process cannot be started with {command[0]}: {error.strerror}"
    return describe_exit(done.returncode, "was not done")
