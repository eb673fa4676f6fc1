"""Which tokens of a long text the model reads at a time."""

from collections.abc import Iterator
from typing import NamedTuple


class Window(NamedTuple):
    """The model reads tokens `start` to `end`; its logits from `scored_from` on count."""

    start: int
    end: int
    scored_from: int


def score_windows(tokens: int, context: int, stride: int | None = None) -> Iterator[Window]:
    """Cover the predictions after each token but the last with windows of at most `context` tokens.

    One window where they fit. Otherwise each further window begins `stride` tokens (half the context, rounded
    up) after the one before it and is scored only where that one ended: so every token is predicted from all
    tokens before it, or from at least `context - stride + 1` of them. With a stride of 1 each is predicted
    from as many as the context holds. The sliding window of Hugging Face's "Perplexity of fixed-length
    models"; averages are taken over tokens here, never over windows.
    """
    stride = (context + 1) // 2 if stride is None else stride
    start, end, scored_from = 0, min(context, tokens - 1), 0
    yield Window(start, end, scored_from)
    while end < tokens - 1:
        start += stride
        scored_from = end
        end = min(start + context, tokens - 1)
        yield Window(start, end, scored_from)
