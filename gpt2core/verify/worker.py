"""One backend in a process of its own: `python -m gpt2core.verify.worker FOLDER`.

`FOLDER/job.json` says what to do. Logits go to `FOLDER/case-N.npy`, a trace to `FOLDER/trace.npz`, and
`FOLDER/result.json`, written last, says how it went; without it the process died.
"""

import importlib
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gpt2core._machine import peak_memory_nbytes
from gpt2core.backends import load_factory
from gpt2core.backends.base import Backend, BackendFactory, RunsPrecisions, Traces
from gpt2core.batch import Batch
from gpt2core.checkpoint.open import open_checkpoint
from gpt2core.engine.engine import Engine
from gpt2core.errors import BackendError, BackendUnavailableError, RequestError
from gpt2core.sampling.params import SamplingParams
from gpt2core.verify.cases import Case, cases_of


def main(folder: Path) -> None:
    """Do the job in `folder`; what a backend raises becomes part of the result."""
    job = json.loads((folder / "job.json").read_text())
    result: dict[str, Any] = {"errors": [], "tokens": None, "traced": None}
    try:
        _run(job, folder, result)
    except Exception as error:  # a backend may raise anything
        result["errors"].append(_described(error))
    result["peak_memory_nbytes"] = peak_memory_nbytes()
    (folder / "result.json").write_text(json.dumps(result))


def factory_of(name: str) -> BackendFactory:
    """The factory of a backend by name, or by the `module:attribute` that an entry point would name.

    Raises:
        BackendUnavailableError: there is none.
    """
    if ":" not in name:
        return load_factory(name)
    module, _, attributes = name.partition(":")
    try:
        found: Any = importlib.import_module(module)
        for attribute in attributes.split("."):
            found = getattr(found, attribute)
    except Exception as error:  # a stranger's module
        raise BackendUnavailableError(f"{name} cannot be imported: {_described(error)}") from error
    factory: BackendFactory = found
    return factory


def _run(job: dict[str, Any], folder: Path, result: dict[str, Any]) -> None:
    began = time.perf_counter()
    result["unavailable"] = True
    factory = factory_of(job["backend"])
    weights = open_checkpoint(Path(job["model"])).stored
    offered = factory.precisions if isinstance(factory, RunsPrecisions) else ("float32",)
    if weights.precision not in offered:
        raise RequestError(f"does not run precision {weights.precision!r}, only {', '.join(offered)}")
    result["unavailable"] = False
    backend = factory(weights, device="cpu", threads=job["threads"])
    del weights
    try:
        result["load_s"] = time.perf_counter() - began
        began = time.perf_counter()
        for step in (_logits, _texts, _trace):  # one that fails leaves the others their say
            try:
                step(backend, job, folder, result)
            except Exception as error:
                result["errors"].append(_described(error))
        result["elapsed_s"] = time.perf_counter() - began
    finally:
        backend.close()


def _logits(backend: Backend, job: dict[str, Any], folder: Path, result: dict[str, Any]) -> None:
    for number, case in enumerate(cases_of([len(text) for text in job["texts"]])):
        np.save(folder / f"case-{number}.npy", _run_case(backend, case, job["texts"]))


def _run_case(backend: Backend, case: Case, texts: Sequence[Sequence[int]]) -> np.ndarray:
    cache = backend.new_cache(case.slots, max(row.end for row in case.rows))
    logits = np.empty((case.positions, backend.config.vocab_size), np.float32)
    done = 0
    for rows in case.passes:
        count = sum(row.end - row.start for row in rows)
        batch = Batch.of(
            [(texts[row.text][row.start : row.end], row.start, row.slot) for row in rows], range(count)
        )
        got, want = backend.forward(batch, cache), (count, backend.config.vocab_size)
        if not isinstance(got, np.ndarray) or got.shape != want or got.dtype != np.float32:
            what = f"{got.dtype} {got.shape}" if isinstance(got, np.ndarray) else f"a {type(got).__name__}"
            raise BackendError(f"{case.name}: forward returned {what}, expected float32 {want}")
        logits[done : done + count] = got
        done += count
    return logits


def _texts(backend: Backend, job: dict[str, Any], folder: Path, result: dict[str, Any]) -> None:
    if not job["seeds"]:
        return
    engine = Engine(backend, None)
    sequences = [
        engine.submit(
            job["prompt_ids"],
            SamplingParams(max_new_tokens=job["tokens"], temperature=job["temperature"], seed=seed),
        )[0]
        for seed in range(job["seeds"])
    ]
    while engine.running or engine.waiting:
        engine.step()
    engine.close()
    for sequence in sequences:
        if sequence.error is not None:
            raise sequence.error
    result["tokens"] = [sequence.generated for sequence in sequences]


def _trace(backend: Backend, job: dict[str, Any], folder: Path, result: dict[str, Any]) -> None:
    if job["traced_ids"] is None:
        return
    result["traced"] = isinstance(backend, Traces)
    if isinstance(backend, Traces):
        found = backend.trace(job["traced_ids"])
        np.savez(
            folder / "trace.npz",
            hidden_states=found.hidden_states,
            attentions=found.attentions,
            logits=found.logits,
        )


def _described(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"


if __name__ == "__main__":
    main(Path(sys.argv[1]))
