"""From logits to whole-number frequencies, by arithmetic that gives the same on every machine."""

# B rows, V vocabulary

import decimal
from functools import cache
from typing import Final

import numpy as np

from gpt2core._shapes import Float32, Int32
from gpt2core.errors import NumericalError

RESOLUTION: Final = 2048
"""Steps per nat. Cutting a logit down to a step costs less than 1e-7 bits a token."""
ONE: Final = 2**30
"""The frequency of the likeliest token."""


@cache
def _frequency_of_distance() -> Int32[np.ndarray, "L"]:
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
    return np.array([*frequencies, 1], np.int32)


def count_frequencies(logits: Float32[np.ndarray, "B V"]) -> Int32[np.ndarray, "B V"]:
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
    return table.take(steps.astype(np.int32))
