"""Words and regions: sums over tokens, corrected as wordsprobability does; tokens as minicons has them."""

import json
import math
from pathlib import Path

import fakes
import numpy as np
import pytest
from engines import make_model
from scoring_oracle import load_oracle, log_softmax

from gpt2core import GPT2, RequestError
from gpt2core.checkpoint.open import open_checkpoint

GOLDEN = json.loads((Path(__file__).parent / "scoring_golden.json").read_text())
"""Made by make_scoring_golden.py, with the commands that it shows."""
TEXTS = GOLDEN["texts"]
AGREEMENT = 1e-5
"""Most that a word may differ, relative to its surprisal or in nats; both sides compute in float32."""


@pytest.fixture(scope="module", params=["native", "numpy"])
def model(request):
    with GPT2.from_pretrained("demo", backend=request.param) as model:
        yield model


@pytest.fixture(scope="module")
def scores(model):
    return model.score(TEXTS, bos="eos", boundaries=True)


def test_raw_words_are_those_of_wordsprobability(scores):
    for score, theirs in zip(scores, GOLDEN["wordsprobability"], strict=True):
        words = score.words(base=math.e)
        assert [word.text for word in words] == score.text.split()
        got = [word.surprisal for word in words]
        assert got == pytest.approx([raw for _, _, raw in theirs], rel=AGREEMENT, abs=AGREEMENT)
        assert sum(got) == pytest.approx(-score.logprob)
        assert all(word.exact for word in words)


def test_corrected_words_are_those_of_wordsprobability(model, scores):
    """But the first, of which it divides by P(no space) with the end-of-text token counted twice."""
    eos = model.config.eos_token_ids[0]
    logits = model.logits([eos])[0].astype(np.float64)
    probabilities = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
    for score, theirs in zip(scores, GOLDEN["wordsprobability"], strict=True):
        words = score.words(corrected=True, base=math.e)
        got = [word.surprisal for word in words]
        want = [corrected for _, corrected, _ in theirs]
        assert got[1:] == pytest.approx(want[1:], rel=AGREEMENT, abs=AGREEMENT)
        boundary = math.exp(score.boundary_logprobs[0])  # a space, or the end
        theirs_first = 1 - boundary + 2 * probabilities[eos]
        undone = want[0] - math.log(theirs_first) + math.log(1 - boundary)
        assert got[0] == pytest.approx(undone, rel=AGREEMENT, abs=AGREEMENT)
        assert all(word.exact for word in words)


def test_tokens_are_those_of_minicons_with_and_without_bos(model):
    """minicons' rank counts from the likeliest too; without bos it gives the first token 0 bits."""
    for name, bos in (("bos", "eos"), ("none", None)):
        for score, theirs in zip(model.score(TEXTS, bos=bos), GOLDEN["minicons"][name], strict=True):
            theirs = theirs[1:]  # the end-of-text token before the text, or the first token
            assert [token.replace("Ġ", " ") for token, _, _ in theirs] == score.tokens[score.first :]
            bits = [value for _, value, _ in theirs]
            assert score.surprisals().tolist() == pytest.approx(bits, rel=1e-5, abs=1e-4)
            assert score.ranks.tolist() == [rank for _, _, rank in theirs]


def test_the_correction_makes_the_probabilities_of_a_next_word_sum_to_at_most_one():
    """Raw ones need not: "the king" leaves open whether the word goes on. By float64, on one prefix."""
    folder = open_checkpoint("demo").folder
    oracle = load_oracle(folder)
    with GPT2.from_pretrained("demo", backend="native") as model:
        score = model.score("The king said", bos="eos", boundaries=True)
    ids = [model.config.eos_token_ids[0], *score.token_ids]
    marked = np.array([model.tokenizer.token_bytes(t)[:1] == b" " for t in range(model.config.vocab_size)])
    marked[ids[0]] = True
    with_space = [math.log(np.exp(log_softmax(oracle, ids[: t + 1]))[marked].sum()) for t in range(len(ids))]
    np.testing.assert_allclose(score.boundary_logprobs, with_space, atol=1e-4)
    last = log_softmax(oracle, ids[:-1])[ids[-1]]
    assert len(score.token_ids) == 3
    word = score.words(corrected=True)[-1]
    assert word.logprob == pytest.approx(last - with_space[2] + with_space[3], abs=1e-4)


# Spans, on one token per byte


def byte_score(text, **choices):
    return make_model(fakes.hashed, context=256).score(text, bos="eos", **choices)


def test_regions_hold_the_tokens_whose_visible_characters_lie_in_them():
    score = byte_score("ab  cd e\n")
    words = score.words([(0, 2), (4, 6), (7, 8)])
    assert [(w.text, w.first, w.last) for w in words] == [("ab", 0, 2), ("cd", 2, 6), ("e", 6, 8)]
    assert [w.exact for w in words] == [True] * 3
    nats = -score.logprobs
    assert [w.surprisal for w in words] == pytest.approx(
        [nats[0:2].sum() / math.log(2), nats[2:6].sum() / math.log(2), nats[6:8].sum() / math.log(2)]
    )


def test_a_region_with_white_space_inside_keeps_it():
    [one, two] = byte_score("ab cd ef").words([(0, 6), (6, 8)])
    assert (one.text, one.first, one.last, one.exact) == ("ab cd ", 0, 6, True)
    assert (two.first, two.last) == (6, 8)


def test_borders_inside_a_token_are_told():
    with GPT2.from_pretrained("demo", backend="numpy") as model:
        score = model.score("The king", bos="eos")
    assert [t for t in score.tokens] == ["The", " king"]
    [one, two, three] = score.words([(0, 2), (2, 6), (6, 8)])
    assert [(w.first, w.last, w.exact) for w in (one, two, three)] == [
        (0, 1, False),
        (1, 2, False),
        (0, 0, False),
    ]
    assert three.surprisal is None


def test_a_character_that_is_split_is_in_one_region():
    [one, two] = byte_score("é€").words([(0, 1), (1, 2)])
    assert [(w.first, w.last, w.exact) for w in (one, two)] == [(0, 2, True), (2, 5, True)]


def test_a_function_finds_the_spans():
    score = byte_score("ab-cd")
    assert [w.text for w in score.words(lambda text: [(0, 2), (text.index("-") + 1, 5)])] == ["ab", "cd"]


def test_a_word_whose_first_token_is_not_predicted_has_no_surprisal():
    score = make_model(fakes.hashed).score("ab cd")
    assert [w.surprisal is None for w in score.words()] == [True, False]


def test_a_word_that_no_space_begins_is_corrected_as_far_as_marks_stand():
    score = byte_score("ab\ncd ef", boundaries=True)
    [one, two, three] = score.words(corrected=True)
    assert [w.exact for w in (one, two, three)] == [False, False, True]
    assert two.logprob == pytest.approx(score.logprobs[2:5].sum() + score.boundary_logprobs[5])


@pytest.mark.parametrize(
    ("by", "message"),
    [
        ("lines", "by is 'lines'; it must be 'whitespace', spans"),
        ([(0, 9)], r"span 0 is \(0, 9\) after one that ends at 0, in a text of 5 characters"),
        ([(0, 2), (1, 3)], r"span 1 is \(1, 3\) after one that ends at 2"),
        ([(2, 2)], "span 0 is"),
        ([3], "by holds what is no pair"),
    ],
)
def test_spans_that_are_none_are_refused(by, message):
    with pytest.raises(RequestError, match=message):
        byte_score("ab cd").words(by)


def test_corrected_words_need_boundaries():
    with pytest.raises(RequestError, match="boundaries=True; score the text again"):
        byte_score("ab").words(corrected=True)


@pytest.mark.parametrize("base", [1, 0, True, math.inf, "2"])
def test_a_base_is_a_number_above_1(base):
    with pytest.raises(RequestError, match="it must be a number above 1"):
        byte_score("ab").surprisals(base)
