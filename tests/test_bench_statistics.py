"""The statistics find what was planted in synthetic data, and nothing where nothing was planted."""

import numpy as np
import pytest

from gpt2core.bench.permutation import group_effect, holm
from gpt2core.bench.statistics import (
    Interval,
    bootstrap_interval,
    linear_fit,
    mean_interval,
    paired_ratio,
    quadratic_term,
)

PROMPTS, LENGTHS = 5, (50, 100, 200)
PROMPT_TOKENS = np.array([4, 9, 12, 6, 21])


def times(seed: int, *, quadratic: float = 0.0, noise: float = 0.01, runs: int = 1, lengths=LENGTHS):
    """(x, y, prompt): 1 ms a token, prompts that differ in overhead and in slope, noise that grows with x."""
    rng = np.random.default_rng(seed)
    x, y, prompt = [], [], []
    for p in range(PROMPTS):
        start, slope = rng.normal(0.01, 0.003), rng.normal(1e-3, 2e-5)
        for length in lengths:
            for _ in range(runs):
                new = length - PROMPT_TOKENS[p]
                mean = start + slope * new + quadratic * new**2
                x.append(new)
                y.append(mean * (1 + rng.normal(0, noise)))
                prompt.append(p)
    return np.array(x), np.array(y), prompt


# Intervals


def test_an_interval_of_the_mean_covers_it_in_about_95_of_100_samples():
    covered = 0
    for seed in range(400):
        values = np.random.default_rng(seed).normal(3.0, 1.0, 10)
        covered += bootstrap_interval(values, statistic="mean", resamples=1000).covers(3.0)
    assert 0.92 <= covered / 400 <= 0.98


def test_an_interval_of_the_median_of_skewed_values_covers_it_in_at_least_95_of_100_samples():
    covered = 0
    for seed in range(400):
        values = np.random.default_rng(seed).exponential(1.0, 15)
        covered += bootstrap_interval(values, resamples=1000).covers(np.log(2))
    assert 0.93 <= covered / 400 <= 0.995


def test_an_interval_is_the_same_again_and_scales_with_its_values():
    values = [1.0, 1.2, 0.9, 1.1, 5.0, 1.05]
    once, again = bootstrap_interval(values), bootstrap_interval(values)
    assert once == again
    assert once.mid == pytest.approx(1.075)
    thousandfold = bootstrap_interval(np.array(values) * 1000)
    assert thousandfold.low == pytest.approx(once.low * 1000)
    assert bootstrap_interval(values, statistic="mean").mid == pytest.approx(np.mean(values))
    assert once.scaled(-1) == Interval(-once.high, -once.mid, -once.low)


def test_few_values_give_at_most_their_range_and_one_gives_no_width():
    few = bootstrap_interval([1.0, 2.0, 4.0])
    assert (few.low, few.mid, few.high) == (1.0, 2.0, 4.0)
    assert bootstrap_interval([3.0]) == Interval(3.0, 3.0, 3.0)
    assert mean_interval([3.0]) is None


@pytest.mark.parametrize("values", [[], [1.0, float("nan")], [float("inf")]])
def test_an_interval_of_nothing_or_of_what_is_not_finite_is_refused(values):
    with pytest.raises(ValueError, match="at least one value and finite ones"):
        bootstrap_interval(values)


def test_a_ratio_pair_by_pair_ignores_a_drift_that_hits_both():
    rng = np.random.default_rng(0)
    drift = np.linspace(1, 3, 20)  # the machine becomes three times slower
    slow = 2.0 * drift * (1 + rng.normal(0, 0.01, 20))
    fast = 1.0 * drift * (1 + rng.normal(0, 0.01, 20))
    ratio = paired_ratio(slow, fast)
    assert ratio.covers(2.0)
    assert ratio.high - ratio.low < 0.05
    unpaired = bootstrap_interval(slow)
    assert (unpaired.high - unpaired.low) / unpaired.mid > 0.3


@pytest.mark.parametrize(("a", "b"), [([1, 2], [1]), ([1], [0])])
def test_a_ratio_needs_pairs_and_denominators_above_zero(a, b):
    with pytest.raises(ValueError, match="as many denominators above 0"):
        paired_ratio(a, b)


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


def test_a_planted_quadratic_term_is_found_and_its_interval_excludes_zero():
    planted, covered = 1e-6, 0
    for seed in range(100):
        found = quadratic_term(*times(seed, quadratic=planted, noise=0.002))
        covered += found.coefficient.covers(planted)
        assert found.coefficient.low > 0
        assert found.p_value < 0.05
    assert covered >= 88


def test_the_bend_is_how_far_the_parabola_leaves_its_chord():
    x = np.array([0.0, 50.0, 100.0, 0.0, 50.0, 100.0])
    found = quadratic_term(x, 1e-6 * x**2 + 1e-9 * np.array([1, -1, 1, -1, 1, -1]), [0, 0, 0, 1, 1, 1])
    assert found.bend.mid == pytest.approx(1e-6 * 50**2)
    assert found.coefficient.mid == pytest.approx(1e-6)


@pytest.mark.parametrize("lengths", [LENGTHS, (50, 100, 150, 200)])
def test_without_a_quadratic_term_the_interval_covers_zero_at_the_nominal_rate(lengths):
    covered = sum(
        quadratic_term(*times(seed, noise=0.02, lengths=lengths)).coefficient.covers(0.0)
        for seed in range(600)
    )
    assert 0.92 <= covered / 600 <= 0.98


def test_the_curvature_of_one_prompt_with_repeated_runs_is_judged_by_the_runs():
    rng = np.random.default_rng(0)
    x = np.repeat([50.0, 100.0, 200.0], 5)
    straight = 0.01 + 1e-3 * x + rng.normal(0, 1e-3, 15)
    assert quadratic_term(x, straight).coefficient.covers(0.0)
    curved = quadratic_term(x, straight + 2e-6 * x**2)
    assert curved.coefficient.low > 0
    assert curved.freedom == 12


def test_what_cannot_be_judged_is_none():
    assert quadratic_term([50, 100], [1, 2]) is None
    assert quadratic_term([50, 100, 200], [1, 2, 4]) is None  # the parabola goes through all points
    assert quadratic_term([50, 100, 200, 200], [1, 2, 4, 5], [0, 0, 1, 1]) is None
    assert linear_fit([], []) is None
    assert linear_fit([50, 100], [1, 2]) is None
    with pytest.raises(ValueError, match="each point needs one of each"):
        linear_fit([1, 2], [1])


# Does the prompt matter?


def prompt_runs(seed: int, *, effect: float = 0.0, runs: int = 4, noise: float = 0.003):
    """Times that depend on token counts and, if `effect`, on prompt 2 itself."""
    rng = np.random.default_rng(seed)
    y, prompt, stratum, tokens = [], [], [], []
    for run in range(runs):
        for length in LENGTHS:
            drift = rng.normal(0, 0.01)  # of the machine, the same for all prompts of a round
            for p in range(PROMPTS):
                count = PROMPT_TOKENS[p]
                mean = 0.01 + 1e-3 * (length - count) + 2e-4 * count + drift + (effect if p == 2 else 0)
                y.append(mean + rng.normal(0, noise))
                prompt.append(p)
                stratum.append((length, run))
                tokens.append([length - count, count])
    return y, prompt, stratum, tokens


def test_a_planted_prompt_effect_is_found_and_named():
    for seed in range(10):
        found = group_effect(*prompt_runs(seed, effect=0.01), permutations=1000)
        assert found.p_value < 0.01
        assert found.share > 0.3
        assert max(found.deviations, key=found.deviations.get) == 2
        assert found.p_values[2] < 0.05


def test_prompts_of_different_token_counts_alone_are_no_effect():
    p_values = [group_effect(*prompt_runs(seed), permutations=300).p_value for seed in range(400)]
    assert np.mean(np.array(p_values) < 0.05) <= 0.08
    assert 0.42 <= np.mean(p_values) <= 0.58  # uniform
    assert np.mean(np.array(p_values) < 0.5) == pytest.approx(0.5, abs=0.1)


def test_the_token_count_would_look_like_a_prompt_effect_if_it_were_not_controlled_for():
    y, prompt, stratum, _ = prompt_runs(0)
    assert group_effect(y, prompt, stratum, permutations=500).p_value < 0.01


def test_the_share_of_an_effect_that_is_not_there_is_near_zero():
    shares = [group_effect(*prompt_runs(seed), permutations=10).share for seed in range(100)]
    assert np.mean(shares) < 0.05


def test_two_prompts_of_different_token_counts_cannot_be_told_from_their_token_counts():
    y, prompt, stratum, tokens = (
        [value for value, p in zip(column, prompt_runs(0)[1], strict=True) if p < 2]
        for column in prompt_runs(0)
    )
    assert group_effect(y, prompt, stratum, tokens) is None
    assert group_effect(y, prompt, stratum).p_value < 0.05
    assert group_effect([], [], []) is None


def test_holm_corrects_the_least_p_value_most_and_keeps_the_order():
    assert holm([0.04, 0.01, 0.03]) == pytest.approx([0.06, 0.03, 0.06])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []
