"""Output folders of `gpt2core bench` with a known answer, written without measuring anything."""

import json
from pathlib import Path
from typing import Any

import numpy as np

ENVIRONMENT = {
    "id": "0123456789abcdef",
    "machine": {
        "cpu": "Imaginary CPU @ 3 GHz",
        "cores": 2,
        "memory_nbytes": 8 * 2**30,
        "system": "Linux 6.1",
        "architecture": "x86_64",
    },
    "python": "3.11.7",
    "gpt2core": "0.1.0",
    "packages": {"numpy": "2.4.6"},
}
PROMPTS = (
    "Once upon a time",
    "In a galaxy far, far away",
    "def fibonacci(n):",
    "The capital of France is",
    "It was a dark and stormy night, and the rain fell in torrents",
)


def _write(folder: Path, settings: dict[str, Any], lines: list[dict[str, Any]]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "environment.json").write_text(json.dumps(ENVIRONMENT))
    (folder / "settings.json").write_text(json.dumps(settings))
    text = "".join(json.dumps(line, allow_nan=False, ensure_ascii=False) + "\n" for line in lines)
    (folder / "runs.jsonl").write_text(text, encoding="utf-8")
    return folder


def classic_folder(
    folder: Path,
    *,
    prompts: tuple[str, ...] = PROMPTS,
    lengths: tuple[int, ...] = (50, 100, 200),
    runs: int = 5,
    step_s: float = 1e-3,
    growth_s: float = 0.0,
    effect_s: float = 0.0,
    noise: float = 0.01,
    failed: tuple[tuple[int, int, int], ...] = (),
    tokens_known: bool = True,
    seed: int = 0,
) -> Path:
    """A classic run: `step_s` a token, `growth_s` more per position, `effect_s` on prompt 2, failed cells."""
    rng = np.random.default_rng(seed)
    lines = []
    for run in range(-1, runs):
        for length in lengths if run >= 0 else lengths[:1]:
            for index, prompt in enumerate(prompts):
                count = 3 + 2 * (index % 4)
                new = length - count
                steps = step_s + growth_s * (count + np.arange(new))
                steps *= 1 + rng.normal(0, 3 * noise, new).clip(-0.9, 0.9)
                steps[0] += 4e-3 + 1e-4 * count + (0.05 if run < 0 else 0)
                steps *= 1 + rng.normal(0, noise)
                times = np.cumsum(steps)
                elapsed = times[-1] + (effect_s if index == 2 else 0)
                line = {
                    "kind": "classic", "cell": [index, length, run], "prompt": prompt, "length": length,
                    "run": run, "status": "ok", "error": None, "attempts": 1, "elapsed_s": elapsed,
                    "ttft_s": times[0], "token_times_s": times.tolist(), "prompt_tokens": count,
                    "completion_tokens": new, "finish_reason": "length", "seed": 7, "text": "text",
                    "backend": "numpy", "precision": "float32", "model": "demo", "url": None,
                    "environment": ENVIRONMENT["id"], "started_at": "2026-01-02T03:04:05Z",
                }  # fmt: skip
                measured = ("elapsed_s", "ttft_s", "token_times_s", "prompt_tokens", "completion_tokens")
                unknown = () if tokens_known else ("prompt_tokens", "completion_tokens", "token_times_s")
                if (index, length, run) in failed:
                    line |= {"status": "failed", "error": "TimeoutError: no answer after 30 s", "attempts": 3}
                    unknown = (*measured, "finish_reason", "text")
                lines.append(line | dict.fromkeys(unknown))
    settings = {
        "kind": "classic", "model": "demo", "backend": "numpy", "precision": "float32",
        "prompts": list(prompts), "lengths": list(lengths), "runs": runs, "seed": 7,
    }  # fmt: skip
    return _write(folder, settings, lines)


SPEEDS = {"numpy": 40.0, "torch": 60.0, "onnx": 75.0, "jax": 50.0, "transformers": 30.0, "ctranslate2": 90.0}
"""Tokens per second of each engine with one sequence."""


def comparison_folder(
    folder: Path,
    *,
    engines: tuple[str, ...] = tuple(SPEEDS),
    precisions: tuple[str, ...] = ("float32",),
    batches: tuple[int, ...] = (1, 8, 32),
    lengths: tuple[int, ...] = (32, 128, 512),
    positions: tuple[int, ...] = (100, 500, 1000),
    rounds: int = 5,
    wrong: tuple[str, ...] = ("ctranslate2",),
    skipped: tuple[str, ...] = ("llamacpp",),
    failed: tuple[str, ...] = (),
    drift: float = 1.0,
    others_cores: float | None = None,
    steal_share: float | None = None,
    seed: int = 0,
    **settings: Any,
) -> Path:
    """A comparison of engines of known speeds; the machine becomes slower, by `drift` in all."""
    rng = np.random.default_rng(seed)
    lines: list[dict[str, Any]] = []

    def add(engine: str, measure: str, value: float | None, unit: str, **fields: Any) -> None:
        peer = engine in ("transformers", "ctranslate2", "llamacpp")
        lines.append({
            "kind": "comparison", "engine": engine, "family": "peer" if peer else "gpt2core",
            "precision": "float32", "round": 0, "measure": measure, "batch": None, "length": None,
            "position": None, "value": value, "unit": unit, "tokens": None, "status": "ok", "error": None,
            "settings": {"threads": 2}, "environment": ENVIRONMENT["id"],
            "started_at": "2026-01-02T03:04:05Z", **fields,
        })  # fmt: skip

    for engine in skipped:
        reason = f"{engine} is not installed; pip install {engine}"
        add(engine, "load_s", None, "s", status="skipped", error=reason)
    for index in range(rounds):
        slower = drift ** (index / max(rounds - 1, 1))
        add("machine", "read_bandwidth", 2e10 / slower, "bytes/s", round=index)
        for measure, value in (("others_cores", others_cores), ("steal_share", steal_share)):
            if value is not None:
                add("machine", measure, value, "", round=index)
        for engine in engines:
            for precision in precisions:
                speed = SPEEDS.get(engine, 45.0) * (2.5 if precision == "int8" else 1)
                common = {"round": index, "precision": precision}

                def noisy(value: float, slower: float = slower) -> float:
                    return value * slower * (1 + rng.normal(0, 0.01))

                if engine in failed:
                    crash = {"status": "failed", "error": "MemoryError: no room for the cache", **common}
                    add(engine, "decode_tok_s", None, "tok/s", batch=1, **crash)
                    continue
                add(engine, "start_s", noisy(0.3 + 20 / speed), "s", **common)
                add(engine, "load_s", noisy(0.2 + 10 / speed), "s", **common)
                add(engine, "compile_s", noisy(2.0) if engine == "jax" else 0.0, "s", **common)
                add(engine, "ttft_s", noisy(1.5 / speed), "s", **common)
                add(engine, "first_token_cold_s", noisy(0.6 + 30 / speed), "s", **common)
                add(engine, "peak_memory_nbytes", (6e8 + 2e10 / speed) * (1 + rng.normal(0, 0.001)), "bytes",
                    **common)  # fmt: skip
                add(engine, "weight_nbytes", 5e8 / (4 if precision == "int8" else 1), "bytes", **common)
                for batch in batches:
                    rate = speed * batch**0.7
                    add(engine, "decode_tok_s", rate / noisy(1.0), "tok/s", batch=batch, **common)
                for length in lengths:
                    add(engine, "prefill_s", noisy(length / (speed * 12) + 0.005), "s", length=length,
                        **common)  # fmt: skip
                for position in positions:
                    add(engine, "step_s", noisy((1 + position / 5000) / speed), "s", position=position,
                        **common)  # fmt: skip
    for engine in (*engines, *skipped):
        for variant in ("plain", "inverse_layer_scaling") if engine not in skipped else ():
            bad = engine in wrong and variant != "plain"
            add(engine, "correct", 0.0 if bad else 1.0, "bool", variant=variant,
                error="logits differ by 3.5, allowed is 0.0002" if bad else None)  # fmt: skip
    settings = {"kind": "comparison", "model": "demo", "threads": 2, **settings}
    return _write(folder, settings, lines)
