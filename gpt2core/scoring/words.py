"""From tokens to words and regions of interest, as they are and corrected for marks of word beginnings."""

# T tokens, P of them predicted

import bisect
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from gpt2core.errors import RequestError, in_short
from gpt2core.scoring.spans import Span


class Scored(Protocol):
    """What is asked of a Score."""

    @property
    def text(self) -> str: ...  # noqa: D102
    @property
    def token_ids(self) -> list[int]: ...  # noqa: D102
    @property
    def first(self) -> int: ...  # noqa: D102
    @property
    def offsets(self) -> list[Span]: ...  # noqa: D102
    @property
    def logprobs(self) -> np.ndarray: ...  # noqa: D102
    @property
    def boundary_logprobs(self) -> np.ndarray | None: ...  # noqa: D102
    @property
    def marks(self) -> list[bool] | None: ...  # noqa: D102


@dataclass(frozen=True, slots=True)
class WordScore:
    """One word, or region, of a scored text.

    Attributes:
        text: its characters.
        start, end: where they stand in the text.
        first, last: its tokens, from `first` to before `last`.
        logprob: the natural logarithm of its probability; None where one of its tokens is not predicted, or
            where it has none of its own.
        surprisal: the negative of that, in the base asked for.
        exact: whether it is what it seems: its borders are those of tokens (white space aside), and, where
            it was corrected, what marks a word begins it and what comes after it.
    """

    text: str
    start: int
    end: int
    first: int
    last: int
    logprob: float | None
    surprisal: float | None
    exact: bool


def score_words(
    score: Scored, by: str | Iterable[Span] | Callable[[str], Iterable[Span]], corrected: bool, nats: float
) -> list[WordScore]:
    """See `Score.words`; `nats`: of the unit of the surprisals."""
    spans = _check_spans(_find_spans(score.text, by), len(score.text))
    offsets, visible = score.offsets, _visible_starts(score)
    words = []
    for (start, end), (first, last) in zip(spans, _assign(spans, offsets, visible), strict=True):
        logprob, exact = None, True
        if first == last:
            exact = False
        else:
            inside = [t for t in range(first, last) if visible[t] is not None]
            exact = bool(inside) and offsets[last - 1][1] <= end and (visible[inside[0]] or 0) >= start
            own = score.text[start:end].strip()
            covered = score.text[offsets[first][0] : offsets[last - 1][1]].strip()
            exact = exact and own == covered
            if first >= score.first:
                logprob = math.fsum(score.logprobs[first - score.first : last - score.first])
        if corrected and logprob is not None:
            change, marked = _correction(score, first, last)
            logprob, exact = logprob + change, exact and marked
        surprisal = None if logprob is None else 0.0 - logprob / nats
        words.append(WordScore(score.text[start:end], start, end, first, last, logprob, surprisal, exact))
    return words


def _correction(score: Scored, first: int, last: int) -> tuple[float, bool]:
    """What to add to a word's logarithm, and whether marks stand where they must.

    Pimentel and Meister's theorem 1: p(w) = p(tokens) P(boundary | after them) / P(boundary | before them);
    before the first word of a text there can be none, so that its factor is 1 / (1 - P(boundary)).
    """
    boundaries = score.boundary_logprobs
    assert boundaries is not None
    assert score.marks is not None
    before = float(boundaries[first - score.first])
    after = float(boundaries[last - score.first])
    begins = score.marks[first]
    ends = last == len(score.token_ids) or score.marks[last]
    change = after if ends else 0.0
    if begins:
        change -= before
    elif first == 0:
        change -= float(np.log1p(-math.exp(before))) if before < 0 else -math.inf
    return change, ends and (begins or first == 0)


def _find_spans(text: str, by: str | Iterable[Span] | Callable[[str], Iterable[Span]]) -> list[Span]:
    if callable(by):
        by = by(text)
    if isinstance(by, str):
        if by != "whitespace":
            raise RequestError(f"by is {in_short(by)}; it must be 'whitespace', spans, or what gives them")
        spans, start = [], 0
        for word in text.split():
            start = text.index(word, start)
            spans.append((start, start + len(word)))
            start += len(word)
        return spans
    try:
        return [(int(start), int(end)) for start, end in by]
    except (TypeError, ValueError) as error:
        raise RequestError(
            f"by holds what is no pair of a start and an end ({error}); give such pairs"
        ) from None


def _check_spans(spans: list[Span], length: int) -> list[Span]:
    before = 0
    for i, (start, end) in enumerate(spans):
        if not before <= start < end <= length:
            raise RequestError(
                f"span {i} is ({start}, {end}) after one that ends at {before}, in a text of {length} "
                "characters; spans are in order, not empty, without overlaps, and inside the text"
            )
        before = end
    return spans


def _visible_starts(score: Scored) -> list[int | None]:
    """Of each token its first character that is no white space; None for one without."""
    return [
        next((i for i in range(start, end) if not score.text[i].isspace()), None)
        for start, end in score.offsets
    ]


def _assign(spans: list[Span], offsets: list[Span], visible: list[int | None]) -> list[Span]:
    """The tokens of each span, in order; each token belongs to one at most."""
    starts = [start for start, _ in spans]
    owners: list[int | None] = []
    for (begin, end), place in zip(offsets, visible, strict=True):
        owner = bisect.bisect_right(starts, begin if place is None else place) - 1
        if owner >= 0 and (begin if place is None else place) < spans[owner][1]:
            owners.append(owner)
        elif place is None and end > begin and owner + 1 < len(spans):
            owners.append(owner + 1)  # white space before it
        else:
            owners.append(None)
    ranges: list[Span] = [(0, 0)] * len(spans)
    for t, own in enumerate(owners):
        if own is not None:
            first, last = ranges[own]
            ranges[own] = (first if last else t, t + 1)
    return ranges
