"""Do backends that sit idle in a process slow down the one that works? Each keeps a thread pool of its own.

    pip install -c constraints.txt "gpt2core[all]"
    python examples/idle_interference.py CHECKPOINT_FOLDER
    python examples/idle_interference.py --random small      # GPT-2 small's shape with random weights

For each backend two processes: one that loaded it alone, and one where all others were loaded too and have
run a pass. They take turns with a few decode steps each, so that a drift of the machine's speed hits both of
a pair, and the first of a pair changes from pair to pair. The table gives the medians and the median of the
pairs' ratios; the exit code is 1 where a ratio is above the limit.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time

BACKENDS = ("numpy", "native", "torch", "jax", "onnx")
PROMPT = [(i * 7919) % 50000 for i in range(32)]
STEPS = 8


def serve(folder: str, threads: int, name: str, others: list[str]) -> None:
    """Load `name` and let the others run once; then, for each line read, print the median step in ms."""
    from gpt2core import Batch, open_checkpoint
    from gpt2core.backends import create_backend

    weights = open_checkpoint(folder).weights
    vocab = weights.config.vocab_size
    prompt, step = Batch.of([([t % vocab for t in PROMPT], 0, 0)]), Batch.of([([5], len(PROMPT), 0)])
    loaded = []
    for each in (name, *others):
        backend = create_backend(each, weights, threads=threads)
        cache = backend.new_cache(1, weights.config.n_positions)
        for batch in (prompt, step):
            backend.forward(batch, cache)
        loaded.append((backend, cache))  # kept, so that every pool stays
    backend, cache = loaded[0]
    print("ready", flush=True)
    for _ in sys.stdin:
        times_ms = []
        for _ in range(STEPS):
            start_s = time.perf_counter()
            backend.forward(step, cache)
            times_ms.append((time.perf_counter() - start_s) * 1e3)
        print(statistics.median(times_ms), flush=True)


class Process:
    """A child that answers one measurement at a time and sleeps in between."""

    def __init__(self, folder: str, threads: int, name: str, others: list[str]) -> None:
        command = [sys.executable, __file__, folder, "--threads", str(threads), "--serve", name, *others]
        self._child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        if self._line() != "ready":
            raise SystemExit(f"the process of {name} beside {others} did not start; see above")

    def step_ms(self) -> float:
        """Median milliseconds of a few decode steps."""
        assert self._child.stdin is not None
        print("go", file=self._child.stdin, flush=True)
        return float(self._line())

    def close(self) -> None:
        """End the child."""
        self._child.communicate()

    def _line(self) -> str:
        assert self._child.stdout is not None
        return self._child.stdout.readline().strip()


def compare(
    folder: str, threads: int, name: str, others: list[str], pairs: int
) -> tuple[float, float, float]:
    """Median step in ms alone and beside the others, and the median ratio of a pair."""
    alone, beside = Process(folder, threads, name, []), Process(folder, threads, name, others)
    both = (alone, beside)
    for process in both:
        process.step_ms()  # warms up
    measured = []
    for i in range(pairs):
        first = i % 2
        times = {process: process.step_ms() for process in (both[first], both[1 - first])}
        measured.append((times[alone], times[beside]))
    for process in both:
        process.close()
    ratio = statistics.median(b / a for a, b in measured)
    return statistics.median(a for a, _ in measured), statistics.median(b for _, b in measured), ratio


def main() -> None:
    """Compare every backend that is available, print the table."""
    from gpt2core.backends import available

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", nargs="?", help="a checkpoint in Hugging Face layout")
    parser.add_argument("--random", metavar="SIZE", help="small, medium, large or xl, with random weights")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--limit", type=float, default=1.10, help="largest ratio that passes")
    parser.add_argument("--serve", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        serve(args.folder, args.threads, args.serve[0], args.serve[1:])
        return
    if (args.folder is None) == (args.random is None):
        parser.error("name a folder, or --random SIZE")
    infos = available()
    names = [name for name in BACKENDS if name in infos and infos[name].available]
    if len(names) < 2:
        parser.error(f"it takes two backends; here is {', '.join(names)}")
    worst = 0.0
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.folder
        if args.random:
            from gpt2core.testing import random_checkpoint

            folder = str(random_checkpoint(scratch, args.random))
        print("| backend | alone, ms per step | beside idle others | ms per step | ratio |")
        print("|---|---|---|---|---|")
        for name in names:
            others = [other for other in names if other != name]
            alone, beside, ratio = compare(folder, args.threads, name, others, args.pairs)
            worst = max(worst, ratio)
            print(f"| {name} | {alone:.2f} | {', '.join(others)} | {beside:.2f} | {ratio:.3f} |", flush=True)
    if worst > args.limit:
        raise SystemExit(f"a backend is slowed to {worst:.3f} of its time alone; the limit is {args.limit}")


if __name__ == "__main__":
    main()
