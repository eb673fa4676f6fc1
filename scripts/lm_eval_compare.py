"""lm-evaluation-harness on local tasks, its `hf` model against `gpt2core serve`: run by scripts/lm-eval.

    python lm_eval_compare.py LM_EVAL MODEL TEXT

Three small tasks are made from a text file: the log likelihood of its paragraphs, the choice between a
paragraph's end and others, and a greedy continuation. Each sample's answers are compared, not only metrics.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import gpt2core
from gpt2core import GPT2

TOLERANCE: Final = 1e-3
"""Largest difference of a log likelihood, relative to it: both compute in float32, in another order."""
NEW_TOKENS: Final = 24
CHOICES: Final = 4
TASKS: Final[dict[str, dict[str, Any]]] = {
    "paragraphs": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "byte_perplexity"}, {"metric": "bits_per_byte"}],
    },
    "ends": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{begin}}",
        "doc_to_choice": "{{ends}}",
        "doc_to_target": "{{right}}",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    },
    "continuations": {
        "output_type": "generate_until",
        "doc_to_text": "{{begin}}",
        "doc_to_target": "{{ends[right]}}",
        "generation_kwargs": {"until": ["\n\n"], "max_gen_toks": NEW_TOKENS, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
    },
}


def write_tasks(folder: Path, text: str, model: GPT2) -> int:
    """Write the documents and one task file each; how many documents."""
    most = model.config.n_positions - NEW_TOKENS - 1
    paragraphs = [" ".join(part.split()) for part in text.split("\n\n")]
    paragraphs = [part for part in paragraphs if 12 <= len(part.split()) <= 200]
    paragraphs = [part for part in paragraphs if len(model.tokenizer.encode(part)) <= most][:40]
    if len(paragraphs) < CHOICES:
        sys.exit(
            f"the text has {len(paragraphs)} paragraphs of 12 words or more; give one that has {CHOICES}"
        )
    begins, ends = [], []
    for paragraph in paragraphs:
        words = paragraph.split(" ")
        begins.append(" ".join(words[: len(words) // 2]))
        ends.append(" " + " ".join(words[len(words) // 2 :][:20]))
    documents = []
    for i, paragraph in enumerate(paragraphs):
        others = [ends[(i + j) % len(ends)] for j in range(CHOICES)]
        right = i % CHOICES
        others[0], others[right] = others[right], others[0]
        documents.append({"text": paragraph, "begin": begins[i], "ends": others, "right": right})
    data = folder / "documents.jsonl"
    data.write_text("".join(json.dumps(document) + "\n" for document in documents))
    for name, task in TASKS.items():
        source = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}}}
        (folder / f"{name}.yaml").write_text(
            json.dumps({"task": name, "test_split": "test", **source, **task})  # JSON is YAML too
        )
    return len(documents)


@contextmanager
def serving(model: str) -> Iterator[str]:
    """The server as a process of its own; its URL."""
    command = [sys.executable, "-m", "gpt2core", "serve", "--model", model, "--port", "0", "--offline"]
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert server.stderr is not None
    try:
        port = None
        for line in server.stderr:
            event = json.loads(line)
            port = event["port"] if event["event"] == "listening" else port
            if event["event"] == "ready":
                break
        if port is None:
            sys.exit(f"the server ended with {server.wait()} before it listened")
        subprocess.Popen(
            ["cat"], stdin=server.stderr, stdout=subprocess.DEVNULL
        )  # or it would block on a full pipe
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait()


def evaluate(program: str, folder: Path, kind: str, arguments: str) -> dict[str, Any]:
    """Run the harness; for each task its metrics and its samples' answers."""
    output = folder / kind
    command = [program, "--model", kind, "--model_args", arguments, "--tasks", ",".join(TASKS)]
    command += [
        "--include_path",
        str(folder),
        "--output_path",
        str(output),
        "--log_samples",
        "--device",
        "cpu",
        "--batch_size",
        "4",
    ]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **offline})
    if done.returncode:
        sys.exit(f"{kind}: the harness ended with {done.returncode}\n{done.stderr[-4000:]}")
    [results] = output.rglob("results_*.json")
    found: dict[str, Any] = {"metrics": json.loads(results.read_text())["results"]}
    for name in TASKS:
        [samples] = output.rglob(f"samples_{name}_*.jsonl")
        lines = [json.loads(line) for line in samples.read_text().splitlines()]
        found[name] = {line["doc_id"]: line["filtered_resps"] for line in lines}
    return found


def differences(ours: Any, theirs: Any) -> Iterator[str]:
    """What differs between two answers: numbers beyond the tolerance, anything else at all."""
    if isinstance(ours, list) and isinstance(theirs, list) and len(ours) == len(theirs):
        for one, other in zip(ours, theirs, strict=True):
            yield from differences(one, other)
        return
    try:
        mine, other = float(ours), float(theirs)
    except (TypeError, ValueError):
        if ours != theirs:
            yield f"{ours!r} is not {theirs!r}"
        return
    if abs(mine - other) > TOLERANCE * max(1.0, abs(other)):
        yield f"{mine} is not {other}"


def main(program: str, model: str, text: str) -> int:
    """Run both and compare."""
    folder = str(Path(gpt2core.__file__).parent / "demo") if model == "demo" else model
    with tempfile.TemporaryDirectory() as scratch:
        with GPT2.from_pretrained(folder) as loaded:
            count = write_tasks(Path(scratch), Path(text).read_text(), loaded)
            context = loaded.config.n_positions
        print(f"{count} paragraphs of {text}; {folder}", flush=True)
        hf = evaluate(program, Path(scratch), "hf", f"pretrained={folder},dtype=float32")
        with serving(folder) as url:
            arguments = (
                f"base_url={url}/v1/completions,model={Path(folder).name},tokenizer={folder},"
                f"tokenized_requests=True,num_concurrent=2,max_length={context}"
            )
            served = evaluate(program, Path(scratch), "local-completions", arguments)
    failed = 0
    for name in TASKS:
        faults = [
            f"{name} {number}: {fault}"
            for number, answers in hf[name].items()
            for fault in differences(served[name].get(number), answers)
        ]
        failed += len(faults)
        metrics = {k: v for k, v in served["metrics"][name].items() if isinstance(v, float)}
        print(json.dumps({"task": name, "samples": len(hf[name]), "differ": len(faults), "served": metrics}))
        print("\n".join(faults[:5]), end="\n" if faults else "")
    print(
        f"{failed} answers differ"
        if failed
        else "the server and the harness's hf model agree on every sample"
    )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
