"""Score: what a model says of one text, by token, by word and in all."""

# T tokens of a text, P of them predicted (all, or all but the first), K likeliest tokens

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from gpt2core._shapes import Float64, Int64
from gpt2core.errors import RequestError, in_short
from gpt2core.scoring.spans import Span, character_spans
from gpt2core.scoring.words import WordScore, score_words


@dataclass(frozen=True, slots=True)
class Alternative:
    """One of the likeliest tokens at a place."""

    token_id: int
    text: str
    logprob: float


@dataclass(frozen=True, slots=True)
class TokenScore:
    """One token of a scored text; what is not known is None: of a first token that nothing predicts, or what
    was not asked for.

    Attributes:
        text: what it stands for; U+FFFD for a part of a character.
        token_id: its id.
        start, end: its characters in the text; a character that is split belongs to all its tokens.
        byte_start, byte_end: its bytes in the text's UTF-8.
        logprob: the natural logarithm of its probability.
        surprisal: the negative of that, in the base asked for.
        rank: one more than the number of tokens that were likelier.
        entropy: of the prediction that it was, in the base asked for.
        top: the likeliest tokens there, the likeliest first.
    """

    text: str
    token_id: int
    start: int
    end: int
    byte_start: int
    byte_end: int
    logprob: float | None
    surprisal: float | None
    rank: int | None
    entropy: float | None
    top: tuple[Alternative, ...] | None


@dataclass(frozen=True, slots=True)
class Score:
    """How well a model predicts a text. docs/scoring.md has the definitions.

    Attributes:
        token_ids: the T tokens of the text.
        logprobs: (P,) float64, the natural logarithms of the probabilities of the last P tokens, each given
            those before it. P is T where a token was put before the text (`bos`), else T - 1.
        perplexity: e to the mean of their negatives, by token.
        bits_per_byte: their negatives' sum in bits, over the bytes of the text that they are; None for token
            ids without a text.
        ranks: (P,) one more than the number of tokens that were likelier.
        entropies: (P,) float64, of the predictions, in nats, where asked for.
        top: the K likeliest tokens at each of the P places, where asked for.
        boundary_logprobs: (P + 1,) float64, where asked for: the logarithm of the probability that, instead
            of each of the P tokens, and after the last, a word begins or the text ends.
        text: what was scored: given, or decoded from token ids.
        byte_offsets: T pairs, the tokens' bytes in the UTF-8 of the text.
        marks: T answers to whether a token marks a word's beginning or the text's end; None with the above.
    """

    token_ids: list[int]
    logprobs: Float64[np.ndarray, "P"]
    perplexity: float
    bits_per_byte: float | None
    ranks: Int64[np.ndarray, "P"]
    entropies: Float64[np.ndarray, "P"] | None
    top: list[tuple[Alternative, ...]] | None
    boundary_logprobs: Float64[np.ndarray, "P1"] | None
    text: str
    byte_offsets: list[Span]
    marks: list[bool] | None

    @property
    def first(self) -> int:
        """The first token that is predicted: 0, or 1 where nothing stands before the text."""
        return len(self.token_ids) - len(self.logprobs)

    @property
    def tokens(self) -> list[str]:
        """What the T tokens stand for in the text; U+FFFD for a part of a character."""
        data = self.text.encode()
        return [data[start:end].decode("utf-8", "replace") for start, end in self.byte_offsets]

    @property
    def offsets(self) -> list[Span]:
        """T pairs, the tokens' characters in the text; one that is split belongs to all its tokens."""
        return character_spans(self.text, self.byte_offsets)

    @property
    def logprob(self) -> float:
        """The sum of `logprobs`."""
        return math.fsum(self.logprobs)

    @property
    def word_perplexity(self) -> float | None:
        """E to the negative of `logprob` over the number of words: what stands between white space in the
        part of the text that is predicted; None where there is none.
        """
        begin = self.byte_offsets[self.first][0]
        words = len(self.text.encode()[begin:].decode("utf-8", "replace").split())
        return _exponential(-self.logprob / words) if words else None

    @property
    def byte_perplexity(self) -> float | None:
        """2 to the power of `bits_per_byte`."""
        return None if self.bits_per_byte is None else _exponential(self.bits_per_byte * math.log(2))

    def surprisals(self, base: float = 2) -> Float64[np.ndarray, "P"]:
        """(P,) the negatives of `logprobs`, in bits, or to another base."""
        return -self.logprobs / _log_base(base)

    def by_token(self, base: float = 2) -> list[TokenScore]:
        """All that is known of each token.

        Args:
            base: 2 for surprisals and entropies in bits, `math.e` for nats.
        """
        nats, first, offsets = _log_base(base), self.first, self.offsets
        result = []
        for t, (token_id, text) in enumerate(zip(self.token_ids, self.tokens, strict=True)):
            p = t - first
            known = p >= 0
            logprob = float(self.logprobs[p]) if known else None
            entropy = float(self.entropies[p]) / nats if known and self.entropies is not None else None
            result.append(
                TokenScore(
                    *(text, token_id, *offsets[t], *self.byte_offsets[t]),
                    logprob=logprob,
                    surprisal=None if logprob is None else 0.0 - logprob / nats,
                    rank=int(self.ranks[p]) if known else None,
                    entropy=entropy,
                    top=self.top[p] if known and self.top is not None else None,
                )
            )
        return result

    def words(
        self,
        by: Literal["whitespace"] | Iterable[Span] | Callable[[str], Iterable[Span]] = "whitespace",
        *,
        corrected: bool = False,
        base: float = 2,
    ) -> list[WordScore]:
        """The surprisal of each word, or of each region of interest.

        A token counts where its first character that is no white space lies; one that is only white space
        counts where it lies, or else in the next word. What is in no word is left out.

        Args:
            by: "whitespace" for what stands between white space; or (start, end) in characters, in order and
                without overlaps; or what gives such spans for a text.
            corrected: whether the space that begins a word is counted with the word before it, as its end,
                after Pimentel and Meister (2024, arXiv 2406.14561), section 3, and Oh and Schuler (2024,
                arXiv 2406.10851). Needs a score made with `boundaries=True`.
            base: of the surprisals; 2 for bits.

        Raises:
            RequestError: spans that overlap or leave the text, or `corrected` without `boundaries`.
        """
        if corrected and self.boundary_logprobs is None:
            raise RequestError("corrected words need a score made with boundaries=True; score the text again")
        return score_words(self, by, corrected, _log_base(base))


def mean_perplexity(logprobs: Sequence[float] | Float64[np.ndarray, "P"]) -> float:
    """E to the mean of the negatives; inf beyond float64."""
    return _exponential(-math.fsum(logprobs) / len(logprobs))


def _exponential(value: float) -> float:
    try:
        return math.exp(value)
    except OverflowError:
        return math.inf


def _log_base(base: float) -> float:
    if isinstance(base, bool) or not isinstance(base, int | float) or not (math.isfinite(base) and base > 1):
        raise RequestError(
            f"base is {in_short(base)}; it must be a number above 1, as 2 for bits or math.e for nats"
        )
    return math.log(base)
