"""Score: how well a model predicts a given text."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from gpt2core._shapes import Float64


@dataclass(frozen=True, slots=True)
class Score:
    """How well a model predicts a text.

    Attributes:
        token_ids: the T tokens of the text.
        logprobs: (T - 1,) float64, the natural logarithm of the probability of `token_ids[1:]`, each given
            the tokens before it.
        perplexity: e to the mean of their negatives.
        bits_per_byte: their negatives' sum in bits, over the bytes of the text after its first token; None
            for token ids without a text.
    """

    token_ids: list[int]
    logprobs: Float64[np.ndarray, "T-1"]
    perplexity: float
    bits_per_byte: float | None


class Window(NamedTuple):
    """The model reads tokens `start` to `end`; its logits from `scored_from` on count."""

    start: int
    end: int
    scored_from: int


def score_windows(tokens: int, context: int) -> Iterator[Window]:
    """Cover the predictions after each token but the last with windows of at most `context` tokens.

    One window where they fit. Otherwise windows that overlap by half the context, each scored in its second
    half
    only: so every token is predicted from all tokens before it, or from at least half a context of them. The
    sliding window of Hugging Face's "Perplexity of fixed-length models", with a stride of half the context.
    """
    stride = (context + 1) // 2
    start, end, scored_from = 0, min(context, tokens - 1), 0
    yield Window(start, end, scored_from)
    while end < tokens - 1:
        start += stride
        scored_from = end
        end = min(start + context, tokens - 1)
        yield Window(start, end, scored_from)


def score_of(token_ids: Sequence[int], logprobs: Sequence[float], text_nbytes: int | None) -> Score:
    """Sum up the log probabilities of `token_ids[1:]`; `text_nbytes`: how many bytes those tokens are."""
    nats = -math.fsum(logprobs)
    try:
        perplexity = math.exp(nats / len(logprobs))
    except OverflowError:
        perplexity = math.inf
    bits_per_byte = nats / math.log(2) / text_nbytes if text_nbytes else None
    return Score(list(token_ids), np.array(logprobs, np.float64), perplexity, bits_per_byte)
