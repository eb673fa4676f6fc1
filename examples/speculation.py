"""Batch-1 decoding with and without prompt lookup, in pairs, on texts that repeat themselves and on others.

    python examples/speculation.py FOLDER --backend onnx --threads 2
    python examples/speculation.py --random small --backend onnx --threads 2   # GPT-2 small's shape
    python examples/speculation.py demo

The first three texts are given: the model computes every pass, and then each token of the text is made the
likeliest where its turn comes, so that any model, with random weights too, writes them.

- "repeating": 32 tokens, again and again. The best case.
- "unrelated": no token occurs twice, so that nothing is ever proposed. What looking costs.
- "misleading": three tokens that recur, and each time another one follows, so that every proposal is
  refused. The worst case.

The others are what the model itself writes after a prompt, greedily and at temperature 0.8.

Each text is written `--rounds` times by either way in turn, the order changing from round to round. A ratio
is that of the decoding speeds of one such pair (above 1: prompt lookup is faster). The tokens are compared;
where a backend rounds its inputs to 8 bits (onnx, int8 and int4) they may differ, elsewhere that is an error.

`--passes` times single passes instead, over one row of several tokens beside one of a single token, and shows
what the backend says of it (`extra_tokens_cost`, by which refused proposals are limited).
"""

import argparse
import random
import statistics
import sys
import tempfile
import time
from typing import Any

import numpy as np

from gpt2core import GPT2, Backend, Batch, Cache, Generation
from gpt2core.backends.base import EstimatesCost


class Scripted:
    """A backend that computes as another one does, and then lets a given text be the likeliest."""

    def __init__(self, inner: Backend) -> None:
        self.inner, self.name, self.config = inner, inner.name, inner.config
        self.script: np.ndarray | None = None  # (T,) token ids by position

    def new_cache(self, slots: int, capacity: int) -> Cache:
        """The other one's."""
        return self.inner.new_cache(slots, capacity)

    def forward(self, batch: Batch, cache: Cache) -> np.ndarray:
        """Compute, then decide."""
        logits = self.inner.forward(batch, cache)  # (M, V)
        if self.script is not None:
            following = batch.positions[batch.logits_at] + 1  # (M,)
            logits[np.arange(len(logits)), self.script[following]] = 1e6
        return logits

    def close(self) -> None:
        """Close the other one."""
        self.inner.close()


def scripts(vocab_size: int, context: int) -> dict[str, list[int]]:
    """The given texts, each a whole context long."""
    rng = random.Random(0)
    different = rng.sample(range(1, vocab_size), min(vocab_size - 1, context))
    motif, rest = different[:3], different[3:]
    return {
        "repeating": (different[:32] * context)[:context],
        "unrelated": different,
        "misleading": [token for other in rest for token in (*motif, other)][:context],
    }


def measure(
    models: dict[str, GPT2], prompt: Any, rounds: int, *, exact: bool, **params: Any
) -> tuple[list[dict[str, float]], Generation, int]:
    """Tokens per second of both ways, round by round, the last text with speculation, and the equal pairs."""
    speeds, same = [], -1  # the first round warms up
    for i in range(rounds + 1):
        outs = {name: models[name].generate(prompt, **params) for name in list(models)[:: (-1) ** i]}
        equal = outs["off"].token_ids == outs["on"].token_ids
        assert equal or not exact, "the tokens differ"
        same += equal if i > 0 else 1
        speeds.append({name: out.timing.tokens_per_s or 0.0 for name, out in outs.items()})
    return speeds[1:], outs["on"], same


def main() -> None:
    """Measure, print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?", default="demo", help="demo, a folder, or an id on the hub")
    parser.add_argument("--random", metavar="SIZE", help="small, medium, large or xl, with random weights")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--new-tokens", type=int, default=200)
    parser.add_argument("--passes", action="store_true", help="time passes over several tokens instead")
    parser.add_argument("--prompt", default="Once upon a time there was a king")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        model = args.model
        if args.random:
            from gpt2core.testing import random_checkpoint

            model = str(random_checkpoint(scratch, args.random))
        options = {"backend": args.backend, "precision": args.precision, "threads": args.threads}
        with GPT2.from_pretrained(model, **options) as loaded:
            if args.passes:
                time_passes(loaded.backend, args.rounds)
            else:
                run(loaded, args)


def time_passes(backend: Backend, rounds: int) -> None:
    """Print how much longer a pass over several tokens of one text takes than one over a single token."""
    start = backend.config.n_positions // 2
    cache = backend.new_cache(1, backend.config.n_positions)
    backend.forward(Batch.of([(range(start), 0, 0)]), cache)
    times_s: dict[int, list[float]] = {n: [] for n in (1, 2, 4, 8, 16)}
    for i in range(10 * rounds + 1):
        for n, measured in times_s.items():
            batch = Batch.of([(range(n), start, 0)], range(n))
            start_s = time.perf_counter()
            backend.forward(batch, cache)
            if i > 0:  # the first round compiles and warms up
                measured.append(time.perf_counter() - start_s)
    print("| tokens | ms, median | longer than one token, in such passes | said |")
    print("|---|---|---|---|")
    for n, measured in times_s.items():
        ratios = [several / one - 1 for several, one in zip(measured, times_s[1], strict=True)]
        said = (
            f"{backend.extra_tokens_cost(n - 1, 1):.2f}"
            if isinstance(backend, EstimatesCost) and n > 1
            else ""
        )
        print(f"| {n} | {1e3 * statistics.median(measured):.2f} | {statistics.median(ratios):.2f} | {said} |")


def run(loaded: GPT2, args: argparse.Namespace) -> None:
    """Measure every text and print its line as soon as it is known."""
    backend, context = Scripted(loaded.backend), loaded.config.n_positions
    models = {
        "off": GPT2(backend, loaded.tokenizer, max_batch=1),
        "on": GPT2(backend, loaded.tokenizer, max_batch=1, speculation="prompt_lookup"),
    }
    print(f"backend {backend.name}, {args.threads} threads, {args.rounds} pairs of {args.new_tokens} tokens")
    print("| text | off, tok/s | on, tok/s | ratio, median (least to most) | accepted | same tokens |")
    print("|---|---|---|---|---|---|")
    exact = backend.name != "onnx" or getattr(loaded.backend, "precision", "float32") == "float32"
    given = scripts(loaded.config.vocab_size, context)
    own = {"the model's own, greedy": 0.0, "the model's own, temperature 0.8": 0.8}
    for name in (*given, *own):
        prompt: Any = args.prompt
        params: dict[str, Any] = {"seed": 1, "temperature": own.get(name, 0.0)}
        backend.script = None
        room = context - len(loaded.tokenizer.encode(args.prompt))
        if name in given:
            script, prompt_tokens = given[name], min(64, len(given[name]) // 2)
            backend.script = np.array([*script, 0], np.int64)
            prompt, room = script[:prompt_tokens], len(script) - prompt_tokens
        params["max_new_tokens"] = params["min_new_tokens"] = min(args.new_tokens, room)
        speeds, out, same = measure(models, prompt, args.rounds, exact=exact, **params)
        ratios = [pair["on"] / pair["off"] for pair in speeds]
        off, on = (statistics.median(pair[way] for pair in speeds) for way in ("off", "on"))
        spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        accepted = f"{out.timing.accepted_tokens} of {out.timing.proposed_tokens}"
        print(f"| {name} | {off:.0f} | {on:.0f} | {spread} | {accepted} | {same} of {args.rounds} |")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
