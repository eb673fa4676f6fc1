"""Is what a peer computes right? On every variant of the family, against gpt2core's checked arithmetic.

For each of `gpt2core.testing.VARIANTS` a tiny random checkpoint is written, the engine loads it as it would
load any other, and its logits and its greedy tokens are compared with those of the NumPy backend, which the
conformance suite holds to a float64 reference.
"""

import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np

from gpt2core import GPT2
from gpt2core.bench.compare import worker
from gpt2core.bench.compare.worker import EngineSetup
from gpt2core.testing import VARIANTS, random_checkpoint

TOLERANCE: Final = 0.05
"""Largest allowed difference of a float32 logit; the models' logits spread by about 1.5.

What is right differs by 1e-5, but llama.cpp, which rounds to half precision inside, by 0.013; what is wrong
differs by more than 1.
"""

LOSSY_TOLERANCES: Final = {"float16": 0.01, "bfloat16": 0.05, "int8": 0.2, "int4": 0.6}
"""Largest allowed root mean square of the differences over the logits' spread, by precision.

A single logit may be far off in these, so that the largest difference says little.
"""

LOSSY_MARGIN: Final = 6.0
"""How many times that a greedy token's logit may lie below the largest."""

IDS: Final = tuple(i * 79 % 257 for i in range(40))
PROMPT_TOKENS: Final = 8
NEW_TOKENS: Final = 24

Logits = np.ndarray[Any, Any]


def check(
    engine: EngineSetup,
    *,
    threads: int,
    variants: Mapping[str, Mapping[str, Any]] = VARIANTS,
    timeout_s: float = 1800.0,
) -> Iterator[dict[str, Any]]:
    """Compare an engine with the reference; yields a result for each variant, exactly one.

    A result has "variant", "value" (1.0 or 0.0, None where there is none), "difference" (the largest of a
    logit, or None), "status", "error" (how it differs, or why there is no answer) and "settings". A variant
    on which the engine's process dies is a failure; the others are tried again in a new process.
    """
    job = {"task": "check", "ids": IDS, "prompt": IDS[:PROMPT_TOKENS], "new_tokens": NEW_TOKENS}
    job |= {"batches": [1], "threads": threads, "device": "cpu"}
    with tempfile.TemporaryDirectory(prefix="gpt2core-bench-check-") as name:
        folder = Path(name)
        models = []
        for variant, fields in variants.items():
            (work := folder / "work" / variant).mkdir(parents=True)
            checkpoint = random_checkpoint(folder / variant, **fields)
            models.append({"variant": variant, "checkpoint": str(checkpoint), "work": str(work)})
        while models:
            lines, died = worker.run_engine(
                engine, {**job, "models": models}, timeout_s=timeout_s, folder=folder
            )
            answers = {line["variant"]: line for line in lines if "variant" in line}
            whole = next((line for line in lines if "status" in line and "variant" not in line), None)
            if died and not whole:  # at the one that it had begun last, or before any
                begun = [line["begins"] for line in lines if "begins" in line]
                at = begun[-1] if begun and begun[-1] not in answers else models[0]["variant"]
                answers.setdefault(at, {"status": "failed", "error": died})
            for model in models:
                if answer := answers.get(model["variant"], whole):
                    yield _judge(engine.precision, model, answer)
            models = [m for m in models if whole is None and m["variant"] not in answers]


def _judge(precision: str, model: Mapping[str, str], answer: Mapping[str, Any]) -> dict[str, Any]:
    result: dict[str, Any] = {"error": None, "settings": {}} | {
        name: answer[name] for name in ("status", "error", "settings") if name in answer
    }
    result |= {"variant": model["variant"], "value": None, "difference": None}
    if answer["status"] != "ok":
        return result
    prompt, tokens = list(IDS[:PROMPT_TOKENS]), answer["tokens"]
    with GPT2.from_pretrained(model["checkpoint"], backend="numpy", threads=1) as reference:
        want = reference.logits(IDS)
        legal = [token for token in tokens if 0 <= token < want.shape[1]]
        after = reference.logits([*prompt, *legal])[len(prompt) - 1 :]
    result["difference"], fault = _compare_logits(np.load(answer["logits"]), want, precision)
    fault = fault or _compare_tokens(tokens, after, precision)
    return result | {"value": 0.0 if fault else 1.0, "error": fault}


def _compare_logits(got: Logits, want: Logits, precision: str) -> tuple[float | None, str | None]:
    """The largest difference, and what is wrong with it."""
    if got.shape != want.shape:
        return None, f"its logits have the shape {got.shape}, not {want.shape}"
    off = np.abs(got - want)
    largest, spread = float(off.max()), float(want.std())
    if not np.isfinite(largest):
        return None, "its logits are not finite"
    if precision == "float32":
        wrong = f"a logit is off by {largest:.2g}, allowed is {TOLERANCE:g}; logits spread by {spread:.2g}"
        return largest, wrong if largest > TOLERANCE else None
    share, allowed = float(np.sqrt(np.square(off).mean())) / spread, LOSSY_TOLERANCES[precision]
    wrong = f"logits are off by {share:.2g} of their spread, allowed is {allowed:g} in {precision}"
    return largest, wrong if share > allowed else None


def _compare_tokens(tokens: list[int], after: Logits, precision: str) -> str | None:
    """Each token must have nearly the largest logit of the reference after the same text."""
    if len(tokens) != NEW_TOKENS or len(after) != len(tokens) + 1:
        return f"it generated {len(tokens)} tokens of the vocabulary, asked for {NEW_TOKENS}"
    margin = 2 * TOLERANCE
    if precision != "float32":
        margin = LOSSY_MARGIN * LOSSY_TOLERANCES[precision] * float(after.std())
    for index, token in enumerate(tokens):
        behind = float(after[index].max() - after[index][token])
        if behind > margin:
            return f"greedy token {index} is {token}, whose logit is {behind:.2g} below the largest"
    return None
