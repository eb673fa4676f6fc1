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


@dataclass(frozen=True, slots=True)
class Workload:
    """What every engine is asked, in token ids that the model has.

    Attributes:
        prompt: of the texts that are generated.
        long: of which a prefix is prefilled.
        new_tokens: of each text.
    """

    prompt: tuple[int, ...]
    long: tuple[int, ...]
    new_tokens: int

    @classmethod
    def for_model(cls, vocab_size: int, context: int, new_tokens: int = NEW_TOKENS) -> "Workload":
        """The workload for a model of this vocabulary and context."""
        return cls(
            prompt=tuple(token % vocab_size for token in PROMPT)[: max(1, context // 2)],
            long=tuple(i * 7919 % min(50000, vocab_size) for i in range(context)),
            new_tokens=max(1, min(new_tokens, context - min(len(PROMPT), context // 2))),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSetup:
    """An engine and how it is set up.

    Attributes:
        name: of a backend of gpt2core or of a peer.
        family: "gpt2core" or "peer".
        precision: of the weights.
        python: the interpreter that it runs in.
        adapter: the path of the module that runs it.
        packages: those whose absence is a skip.
        remedy: how to get them.
        builds: whether it is asked to compile what it keeps, which is then a measure of its own.
    """

    name: str
    family: str
    precision: str
    python: str
    adapter: Path
    packages: tuple[str, ...] = ()
    remedy: str = ""
    builds: bool = False

    @classmethod
    def own(cls, name: str, precision: str = "float32") -> "EngineSetup":
        """A backend of gpt2core."""
        return cls(
            name=name,
            family="gpt2core",
            precision=precision,
            python=sys.executable,
            adapter=OWN_ADAPTER,
            builds=True,
        )

    @classmethod
    def peer(cls, name: str, precision: str = "float32", python: str | None = None) -> "EngineSetup":
        """A peer, in the interpreter given or in this one."""
        about = PEERS[name]
        return cls(
            name=name,
            family="peer",
            precision=precision,
            python=python or sys.executable,
            adapter=about.adapter,
            packages=about.packages,
            remedy=f"pip install {about.install}, or name its interpreter with --peer-python",
        )


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
) -> Iterator[dict[str, Any]]:
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
        "prompt": workload.prompt,
        "long": workload.long,
        "new_tokens": workload.new_tokens,
        "batches": [cell.batch for cell in cells if cell.batch is not None],
        "repeats": REPEATS,
        "threads": threads,
        "device": device,
    }
    lines, died = run_engine(engine, job, timeout_s=timeout_s)
    settings: dict[str, Any] = next((line["settings"] for line in reversed(lines) if "settings" in line), {})
    names = ("measure", "batch", "length", "position")
    found = {Cell(*(line[name] for name in names)): line for line in lines if "measure" in line}
    whole = next((line for line in lines if "status" in line and "measure" not in line), None)
    for cell in cells:
        line = found.get(cell)
        if line is None:
            reason = whole or {"status": "failed", "error": died or "the engine gave no result"}
            line = {**asdict(cell), **reason, "value": None, "unit": None}
        yield {"tokens": None, "samples_s": None, **line, "settings": settings}


def prepare(
    engine: EngineSetup, *, checkpoint: Path, work: Path, threads: int, timeout_s: float
) -> tuple[str, str | None]:
    """Let a peer convert the checkpoint into `work`, which is there if this was done before.

    Returns "ok", or "skipped" or "failed" with the reason. It has a process of its own, since converting may
    need more memory than running.
    """
    if work.exists():
        return "ok", None
    work.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=work.parent, prefix=".") as name:  # half a conversion counts as none
        converted = Path(name, "converted")
        converted.mkdir()
        job = {"task": "prepare", "checkpoint": str(checkpoint), "work": str(converted), "threads": threads}
        lines, died = run_engine(engine, job, timeout_s=timeout_s)
        for line in lines:
            if line.get("prepared"):
                converted.rename(work)
                return "ok", None
            if "status" in line:
                return line["status"], line["error"]
    return "failed", died or "the engine gave no result"


def build(engine: EngineSetup, *, timeout_s: float) -> dict[str, Any]:
    """Let an engine compile what it keeps, and time it; near 0 where that was done before."""
    lines, died = run_engine(engine, {"task": "build"}, timeout_s=timeout_s)
    line = next((line for line in lines if "status" in line), None)
    return line or {"status": "failed", "error": died or "the engine gave no result"}


def run_engine(
    engine: EngineSetup, job: Mapping[str, Any], *, timeout_s: float, folder: Path | None = None
) -> tuple[list[dict[str, Any]], str | None]:
    """Run an engine's process; the lines that it wrote, and how it died, or None if it ended well."""
    if folder is None:
        with tempfile.TemporaryDirectory(prefix="gpt2core-bench-") as name:
            return run_engine(engine, job, timeout_s=timeout_s, folder=Path(name))
    whole = {
        "engine": engine.name,
        "precision": engine.precision,
        "adapter": str(engine.adapter),
        "packages": engine.packages,
        "remedy": engine.remedy,
        **job,
    }
    (folder / "job.json").write_text(json.dumps(whole), encoding="utf-8")
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
        code = subprocess.run(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, timeout=timeout_s
        ).returncode
    except subprocess.TimeoutExpired:
        return f"its process was stopped after {timeout_s:g} s; allow it more time"
    except OSError as error:
        return f"its process cannot be started with {command[0]}: {error.strerror}"
    return describe_exit(code, "was not done")
