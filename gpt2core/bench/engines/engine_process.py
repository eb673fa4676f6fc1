"""One engine in this process: `python engine_process.py FOLDER STARTED_S`, run by `gpt2core.bench.worker`.

It may run in an interpreter that has no gpt2core, so it imports the standard library only, and the adapter
that `FOLDER/job.json` names by path. Each result is one line of `FOLDER/lines.jsonl`, written as soon as it
is there, so that whatever was measured before a crash is kept. STARTED_S is the parent's monotonic clock,
which is this process's too, just before the start.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import sys
import time
from collections.abc import Callable
from typing import Any

Job = dict[str, Any]
Line = dict[str, Any]
Write = Callable[..., None]

if sys.path and os.path.abspath(sys.path[0] or ".") == os.path.dirname(os.path.abspath(__file__)):
    del sys.path[0]  # the adapters' folder is no place to import from

WARM_REPEATS = 3


def main(folder: str, started_s: str) -> None:
    """Do the job; whatever the engine raises becomes a line."""
    with open(os.path.join(folder, "job.json"), encoding="utf-8") as file:
        job = json.load(file)
    with open(os.path.join(folder, "lines.jsonl"), "a", encoding="utf-8") as out:

        def write(**line: Any) -> None:
            out.write(json.dumps(line, allow_nan=False) + "\n")
            out.flush()

        try:
            adapter = load_adapter(job)
            {"build": build, "prepare": prepare, "measure": measure, "check": check}[job["task"]](
                adapter, job, write, float(started_s), folder
            )
        except Exception as error:
            write(**outcome(error, job))
        write(done=True)


def outcome(error: Exception, job: Job) -> Line:
    """How an exception is reported: what is missing or not offered is a skip, the rest a failure."""
    if isinstance(error, ModuleNotFoundError) and error.name and error.name.split(".")[0] in job["packages"]:
        return {
            "status": "skipped",
            "error": f"{error.name} is not installed in {sys.executable}; {job['remedy']}",
        }
    if isinstance(error, NotImplementedError):
        return {"status": "skipped", "error": str(error)}
    return {"status": "failed", "error": f"{type(error).__name__}: {error}"}


def load_adapter(job: Job) -> Any:
    """Import the adapter, and with it its engine, from its path."""
    spec = importlib.util.spec_from_file_location("adapter", job["adapter"])
    assert spec is not None
    assert spec.loader is not None
    adapter: Any = importlib.util.module_from_spec(spec)
    sys.modules["adapter"] = adapter
    spec.loader.exec_module(adapter)
    if hasattr(adapter, "start"):
        adapter.start(job)
    return adapter


def prepare(adapter: Any, job: Job, write: Write, started_s: float, folder: str) -> None:
    """Convert the checkpoint, where the engine wants that."""
    if hasattr(adapter, "prepare"):
        adapter.prepare(job)
    write(prepared=True)


def build(adapter: Any, job: Job, write: Write, started_s: float, folder: str) -> None:
    """Compile what the engine keeps for later processes; timed."""
    write(value=timed(lambda: adapter.build(job)), unit="s", status="ok", error=None)


def measure(adapter: Any, job: Job, write: Write, started_s: float, folder: str) -> None:
    """Measure the job's cells in the order that keeps the cold ones cold."""
    wanted = {cell["measure"] for cell in job["cells"]}

    def put(measure: str, value: float, unit: str, **more: Any) -> None:
        if measure in wanted:
            cell = {"measure": measure, "batch": None, "length": None, "position": None}
            write(**cell, value=value, unit=unit, status="ok", error=None, **more)

    put("start_s", time.monotonic() - started_s, "s")
    began_s = time.monotonic()
    engine = adapter.load(job)
    put("load_s", time.monotonic() - began_s, "s")
    write(settings=engine.settings)
    prompt, long = job["prompt"], job["long"]
    first_s = timed(lambda: engine.prefill(prompt))
    put("first_token_cold_s", time.monotonic() - started_s, "s")
    warm = [timed(lambda: engine.prefill(prompt)) for _ in range(WARM_REPEATS + 1)]
    put("compile_s", max(0.0, first_s - min(warm)), "s")
    put("ttft_s", min(warm), "s", samples_s=warm, tokens=1)
    if "decode_tok_s" in wanted:
        engine.generate([prompt], min(16, job["new_tokens"]))  # warms what decoding needs
    measurements = {"decode_tok_s": decode, "prefill_s": prefill, "step_s": step}
    for cell in job["cells"]:
        if cell["measure"] in measurements:
            try:
                write(**cell, **measurements[cell["measure"]](engine, job, cell, prompt, long))
            except Exception as error:  # the other cells may yet work
                write(**cell, value=None, unit=None, **outcome(error, job))
    put("peak_memory_nbytes", peak_memory_nbytes(), "bytes")
    write(settings={**engine.settings, "versions": versions(job["packages"])})  # slow, so after the clocks


def decode(engine: Any, job: Job, cell: Line, prompt: list[int], long: list[int]) -> Line:
    """Greedy decoding of a batch, prompt included, as a user would call it."""
    batch, new_tokens = cell["batch"], job["new_tokens"]
    samples_s = []
    for _ in range(job["repeats"] + (batch == 1)):
        began_s = time.perf_counter()
        out = engine.generate([list(prompt) for _ in range(batch)], new_tokens)
        samples_s.append(time.perf_counter() - began_s)
    lengths = sorted({len(text) for text in out})
    if len(out) != batch or lengths != [new_tokens]:
        raise RuntimeError(
            f"it generated {len(out)} texts of {lengths} tokens, asked for {batch} of {new_tokens}"
        )
    tokens = batch * new_tokens
    return ok(tokens / min(samples_s), "tok/s", samples_s, tokens)


def prefill(engine: Any, job: Job, cell: Line, prompt: list[int], long: list[int]) -> Line:
    """From one prompt of some length to its first token."""
    ids = long[: cell["length"]]
    engine.prefill(ids)
    samples_s = [timed(lambda: engine.prefill(ids)) for _ in range(job["repeats"] + 1)]
    return ok(min(samples_s), "s", samples_s, len(ids))


def step(engine: Any, job: Job, cell: Line, prompt: list[int], long: list[int]) -> Line:
    """One decode step of one text with so many tokens before it."""
    if not hasattr(engine, "step_at"):
        raise NotImplementedError("its interface has no single decode step")
    run = engine.step_at(cell["position"])
    run()
    samples_s = [timed(run) for _ in range(3 * job["repeats"])]
    return ok(min(samples_s), "s", samples_s, 1)


def ok(value: float, unit: str, samples_s: list[float], tokens: int) -> Line:
    """A measured cell."""
    return {
        "value": value, "unit": unit, "tokens": tokens, "samples_s": samples_s, "status": "ok", "error": None,
    }  # fmt: skip


def check(adapter: Any, job: Job, write: Write, started_s: float, folder: str) -> None:
    """Logits and greedy tokens of every model in the job, for the parent to compare with the reference."""
    import numpy as np

    installed = versions(job["packages"])
    for number, model in enumerate(job["models"]):
        write(begins=model["variant"])
        try:
            own = {**job, "checkpoint": model["checkpoint"], "work": model["work"]}
            if hasattr(adapter, "prepare"):
                adapter.prepare(own)
            engine = adapter.load(own)
            path = os.path.join(folder, f"logits-{number}.npy")
            np.save(path, np.asarray(engine.logits(list(job["ids"])), np.float32))
            tokens = [int(i) for i in engine.generate([list(job["prompt"])], job["new_tokens"])[0]]
            settings = {**engine.settings, "versions": installed}
            write(variant=model["variant"], status="ok", logits=path, tokens=tokens, settings=settings)
        except Exception as error:  # the other variants may yet work
            write(variant=model["variant"], **outcome(error, job))


def timed(run: Callable[[], object]) -> float:
    """Seconds of one call."""
    began_s = time.perf_counter()
    run()
    return time.perf_counter() - began_s


def versions(packages: list[str]) -> dict[str, str]:
    """Of what the engine imports, as installed here."""
    from importlib.metadata import packages_distributions, version

    known = packages_distributions()
    return {found: version(found) for name in packages for found in sorted(set(known.get(name, [])))}


def peak_memory_nbytes() -> int:
    """Most resident memory of this process; getrusage alone would begin with what the parent had."""
    try:
        with open("/proc/self/status", encoding="ascii", errors="replace") as file:
            found = re.search(r"^VmHWM:\s+(\d+) kB", file.read(), re.MULTILINE)
    except OSError:
        found = None
    if found:
        return 1024 * int(found[1])
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


if __name__ == "__main__":
    main(*sys.argv[1:])
