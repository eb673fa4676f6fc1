"""SamplingParams: every value is checked when it is given, and the message says what would be right."""

import copy
import dataclasses
import math
import pickle
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpt2core.errors import ContextLengthError, InvalidSamplingError
from gpt2core.sampling.draw import SamplingParams

EVERYTHING = {
    "max_new_tokens": 50,
    "min_new_tokens": 2,
    "temperature": 0.8,
    "top_k": 40,
    "top_p": 0.95,
    "min_p": 0.05,
    "repetition_penalty": 1.2,
    "no_repeat_ngram_size": 3,
    "presence_penalty": 0.5,
    "frequency_penalty": -0.5,
    "logit_bias": {7: -100, 3: 1.5},
    "stop": ["\n\n", "END"],
    "stop_token_ids": [3, 5],
    "ignore_eos": True,
    "n": 3,
    "seed": 7,
    "logprobs": 5,
    "echo": True,
}


class Unprintable:
    def __repr__(self):
        raise RuntimeError("no repr")


INTEGERS = {
    "max_new_tokens": (0, 2**31 - 1),
    "min_new_tokens": (0, 2**31 - 1),
    "max_length": (1, 2**31 - 1),
    "top_k": (0, 2**31 - 1),
    "no_repeat_ngram_size": (0, 2**31 - 1),
    "n": (1, 128),
    "seed": (0, 2**63 - 1),
    "logprobs": (0, 20),
}
REALS = {
    "temperature": "at least 0",
    "top_p": "above 0 and at most 1",
    "min_p": "at least 0 and at most 1",
    "repetition_penalty": "above 0",
    "presence_penalty": "at least -2 and at most 2",
    "frequency_penalty": "at least -2 and at most 2",
}


def test_the_defaults_are_greedy_and_change_nothing():
    params = SamplingParams()
    assert params.temperature == 0
    assert (params.top_k, params.top_p, params.min_p, params.repetition_penalty) == (None, 1, 0, 1)
    assert (params.stop, dict(params.logit_bias), params.n, params.seed) == ((), {}, 1, None)


@pytest.mark.parametrize("name", INTEGERS)
@pytest.mark.parametrize(
    "value", [True, False, 1.0, 1.5, "1", b"1", [1], math.nan, math.inf, 1e400, np.bool_(True), Unprintable()]
)
def test_an_integer_parameter_refuses_what_is_no_integer(name, value):
    least, most = INTEGERS[name]
    with pytest.raises(InvalidSamplingError, match=rf"^{name} is .*whole number from {least} to {most}"):
        SamplingParams(**{name: value})


@pytest.mark.parametrize("name", INTEGERS)
def test_an_integer_parameter_accepts_its_limits_and_nothing_beyond(name):
    least, most = INTEGERS[name]
    largest = {"min_new_tokens": {"max_new_tokens": most}}.get(name, {})
    assert getattr(SamplingParams(**{name: least}), name) == least
    assert getattr(SamplingParams(**{name: most}, **largest), name) == most
    for value in (least - 1, most + 1, -(2**63), 2**63, 2**64, 10**5000):
        with pytest.raises(InvalidSamplingError, match=rf"^{name} is .*from {least} to {most}") as caught:
            SamplingParams(**{name: value})
        assert len(str(caught.value)) < 200
        if abs(value) < 2**65:
            assert f"{name} is {value};" in str(caught.value)


@pytest.mark.parametrize("name", REALS)
@pytest.mark.parametrize(
    "value",
    [True, "0.5", None, 1j, [0.5], math.nan, math.inf, -math.inf, 1e400, 10**400, -3, np.float32("nan")],
)
def test_a_real_parameter_refuses_what_is_not_finite_or_no_number(name, value):
    with pytest.raises(InvalidSamplingError) as caught:
        SamplingParams(**{name: value})
    message = str(caught.value)
    assert message.startswith(f"{name} is ")
    assert f"it must be a finite number {REALS[name]}" in message
    assert len(message) < 250


@pytest.mark.parametrize(
    ("name", "value"),
    [("top_p", 0), ("top_p", 1.0000001), ("min_p", -1e-9), ("min_p", 1.1), ("repetition_penalty", 0),
     ("presence_penalty", 2.01), ("frequency_penalty", -2.01), ("temperature", -1e-300)],
)  # fmt: skip
def test_a_real_parameter_refuses_what_lies_just_outside(name, value):
    with pytest.raises(InvalidSamplingError, match=rf"^{name} is {value}; it must be .*{REALS[name]}"):
        SamplingParams(**{name: value})


def test_a_refusal_says_how_to_turn_the_parameter_off():
    with pytest.raises(InvalidSamplingError, match=r"top_p is 2; .*at most 1; 1 turns it off$"):
        SamplingParams(top_p=2)
    with pytest.raises(
        InvalidSamplingError, match=r"temperature is -1; .*0 always takes the likeliest token"
    ):
        SamplingParams(temperature=-1)


def test_an_invalid_parameter_is_a_value_error():
    with pytest.raises(ValueError, match="top_p"):
        SamplingParams(top_p=2)


@pytest.mark.parametrize("value", [1, np.float32(0.5), np.int64(1), Fraction(1, 2)])
def test_numbers_of_other_types_become_plain_floats(value):
    params = SamplingParams(temperature=value)
    assert type(params.temperature) is float
    assert params.temperature == value


def test_numpy_integers_become_plain_ints():
    params = SamplingParams(seed=np.uint64(2**63 - 1), n=np.int8(3))
    assert (type(params.seed), type(params.n)) == (int, int)
    assert (params.seed, params.n) == (2**63 - 1, 3)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([1, 2], r"^logit_bias is \[1, 2\]; it must map token ids to numbers"),
        (None, r"^logit_bias is None"),
        ({"5": 1}, r"^a token id in logit_bias is '5'; it must be a whole number from 0 to 2147483647$"),
        ({True: 1}, r"^a token id in logit_bias is True"),
        ({-1: 1}, r"^a token id in logit_bias is -1; it must be from 0 to 2147483647$"),
        ({2**31: 1}, r"^a token id in logit_bias is 2147483648"),
        ({5: 100.5}, r"^logit_bias of token 5 is 100.5; .* at least -100 and at most 100$"),
        ({5: math.nan}, r"^logit_bias of token 5 is nan"),
        ({5: False}, r"^logit_bias of token 5 is False"),
        ({i: 1 for i in range(1025)}, r"^logit_bias has 1025 entries; at most 1024 are allowed"),
    ],
)
def test_a_bad_logit_bias_is_refused(value, message):
    with pytest.raises(InvalidSamplingError, match=message):
        SamplingParams(logit_bias=value)


def test_a_logit_bias_cannot_be_changed_from_outside():
    given_bias = {7: 1}
    params = SamplingParams(logit_bias=given_bias)
    given_bias[8] = 2
    assert dict(params.logit_bias) == {7: 1.0}
    assert params.logit_bias[7] == 1
    with pytest.raises(TypeError):
        params.logit_bias[7] = 2


def test_a_logit_bias_outside_the_vocabulary_is_refused_when_the_vocabulary_is_known():
    params = SamplingParams(logit_bias={50256: 1, 50257: 1})
    params.check_vocabulary(50258)
    with pytest.raises(
        InvalidSamplingError, match=r"token 50257; this model's vocabulary has 50257 .*0 to 50256"
    ):
        params.check_vocabulary(50257)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (5, r"^stop is 5; it must be a string or a list of strings"),
        (None, r"^stop is None"),
        ({"a"}, r"^stop is \{'a'\}"),
        (b"ab", r"^stop is b'ab'"),
        (["a", 5], r"^stop\[1\] is 5; it must be a string$"),
        (["a", ""], r"^stop\[1\] has 0 characters; it must have 1 to 1024$"),
        ("", r"^stop\[0\] has 0 characters"),
        ("x" * 1025, r"^stop\[0\] has 1025 characters"),
        (["a"] * 17, r"^stop has 17 strings; at most 16 are allowed"),
        (["a", "b\udc80"], r"^stop\[1\] holds a lone surrogate"),
    ],
)
def test_a_bad_stop_is_refused(value, message):
    with pytest.raises(InvalidSamplingError, match=message):
        SamplingParams(stop=value)


def test_stop_is_kept_as_a_tuple_of_strings():
    assert SamplingParams(stop="\n").stop == ("\n",)
    assert SamplingParams(stop=["a", "\0", "😀"]).stop == ("a", "\0", "😀")


@pytest.mark.parametrize("value", [1, 0, None, "yes"])
def test_echo_must_be_a_boolean(value):
    with pytest.raises(InvalidSamplingError, match=r"^echo is .*; it must be True or False$"):
        SamplingParams(echo=value)


def test_contradictions_are_refused():
    with pytest.raises(
        InvalidSamplingError, match=r"max_new_tokens 5 and max_length 9 .*leave one of them out"
    ):
        SamplingParams(max_new_tokens=5, max_length=9)
    with pytest.raises(
        InvalidSamplingError, match="min_new_tokens 6 is more than max_new_tokens 5; lower it"
    ):
        SamplingParams(max_new_tokens=5, min_new_tokens=6)
    with pytest.raises(InvalidSamplingError, match="min_new_tokens 6 is more than max_length 5; lower it"):
        SamplingParams(max_length=5, min_new_tokens=6)


def test_equal_parameters_are_equal_and_hash_alike():
    one = SamplingParams(**EVERYTHING)
    two = SamplingParams(**(EVERYTHING | {"logit_bias": {3: 1.5, 7: -100.0}, "stop": ("\n\n", "END")}))
    assert one == two
    assert hash(one) == hash(two)
    assert one != dataclasses.replace(two, logit_bias={3: 1.5})
    assert len({one, two}) == 1


def test_parameters_survive_pickling_copying_and_replacing():
    params = SamplingParams(**EVERYTHING)
    assert pickle.loads(pickle.dumps(params)) == params
    assert copy.deepcopy(params) == params
    assert dataclasses.replace(params) == params
    changed = dataclasses.replace(params, seed=8)
    assert (changed.seed, changed.stop, changed.logit_bias) == (8, params.stop, params.logit_bias)
    with pytest.raises(InvalidSamplingError, match="top_p is 2"):
        dataclasses.replace(params, top_p=2)


def test_parameters_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        SamplingParams().top_p = 0.5


def test_the_repr_shows_the_bias():
    assert "logit_bias={3: 1.5, 7: -100.0}" in repr(SamplingParams(**EVERYTHING))


ANYTHING = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=3), st.binary(max_size=3),
    st.lists(st.text(max_size=3), max_size=3), st.dictionaries(st.integers(), st.floats(), max_size=3),
)  # fmt: skip


@given(st.dictionaries(st.sampled_from([f.name for f in dataclasses.fields(SamplingParams)]), ANYTHING))
def test_any_values_give_valid_parameters_or_the_typed_error(values):
    try:
        params = SamplingParams(**values)
    except InvalidSamplingError:
        return
    assert 0 < params.top_p <= 1
    assert 0 <= params.min_p <= 1
    assert 0 <= params.temperature < math.inf
    assert all(-100 <= bias <= 100 for bias in params.logit_bias.values())
    assert all(isinstance(text, str) and text for text in params.stop)
    assert dataclasses.replace(params) == params


# How many tokens


def test_new_tokens_default_to_100_or_what_the_context_leaves():
    assert SamplingParams().resolve_max_new_tokens(10, 1024) == 100
    assert SamplingParams().resolve_max_new_tokens(1000, 1024) == 24


def test_max_new_tokens_may_fill_the_context_exactly():
    assert SamplingParams(max_new_tokens=24).resolve_max_new_tokens(1000, 1024) == 24
    assert SamplingParams(max_new_tokens=0).resolve_max_new_tokens(1024, 1024) == 0


def test_max_length_counts_the_prompt():
    assert SamplingParams(max_length=30).resolve_max_new_tokens(10, 1024) == 20
    assert SamplingParams(max_length=10).resolve_max_new_tokens(10, 1024) == 0


@pytest.mark.parametrize(
    ("params", "prompt_tokens", "message"),
    [
        (
            {},
            1100,
            "prompt has 1100 tokens; this model's context is 1024; shorten the prompt by 76 tokens or more",
        ),
        (
            {},
            1024,
            "prompt has 1024 tokens and fills this model's context of 1024; shorten it, or pass "
            "max_new_tokens=0",
        ),
        (
            {"max_new_tokens": 30},
            1000,
            "prompt has 1000 tokens and max_new_tokens is 30, 1030 in all; this model's context is 1024; "
            "shorten the prompt or pass max_new_tokens=24 or less",
        ),
        (
            {"max_length": 2000},
            10,
            "max_length is 2000; this model's context is 1024; pass max_length=1024 or less",
        ),
        (
            {"max_length": 9},
            10,
            "prompt has 10 tokens; max_length (prompt + new) is 9; shorten the prompt or pass max_new_tokens",
        ),
    ],
)
def test_what_exceeds_the_context_is_refused_with_the_numbers(params, prompt_tokens, message):
    with pytest.raises(ContextLengthError) as caught:
        SamplingParams(**params).resolve_max_new_tokens(prompt_tokens, 1024)
    assert message in str(caught.value)


def test_more_min_new_tokens_than_fit_are_refused():
    with pytest.raises(
        InvalidSamplingError, match=r"min_new_tokens is 30; a prompt of 1000 tokens gets at most 24"
    ):
        SamplingParams(min_new_tokens=30).resolve_max_new_tokens(1000, 1024)


@pytest.mark.parametrize("value", [5, "5", b"5", [True], [1.5], [-1], [2**31], list(range(129)), None])
def test_stop_token_ids_must_be_token_ids(value):
    with pytest.raises(InvalidSamplingError, match="stop_token_ids"):
        SamplingParams(stop_token_ids=value)


def test_stop_token_ids_beyond_the_vocabulary_are_refused():
    SamplingParams(stop_token_ids=[99]).check_vocabulary(100)
    with pytest.raises(InvalidSamplingError, match="stop_token_ids names token 100"):
        SamplingParams(stop_token_ids=[99, 100]).check_vocabulary(100)
