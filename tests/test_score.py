"""logits and score: every position, every token, in windows."""

import math

import fakes
import numpy as np
import pytest
from engines import make_model

from gpt2core.errors import (
    ContextLengthError,
    RequestError,
)
from gpt2core.sampling.draw import token_logprobs
from gpt2core.scoring.windows import score_windows


def test_logits_are_those_of_every_position():
    model = make_model(fakes.hashed, context=300)
    ids = [i % 256 for i in range(300)]
    got = model.logits(ids)
    assert (got.shape, got.dtype) == ((300, 257), np.float32)
    np.testing.assert_array_equal(got, [fakes.hashed(tuple(ids[: i + 1]), 257) for i in range(300)])


def test_logits_of_more_tokens_than_the_context_are_refused():
    with pytest.raises(ContextLengthError, match="65 tokens; this model's context is 64"):
        make_model().logits([1] * 65)
    with pytest.raises(RequestError, match="prompt is empty"):
        make_model().logits([])


def by_hand(ids: list[int], context: int) -> list[float]:
    """Each token's logprob, from the most tokens before it that its window holds."""
    logprobs = []
    for window in score_windows(len(ids), context):
        for position in range(window.scored_from, window.end):
            logits = fakes.hashed(tuple(ids[window.start : position + 1]), 257)
            logprobs.append(token_logprobs(logits, ids[position + 1], 0).logprob)
    return logprobs


@pytest.mark.parametrize("tokens", [2, 63, 64, 65, 66, 97, 200])
def test_a_score_holds_the_logprob_of_every_token_but_the_first(tokens):
    model = make_model(fakes.hashed)
    ids = [(7 * i) % 256 for i in range(tokens)]
    got = model.score(ids)
    assert got.token_ids == ids
    np.testing.assert_array_equal(got.logprobs, by_hand(ids, 64))
    assert len(got.logprobs) == tokens - 1
    assert got.perplexity == pytest.approx(math.exp(-got.logprobs.mean()), rel=1e-12)
    assert got.bits_per_byte is None


@pytest.mark.parametrize("context", [1, 2, 3, 8, 9])
@pytest.mark.parametrize("tokens", range(2, 40))
def test_windows_score_each_token_once_from_at_least_half_a_context(tokens, context):
    scored = []
    for window in score_windows(tokens, context):
        assert window.end - window.start <= context
        for position in range(window.scored_from, window.end):
            seen = position + 1 - window.start
            assert seen == position + 1 or 2 * seen >= context
            scored.append(position + 1)
    assert scored == list(range(1, tokens))


def test_bits_per_byte_count_the_bytes_after_the_first_token():
    model = make_model(fakes.hashed)
    text = "naïve €"
    got = model.score(text)
    assert got.token_ids == [*text.encode()]
    assert got.bits_per_byte == pytest.approx(-got.logprobs.sum() / math.log(2) / (len(text.encode()) - 1))
    assert model.score("a<|endoftext|>", allow_special=True).token_ids == [97, 256]
    assert len(model.score("a<|endoftext|>").token_ids) == 14


def test_a_text_the_model_finds_impossible_has_infinite_perplexity():
    def certain(history, vocab_size):
        logits = np.zeros(vocab_size, np.float32)
        logits[0] = 1e4
        return logits

    got = make_model(certain).score([1, 2, 3])
    assert got.perplexity == math.inf
    np.testing.assert_allclose(got.logprobs, -1e4)


def test_progress_is_told_after_each_window():
    told = []
    make_model(fakes.hashed).score([1] * 130, on_progress=lambda done, total: told.append((done, total)))
    assert told == [(65, 130), (97, 130), (129, 130), (130, 130)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "prompt is empty"),
        ("a", "text has 1 token; a score needs at least 2"),
        ([1, 300], "prompt holds 300 at place 1"),
        (None, "prompt is None"),
    ],
)
def test_what_cannot_be_scored_is_refused(text, message):
    with pytest.raises(RequestError, match=message):
        make_model().score(text)
