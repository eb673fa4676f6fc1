"""gpt2core's own backends, through its public API: scheduling, sampling and text are timed too."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from gpt2core import GPT2, Batch, open_checkpoint
from gpt2core.backends import load_factory
from gpt2core.backends.base import BuildsOnce


def start(job: dict[str, Any]) -> None:
    """Import the framework, as the peers import theirs."""
    runs = getattr(load_factory(job["engine"]), "precisions", ("float32",))
    if job["precision"] not in runs:
        raise NotImplementedError(f"{job['engine']} runs {', '.join(runs)}, not {job['precision']}")


def build(job: dict[str, Any]) -> None:
    """Compile what the backend keeps in the user's cache, where it does so."""
    factory = load_factory(job["engine"])
    if not isinstance(factory, BuildsOnce):
        raise NotImplementedError("it keeps nothing compiled")
    factory.build()


def prepare(job: dict[str, Any]) -> None:
    """Round the checkpoint once, as a user would, and keep it in a folder; one that is rounded is let be."""
    rounded = open_checkpoint(job["checkpoint"]).stored.precision != "float32"
    if job["precision"] != "float32" and not rounded:
        command = ["quantize", job["checkpoint"], job["work"], "--precision", job["precision"], "--offline"]
        subprocess.run([sys.executable, "-m", "gpt2core", *command], check=True)


def load(job: dict[str, Any]) -> "Gpt2coreEngine":
    """Load the checkpoint, or what it was rounded to, on the backend that the job names."""
    rounded = Path(job["work"], "config.json").exists()
    model = GPT2.from_pretrained(
        job["work"] if rounded else job["checkpoint"],
        backend=job["engine"],
        precision=job["precision"],
        device=job["device"],
        threads=job["threads"],
        local_files_only=True,
        max_batch=max(job["batches"], default=1),
    )
    return Gpt2coreEngine(model, {name: job[name] for name in ("threads", "device", "precision")})


class Gpt2coreEngine:
    """`GPT2` as an engine."""

    def __init__(self, model: GPT2, settings: dict[str, Any]) -> None:
        self._model, self.settings = model, settings

    def generate(self, prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
        """Greedy."""
        out = self._model.generate(prompts, max_new_tokens=new_tokens, min_new_tokens=new_tokens)
        return [generation.token_ids for generation in out]

    def logits(self, ids: list[int]) -> np.ndarray[Any, Any]:
        """(T, V)."""
        return self._model.logits(ids)

    def step_at(self, position: int) -> Callable[[], object]:
        """A pass of one token over a cache that holds `position` others."""
        backend, vocab_size = self._model.backend, self._model.config.vocab_size
        cache = backend.new_cache(1, self._model.config.n_positions)
        before = [i * 7919 % vocab_size for i in range(position)]
        backend.forward(Batch.of([(before, 0, 0)]), cache)
        step = Batch.of([([5], position, 0)])
        return lambda: backend.forward(step, cache)
