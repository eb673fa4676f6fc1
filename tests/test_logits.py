"""The transforms of logits, number by number against Hugging Face's processors and a full sort."""

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from transformers.generation import logits_process as hf

from gpt2core.errors import InvalidSamplingError, NumericalError
from gpt2core.sampling import transforms
from gpt2core.sampling.draw import SamplingParams, transform_logits

# Both sides compute in float64; what remains is the rounding of a few operations on logits up to 100.
TOLERANCE = {"rtol": 1e-12, "atol": 1e-11}
BORDER = 1e-9  # a token whose probability lies nearer to top_p's or min_p's border may fall on either side

# Multiples of 2**-16: two logits 1e-40 apart, as floats() likes them, tie once 30 is subtracted from both.
SPREAD = st.integers(-30 * 2**16, 30 * 2**16).map(lambda i: i * 2.0**-16)
TIES = st.sampled_from([-2.0, 0.0, 1.0, 1.5])
BANNED = st.just(-np.inf)


@st.composite
def logits(draw, *, most=40):
    values = draw(st.sampled_from([SPREAD, TIES, SPREAD | TIES, SPREAD | BANNED, TIES | BANNED]))
    result = draw(st.lists(values, min_size=1, max_size=most))
    assume(max(result) > -np.inf)
    return np.array(result, np.float32)


@st.composite
def situations(draw):
    """Logits, and tokens of which some are the prompt; few distinct ones, so that they repeat."""
    scores = draw(logits())
    token_ids = draw(st.lists(st.integers(0, min(len(scores), 6) - 1), min_size=1, max_size=20))
    return scores, token_ids, draw(st.integers(1, len(token_ids)))


def biases(vocab_size):
    return st.dictionaries(st.integers(0, vocab_size - 1), st.floats(-5, 5, width=32), max_size=3)


def through(processor, scores, token_ids):
    result = processor(torch.tensor([token_ids]), torch.from_numpy(scores.astype(np.float64))[None])
    return result[0].numpy()


def transformed(scores, token_ids, prompt_tokens, eos=(), **params):
    return transform_logits(
        scores, SamplingParams(**params), token_ids=token_ids, prompt_tokens=prompt_tokens, eos_token_ids=eos
    )


def shifted(scores):
    """From the temperature on the library's greatest logit is 0."""
    return scores - scores.max()


def assert_same_up_to_ties(got, want):
    """Of tokens that tie at top_p's border, Hugging Face keeps whichever its unstable sort put last."""
    np.testing.assert_allclose(np.sort(got), np.sort(want), **TOLERANCE)
    above = want > want[np.isfinite(want)].min() + 1e-9
    np.testing.assert_allclose(got[above], want[above], **TOLERANCE)


# One by one


@given(situations(), st.floats(0.1, 5))
def test_repetition_penalty_is_hugging_faces(situation, penalty):
    scores, token_ids, prompt_tokens = situation
    got = transformed(scores, token_ids, prompt_tokens, repetition_penalty=penalty)
    want = through(hf.RepetitionPenaltyLogitsProcessor(penalty), scores, token_ids)
    np.testing.assert_allclose(got, want, **TOLERANCE)


@given(situations(), st.integers(1, 6))
def test_no_repeat_ngram_is_hugging_faces(situation, size):
    scores, token_ids, prompt_tokens = situation
    want = through(hf.NoRepeatNGramLogitsProcessor(size), scores, token_ids)
    assume(want.max() > -np.inf)
    got = transformed(scores, token_ids, prompt_tokens, no_repeat_ngram_size=size)
    np.testing.assert_array_equal(got, want)


@given(situations(), st.integers(0, 25), st.sets(st.integers(0, 45), max_size=3))
def test_min_new_tokens_is_hugging_faces(situation, least, eos):
    scores, token_ids, prompt_tokens = situation
    eos = sorted(eos)
    want = through(hf.MinNewTokensLengthLogitsProcessor(prompt_tokens, least, eos), scores, token_ids)
    assume(want.max() > -np.inf)
    got = transformed(scores, token_ids, prompt_tokens, eos, min_new_tokens=least)
    np.testing.assert_array_equal(got, want)


@given(
    situations(), st.dictionaries(st.integers(0, 39), st.floats(-100, 100, width=32), min_size=1, max_size=5)
)
def test_logit_bias_is_hugging_faces_sequence_bias_of_single_tokens(situation, bias):
    scores, token_ids, prompt_tokens = situation
    bias = {token_id % len(scores): value for token_id, value in bias.items()}
    want = through(
        hf.SequenceBiasLogitsProcessor({(i,): float(v) for i, v in bias.items()}), scores, token_ids
    )
    got = transformed(scores, token_ids, prompt_tokens, logit_bias=bias)
    np.testing.assert_allclose(got, want, **TOLERANCE)


@given(situations(), st.floats(-2, 2), st.floats(-2, 2))
def test_presence_and_frequency_penalties_follow_openais_formula(situation, presence, frequency):
    scores, token_ids, prompt_tokens = situation
    generated = token_ids[prompt_tokens:]
    want = scores.astype(np.float64)
    for token_id in range(len(scores)):
        count = generated.count(token_id)
        want[token_id] -= count * frequency + (count > 0) * presence
    got = transformed(
        scores, token_ids, prompt_tokens, presence_penalty=presence, frequency_penalty=frequency
    )
    np.testing.assert_allclose(got, want, **TOLERANCE)


def test_presence_penalty_leaves_the_prompt_alone():
    scores = np.array([1.0, 2.0, 3.0], np.float32)
    got = transformed(scores, [0, 1, 1, 2, 1], 3, presence_penalty=0.5, frequency_penalty=0.25)
    np.testing.assert_array_equal(got, [1.0, 1.25, 2.25])


@given(situations(), st.floats(0.05, 20))
def test_temperature_is_hugging_faces(situation, temperature):
    scores, token_ids, prompt_tokens = situation
    got = transformed(scores, token_ids, prompt_tokens, temperature=temperature)
    want = through(hf.TemperatureLogitsWarper(temperature), scores, token_ids)
    np.testing.assert_allclose(got, shifted(want), **TOLERANCE)


@given(situations(), st.integers(1, 50))
def test_top_k_is_hugging_faces_and_keeps_ties(situation, top_k):
    scores, token_ids, prompt_tokens = situation
    got = transformed(scores, token_ids, prompt_tokens, temperature=1, top_k=top_k)
    want = through(hf.TopKLogitsWarper(top_k), scores, token_ids)
    np.testing.assert_allclose(got, shifted(want), **TOLERANCE)


@given(situations(), st.floats(1e-6, 1))
def test_top_p_is_hugging_faces(situation, top_p):
    scores, token_ids, prompt_tokens = situation
    assume(far_from_border(scores.astype(np.float64), top_p))
    got = transformed(scores, token_ids, prompt_tokens, temperature=1, top_p=top_p)
    want = through(hf.TopPLogitsWarper(top_p), scores, token_ids)
    assert_same_up_to_ties(got, shifted(want))


@given(situations(), st.floats(0, 1))
def test_min_p_is_hugging_faces(situation, min_p):
    scores, token_ids, prompt_tokens = situation
    ratios = np.exp(shifted(scores.astype(np.float64)))
    assume(np.abs(ratios - min_p).min() > BORDER)
    got = transformed(scores, token_ids, prompt_tokens, temperature=1, min_p=min_p)
    want = through(hf.MinPLogitsWarper(min_p), scores, token_ids)
    np.testing.assert_allclose(got, shifted(want), **TOLERANCE)


@pytest.mark.parametrize("top_p", [0.25, 0.5, 0.75])
def test_top_p_on_the_border_itself_is_hugging_faces_with_the_lower_ids_first(top_p):
    scores = np.array([3, 3, -np.inf, 3, 3], np.float32)  # probabilities 1/4: all sums are exact
    got = transformed(scores, [0], 1, temperature=1, top_p=top_p)
    assert_same_up_to_ties(got, shifted(through(hf.TopPLogitsWarper(top_p), scores, [0])))
    assert np.flatnonzero(np.isfinite(got)).tolist() == [0, 1, 3, 4][: int(4 * top_p)]


def test_min_p_of_1_keeps_the_likeliest_and_its_ties():
    got = transformed(np.array([3, 1, 3, 2.999], np.float32), [0], 1, temperature=1, min_p=1)
    np.testing.assert_array_equal(got, [0, -np.inf, 0, -np.inf])


def test_the_smallest_top_p_keeps_one_token():
    got = transformed(np.array([1, 5, 5, 2], np.float32), [0], 1, temperature=1, top_p=5e-324)
    assert np.flatnonzero(np.isfinite(got)).tolist() == [1]


def far_from_border(scores, top_p):
    ascending = np.sort(np.exp(shifted(scores)))
    sums = np.cumsum(ascending) / ascending.sum()
    return np.abs(sums - (1 - top_p)).min() > BORDER


# All together


@settings(max_examples=300)
@given(data=st.data())
def test_the_chain_is_hugging_faces_in_its_order(data):
    scores, token_ids, prompt_tokens = data.draw(situations())
    eos = [0]
    params = {
        "logit_bias": data.draw(biases(len(scores))),
        "repetition_penalty": data.draw(st.sampled_from([1.0, 0.5, 1.3])),
        "no_repeat_ngram_size": data.draw(st.sampled_from([0, 2, 3])),
        "min_new_tokens": data.draw(st.sampled_from([0, 3])),
        "temperature": data.draw(st.floats(0.2, 3)),
        "top_k": data.draw(st.sampled_from([None, 0, 1, 5, 30])),
        "top_p": data.draw(st.sampled_from([1.0, 0.3, 0.9])),
        "min_p": data.draw(st.sampled_from([0.0, 0.02, 0.4])),
    }
    want = scores.astype(np.float64)
    if params["logit_bias"]:
        bias = {(i,): float(v) for i, v in params["logit_bias"].items()}
        want = through(hf.SequenceBiasLogitsProcessor(bias), want, token_ids)
    if params["repetition_penalty"] != 1:
        want = through(hf.RepetitionPenaltyLogitsProcessor(params["repetition_penalty"]), want, token_ids)
    if params["no_repeat_ngram_size"]:
        want = through(hf.NoRepeatNGramLogitsProcessor(params["no_repeat_ngram_size"]), want, token_ids)
    least = hf.MinNewTokensLengthLogitsProcessor(prompt_tokens, params["min_new_tokens"], eos)
    want = through(least, want, token_ids)
    assume(want.max() > -np.inf)
    want = through(hf.TemperatureLogitsWarper(params["temperature"]), want, token_ids)
    if params["top_k"]:
        want = through(hf.TopKLogitsWarper(params["top_k"]), want, token_ids)
    assume(far_from_border(want, params["top_p"]))
    if params["top_p"] < 1:
        want = through(hf.TopPLogitsWarper(params["top_p"]), want, token_ids)
    assume(np.abs(np.exp(shifted(want)) - params["min_p"]).min() > BORDER or params["min_p"] == 0)
    want = through(hf.MinPLogitsWarper(params["min_p"]), want, token_ids)
    got = transformed(scores, token_ids, prompt_tokens, eos, **params)
    assert_same_up_to_ties(got, shifted(want))


def test_greedy_ignores_the_truncations():
    scores = np.array([1, 2, 3], np.float32)
    got = transformed(scores, [0], 1, top_k=1, top_p=0.1, min_p=0.9)
    np.testing.assert_array_equal(got, scores)


@given(situations(), st.sampled_from([0, 1]))
def test_the_models_logits_are_never_written_to(situation, temperature):
    scores, token_ids, prompt_tokens = situation
    before = scores.copy()
    scores.flags.writeable = False
    got = transformed(
        scores,
        token_ids,
        prompt_tokens,
        temperature=temperature,
        top_p=0.5,
        repetition_penalty=2,
        presence_penalty=1,
    )
    assert not np.shares_memory(got, scores)
    np.testing.assert_array_equal(scores, before)


def test_the_result_belongs_to_the_caller_even_when_nothing_applies():
    scores = np.zeros(3)
    assert not np.shares_memory(transformed(scores, [0], 1), scores)


# The nucleus against a full sort


def find_nucleus(weights, top_p):
    return transforms._nucleus(weights, top_p, weights.sum())[0]


def nucleus_by_full_sort(weights, top_p):
    """The definition: sort everything, stop when the sum has reached top_p; of equals the lower ids first."""
    order = np.argsort(-weights, kind="stable")
    before = np.concatenate(([0], np.cumsum(weights[order])))[:-1]
    nucleus = np.sort(order[before < top_p * weights.sum()])
    return nucleus[weights[nucleus] > 0]  # of those at the end of the sort it does not matter which are in


@given(
    st.lists(st.floats(0, 1) | st.sampled_from([0.0, 0.25, 1.0]), max_size=60),
    st.floats(1e-9, 1) | st.sampled_from([5e-324, 1 - 1e-12, 1 - 2.0**-53]),
)
def test_the_nucleus_is_that_of_a_full_sort(weights, top_p):
    weights = np.array([*weights, 1.0])
    np.testing.assert_array_equal(find_nucleus(weights, top_p), nucleus_by_full_sort(weights, top_p))


@pytest.mark.parametrize("scale", [0.01, 1, 3, 10, 100])
@pytest.mark.parametrize("top_p", [0.01, 0.1, 0.5, 0.9, 0.95, 0.999, 1 - 1e-9, 1 - 1e-12, 1 - 2**-53])
def test_the_nucleus_of_a_large_vocabulary_is_that_of_a_full_sort(scale, top_p):
    scores = np.random.default_rng(0).standard_normal(50257) * scale
    weights = np.exp(scores - scores.max())
    np.testing.assert_array_equal(find_nucleus(weights, top_p), nucleus_by_full_sort(weights, top_p))


@given(st.lists(TIES, min_size=600, max_size=700), st.floats(0.01, 0.99))
@settings(max_examples=20)
def test_the_nucleus_of_many_ties_is_that_of_a_full_sort(scores, top_p):
    weights = np.exp(np.array(scores) - 1.5)
    np.testing.assert_array_equal(find_nucleus(weights, top_p), nucleus_by_full_sort(weights, top_p))


# What cannot be drawn from


@pytest.mark.parametrize("temperature", [0, 1])
@pytest.mark.parametrize(
    ("scores", "shown"),
    [([1, np.nan, 2], "nan"), ([1, np.inf], "inf"), ([-np.inf] * 2, "-inf"), ([np.nan] * 3, "nan")],
)
def test_logits_that_are_no_distribution_are_the_backends_fault(scores, shown, temperature):
    with pytest.raises(
        NumericalError, match=rf"^the greatest of {len(scores)} logits for position 2 is {shown}, "
    ):
        transformed(np.array(scores, np.float32), [0, 1], 1, temperature=temperature, top_k=1)


@pytest.mark.parametrize("temperature", [0, 1])
def test_bans_that_leave_no_token_are_the_requests_fault(temperature):
    scores = np.array([1, 2], np.float32)
    with pytest.raises(
        InvalidSamplingError, match=r"^no token can be drawn for position 2: .*no_repeat_ngram_size"
    ):
        transformed(scores, [0, 1], 1, temperature=temperature, no_repeat_ngram_size=1)
    with pytest.raises(InvalidSamplingError, match="no token can be drawn"):
        transformed(scores[:1], [0], 1, [0], temperature=temperature, min_new_tokens=1)


def test_a_penalty_that_overflows_is_the_requests_fault():
    scores = np.array([100, 2], np.float32)
    with pytest.raises(InvalidSamplingError, match=r"of 2 logits is inf; loosen .*repetition_penalty"):
        transformed(scores, [0], 1, temperature=1, repetition_penalty=1e-308)


def test_a_bias_outside_the_vocabulary_is_refused_before_anything_is_drawn():
    with pytest.raises(
        InvalidSamplingError, match="logit_bias names token 3; this model's vocabulary has 3 tokens"
    ):
        transformed(np.zeros(3, np.float32), [0], 1, logit_bias={3: 1})


def test_tokens_past_the_logits_are_left_alone():
    scores = np.array([1, 2, 3], np.float32)
    got = transformed(
        scores,
        [2, 7, 7],
        1,
        [9],
        repetition_penalty=2,
        frequency_penalty=1,
        no_repeat_ngram_size=1,
        min_new_tokens=9,
    )
    np.testing.assert_array_equal(got, [1, 2, -np.inf])


@pytest.mark.parametrize("temperature", [5e-324, 1e-300, 1e-30])
def test_the_smallest_temperature_keeps_only_the_likeliest(temperature):
    scores = np.array([-3e38, 3e38, 3e38, 1], np.float32)
    got = transformed(scores, [0], 1, temperature=temperature)
    assert np.exp(got).tolist() == [0, 1, 1, 0]


def test_the_largest_temperature_makes_all_tokens_alike():
    got = transformed(np.array([-50, 0, 80], np.float32), [0], 1, temperature=1e308)
    np.testing.assert_allclose(np.exp(got), 1)


def test_log_softmax_is_that_of_torch():
    scores = np.random.default_rng(1).standard_normal(1000).astype(np.float32) * 20
    want = torch.log_softmax(torch.from_numpy(scores).double(), -1).numpy()
    np.testing.assert_allclose(transforms.log_softmax(scores), want, rtol=1e-12, atol=1e-15)
