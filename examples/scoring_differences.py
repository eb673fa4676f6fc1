"""Why two people get different numbers for the same model and text: each reason measured.

    python examples/scoring_differences.py STORY.txt

The file is plain text; its first 1,500 tokens are used, and its first 40 sentences. The table says what
changes, and from which perplexity (by token) to which; differences of single tokens are in nats.
"""

import argparse
import math
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from gpt2core import GPT2, open_checkpoint
from gpt2core.reference import reference_logits
from gpt2core.scoring.windows import score_windows

TOKENS, SENTENCES = 1500, 40


def mean_of_windows(logprobs: np.ndarray, context: int) -> float:
    """The popular recipe: e to the mean of each window's mean."""
    means = []
    for window in score_windows(len(logprobs) + 1, context):
        means.append(-logprobs[window.scored_from : window.end].mean())
    return math.exp(float(np.mean(means)))


def pooled(scores: Sequence) -> float:
    """The perplexity of several texts, by token."""
    return math.exp(-math.fsum(s.logprob for s in scores) / sum(len(s.logprobs) for s in scores))


def choices(model: GPT2, text: str, sentences: list[str]) -> list[tuple[str, str, str]]:
    """Differences of definition: what, from, to."""
    context = model.config.n_positions
    base, with_bos = model.score(sentences), model.score(sentences, bos="eos")
    rows = [("first token predicted (bos), sentences", pooled(base), pooled(with_bos))]
    shared = [w.logprobs[1:] for w in with_bos]
    moved = math.exp(-np.concatenate(shared).mean())
    rows.append(("bos before them, the same tokens counted", pooled(base), moved))
    rows.append(
        ("a mean of the sentences' perplexities", pooled(base), np.mean([s.perplexity for s in base]))
    )
    spaced = model.score(sentences, bos="eos", leading_space=True)
    rows.append(("a space before each sentence", pooled(with_bos), pooled(spaced)))
    ended = model.score(sentences, bos="eos", end="eos")
    rows.append(("the end of each text counted", pooled(with_bos), pooled(ended)))
    long = model.score(text)
    exact = model.score(text, stride=16)
    disjoint = model.score(text, stride=context)
    rows.append(("windows without overlap", long.perplexity, disjoint.perplexity))
    rows.append(("a stride of 16 instead of half a context", long.perplexity, exact.perplexity))
    rows.append(
        ("a quarter of the context", long.perplexity, model.score(text, context=context // 4).perplexity)
    )
    rows.append(
        ("the mean of windows, not of tokens", long.perplexity, mean_of_windows(long.logprobs, context))
    )
    rows.append(("by word instead of by token", long.perplexity, long.word_perplexity or math.nan))
    rows.append(("by byte instead of by token", long.perplexity, long.byte_perplexity or math.nan))
    marked = "<|endoftext|>" + text
    as_text = model.score(marked).perplexity
    rows.append(
        ("<|endoftext|> read as a token", as_text, model.score(marked, allow_special=True).perplexity)
    )
    return [(what, f"{before:.3f}", f"{after:.3f}") for what, before, after in rows]


def words(model: GPT2, sentences: list[str]) -> tuple[str, str, str]:
    """How much the correction changes a word's surprisal."""
    raw, corrected = [], []
    for score in model.score_iter(sentences, bos="eos", boundaries=True):
        raw += [word.surprisal for word in score.words()]
        corrected += [word.surprisal for word in score.words(corrected=True)]
    change = np.subtract(corrected, raw)
    return (
        "words corrected: surprisal in bits, mean and largest change",
        f"{np.mean(raw):.3f}",
        f"{np.mean(corrected):.3f} ({np.abs(change).max():.3f})",
    )


def errors(name: str, text: str) -> list[tuple[str, str, str]]:
    """Differences of arithmetic: the largest of a token against float64, and the perplexity."""
    weights = open_checkpoint(name).stored
    rows = []
    with GPT2.from_pretrained(name, backend="numpy") as model:
        ids = model.tokenizer.encode(text)[: model.config.n_positions]
    logits = reference_logits(weights, ids[:-1])  # (T - 1, V) float64
    logits -= logits.max(1, keepdims=True)
    logits -= np.log(np.exp(logits).sum(1, keepdims=True))
    want = logits[np.arange(len(ids) - 1), ids[1:]]
    variants = [(backend, "float32") for backend in ("native", "numpy", "torch", "jax", "onnx")]
    variants += [("native", precision) for precision in ("bfloat16", "int8", "int4")]
    for backend, precision in variants:
        with GPT2.from_pretrained(name, backend=backend, precision=precision) as model:
            score = model.score(ids)
        off = np.abs(score.logprobs - want).max()
        rows.append((f"{backend} {precision}", f"{off:.1e}", f"{score.perplexity:.4f}"))
    return [("float64", "0", f"{math.exp(-want.mean()):.4f}"), *rows]


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the command line and print two tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("--model", default="demo")
    options = parser.parse_args(arguments)
    whole = " ".join(options.file.read_text(encoding="utf-8").split())
    sentences = [s for s in re.split(r"(?<=[.!?]) ", whole) if len(s.split()) > 3][:SENTENCES]
    with GPT2.from_pretrained(options.model, backend="native") as model:
        text = model.tokenizer.decode(model.tokenizer.encode(whole)[:TOKENS])
        print_table(("reason", "from", "to"), [*choices(model, text, sentences), words(model, sentences)])
    print()
    print_table(("arithmetic", "largest error, nats", "perplexity"), errors(options.model, text))


def print_table(header: tuple[str, str, str], rows: list[tuple[str, str, str]]) -> None:
    """A Markdown table."""
    for row in (header, ("---",) * 3, *rows):
        print("| " + " | ".join(row) + " |")


if __name__ == "__main__":
    main()
