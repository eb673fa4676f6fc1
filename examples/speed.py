"""Compare gpt2core's backends with Hugging Face transformers: the same checkpoint, threads and work.

    pip install -c constraints.txt "gpt2core[all]" transformers
    python examples/speed.py CHECKPOINT_FOLDER --threads 2 --rounds 3
    python examples/speed.py --random small            # GPT-2 small's shape with random weights
    python examples/speed.py CHECKPOINT_FOLDER --engines onnx --precision int8

Each engine runs in a process of its own, one after the other, round by round, so that a drift of the
machine's speed hits all alike. A round is greedy decoding of 128 tokens after a prompt of 8 at batch 1, 8
and 32, the prefill of 512 tokens, and for gpt2core a decode step at position 1000 over one at position 10.
The table gives each engine's median and, for gpt2core, the median of the ratios to transformers of the same
round (above 1 is faster).
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable

PROMPT = [818, 257, 16161, 1290, 11, 1290, 1497, 11]
NEW_TOKENS = 128
BATCHES = (1, 8, 32)
LONG = [(i * 7919) % 50000 for i in range(1000)]


def best_s(run: Callable[[], object], repeats: int) -> float:
    """Seconds of the fastest of `repeats` runs."""
    times = []
    for _ in range(repeats):
        start_s = time.perf_counter()
        run()
        times.append(time.perf_counter() - start_s)
    return min(times)


def measure(generate: Callable[[int, int], object], prefill: Callable[[], object]) -> dict[str, float]:
    """One round of what every engine does: tokens per second at each batch size, and prefill in ms."""
    generate(1, 16)
    row = {f"b{b}": b * NEW_TOKENS / best_s(lambda b=b: generate(b, NEW_TOKENS), 2) for b in BATCHES}
    prefill()
    row["prefill_ms"] = best_s(prefill, 3) * 1e3
    return row


def run_transformers(folder: str, threads: int) -> dict[str, float]:
    """`generate` with its default attention and cache."""
    import torch
    from transformers import GPT2LMHeadModel

    torch.set_num_threads(threads)
    model = GPT2LMHeadModel.from_pretrained(folder, dtype=torch.float32).eval()
    long = torch.tensor([LONG[:512]])

    @torch.inference_mode()
    def generate(batch: int, new_tokens: int) -> None:
        ids = torch.tensor([PROMPT] * batch)
        model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            do_sample=False,
            pad_token_id=0,
        )

    @torch.inference_mode()
    def prefill() -> None:
        model(long, logits_to_keep=1)

    return measure(generate, prefill)


def run_gpt2core(folder: str, threads: int, backend: str) -> dict[str, float]:
    """`GPT2.generate`, whole: scheduling, sampling and text included."""
    from gpt2core import GPT2, Batch

    model = GPT2.from_pretrained(folder, backend=backend, threads=threads)

    def generate(batch: int, new_tokens: int) -> None:
        out = model.generate([PROMPT] * batch, max_new_tokens=new_tokens, min_new_tokens=new_tokens)
        assert all(len(one.token_ids) == new_tokens for one in out)

    row = measure(generate, lambda: model.generate([LONG[:512]], max_new_tokens=1))
    cache = model.backend.new_cache(2, 1024)
    model.backend.forward(Batch.of([(LONG, 0, 0), (LONG[:10], 0, 1)]), cache)
    late, early = Batch.of([([5], 1000, 0)]), Batch.of([([5], 10, 1)])
    times = [
        (
            best_s(lambda: model.backend.forward(late, cache), 3),
            best_s(lambda: model.backend.forward(early, cache), 3),
        )
        for _ in range(10)
    ]
    row["late_step"] = statistics.median(a / b for a, b in times)
    return row


def main() -> None:
    """Run the rounds, print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", nargs="?", help="a checkpoint in Hugging Face layout")
    parser.add_argument("--random", metavar="SIZE", help="small, medium, large or xl, with random weights")
    parser.add_argument("--engines", default="transformers,numpy,native,torch,jax,onnx")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--precision", default="float32", help="of gpt2core: float32, int8, int4 or bfloat16; rounded once"
    )
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        run = run_transformers if args.one == "transformers" else run_gpt2core
        extra = () if args.one == "transformers" else (args.one,)
        print(json.dumps(run(args.folder, args.threads, *extra)))
        return
    if (args.folder is None) == (args.random is None):
        parser.error("name a folder, or --random SIZE")
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.folder
        if args.random:
            from gpt2core.testing import random_checkpoint

            folder = str(random_checkpoint(f"{scratch}/float32", args.random))
        own = folder  # what gpt2core loads; transformers always takes the float checkpoint
        if args.precision != "float32":
            own = f"{scratch}/{args.precision}"
            quantize = ("quantize", folder, own, "--precision", args.precision)
            subprocess.run([sys.executable, "-m", "gpt2core", *quantize], stdout=sys.stderr, check=True)
        rounds: dict[str, list[dict[str, float]]] = {name: [] for name in args.engines.split(",")}
        for i in range(args.rounds):
            for name, rows in rounds.items():
                which = folder if name == "transformers" else own
                command = [sys.executable, __file__, which, "--threads", str(args.threads), "--one", name]
                out = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True).stdout
                rows.append(json.loads(out.splitlines()[-1]))
                print(f"round {i + 1}: {name} {rows[-1]}", file=sys.stderr, flush=True)
    print_table(rounds)


def print_table(rounds: dict[str, list[dict[str, float]]]) -> None:
    """Medians per engine, and the median ratio to transformers of the same round."""
    keys = [f"b{b}" for b in BATCHES] + ["prefill_ms", "late_step"]
    heads = [f"b{b} tok/s" for b in BATCHES] + ["prefill 512 ms", "step at 1000 / at 10"]
    print("| engine | " + " | ".join(heads) + " |")
    print("|---" * (len(heads) + 1) + "|")
    for name, rows in rounds.items():
        cells = []
        for key in keys:
            if key not in rows[0]:
                cells.append("")
                continue
            cell = f"{statistics.median(row[key] for row in rows):.{2 if key == 'late_step' else 0}f}"
            if name != "transformers" and "transformers" in rounds and key != "late_step":
                pairs = [
                    (row[key], base[key]) for row, base in zip(rows, rounds["transformers"], strict=True)
                ]
                ratio = statistics.median(b / a if key == "prefill_ms" else a / b for a, b in pairs)
                cell += f" ({ratio:.2f}x)"
            cells.append(cell)
        print(f"| {name} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
