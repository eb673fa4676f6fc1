"""Records: what is written of each text, token, word or region; the names of the columns do not change."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final, Literal

from gpt2core.scoring.score import Score
from gpt2core.scoring.spans import Span

By = Literal["token", "word", "text", "region"]
KEYS: Final = ("file", "line", "id")
COLUMNS: Final[dict[By, tuple[str, ...]]] = {
    "text": (
        *KEYS,
        *("tokens", "scored_tokens", "bytes", "logprob", "surprisal"),
        *("perplexity", "word_perplexity", "byte_perplexity", "bits_per_byte"),
    ),
    "token": (
        *KEYS,
        *("token", "text", "token_id", "start", "end", "byte_start", "byte_end"),
        *("logprob", "surprisal", "rank", "entropy", "top"),
    ),
    "word": (
        *KEYS,
        *("word", "text", "start", "end", "first_token", "tokens", "logprob", "surprisal", "exact"),
    ),
    "region": (
        *KEYS,
        *("region", "text", "start", "end", "first_token", "tokens", "logprob", "surprisal", "exact"),
    ),
}
"""Columns of each kind of record, in their order."""


@dataclass(frozen=True, slots=True)
class RecordOptions:
    """What is written.

    Attributes:
        by: what a record is of.
        base: of surprisals and entropies; logarithms of probabilities are natural ones always.
        corrected: as of `Score.words`.
    """

    by: By = "text"
    base: float = 2
    corrected: bool = False


def make_records(
    score: Score, options: RecordOptions, regions: list[Span] | None = None
) -> Iterator[dict[str, Any]]:
    """The records of one text, without the columns that say which text it is."""
    match options.by:
        case "text":
            yield {
                "tokens": len(score.token_ids),
                "scored_tokens": len(score.logprobs),
                "bytes": len(score.text.encode()),
                "logprob": score.logprob,
                "surprisal": float(score.surprisals(options.base).sum()),
                "perplexity": score.perplexity,
                "word_perplexity": score.word_perplexity,
                "byte_perplexity": score.byte_perplexity,
                "bits_per_byte": score.bits_per_byte,
            }
        case "token":
            for place, token in enumerate(score.by_token(options.base)):
                top = token.top
                yield {
                    "token": place,
                    "text": token.text,
                    "token_id": token.token_id,
                    "start": token.start,
                    "end": token.end,
                    "byte_start": token.byte_start,
                    "byte_end": token.byte_end,
                    "logprob": token.logprob,
                    "surprisal": token.surprisal,
                    "rank": token.rank,
                    "entropy": token.entropy,
                    "top": None if top is None else [[one.token_id, one.text, one.logprob] for one in top],
                }
        case "word" | "region":
            spans = regions if options.by == "region" else None
            words = score.words(spans or "whitespace", corrected=options.corrected, base=options.base)
            for place, word in enumerate(words):
                yield {
                    options.by: place,
                    "text": word.text,
                    "start": word.start,
                    "end": word.end,
                    "first_token": word.first,
                    "tokens": word.last - word.first,
                    "logprob": word.logprob,
                    "surprisal": word.surprisal,
                    "exact": word.exact,
                }
