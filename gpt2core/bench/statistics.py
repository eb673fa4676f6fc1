"""The statistics of the benchmarks: intervals and fits, as pure functions on arrays.

Every function is deterministic: what is drawn at random comes from a generator with a given seed.
"""

# n values, R resamples, G blocks (prompts), P columns of a design matrix

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

Floats = NDArray[np.float64]
Statistic = Literal["median", "mean"]

_STATISTICS: Final[dict[str, Callable[..., Any]]] = {"median": np.median, "mean": np.mean}
_TINY: Final = 1e-12


@dataclass(frozen=True, slots=True)
class Interval:
    """An estimate between the ends of its confidence interval."""

    low: float
    mid: float
    high: float

    def covers(self, value: float) -> bool:
        """Whether `value` lies in the interval, ends included."""
        return self.low <= value <= self.high

    def scaled(self, factor: float) -> "Interval":
        """The same in another unit; a negative factor swaps the ends."""
        ends = sorted((self.low * factor, self.high * factor))
        return Interval(ends[0], self.mid * factor, ends[1])

    def to_dict(self) -> dict[str, float]:
        """For JSON."""
        return {"low": self.low, "mid": self.mid, "high": self.high}


def bootstrap_interval(
    values: ArrayLike,
    *,
    statistic: Statistic = "median",
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """The expanded percentile bootstrap.

    After Hesterberg (2015), "What Teachers Should Know About the Bootstrap", section 5.3.
    The plain percentile interval of few values is too narrow; this one takes quantiles so much further out
    that the interval of a mean is as wide as Student's. No interval by resampling exceeds the values' range,
    so that fewer than six values give at most that range: 94 % for the median of five, 75 % for that of
    three. One value gives an interval without width, which says nothing about its error.

    Raises:
        ValueError: no values, or one that is not finite.
    """
    x = np.asarray(values, np.float64).reshape(-1)
    if len(x) == 0 or not np.isfinite(x).all():
        raise ValueError(f"an interval needs at least one value and finite ones; got {x.tolist()!r:.80}")
    function = _STATISTICS[statistic]
    mid = float(function(x))
    if len(x) == 1:
        return Interval(mid, mid, mid)
    drawn = np.random.default_rng(seed).integers(0, len(x), (resamples, len(x)))  # (R, n)
    resampled = function(x[drawn], axis=1)  # (R,)
    quantile = stats.t.ppf((1 - level) / 2, len(x) - 1) * np.sqrt(len(x) / (len(x) - 1))
    tail = float(stats.norm.cdf(quantile))
    low, high = np.quantile(resampled, [tail, 1 - tail])
    return Interval(min(float(low), mid), mid, max(float(high), mid))


def paired_ratio(
    numerator: ArrayLike,
    denominator: ArrayLike,
    *,
    statistic: Statistic = "median",
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """The ratio of values that were measured side by side, pair by pair, so that drift cancels.

    Raises:
        ValueError: not one denominator per numerator, or one that is not above 0.
    """
    a, b = (np.asarray(values, np.float64).reshape(-1) for values in (numerator, denominator))
    if len(a) != len(b) or not (b > 0).all():
        raise ValueError(f"{len(a)} numerators need as many denominators above 0; got {b.tolist()!r:.80}")
    return bootstrap_interval(a / b, statistic=statistic, level=level, resamples=resamples, seed=seed)


def mean_interval(values: ArrayLike, *, level: float = 0.95) -> Interval | None:
    """Student's interval of a mean; None for fewer than two values."""
    x = np.asarray(values, np.float64).reshape(-1)
    if len(x) < 2:
        return None
    half = float(stats.t.ppf((1 + level) / 2, len(x) - 1) * x.std(ddof=1) / np.sqrt(len(x)))
    mid = float(x.mean())
    return Interval(mid - half, mid, mid + half)


# -------------------------------------------------------------------------------------------------
# Fits


@dataclass(frozen=True, slots=True)
class LinearFit:
    """`y = intercept of the block + slope * x`.

    Attributes:
        slope: with its confidence interval.
        intercept: the mean of the blocks' intercepts.
        residual_std: spread of what the line leaves, in the unit of y.
        r_squared: the share of y's variance inside the blocks that the line explains.
        points, blocks: how many.
    """

    slope: Interval
    intercept: Interval
    residual_std: float
    r_squared: float
    points: int
    blocks: int


@dataclass(frozen=True, slots=True)
class Curvature:
    """The coefficient of `x**2` beside an intercept and a slope for each block.

    Attributes:
        coefficient: with its confidence interval.
        p_value: of the hypothesis that it is 0, two-sided.
        freedom: degrees of freedom that the fit leaves.
        bend: how far the parabola leaves its chord in the middle of the range of x, in the unit of y;
            positive where y grows faster and faster.
    """

    coefficient: Interval
    p_value: float
    freedom: int
    bend: Interval


def linear_fit(
    x: ArrayLike, y: ArrayLike, blocks: Sequence[Hashable] | None = None, *, level: float = 0.95
) -> LinearFit | None:
    """Least squares with one slope and an intercept for each block; None where no error can be estimated."""
    x_, y_, indicator = _columns(x, y, blocks)
    groups = indicator.shape[1]
    fit = _least_squares(np.column_stack([x_, indicator]), y_)
    if fit is None:
        return None
    average = np.concatenate([[0.0], np.full(groups, 1 / groups)])
    first = np.concatenate([[1.0], np.zeros(groups)])
    within = y_ - indicator @ (indicator.T @ y_ / indicator.sum(0))
    total = float(within @ within)
    left = float(fit.residuals @ fit.residuals)
    return LinearFit(
        slope=fit.interval(first, level),
        intercept=fit.interval(average, level),
        residual_std=fit.residual_std,
        r_squared=1 - left / total if total > 0 else 1.0,
        points=len(x_),
        blocks=groups,
    )


def quadratic_term(
    x: ArrayLike, y: ArrayLike, blocks: Sequence[Hashable] | None = None, *, level: float = 0.95
) -> Curvature | None:
    """Is y curved in x? One coefficient of `x**2`, while each block has its own intercept and slope.

    With blocks of the same three x the interval is exactly Student's over the blocks' second differences, so
    that neither slopes that differ between blocks nor noise that grows with x makes it wrong. None where
    nothing is left to judge by: fewer than three different x, or no more points than coefficients.
    """
    x_, y_, indicator = _columns(x, y, blocks)
    reach = float(np.ptp(x_))
    if len(np.unique(x_)) < 3:
        return None
    u = (x_ - x_.mean()) / reach  # a well-conditioned problem whatever the unit of x
    fit = _least_squares(np.column_stack([u * u, indicator, indicator * u[:, None]]), y_)
    if fit is None or not fit.determined(0):
        return None
    scaled = fit.interval(np.eye(1, fit.columns)[0], level)
    error = fit.standard_error(np.eye(1, fit.columns)[0])
    p_value = 2 * float(
        stats.t.sf(abs(scaled.mid) / max(error, _TINY * abs(scaled.mid) + 1e-300), fit.freedom)
    )
    return Curvature(
        coefficient=scaled.scaled(1 / reach**2),
        p_value=p_value,
        freedom=fit.freedom,
        bend=scaled.scaled(1 / 4),  # c * (reach / 2)**2 below the chord
    )


@dataclass(frozen=True, slots=True)
class _Fit:
    coefficients: Floats  # (P,)
    covariance: Floats  # (P, P), of the coefficients, before the residual variance
    null: Floats  # (P, K) directions that the data leave open
    residuals: Floats  # (n,)
    freedom: int

    @property
    def columns(self) -> int:
        return len(self.coefficients)

    @property
    def residual_std(self) -> float:
        return float(np.sqrt(self.residuals @ self.residuals / self.freedom))

    def determined(self, column: int) -> bool:
        """Whether the data say anything about one coefficient."""
        return bool(np.abs(self.null[column]).max(initial=0) < 1e-6)

    def standard_error(self, weights: Floats) -> float:
        return self.residual_std * float(np.sqrt(weights @ self.covariance @ weights))

    def interval(self, weights: Floats, level: float) -> Interval:
        half = float(stats.t.ppf((1 + level) / 2, self.freedom)) * self.standard_error(weights)
        mid = float(weights @ self.coefficients)
        return Interval(mid - half, mid, mid + half)


def _columns(x: ArrayLike, y: ArrayLike, blocks: Sequence[Hashable] | None) -> tuple[Floats, Floats, Floats]:
    """x, y, and one column of zeros and ones for each block."""
    x_, y_ = (np.asarray(values, np.float64).reshape(-1) for values in (x, y))
    given = [0] * len(x_) if blocks is None else list(blocks)
    if not len(x_) == len(y_) == len(given):
        raise ValueError(f"{len(x_)} x, {len(y_)} y and {len(given)} blocks; each point needs one of each")
    return x_, y_, indicators(given)


def indicators(labels: Sequence[Hashable]) -> Floats:
    """(n, G): a column of zeros and ones for each label, in the order of their first appearance."""
    index = {label: i for i, label in enumerate(dict.fromkeys(labels))}
    return np.eye(len(index))[[index[label] for label in labels]]


def _least_squares(design: Floats, y: Floats) -> _Fit | None:
    if len(y) == 0:
        return None
    left, singular, right = np.linalg.svd(design, full_matrices=True)
    rank = int((singular > singular[0] * 1e-10).sum())
    freedom = len(y) - rank
    if freedom < 1:
        return None
    inverse = right[:rank].T / singular[:rank]  # (P, rank)
    coefficients = inverse @ (left[:, :rank].T @ y)
    return _Fit(
        coefficients=coefficients,
        covariance=inverse @ inverse.T,
        null=right[rank:].T,
        residuals=y - design @ coefficients,
        freedom=freedom,
    )
