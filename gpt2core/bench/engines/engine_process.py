"""One engine in this process: `python engine_process.py FOLDER STARTED_S`, run by `gpt2core.bench.worker`.

It may run in an interpreter that has no gpt2core, so it imports the standard library only, and by path the
adapter that `FOLDER/job.json` names. Each result is one line of `FOLDER/lines.jsonl`, written as soon as it
is there, so that whatever was measured before a crash is kept. STARTED_S is the parent's monotonic clock,
which is this process's too, just before the start.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

Job = dict[str, Any]
Line = dict[str, Any]
Write = Callable[..., None]

if sys.path and os.path.abspath(sys.path[0] or ".") == os.path.dirname(os.path.abspath(__file__)):
    del sys.path[0]  # the adapters' folder is no place to import from

MACHINE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "..", "_machine.py")
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
            if job["task"] == "measure":
                measure(adapter, job, write, float(started_s))
            elif job["task"] == "check":
                check(adapter, job, write, folder)
            else:  # "prepare" or "build"
                run = getattr(adapter, job["task"], lambda job: None)
                write(value=timed(lambda: run(job)), unit="s", status="ok", error=None)
        except Exception as error:
            write(**describe_failure(error, job))
        write(done=True)


def describe_failure(error: Exception, job: Job) -> Line:
    """How an exception is reported: what is missing or not offered is a skip, the rest a failure."""
    if isinstance(error, ModuleNotFoundError) and error.name and error.name.split(".")[0] in job["packages"]:
        missing = f"{error.name} is not installed in {sys.executable}; {job['remedy']}"
        return {"status": "skipped", "error": missing}
    if isinstance(error, NotImplementedError):
        return {"status": "skipped", "error": str(error)}
    return {"status": "failed", "error": f"{type(error).__name__}: {error}"}


def load_module(name: str, path: str) -> Any:
    """Import a module from its path."""
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def load_adapter(job: Job) -> Any:
    """Import the adapter, and with it its engine."""
    adapter = load_module("adapter", job["adapter"])
    if hasattr(adapter, "start"):
        adapter.start(job)
    offered = getattr(adapter, "PRECISIONS", (job["precision"],))
    if job["precision"] not in offered:
        raise NotImplementedError(f"{job['engine']} offers {', '.join(offered)} here, not {job['precision']}")
    return adapter


def measure(adapter: Any, job: Job, write: Write, started_s: float) -> None:
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
    prompt = job["prompt"]
    first_s = timed(lambda: prefill(engine, prompt))
    put("first_token_cold_s", time.monotonic() - started_s, "s")
    warm = [timed(lambda: prefill(engine, prompt)) for _ in range(WARM_REPEATS + 1)]
    put("compile_s", max(0.0, first_s - min(warm)), "s")
    put("ttft_s", min(warm), "s", samples_s=warm, tokens=1)
    if "decode_tok_s" in wanted:
        engine.generate([prompt], min(16, job["new_tokens"]))  # warms what decoding needs
    measurements = {"decode_tok_s": measure_decode, "prefill_s": measure_prefill, "step_s": measure_step}
    for cell in job["cells"]:
        if cell["measure"] in measurements:
            try:
                write(**cell, **measurements[cell["measure"]](engine, job, cell))
            except Exception as error:  # the other cells may yet work
                write(**cell, value=None, unit=None, **describe_failure(error, job))
    put("peak_memory_nbytes", load_module("machine", MACHINE).peak_memory_nbytes(), "bytes")
    write(settings={**engine.settings, "versions": versions(job["packages"])})  # slow, so after the clocks


def prefill(engine: Any, ids: list[int]) -> None:
    """All that the first token after `ids` needs."""
    if hasattr(engine, "prefill"):
        engine.prefill(ids)
    else:
        engine.generate([ids], 1)


def measure_decode(engine: Any, job: Job, cell: Line) -> Line:
    """Greedy decoding of a batch, prompt included, as a user would call it."""
    batch, new_tokens = cell["batch"], job["new_tokens"]
    samples_s = []
    for _ in range(job["repeats"] + (batch == 1)):
        began_s = time.perf_counter()
        out = engine.generate([list(job["prompt"]) for _ in range(batch)], new_tokens)
        samples_s.append(time.perf_counter() - began_s)
    lengths = sorted({len(text) for text in out})
    if len(out) != batch or lengths != [new_tokens]:
        got = f"it generated {len(out)} texts of {lengths} tokens"
        raise RuntimeError(f"{got}, asked for {batch} of {new_tokens}")
    tokens = batch * new_tokens
    return report(tokens / min(samples_s), "tok/s", samples_s, tokens)


def measure_prefill(engine: Any, job: Job, cell: Line) -> Line:
    """From one prompt of some length to its first token."""
    ids = job["long"][: cell["length"]]
    prefill(engine, ids)
    samples_s = [timed(lambda: prefill(engine, ids)) for _ in range(job["repeats"] + 1)]
    return report(min(samples_s), "s", samples_s, len(ids))


def measure_step(engine: Any, job: Job, cell: Line) -> Line:
    """One decode step of one text with so many tokens before it."""
    if not hasattr(engine, "step_at"):
        raise NotImplementedError("its interface has no single decode step")
    run = engine.step_at(cell["position"])
    run()
    samples_s = [timed(run) for _ in range(3 * job["repeats"])]
    return report(min(samples_s), "s", samples_s, 1)


def report(value: float, unit: str, samples_s: list[float], tokens: int) -> Line:
    """A measured cell."""
    how = {"tokens": tokens, "samples_s": samples_s}
    return {"value": value, "unit": unit, "status": "ok", "error": None, **how}


def check(adapter: Any, job: Job, write: Write, folder: str) -> None:
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
            write(variant=model["variant"], **describe_failure(error, job))


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


if __name__ == "__main__":
    main(*sys.argv[1:])
