"""The statistics find what was planted in synthetic data, and nothing where nothing was planted."""

import numpy as np
import pytest

from gpt2core.bench.statistics import (
    Interval,
    drift,
    group_effect,
    linear_fit,
    mean_interval,
    ratio_interval,
)

PROMPTS, LENGTHS = 5, (50, 100, 200)
PROMPT_TOKENS = np.array([4, 9, 12, 6, 21])


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
    assert found.scaled(-1) == Interval(-found.high, -found.mid, -found.low)


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


def test_a_line_is_found_although_each_prompt_has_its_own_overhead():
    x = np.tile([50.0, 100.0, 200.0], 4)
    prompt = np.repeat(range(4), 3)
    y = 0.002 * x + np.array([0.1, 0.2, 0.3, 0.4])[prompt]
    fit = linear_fit(x, y, list(prompt))
    assert fit.slope.mid == pytest.approx(0.002)
    assert fit.intercept.mid == pytest.approx(0.25)
    assert fit.residual_std == pytest.approx(0, abs=1e-12)
    assert fit.r_squared == pytest.approx(1)
    assert (fit.points, fit.blocks) == (12, 4)


def test_the_interval_of_a_slope_covers_it_in_about_95_of_100_data_sets():
    rng = np.random.default_rng(0)
    x, prompt = np.tile([50.0, 100.0, 200.0], 5), list(np.repeat(range(5), 3))
    hits = sum(
        linear_fit(x, 0.001 * x + rng.normal(0, 0.01, 15), prompt).slope.covers(0.001) for _ in range(500)
    )
    assert 0.92 <= hits / 500 <= 0.98


def test_what_cannot_be_judged_is_none():
    assert linear_fit([], [], []) is None
    assert linear_fit([50, 100], [1, 2], [0, 0]) is None


# Does the prompt matter?


def prompt_runs(seed: int, *, effect: float = 0.0, runs: int = 4, noise: float = 0.003):
    """Times that depend on token counts and, if `effect`, on prompt 2 itself."""
    rng = np.random.default_rng(seed)
    y, prompt, stratum, tokens = [], [], [], []
    for run in range(runs):
        for length in LENGTHS:
            slow = rng.normal(0, 0.01)  # of the machine, the same for all prompts of a round
            for p in range(PROMPTS):
                count = PROMPT_TOKENS[p]
                mean = 0.01 + 1e-3 * (length - count) + 2e-4 * count + slow + (effect if p == 2 else 0)
                y.append(mean + rng.normal(0, noise))
                prompt.append(p)
                stratum.append((length, run))
                tokens.append([length - count, count])
    return y, prompt, stratum, tokens


def test_a_planted_prompt_effect_is_found_and_named():
    for seed in range(10):
        found = group_effect(*prompt_runs(seed, effect=0.01))
        assert found.p_value < 0.01
        assert found.share > 0.3
        assert max(found.deviations, key=found.deviations.get) == 2


def test_prompts_of_different_token_counts_alone_are_no_effect():
    p_values = [group_effect(*prompt_runs(seed)).p_value for seed in range(400)]
    assert 0.02 <= np.mean(np.array(p_values) < 0.05) <= 0.08
    assert 0.45 <= np.mean(p_values) <= 0.55  # uniform


def test_the_token_count_would_look_like_a_prompt_effect_if_it_were_not_controlled_for():
    y, prompt, stratum, _ = prompt_runs(0)
    assert group_effect(y, prompt, stratum).p_value < 0.01


def test_the_share_of_an_effect_that_is_not_there_is_near_zero():
    assert np.mean([group_effect(*prompt_runs(seed)).share for seed in range(100)]) < 0.05


def test_two_prompts_of_different_token_counts_cannot_be_told_from_their_token_counts():
    y, prompt, stratum, tokens = (
        [value for value, p in zip(column, prompt_runs(0)[1], strict=True) if p < 2]
        for column in prompt_runs(0)
    )
    assert group_effect(y, prompt, stratum, tokens) is None
    assert group_effect(y, prompt, stratum).p_value < 0.05
    assert group_effect([], [], []) is None
