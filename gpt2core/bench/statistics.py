"""The statistics of the benchmarks: Student's intervals and least squares, as pure functions on arrays."""

# n values, G groups (prompts), P columns of a design matrix

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

Floats = NDArray[np.float64]


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

    def scaled(self, factor: float) -> "Interval":
        """The same in another unit; a negative factor swaps the ends."""
        ends = sorted((self.low * factor, self.high * factor))
        return Interval(ends[0], self.mid * factor, ends[1])

    def to_dict(self) -> dict[str, float]:
        """For JSON."""
        return {"low": self.low, "mid": self.mid, "high": self.high}


def mean_interval(values: ArrayLike, *, level: float = 0.95, least: float = -np.inf) -> Interval:
    """The mean with Student's interval; a single value gives no width, which says nothing about its error.

    `least` is the smallest value that is possible, below which the interval does not reach.

    Raises:
        ValueError: no values, or one that is not finite.
    """
    x = np.asarray(values, np.float64).reshape(-1)
    if len(x) == 0 or not np.isfinite(x).all():
        raise ValueError(f"an interval needs at least one value and finite ones; got {x.tolist()!r:.80}")
    mid = float(x.mean())
    if len(x) == 1:
        return Interval(mid, mid, mid)
    half = float(stats.t.ppf((1 + level) / 2, len(x) - 1) * stats.sem(x))
    return Interval(max(mid - half, least), mid, mid + half)


def ratio_interval(numerator: ArrayLike, denominator: ArrayLike, *, level: float = 0.95) -> Interval:
    """The ratio of values that were measured side by side, pair by pair, so that drift cancels.

    The geometric mean of the pairs' ratios with Student's interval of their logarithms: exchanging numerator
    and denominator gives exactly the reciprocal.

    Raises:
        ValueError: not one denominator per numerator, or a value that is not above 0.
    """
    a, b = (np.asarray(values, np.float64).reshape(-1) for values in (numerator, denominator))
    if len(a) != len(b) or not ((a > 0).all() and (b > 0).all()):
        raise ValueError(f"{len(a)} numerators need as many denominators above 0; got {b.tolist()!r:.80}")
    found = mean_interval(np.log(a / b), level=level)
    low, mid, high = (float(value) for value in np.exp([found.low, found.mid, found.high]))
    return Interval(low, mid, high)


def drift(series: Iterable[Mapping[int, float]]) -> float | None:
    """How far a machine's speed moved: each series has what was measured again, by its repetition.

    The slowest repetition over the fastest one, each the median over the series relative to their own means.
    None with fewer than two repetitions.
    """
    relative: dict[int, list[float]] = {}
    for values in series:
        mean = float(np.mean(list(values.values()))) if values else 0.0
        if len(values) > 1 and mean > 0:
            for repetition, value in values.items():
                relative.setdefault(repetition, []).append(value / mean)
    levels = [float(np.median(values)) for values in relative.values()]
    return max(levels) / min(levels) if len(levels) > 1 and min(levels) > 0 else None


# -------------------------------------------------------------------------------------------------
# Fits; points belong to blocks (prompts), each of which has its own intercept


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
class GroupEffect:
    """An analysis of covariance: do groups differ once strata and covariates are controlled for?

    Attributes:
        p_value: of the F test.
        share: of the variance that strata and covariates leave, what the groups explain, corrected for what
            chance explains (omega squared; 0 where there is less than that).
        deviations: each group's mean deviation once all is controlled for, in the unit of y.
    """

    p_value: float
    share: float
    deviations: dict[Hashable, float]


def linear_fit(x: ArrayLike, y: ArrayLike, blocks: Sequence[Hashable]) -> LinearFit | None:
    """Least squares with one slope and an intercept for each block; None where no error can be estimated."""
    x_, y_, indicator = np.asarray(x, np.float64), np.asarray(y, np.float64), _indicators(blocks)
    fit = _least_squares(np.column_stack([x_, indicator]), y_)
    if fit is None:
        return None
    groups = indicator.shape[1]
    within = y_ - indicator @ (indicator.T @ y_ / indicator.sum(0))
    total = float(within @ within)
    return LinearFit(
        slope=fit.interval(np.eye(1, groups + 1)[0]),
        intercept=fit.interval(np.r_[0.0, np.full(groups, 1 / groups)]),
        residual_std=float(np.sqrt(fit.variance)),
        r_squared=1 - fit.left / total if total > 0 else 1.0,
        points=len(x_),
        blocks=groups,
    )


def group_effect(
    y: ArrayLike,
    groups: Sequence[Hashable],
    strata: Sequence[Hashable],
    covariates: Sequence[Sequence[float]] | None = None,
) -> GroupEffect | None:
    """Compare least squares with and without the groups beside strata and covariates (n, K).

    None where groups cannot be told from the covariates (two prompts of different token counts differ in
    both), or where nothing is left to judge by.
    """
    y_, of_group = np.asarray(y, np.float64), _indicators(groups)
    given = np.asarray(covariates, np.float64) if covariates else np.empty((len(y_), 0))
    nuisance = np.column_stack([_indicators(strata), given])
    without, full = _least_squares(nuisance, y_), _least_squares(np.column_stack([nuisance, of_group]), y_)
    if without is None or full is None or full.rank == without.rank:
        return None
    extra, explained = full.rank - without.rank, without.left - full.left
    deviations = of_group.T @ without.residuals / of_group.sum(0)
    return GroupEffect(
        p_value=float(stats.f.sf(explained / extra / max(full.variance, 1e-300), extra, full.freedom)),
        share=max(0.0, (explained - extra * full.variance) / (without.left + full.variance + 1e-300)),
        deviations=dict(zip(dict.fromkeys(groups), deviations.tolist(), strict=True)),
    )


@dataclass(frozen=True, slots=True)
class _Fit:
    coefficients: Floats  # (P,)
    covariance: Floats  # (P, P), of the coefficients, before the residual variance
    residuals: Floats  # (n,)
    rank: int
    freedom: int

    @property
    def left(self) -> float:
        return float(self.residuals @ self.residuals)

    @property
    def variance(self) -> float:
        return self.left / self.freedom

    def standard_error(self, weights: Floats) -> float:
        return float(np.sqrt(self.variance * (weights @ self.covariance @ weights)))

    def interval(self, weights: Floats) -> Interval:
        half = float(stats.t.ppf(0.975, self.freedom)) * self.standard_error(weights)
        mid = float(weights @ self.coefficients)
        return Interval(mid - half, mid, mid + half)


def _least_squares(design: Floats, y: Floats) -> _Fit | None:
    """None where no point is left to estimate the error by."""
    rank = int(np.linalg.matrix_rank(design)) if len(y) else 0
    if len(y) <= rank:
        return None
    inverse = np.linalg.pinv(design)  # (P, n)
    coefficients = inverse @ y
    return _Fit(coefficients, inverse @ inverse.T, y - design @ coefficients, rank, len(y) - rank)


def _indicators(labels: Sequence[Hashable]) -> Floats:
    """(n, G): a column of zeros and ones for each label, in the order of their first appearance."""
    index = {label: i for i, label in enumerate(dict.fromkeys(labels))}
    return np.eye(len(index))[[index[label] for label in labels]].reshape(len(labels), len(index))
