"""What logits say of given tokens: their probabilities and ranks, the entropy, the likeliest tokens."""

# M positions, V vocabulary, K likeliest tokens

from dataclasses import dataclass
from typing import Final

import numpy as np

from gpt2core._shapes import Float32, Float64, Int32, Int64

_CHUNK: Final = 8
"""Positions whose probabilities are computed at once: 3 MB of float64 at GPT-2's vocabulary."""


@dataclass(frozen=True, slots=True)
class TokenQuery:
    """What is asked of the last of a batch's logits, one target each.

    Attributes:
        targets: the token whose probability is wanted at each position.
        top: K, how many of the likeliest tokens are wanted.
        members: 1 for the tokens of a set whose probability is wanted, else 0.
    """

    targets: Int32[np.ndarray, "M"]
    top: int = 0
    members: Float32[np.ndarray, "V"] | None = None

    def at(self, places: Int64[np.ndarray, "P"]) -> "TokenQuery":
        """The same of some of the targets."""
        return TokenQuery(self.targets[places], self.top, self.members)

    def empty_scores(self, vocab_size: int) -> "TokenScores":
        """Arrays for the answers."""
        return TokenScores.empty(len(self.targets), min(self.top, vocab_size), self.members is not None)


@dataclass(frozen=True, slots=True)
class TokenScores:
    """The answers to a `TokenQuery`; all logarithms are natural ones.

    Attributes:
        logprobs: of the targets.
        ranks: one more than the number of tokens that are likelier than the target.
        entropies: of the predictions, in nats.
        member_logprobs: of the set; None where none was asked for.
        top_ids: the likeliest first; of tokens that are equally likely that with the lower id.
        top_logprobs: theirs.
    """

    logprobs: Float64[np.ndarray, "M"]
    ranks: Int64[np.ndarray, "M"]
    entropies: Float64[np.ndarray, "M"]
    member_logprobs: Float64[np.ndarray, "M"] | None
    top_ids: Int32[np.ndarray, "M K"]
    top_logprobs: Float64[np.ndarray, "M K"]

    @classmethod
    def empty(cls, positions: int, top: int, members: bool) -> "TokenScores":
        """Arrays for so many positions, to be filled."""
        return cls(
            logprobs=np.empty(positions, np.float64),
            ranks=np.empty(positions, np.int64),
            entropies=np.empty(positions, np.float64),
            member_logprobs=np.empty(positions, np.float64) if members else None,
            top_ids=np.empty((positions, top), np.int32),
            top_logprobs=np.empty((positions, top), np.float64),
        )

    def part(self, first: int, last: int) -> "TokenScores":
        """Views of some positions."""
        return TokenScores(
            self.logprobs[first:last],
            self.ranks[first:last],
            self.entropies[first:last],
            None if self.member_logprobs is None else self.member_logprobs[first:last],
            self.top_ids[first:last],
            self.top_logprobs[first:last],
        )

    def put(self, places: slice | Int64[np.ndarray, "P"], scores: "TokenScores") -> None:
        """Copy another's scores to some positions, as far as this has room for what they hold."""
        self.logprobs[places] = scores.logprobs
        self.ranks[places] = scores.ranks
        self.entropies[places] = scores.entropies
        if self.member_logprobs is not None:
            self.member_logprobs[places] = scores.member_logprobs
        top = self.top_ids.shape[1]
        self.top_ids[places] = scores.top_ids[:, :top]
        self.top_logprobs[places] = scores.top_logprobs[:, :top]

    @property
    def finite(self) -> bool:
        """Whether the logits were: one that is not shows in its position's entropy."""
        return bool(np.isfinite(self.entropies).all())


def score_logits(logits: Float32[np.ndarray, "M V"], query: TokenQuery) -> TokenScores:
    """Answer a query from logits, in float64, a few positions at a time."""
    scores = query.empty_scores(logits.shape[1])
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        for first in range(0, len(logits), _CHUNK):
            _score_chunk(logits[first : first + _CHUNK], query, first, scores)
    return scores


def _score_chunk(
    logits: Float32[np.ndarray, "M V"], query: TokenQuery, first: int, scores: TokenScores
) -> None:
    last = first + len(logits)
    here = slice(first, last)
    targets = query.targets[here].astype(np.int64)
    shifted = logits.astype(np.float64)  # (M, V)
    shifted -= shifted.max(1, keepdims=True)
    exponentials = np.exp(shifted)
    totals = exponentials.sum(1)
    log_totals = np.log(totals)
    rows = np.arange(len(logits))
    asked = logits[rows, targets]
    scores.logprobs[here] = shifted[rows, targets] - log_totals
    scores.ranks[here] = (logits > asked[:, None]).sum(1) + 1
    if query.members is not None and scores.member_logprobs is not None:
        scores.member_logprobs[here] = np.log((exponentials * query.members).sum(1)) - log_totals
    exponentials *= shifted
    scores.entropies[here] = log_totals - exponentials.sum(1) / totals
    top = scores.top_ids.shape[1]
    if top > 0:
        for m, row in enumerate(logits):
            kth = np.partition(row, len(row) - top)[len(row) - top]
            best = np.flatnonzero(row >= kth)  # `top`, and those that tie with the last
            order = best[np.argsort(-row[best], kind="stable")][:top]
            scores.top_ids[first + m, : len(order)] = order
            scores.top_logprobs[first + m, : len(order)] = shifted[m, order] - log_totals[m]
