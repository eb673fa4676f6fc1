"""The statistics find what was planted in synthetic data, and nothing where nothing was planted."""

import numpy as np
import pytest

from gpt2core.bench.statistics import (
    Interval,
    drift,
    linear_fit,
    mean_interval,
    ratio_interval,
)

# Intervals


@pytest.mark.parametrize("count", [2, 3, 5, 10])
def test_an_interval_of_few_values_covers_their_mean_in_95_of_100_samples(count):
    samples = np.random.default_rng(count).normal(3.0, 1.0, (2000, count))
    covered = sum(mean_interval(values).covers(3.0) for values in samples)
    assert 0.935 <= covered / 2000 <= 0.965


@pytest.mark.parametrize("count", [3, 5])
def test_an_interval_of_a_ratio_covers_it_in_95_of_100_samples(count):
    rng, covered = np.random.default_rng(count), 0
    for _ in range(2000):
        shared = rng.lognormal(0, 0.5, count)  # what the machine did in a round hits both
        a, b = 2.0 * shared * rng.lognormal(0, 0.05, count), shared * rng.lognormal(0, 0.05, count)
        covered += ratio_interval(a, b).covers(2.0)
    assert 0.935 <= covered / 2000 <= 0.965


def test_an_interval_is_students_and_scales_with_its_values():
    values = [1.0, 2.0, 3.0]
    found = mean_interval(values)
    half = 4.302652729911275 / np.sqrt(3)  # the 97.5 % quantile of t with 2 degrees of freedom, times s / √n
    assert (found.low, found.mid, found.high) == pytest.approx((2 - half, 2.0, 2 + half))
    assert mean_interval(np.array(values) * 1000).low == pytest.approx(found.low * 1000)
    assert mean_interval(values, least=0.0) == Interval(0.0, 2.0, found.high)


def test_one_value_gives_no_width():
    assert mean_interval([3.0]) == Interval(3.0, 3.0, 3.0)


@pytest.mark.parametrize("values", [[], [1.0, float("nan")], [float("inf")]])
def test_an_interval_of_nothing_or_of_what_is_not_finite_is_refused(values):
    with pytest.raises(ValueError, match="at least one value and finite ones"):
        mean_interval(values)


def test_intervals_overlap_where_they_share_a_value():
    assert Interval(1, 2, 3).overlaps(Interval(3, 4, 5))
    assert Interval(0, 4, 9).overlaps(Interval(3, 4, 5))
    assert not Interval(1, 2, 3).overlaps(Interval(3.1, 4, 5))
    assert not Interval(3.1, 4, 5).overlaps(Interval(1, 2, 3))


def test_a_ratio_pair_by_pair_ignores_a_drift_that_hits_both_and_can_be_turned_round():
    rng = np.random.default_rng(0)
    slowing = np.linspace(1, 3, 20)  # the machine becomes three times slower
    slow = 2.0 * slowing * (1 + rng.normal(0, 0.01, 20))
    fast = 1.0 * slowing * (1 + rng.normal(0, 0.01, 20))
    ratio, inverse = ratio_interval(slow, fast), ratio_interval(fast, slow)
    assert ratio.covers(2.0)
    assert ratio.high - ratio.low < 0.05
    assert (1 / inverse.high, 1 / inverse.mid, 1 / inverse.low) == pytest.approx(
        (ratio.low, ratio.mid, ratio.high)
    )
    alone = mean_interval(slow)
    assert (alone.high - alone.low) / alone.mid > 0.25


@pytest.mark.parametrize(("a", "b"), [([1, 2], [1]), ([1], [0]), ([0], [1])])
def test_a_ratio_needs_pairs_and_values_above_zero(a, b):
    with pytest.raises(ValueError, match="as many denominators above 0"):
        ratio_interval(a, b)


def test_drift_is_the_slowest_repetition_over_the_fastest():
    assert drift([{0: 1.0, 1: 2.0, 2: 1.5}, {0: 10.0, 1: 20.0, 2: 15.0}]) == pytest.approx(2.0)
    assert drift([{0: 1.0, 1: 1.0}, {0: 3.0, 1: 3.0}, {0: 1.0, 1: 9.0}]) == pytest.approx(1.0)  # one hiccup
    assert drift([{0: 1.0}]) is None
    assert drift([]) is None


# Fits


def test_a_line_is_found_with_its_overhead():
    x = np.tile([50.0, 100.0, 200.0], 4)
    fit = linear_fit(x, 0.002 * x + 0.25)
    assert fit.slope.mid == pytest.approx(0.002)
    assert fit.intercept.mid == pytest.approx(0.25)
    assert fit.r_squared == pytest.approx(1)
    assert fit.points == 12


def test_the_interval_of_a_slope_covers_it_in_about_95_of_100_data_sets():
    rng, x = np.random.default_rng(0), np.tile([50.0, 100.0, 200.0], 5)
    hits = sum(linear_fit(x, 0.001 * x + rng.normal(0, 0.01, 15)).slope.covers(0.001) for _ in range(500))
    assert 0.92 <= hits / 500 <= 0.98


def test_what_cannot_be_judged_is_none():
    assert linear_fit([], []) is None
    assert linear_fit([50, 100], [1, 2]) is None
    assert linear_fit([50, 50, 50], [1, 2, 3]) is None
