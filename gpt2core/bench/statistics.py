"""The statistics of the benchmarks: Student's intervals and a line, on top of scipy.stats."""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

from gpt2core.errors import in_short


@dataclass(frozen=True, slots=True)
class Interval:
    """An estimate between the ends of its 95 % confidence interval."""

    low: float
    mid: float
    high: float

    def covers(self, value: float) -> bool:
        """Whether `value` lies in the interval, ends included."""
        return self.low <= value <= self.high

    def overlaps(self, other: "Interval") -> bool:
        """Whether the two have a value in common."""
        return self.low <= other.high and other.low <= self.high


def mean_interval(values: ArrayLike, *, least: float = -np.inf) -> Interval:
    """The mean with Student's interval; a single value gives no width, which says nothing about its error.

    `least` is the smallest value that is possible, below which the interval does not reach.

    Raises:
        ValueError: no values, or one that is not finite.
    """
    x = np.asarray(values, np.float64).reshape(-1)
    if len(x) == 0 or not np.isfinite(x).all():
        raise ValueError(f"an interval needs at least one value and finite ones; got {in_short(x.tolist())}")
    return _interval(x.mean(), stats.sem(x) if len(x) > 1 else 0.0, len(x) - 1, least)


def ratio_interval(numerator: ArrayLike, denominator: ArrayLike) -> Interval:
    """The ratio of values that were measured side by side, pair by pair, so that drift cancels.

    The geometric mean of the pairs' ratios with Student's interval of their logarithms: exchanging numerator
    and denominator gives exactly the reciprocal.

    Raises:
        ValueError: not one denominator per numerator, or a value that is not above 0.
    """
    a, b = (np.asarray(values, np.float64).reshape(-1) for values in (numerator, denominator))
    if len(a) != len(b) or not ((a > 0).all() and (b > 0).all()):
        raise ValueError(f"{len(a)} numerators need as many denominators above 0; got {in_short(b.tolist())}")
    found = mean_interval(np.log(a / b))
    return Interval(*(float(np.exp(end)) for end in (found.low, found.mid, found.high)))


def drift(series: Iterable[Mapping[int, float]]) -> float | None:
    """How far a machine's speed moved: each series has what was measured again, by its repetition.

    The slowest repetition over the fastest one, each the median over the series relative to their own means.
    None with fewer than two repetitions.
    """
    relative = defaultdict(list)
    for values in series:
        mean = float(np.mean(list(values.values()))) if values else 0.0
        if len(values) > 1 and mean > 0:
            for repetition, value in values.items():
                relative[repetition].append(value / mean)
    levels = [float(np.median(values)) for values in relative.values()]
    return max(levels) / min(levels) if len(levels) > 1 and min(levels) > 0 else None


@dataclass(frozen=True, slots=True)
class LinearFit:
    """`y = intercept + slope * x`, with the share of y's variance that the line explains."""

    slope: Interval
    intercept: Interval
    r_squared: float
    points: int


def linear_fit(x: ArrayLike, y: ArrayLike) -> LinearFit | None:
    """Least squares with Student's intervals; None where no error can be estimated."""
    x_, y_ = np.asarray(x, np.float64), np.asarray(y, np.float64)
    if len(x_) < 3 or len(np.unique(x_)) < 2:
        return None
    fit, freedom = stats.linregress(x_, y_), len(x_) - 2
    slope = _interval(fit.slope, fit.stderr, freedom)
    intercept = _interval(fit.intercept, fit.intercept_stderr, freedom)
    return LinearFit(slope, intercept, float(fit.rvalue**2), len(x_))


def _interval(mid: float, error: float, freedom: int, least: float = -np.inf) -> Interval:
    half = float(stats.t.ppf(0.975, freedom) * error) if freedom and error else 0.0
    return Interval(max(float(mid) - half, least), float(mid), float(mid) + half)
