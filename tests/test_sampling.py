"""Drawing tokens: random numbers, bisection, statistics, log-probabilities."""

import dataclasses
import math
import subprocess
import sys

import numpy as np
import pytest
import sampling_oracle
import scipy.stats
from hypothesis import assume, given, reject, settings
from hypothesis import strategies as st

from gpt2core.errors import InvalidSamplingError, NumericalError
from gpt2core.sampling import draw as sampling
from gpt2core.sampling.draw import (
    SamplingParams,
    TokenLogprob,
    sample_token,
    token_logprobs,
    transform_logits,
    uniform,
)

DRAWS = 10_000
SIGNIFICANCE = 1e-3  # the seeds are fixed: a test that passes once passes always


def draw(logits, params, *, token_ids=(0,), prompt_tokens=1, eos=(), seed=7, choice=0):
    return sample_token(
        np.asarray(logits, np.float32),
        params,
        token_ids=list(token_ids),
        prompt_tokens=prompt_tokens,
        eos_token_ids=eos,
        seed=seed,
        choice=choice,
    )


# Random numbers


@pytest.mark.parametrize(
    ("seed", "choice", "position", "value"),
    [
        (0, 0, 0, "0x1.7a5d3204726c0p-7"),
        (1, 0, 0, "0x1.36da89edd58a0p-2"),
        (0, 1, 0, "0x1.a06ff187f343ap-1"),
        (0, 0, 1, "0x1.0137e64510730p-1"),
        (7, 3, 5, "0x1.8bf9633e6690dp-1"),
        (2**63 - 1, 127, 1023, "0x1.6a7d9d80fe59ep-1"),
    ],
)
def test_the_random_numbers_are_pinned_for_ever(seed, choice, position, value):
    assert uniform(seed, choice, position) == float.fromhex(value)


@given(st.integers(0, 2**63 - 1), st.integers(0, 127), st.integers(0, 2**31))
def test_the_random_numbers_are_those_of_numpys_philox(seed, choice, position):
    key, counter = np.array([seed, choice], np.uint64), np.array([position, 0, 0, 0], np.uint64)
    want = np.random.Generator(np.random.Philox(key=key, counter=counter)).random()
    assert uniform(seed, choice, position) == want


@given(st.integers(0, 2**63 - 1), st.integers(0, 127), st.integers(0, 2**31), st.integers(0, 9))
def test_further_draws_are_philoxs_further_words(seed, choice, position, block):
    key, counter = np.array([seed, choice], np.uint64), np.array([position, block, 0, 0], np.uint64)
    want = np.random.Generator(np.random.Philox(key=key, counter=counter)).random(4)
    assert [uniform(seed, choice, position, 4 * block + i) for i in range(4)] == want.tolist()


def streams():
    return {
        "draws": np.array([uniform(7, 0, 100, i) for i in range(DRAWS)]),
        "positions": np.array([uniform(7, 0, i) for i in range(DRAWS)]),
        "choices": np.array([uniform(7, i, 100) for i in range(DRAWS)]),
        "seeds": np.array([uniform(i, 0, 100) for i in range(DRAWS)]),
    }


def test_the_random_numbers_are_uniform_along_each_counter():
    for name, values in streams().items():
        assert scipy.stats.kstest(values, "uniform").pvalue > SIGNIFICANCE, name
        cells = np.bincount((values * 256).astype(int), minlength=256)
        assert scipy.stats.chisquare(cells).pvalue > SIGNIFICANCE, name


def test_neighbouring_random_numbers_are_independent():
    for name, values in streams().items():
        pairs = np.histogram2d(values[:-1:2], values[1::2], bins=10, range=[[0, 1], [0, 1]])[0]
        assert scipy.stats.chisquare(pairs.ravel()).pvalue > SIGNIFICANCE, name
        assert scipy.stats.pearsonr(values[:-1], values[1:]).pvalue > SIGNIFICANCE, name


@pytest.mark.parametrize(("one", "two"), [((7, 0), (7, 1)), ((7, 0), (8, 0)), ((7, 1), (8, 0))])
def test_texts_of_other_choices_and_seeds_are_uncorrelated(one, two):
    a = [uniform(*one, i) for i in range(DRAWS)]
    b = [uniform(*two, i) for i in range(DRAWS)]
    assert scipy.stats.pearsonr(a, b).pvalue > SIGNIFICANCE
    assert scipy.stats.spearmanr(a, b).pvalue > SIGNIFICANCE


def test_sampling_does_not_import_numpys_random_module():
    code = (
        "import sys, gpt2core.sampling.draw; print([m for m in sys.modules if m.startswith('numpy.random')])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"


# Greedy


def test_greedy_takes_the_greatest_logit_and_the_lowest_id_among_equals():
    assert draw([1, 3, 2, 3], SamplingParams()) == 1
    assert draw([5], SamplingParams()) == 0


def test_greedy_sees_the_penalties():
    assert draw([1, 3, 2.9], SamplingParams(presence_penalty=0.2), token_ids=[0, 1]) == 2
    assert draw([1, 3, 2], SamplingParams(logit_bias={0: 2.5})) == 0
    assert draw([1, 3, 2], SamplingParams(min_new_tokens=1), eos=[1]) == 2
    assert draw([1, 3, 2], SamplingParams(min_new_tokens=1), token_ids=[0, 2], eos=[1]) == 1
    assert draw([1, 3, 2], SamplingParams(no_repeat_ngram_size=2), token_ids=[0, 1, 0]) == 2
    assert draw([1, 3, 2], SamplingParams(repetition_penalty=2), token_ids=[1]) == 2


def test_greedy_is_the_argmax_of_the_transformed_logits_also_where_float32_would_tie():
    bias = {1: 1e-9}  # 1 + 1e-9 is 1 in float32
    assert draw([1, 1], SamplingParams(logit_bias=bias)) == 1


# Inverse CDF, bisection by bisection


def plain_bisection(weights, seed, choice, position):
    """The same by its definition, over a list padded to a power of two."""
    weights = [float(w) for w in weights]
    while len(weights) & (len(weights) - 1):
        weights.append(0.0)
    first, depth = 0, 0
    while len(weights) > 1:
        lower, upper = weights[: len(weights) // 2], weights[len(weights) // 2 :]
        share = math.fsum(lower) / math.fsum(weights)
        u = uniform(seed, choice, position, depth)
        assume(abs(u - share) > 1e-12)  # else sums may round to either side
        first, weights = (first, lower) if u < share else (first + len(lower), upper)
        depth += 1
    return first


WEIGHTS = st.lists(st.floats(1e-9, 1) | st.just(0.0), min_size=1, max_size=70).filter(any)


@given(WEIGHTS, st.integers(0, 2**63 - 1), st.integers(0, 3), st.integers(0, 9))
def test_a_draw_bisects_the_vocabulary_and_never_finds_a_token_of_probability_0(
    weights, seed, choice, position
):
    index = sampling._bisect(np.array(weights), None, len(weights), seed, choice, position, exact=True)
    assert weights[index] > 0
    assert index == plain_bisection(weights, seed, choice, position)


@given(WEIGHTS, st.integers(0, 2**63 - 1))
def test_tokens_that_were_cut_do_not_shift_the_others(weights, seed):
    dense = np.array(weights)
    kept = np.flatnonzero(dense)
    index = sampling._bisect(dense[kept], kept, len(dense), seed, 0, 5, exact=True)
    assert index == sampling._bisect(dense, None, len(dense), seed, 0, 5, exact=True)


def test_the_only_token_that_has_probability_is_drawn_however_small_it_is():
    for seed in range(50):
        assert sampling._bisect(np.array([0, 5e-324, 0, 0, 0]), None, 5, seed, 0, 0, exact=True) == 1
        assert sampling._bisect(np.array([5e-324]), np.array([3]), 5, seed, 0, 0) == 3


def test_two_backends_rounding_hardly_ever_parts_them():
    """4,000 draws over 4,096 tokens, most of them unlikely, from logits that differ by 1e-5."""
    rng, params = np.random.default_rng(0), SamplingParams(temperature=0.8)
    parted = 0
    for seed in range(4000):
        if seed % 100 == 0:
            logits = rng.normal(0, 3, 4096).astype(np.float32)
            noisy = logits + rng.normal(0, 1e-5, 4096).astype(np.float32)
        parted += draw(logits, params, seed=seed) != draw(noisy, params, seed=seed)
    assert parted <= 1  # with one random number for the whole vocabulary it is several


SCORES = st.lists(st.integers(-2000, 2000).map(lambda i: i / 128), min_size=1, max_size=30)


@given(
    SCORES,
    st.sampled_from([0.1, 0.7, 1.0, 2.5]),
    st.sampled_from([None, 1, 3, 20]),
    st.sampled_from([0.2, 0.9, 1.0]),
    st.sampled_from([0.0, 0.1]),
    st.integers(0, 2**63 - 1),
)
def test_a_draw_is_from_the_transformed_logits(scores, temperature, top_k, top_p, min_p, seed):
    params = SamplingParams(
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        frequency_penalty=0.5,
        logit_bias={0: 1},
    )
    scores, tokens = np.array(scores, np.float32), [0, 0, 0]
    transformed = transform_logits(scores, params, token_ids=tokens, prompt_tokens=1, eos_token_ids=())
    want = plain_bisection(np.exp(transformed), seed, 4, len(tokens))
    assert draw(scores, params, token_ids=tokens, seed=seed, choice=4) == want


def test_a_draw_depends_on_seed_choice_and_position_only():
    logits, params = np.zeros(1000), SamplingParams(temperature=1)
    first = draw(logits, params, token_ids=[1, 2, 3])
    assert draw(logits, params, token_ids=[9, 9, 9]) == first
    others = [
        draw(logits, params, token_ids=[1, 2]),
        draw(logits, params, token_ids=[1, 2, 3], seed=8),
        draw(logits, params, token_ids=[1, 2, 3], choice=1),
    ]
    assert first not in others


def test_a_tiny_temperature_draws_what_greedy_takes():
    logits = np.random.default_rng(3).standard_normal(500) * 20
    for temperature in (5e-324, 1e-300, 1e-6):
        assert draw(logits, SamplingParams(temperature=temperature)) == logits.astype(np.float32).argmax()


@pytest.mark.parametrize("temperature", [0, 1])
def test_what_cannot_be_drawn_from_raises(temperature):
    params = SamplingParams(temperature=temperature, no_repeat_ngram_size=1)
    with pytest.raises(NumericalError, match="logits for position 1 is nan"):
        draw([1, np.nan], SamplingParams(temperature=temperature))
    with pytest.raises(NumericalError, match="logits for position 1 is nan"):
        draw([1, 2, np.nan], params)
    with pytest.raises(NumericalError, match="logits for position 1 is -inf"):
        draw([-np.inf, -np.inf], SamplingParams(temperature=temperature))
    with pytest.raises(InvalidSamplingError, match="no token can be drawn for position 2"):
        draw([1, 2], params, token_ids=[0, 1])


# Statistics

PEAKED = np.random.default_rng(5).standard_normal(50).astype(np.float32) * 2


@pytest.mark.parametrize(
    "chosen",
    [
        {"temperature": 1.0},
        {"temperature": 0.5},
        {"temperature": 2.0, "top_k": 20},
        {"temperature": 1.0, "top_p": 0.8},
        {"temperature": 1.5, "min_p": 0.1},
        {"temperature": 1.2, "top_k": 30, "top_p": 0.9, "min_p": 0.02, "repetition_penalty": 1.5},
        {"temperature": 1.0, "presence_penalty": 1.0, "frequency_penalty": 0.5, "logit_bias": {3: 2}},
    ],
    ids=str,
)
def test_draws_fit_the_transformed_distribution(chosen):
    params = SamplingParams(**chosen)
    tokens = [1, 2, 3, 3]
    transformed = transform_logits(PEAKED, params, token_ids=tokens, prompt_tokens=1, eos_token_ids=())
    probabilities = np.exp(transformed) / np.exp(transformed).sum()
    drawn = [draw(PEAKED, params, token_ids=tokens, seed=seed) for seed in range(DRAWS)]
    counts = np.bincount(drawn, minlength=len(PEAKED))
    assert counts[probabilities == 0].sum() == 0
    expected = probabilities * DRAWS
    rare = expected < 5  # the chi-square approximation wants at least five per cell
    cells = [np.append(values[~rare], values[rare].sum()) for values in (counts, expected)]
    cells = [values[cells[1] > 0] for values in cells]
    assert scipy.stats.chisquare(*cells).pvalue > SIGNIFICANCE


# Log-probabilities


@given(SCORES, st.integers(0, 20), st.data())
def test_logprobs_are_the_logarithms_of_the_models_probabilities(scores, k, data):
    scores = np.array(scores, np.float32)
    token_id = data.draw(st.integers(0, len(scores) - 1))
    exact = scores.astype(np.float64)
    want = exact - scipy.special.logsumexp(exact)
    got = token_logprobs(scores, token_id, k)
    assert got.token_id == token_id
    np.testing.assert_allclose(got.logprob, want[token_id], rtol=1e-12, atol=1e-12)
    order = sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:k]
    assert [i for i, _ in got.top] == order
    np.testing.assert_allclose([value for _, value in got.top], want[order], rtol=1e-12, atol=1e-12)


def test_logprobs_of_ties_come_in_the_order_of_ids():
    got = token_logprobs(np.array([1, 3, 3, 1, 3, 0], np.float32), 0, 4)
    assert [token_id for token_id, _ in got.top] == [1, 2, 4, 0]


def test_logprobs_are_plain_python_numbers():
    got = token_logprobs(np.zeros(4, np.float32), 2, 2)
    assert got == TokenLogprob(2, -np.log(4), ((0, -np.log(4)), (1, -np.log(4))))
    assert [type(x) for x in (got.logprob, *got.top[0])] == [float, int, float]


def test_no_alternatives_are_given_unless_asked_for():
    assert token_logprobs(np.zeros(4, np.float32), 2, 0).top == ()
    assert TokenLogprob(3, None).top == ()


def test_logprobs_of_what_is_no_distribution_raise():
    with pytest.raises(NumericalError, match="the greatest of 2 logits is nan"):
        token_logprobs(np.array([1, np.nan], np.float32), 0, 1)


# Against an oracle


@settings(max_examples=400)
@given(data=st.data())
def test_tokens_are_those_of_an_oracle_that_shares_no_code(data):
    scores = np.array(data.draw(st.lists(st.integers(-80, 80), min_size=1, max_size=24)), np.float32) / 16
    token_ids = data.draw(st.lists(st.integers(0, min(len(scores), 5) - 1), min_size=1, max_size=12))
    situation = {
        "token_ids": token_ids,
        "prompt_tokens": data.draw(st.integers(1, len(token_ids))),
        "eos_token_ids": [1],
    }
    chosen = {
        "temperature": data.draw(st.sampled_from([0.0, 0.3, 0.7, 1.0, 2.5])),
        "top_k": data.draw(st.sampled_from([None, 0, 1, 4, 15])),
        "top_p": data.draw(st.sampled_from([1.0, 0.1, 0.6, 0.95])),
        "min_p": data.draw(st.sampled_from([0.0, 0.01, 0.3, 1.0])),
        "repetition_penalty": data.draw(st.sampled_from([1.0, 0.5, 1.3, 2.0])),
        "presence_penalty": data.draw(st.sampled_from([0.0, -1.0, 0.5, 2.0])),
        "frequency_penalty": data.draw(st.sampled_from([0.0, -0.5, 0.75])),
        "no_repeat_ngram_size": data.draw(st.sampled_from([0, 1, 2, 3])),
        "min_new_tokens": data.draw(st.sampled_from([0, 3])),
        "logit_bias": data.draw(
            st.dictionaries(st.integers(0, len(scores) - 1), st.sampled_from([-2.0, 1.5, 100.0]), max_size=2)
        ),
    }
    seed, choice = data.draw(st.integers(0, 2**63 - 1)), data.draw(st.integers(0, 127))
    try:
        want = sampling_oracle.sample(scores, *situation.values(), chosen, seed, choice)
    except sampling_oracle.BorderlineError:
        reject()
    params = SamplingParams(**chosen)
    if want is None:
        with pytest.raises(InvalidSamplingError, match="no token can be drawn"):
            sample_token(scores, params, **situation, seed=seed, choice=choice)
        return
    edited = transform_logits(scores, dataclasses.replace(params, temperature=0), **situation)
    exactly = sampling_oracle.edit(scores, *situation.values(), chosen)
    values = [-np.inf if value is None else float(value) for value in exactly]
    np.testing.assert_allclose(edited, values, rtol=1e-12, atol=1e-12)
    token, possible = want
    assert sample_token(scores, params, **situation, seed=seed, choice=choice) == token
    transformed = transform_logits(scores, params, **situation)
    assert set(np.flatnonzero(np.isfinite(transformed)).tolist()) == possible
