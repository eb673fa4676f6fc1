"""How fast texts are scored: packed on `native`, one by one, by transformers in batches, and by minicons.

    python examples/scoring_speed.py --sentences 2000 --rounds 3
    python examples/scoring_speed.py --long 50000 --rounds 1

GPT-2 small's shape with random weights. Sentences are random tokens, sorted by length for the others, which
pad; with `--long` it is one text in windows that move by 512 tokens, which minicons does not offer. In each
round every contender scores the same part of the texts once, in turn, so that all meet the same moods of the
machine; the table shows tokens per second (medians) and the median of the rounds' ratios to transformers.
minicons is left out where it is not installed.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from gpt2core import GPT2
from gpt2core.testing import random_checkpoint

Texts = list[list[int]]


def make_texts(count: int, low: int, high: int, vocab_size: int, seed: int) -> Texts:
    """Random tokens, `low` to `high` of them to a text."""
    rng = np.random.default_rng(seed)
    return [rng.integers(1, vocab_size, rng.integers(low, high + 1)).tolist() for _ in range(count)]


def transformers_loop(folder: Path, batch: int, threads: int) -> Callable[[Texts], None]:
    """The usual loop: sorted by length, padded, log-softmax of all logits."""
    import torch
    from transformers import GPT2LMHeadModel

    torch.set_num_threads(threads)
    model = GPT2LMHeadModel.from_pretrained(folder).eval()

    def score(texts: Texts) -> None:
        ordered = sorted(texts, key=len)
        with torch.inference_mode():
            for first in range(0, len(ordered), batch):
                part = ordered[first : first + batch]
                width = max(map(len, part))
                ids = torch.tensor([[*text, *[0] * (width - len(text))] for text in part])
                mask = torch.tensor([[1] * len(text) + [0] * (width - len(text)) for text in part])
                logits = model(ids, attention_mask=mask).logits[:, :-1]
                logits.log_softmax(-1).gather(-1, ids[:, 1:, None])

    return score


def transformers_windows(folder: Path, batch: int, threads: int, stride: int) -> Callable[[Texts], None]:
    """The usual windows of a long text, several at once; logits only of what each window scores anew."""
    import torch
    from transformers import GPT2LMHeadModel

    torch.set_num_threads(threads)
    model = GPT2LMHeadModel.from_pretrained(folder).eval()
    context = model.config.n_positions

    def score(texts: Texts) -> None:
        for text in texts:
            whole = [text[:context]]
            ends = range(context + stride, len(text) + stride, stride)
            rest = [text[min(end, len(text)) - context : end] for end in ends]
            with torch.inference_mode():
                for windows in (whole, *(rest[i : i + batch] for i in range(0, len(rest), batch))):
                    kept = context if windows is whole else stride + 1
                    ids = torch.tensor(windows)
                    logits = model(ids, logits_to_keep=kept).logits[:, :-1]
                    logits.log_softmax(-1).gather(-1, ids[:, -logits.shape[1] :, None])

    return score


def minicons_loop(folder: Path, batch: int, threads: int) -> Callable[[Texts], None] | None:
    """Its token_score, on texts that spell the same number of tokens."""
    try:
        from minicons import scorer
    except ImportError:
        return None
    import torch
    from transformers import GPT2LMHeadModel, PreTrainedTokenizerFast

    torch.set_num_threads(threads)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"),
        **{name: "<|endoftext|>" for name in ("bos_token", "eos_token", "pad_token")},
    )
    lm = scorer.IncrementalLMScorer(
        GPT2LMHeadModel.from_pretrained(folder).eval(), "cpu", tokenizer=tokenizer
    )

    def score(texts: Texts) -> None:
        spelled = sorted(("a" * len(text) for text in texts), key=len)  # a byte is a token here
        for first in range(0, len(spelled), batch):
            lm.token_score(spelled[first : first + batch])

    return score


def contenders(
    folder: Path, threads: int, batches: Sequence[int], stride: int | None
) -> dict[str, Callable[[Texts], None]]:
    """Everybody who scores: many texts, or with a stride one long text."""
    found: dict[str, Callable[[Texts], None]] = {}
    for precision in ("float32", "int8"):
        model = GPT2.from_pretrained(folder, backend="native", precision=precision, threads=threads)
        if stride is not None:
            found[f"native {precision}"] = lambda texts, model=model: model.score(texts, stride=stride)
            continue
        found[f"native {precision}"] = lambda texts, model=model: model.score(texts)
        found[f"native {precision}, one by one"] = lambda texts, model=model: [model.score(t) for t in texts]
    if stride is not None:
        for batch in batches:
            found[f"transformers, batch {batch}"] = transformers_windows(folder, batch, threads, stride)
        return found
    for batch in batches:
        found[f"transformers, batch {batch}"] = transformers_loop(folder, batch, threads)
    for batch in batches:
        loop = minicons_loop(folder, batch, threads)
        if loop is not None:
            found[f"minicons, batch {batch}"] = loop
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the command line, measure, print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sentences", type=int, default=2000)
    parser.add_argument("--low", type=int, default=8, help="fewest tokens of a sentence")
    parser.add_argument("--high", type=int, default=40, help="most")
    parser.add_argument("--long", type=int, metavar="TOKENS", help="instead: one text of so many tokens")
    parser.add_argument("--stride", type=int, default=512, help="of its windows")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batches", type=int, nargs="+", default=[8, 32])
    parser.add_argument("--size", default="small", help="of the model; tiny for a trial")
    options = parser.parse_args(arguments)
    vocabulary = {} if options.size == "tiny" else {"vocab_size": 50257, "n_positions": 1024}
    with tempfile.TemporaryDirectory() as scratch:
        folder = random_checkpoint(Path(scratch) / "model", options.size, **vocabulary)
        everybody = contenders(
            folder, options.threads, options.batches, options.stride if options.long else None
        )
        vocab_size = vocabulary.get("vocab_size", 257)
        if options.long:
            parts = [make_texts(1, options.long, options.long, vocab_size, i) for i in range(options.rounds)]
        else:
            texts = make_texts(options.sentences, options.low, options.high, vocab_size, 0)
            parts = [texts[i :: options.rounds] for i in range(options.rounds)]
        for score in everybody.values():
            score([text[:2048] for text in parts[0][:8]])  # warm
        seconds: dict[str, list[float]] = {name: [] for name in everybody}
        for part in parts:
            for name, score in everybody.items():
                begun_s = time.perf_counter()
                score(part)
                seconds[name].append(time.perf_counter() - begun_s)
    tokens = [sum(map(len, part)) for part in parts]
    peers = [name for name in everybody if name.startswith("transformers")]
    best = min(peers, key=lambda name: sum(seconds[name]))
    what = f"{options.sentences} texts of {options.low} to {options.high} tokens"
    if options.long:
        what = f"a text of {options.long} tokens, stride {options.stride}"
    print(f"| {what} | tok/s | to {best} |")
    print("|---|---|---|")
    for name, times in seconds.items():
        speed = statistics.median(count / time_s for count, time_s in zip(tokens, times, strict=True))
        ratio = statistics.median(theirs / own for theirs, own in zip(seconds[best], times, strict=True))
        print(f"| {name} | {speed:.0f} | {ratio:.2f} |")


if __name__ == "__main__":
    main()
