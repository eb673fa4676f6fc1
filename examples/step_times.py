"""Where a pass's time goes at each batch size, and how near it comes to the machine's read bandwidth.

    python examples/step_times.py FOLDER --backends onnx,torch --threads 2
    python examples/step_times.py --random small --backends onnx --precision int8

A step gives one token to each of `--batch` texts with `--position` tokens before it; a prefill reads a prompt
of `--prefill` tokens. A part is what goes away with it, all of them timed in turn:

- head: the step, less that of the same model with a vocabulary of 16;
- past: the step, less one with a single token before it: attention to the cached tokens;
- layers: the rest; products, norms, activations.

"reads" is the weights' bytes over the step's time, each weight counted once, as a share of what plain reading
reaches here with as many threads; the cache's own bytes are in its column, in MB for a step.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from gpt2core import Batch, open_checkpoint
from gpt2core.backends import create_backend
from gpt2core.bench.compare.bandwidth import read_bandwidth
from gpt2core.encodings import Int8
from gpt2core.weights import Weights

SMALL_VOCABULARY = 16


def with_small_vocabulary(weights: Any) -> Any:
    """The same layers; the head and the embedding keep their first rows only."""

    def cut(table: Any) -> Any:
        if isinstance(table, Int8):
            return Int8(table.values[:SMALL_VOCABULARY], table.scale[:SMALL_VOCABULARY])
        return table[:SMALL_VOCABULARY]

    wte = cut(weights.wte)
    head = wte if weights.lm_head is weights.wte else cut(weights.lm_head)
    config = replace(weights.config, vocab_size=SMALL_VOCABULARY, bos_token_id=None, eos_token_ids=())
    return replace(weights, config=config, wte=wte, lm_head=head)


def fastest_ms(runs: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Milliseconds of the fastest of `rounds` calls of each, taken in turn after one that does not count."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds + 1):
        for name, run in runs.items():
            began_s = time.perf_counter()
            run()
            times[name].append((time.perf_counter() - began_s) * 1e3)
    return {name: min(all_of_it[1:]) for name, all_of_it in times.items()}


def stepping(backend: Any, batch: int, position: int) -> Callable[[], object]:
    """A step of `batch` texts that all have `position` tokens before it."""
    cache = backend.new_cache(batch, position + 1)
    before = [i % SMALL_VOCABULARY for i in range(position)]
    backend.forward(Batch.of([(before, 0, slot) for slot in range(batch)]), cache)
    step = Batch.of([([slot % SMALL_VOCABULARY], position, slot) for slot in range(batch)])
    return lambda: backend.forward(step, cache)


def reading(backend: Any, tokens: int) -> Callable[[], object]:
    """A prompt from its beginning to its last token's logits."""
    cache = backend.new_cache(1, tokens)
    prompt = Batch.of([([i % SMALL_VOCABULARY for i in range(tokens)], 0, 0)])
    return lambda: backend.forward(prompt, cache)


def read_nbytes(weights: Weights) -> int:
    """Bytes of the weights that a step reads: all, but of the embeddings only the head."""
    embedding = 0 if weights.lm_head is weights.wte else sum(a.nbytes for a in arrays_of(weights.wte))
    return sum(a.nbytes for _, a in weights.named()) - weights.wpe.nbytes - embedding


def arrays_of(table: Any) -> list[np.ndarray]:
    """A table's arrays, whatever its encoding."""
    return [table] if isinstance(table, np.ndarray) else [array for _, array in table.arrays()]


def main() -> None:
    """Measure and print one table per backend."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", nargs="?", help="a checkpoint, quantized or not")
    parser.add_argument("--random", metavar="SIZE", help="small, medium, large or xl, with random weights")
    parser.add_argument("--precision", default="float32", help="rounded to once, before")
    parser.add_argument("--backends", default="onnx")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch", default="1,8,32")
    parser.add_argument("--position", type=int, default=72)
    parser.add_argument("--prefill", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=20)
    args = parser.parse_args()
    if (args.folder is None) == (args.random is None):
        parser.error("name a folder, or --random SIZE")
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.folder
        if args.random:
            from gpt2core.testing import random_checkpoint

            folder = str(random_checkpoint(f"{scratch}/float32", args.random))
        if args.precision != "float32":
            command = ("quantize", folder, f"{scratch}/rounded", "--precision", args.precision)
            subprocess.run([sys.executable, "-m", "gpt2core", *command], stdout=sys.stderr, check=True)
            folder = f"{scratch}/rounded"
        weights = open_checkpoint(folder).stored
        bandwidth = read_bandwidth(args.threads)["value"]
        print(f"weights read {read_nbytes(weights) / 1e6:.0f} MB, bandwidth {bandwidth / 1e9:.1f} GB/s")
        for name in args.backends.split(","):
            measure(name, weights, bandwidth, args)


def measure(name: str, weights: Any, bandwidth: float, args: argparse.Namespace) -> None:
    """The table of one backend."""
    print(f"\n| {name} | pass, ms | layers | past | head | cache read, MB | reads |")
    print("|---" * 7 + "|")
    whole = create_backend(name, weights, threads=args.threads)
    headless = create_backend(name, with_small_vocabulary(weights), threads=args.threads)
    for batch in map(int, args.batch.split(",")):
        ms = fastest_ms(
            {
                "whole": stepping(whole, batch, args.position),
                "near": stepping(whole, batch, 1),
                "headless": stepping(headless, batch, args.position),
            },
            args.rounds,
        )
        head, past = ms["whole"] - ms["headless"], ms["whole"] - ms["near"]
        cached = whole.new_cache(batch, args.position).nbytes
        share = read_nbytes(weights) / (ms["whole"] * 1e-3) / bandwidth
        layers = ms["whole"] - head - past
        print(
            f"| batch {batch} | {ms['whole']:.2f} | {layers:.2f} | {past:.2f} | {head:.2f} "
            f"| {cached / 1e6:.0f} | {share:.0%} |",
            flush=True,
        )
    if args.prefill:
        ms = fastest_ms(
            {"whole": reading(whole, args.prefill), "headless": reading(headless, args.prefill)},
            max(3, args.rounds // 4),
        )
        head = ms["whole"] - ms["headless"]
        print(f"| prefill {args.prefill} | {ms['whole']:.0f} | {ms['headless']:.0f} | | {head:.1f} | | |")
    whole.close()
    headless.close()


if __name__ == "__main__":
    main()
