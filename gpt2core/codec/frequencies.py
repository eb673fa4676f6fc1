"""From logits to whole-number frequencies, by arithmetic that gives the same on every machine."""

# B rows, V vocabulary, G groups of tokens

import decimal
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Final, NamedTuple

import numpy as np

from gpt2core._shapes import Float32, Int64
from gpt2core.errors import NumericalError

RESOLUTION: Final = 2048
"""Steps per nat. Cutting a logit down to a step costs less than 1e-7 bits a token."""
ONE: Final = 2**30
"""The frequency of the likeliest token."""
_BLOCK_LOGITS: Final = 2**18
"""Are looked up at once, so that what is between the steps stays in a processor's cache."""
_GROUP: Final = 64
"""Tokens whose frequencies are added up before one of them is looked for."""


class Interval(NamedTuple):
    """What a range coder takes for a token: `frequency` parts of `total`, from `start` on."""

    start: int
    frequency: int
    total: int


@cache
def _frequency_of_distance() -> Int64[np.ndarray, "L"]:
    """`floor(ONE * exp(-i / RESOLUTION))` for each i until it would be 0, and 1 from there on.

    By the decimal module, whose results its specification fixes to the last digit.
    """
    with decimal.localcontext(decimal.Context(prec=60, rounding=decimal.ROUND_HALF_EVEN)):
        ratio = (decimal.Decimal(-1) / RESOLUTION).exp()
        value = decimal.Decimal(ONE)
        frequencies = []
        while value >= 1:
            frequencies.append(int(value))
            value *= ratio
    return np.array([*frequencies, 1], np.int64)


def count_frequencies(logits: Float32[np.ndarray, "B V"]) -> Int64[np.ndarray, "B V"]:
    """How often, of the row's sum, each token is to be expected; in proportion to exp(logit).

    Equal logits give equal frequencies on every machine: a difference of two float32 numbers is rounded as
    IEEE 754 says; a product with a power of two and the cut to a whole number are exact (a difference
    so small that a processor may flush it to zero is cut to zero anyway); the rest is a table of whole
    numbers. A greater logit never has a smaller frequency, since each of the three is monotone. No frequency
    is 0, so that every token can be coded, and none exceeds `ONE`: the sum of 2**32 of them is 2**62 at most.

    Raises:
        NumericalError: a logit is not finite.
    """
    table = _frequency_of_distance()
    if not np.isfinite(logits).all():
        raise NumericalError("the model gave logits that are not finite, which no frequency can be made of")
    with np.errstate(over="ignore"):  # an infinite distance is the greatest one
        steps = logits.max(axis=1, keepdims=True) - logits  # (B, V)
        steps *= np.float32(RESOLUTION)
    np.minimum(steps, np.float32(len(table) - 1), out=steps)
    return table.take(steps.astype(np.intp), mode="clip")  # within the table already; "raise" looks again


def find_intervals(logits: Float32[np.ndarray, "B V"], token_ids: Sequence[int]) -> Iterator[Interval]:
    """The interval of one token a row, for the encoder.

    Raises:
        NumericalError: a logit is not finite.
    """
    rows = max(1, _BLOCK_LOGITS // logits.shape[1])
    for first in range(0, len(logits), rows):
        frequencies = count_frequencies(logits[first : first + rows])  # (rows, V)
        totals = frequencies.sum(axis=1).tolist()
        for token_id, row, total in zip(token_ids[first : first + rows], frequencies, totals, strict=True):
            yield Interval(int(row[:token_id].sum()), int(row[token_id]), total)


class Table:
    """Finds the token at a position of one row, for the decoder."""

    def __init__(self, logits: Float32[np.ndarray, "B V"]) -> None:
        self._frequencies = count_frequencies(logits)
        groups = np.add.reduceat(self._frequencies, np.arange(0, logits.shape[1], _GROUP), axis=1)  # (B, G)
        self._ends = groups.cumsum(axis=1)

    def total(self, row: int) -> int:
        """The sum of a row's frequencies."""
        return int(self._ends[row, -1])

    def find(self, row: int, position: int) -> tuple[int, Interval]:
        """The token whose interval holds `position`, which is below `total`."""
        ends = self._ends[row]
        group = int(ends.searchsorted(position, side="right"))
        before = int(ends[group - 1]) if group else 0
        frequencies = self._frequencies[row, group * _GROUP : (group + 1) * _GROUP]
        inner = frequencies.cumsum()
        at = int(inner.searchsorted(position - before, side="right"))
        frequency = int(frequencies[at])
        return group * _GROUP + at, Interval(before + int(inner[at]) - frequency, frequency, int(ends[-1]))


class UniformTable:
    """`Table` where nothing is known: one row, in which all tokens are as likely."""

    def __init__(self, vocab_size: int) -> None:
        self._vocab_size = vocab_size

    def total(self, row: int) -> int:
        """See `Table.total`."""
        return self._vocab_size

    def find(self, row: int, position: int) -> tuple[int, Interval]:
        """See `Table.find`."""
        return position, Interval(position, 1, self._vocab_size)
