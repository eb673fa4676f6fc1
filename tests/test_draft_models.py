"""Draft models: what they may cost, where they end, and how they fail."""

import fakes
import numpy as np
import pytest
from engines import run
from speculating import PROMPT, big, fresh, generated, make_engine, outcome, walk

from gpt2core import testing
from gpt2core.engine.speculation import guess_extra_tokens_cost
from gpt2core.errors import RequestError
from gpt2core.model import GPT2
from gpt2core.sampling.params import SamplingParams


def test_a_draft_that_is_the_model_itself_is_always_right():
    params = {"temperature": 1.5, "max_new_tokens": 50}
    _, engine = generated(params=params, draft=walk)
    assert engine.accepted_tokens == engine.proposed_tokens >= 40


def test_a_draft_as_large_as_the_model_is_tried_too():
    config = big()
    [got], engine = generated(draft=fakes.FakeBackend(config, walk))
    assert [got] == generated()[0]
    assert engine.accepted_tokens > 10


def test_a_bad_draft_is_asked_seldom():
    draft = fakes.FakeBackend(fakes.config(1024), fresh)
    params = {"max_new_tokens": 1000, "temperature": 0.8}
    got, engine = generated(params=params, context=1024, draft=draft)
    assert got == generated(params=params, context=1024)[0]
    assert engine.accepted_tokens < engine.proposed_tokens / 4
    assert guess_extra_tokens_cost(engine.proposed_tokens, 1) < 60


def test_a_draft_of_a_shorter_context_helps_as_far_as_it_reaches():
    draft = fakes.FakeBackend(fakes.config(24), walk)
    params = {"max_new_tokens": 100}
    got, engine = generated(params=params, context=128, draft=draft)
    assert got == generated(params=params, context=128)[0]
    assert engine.accepted_tokens == engine.proposed_tokens
    assert 0 < engine.accepted_tokens <= 16


def test_a_draft_catches_up_with_a_long_prompt_in_chunks():
    draft = fakes.FakeBackend(fakes.config(512), walk)
    prompt = [*b"abcdef"] * 50
    params = {"max_new_tokens": 60}
    got, engine = generated(prompt=prompt, params=params, context=512, draft=draft, step_tokens=64)
    assert got == generated(prompt=prompt, params=params, context=512)[0]
    assert max(len(batch.tokens) for batch in draft.batches) == 64
    assert engine.accepted_tokens > 10


def test_a_draft_that_fails_is_given_up_with_a_warning_and_the_text_goes_on():
    def before(batch):
        if len(draft.batches) == 5:
            raise ZeroDivisionError("in the draft")

    draft = fakes.FakeBackend(fakes.config(), walk, before=before)
    engine = make_engine(draft=draft)
    [request] = engine.submit(PROMPT, SamplingParams(max_new_tokens=50, seed=1))
    with pytest.warns(RuntimeWarning, match=r"speculation is off.*ZeroDivisionError\('in the draft'\)"):
        run(engine)
    assert [outcome(request)] == generated()[0]
    assert len(draft.batches) == 5


def test_a_draft_without_finite_logits_proposes_nothing():
    def nothing(history, vocab_size):
        return np.full(vocab_size, np.nan, np.float32)

    got, engine = generated(draft=nothing)
    assert got == generated()[0]
    assert engine.proposed_tokens == 0


def test_options_that_cannot_be_are_refused(tmp_path):
    with pytest.raises(RequestError, match=r"speculation is 'ngram'; it must be 'off' or 'prompt_lookup'"):
        make_engine(speculation="ngram")
    with pytest.raises(RequestError, match="only one can propose"):
        make_engine(speculation="prompt_lookup", draft=walk)
    with pytest.raises(RequestError, match="vocabulary of 300 tokens and the model one of 257"):
        make_engine(draft=fakes.FakeBackend(fakes.config(vocab_size=300), walk))
    with pytest.raises(RequestError, match=r"needs [0-9]+ bytes"):
        make_engine(cache_nbytes=big().cache_nbytes(1, 64), draft=walk)
    folder = testing.random_checkpoint(tmp_path / "model")
    other = testing.random_checkpoint(tmp_path / "draft", seed=1)
    text = (other / "tokenizer.json").read_text()
    (other / "tokenizer.json").write_text(
        text.replace('"A":', '"\\u0000":').replace('"B":', '"A":', 1).replace('"\\u0000":', '"B":')
    )
    with pytest.raises(RequestError, match="another tokenizer than the model"):
        GPT2.from_pretrained(folder, draft_model=other)


def test_a_draft_draws_each_choice_with_that_choices_random_numbers():
    params = {"temperature": 1.5, "n": 3}
    got, engine = generated(params=params, draft=walk, max_slots=3)
    assert got == generated(params=params, max_slots=3)[0]
    assert engine.accepted_tokens == engine.proposed_tokens > 20


def test_a_draft_goes_on_from_the_text_and_not_from_its_own_refused_guesses():
    """It is right but for every fifth token, if its cache holds the text as it was drawn."""

    def half_right(history, vocab_size):
        logits = fakes.endless(history, vocab_size)
        if len(history) % 5 == 0:
            logits[logits.argmax()] = -100
        return logits

    params = {"max_new_tokens": 200}
    got, engine = generated(fakes.endless, params=params, context=256, draft=half_right)
    assert got == generated(fakes.endless, params=params, context=256)[0]
    assert engine.accepted_tokens > 80
