"""What is drawn under a constraint: the distribution, where texts end, the same text in every way."""

import re
from dataclasses import replace

import fakes
import numpy as np
import pytest
from constraining import ASKED, ENDS, PERSON, constraints
from engines import TOKENIZER, make_model, run, texts
from speculating import PROMPT, SOURCES, big, walk

from gpt2core import testing
from gpt2core.backends import available, create_backend
from gpt2core.engine.engine import Engine
from gpt2core.model import GPT2
from gpt2core.sampling.draw import sample_token, transform_logits
from gpt2core.sampling.params import SamplingParams

# What is drawn


@pytest.mark.parametrize("options", [{}, {"top_k": 5}, {"top_p": 0.8}, {"min_p": 0.1}], ids=str)
def test_the_distribution_is_the_models_restricted_to_what_is_allowed(options):
    """Closed form: softmax over the allowed tokens; the filters see nothing else."""
    logits = fakes.hashed((1, 2), 257)
    prompt = [1, 2]
    params = SamplingParams(temperature=0.7, regex="[a-p]+", **options)
    matcher = constraints().start(params, ENDS)

    def steer(token_ids, edited):
        return matcher.restrict(list(token_ids[2:]), edited)

    situation = {"token_ids": prompt, "prompt_tokens": 2, "eos_token_ids": ENDS}
    got = transform_logits(logits, params, **situation, steer=steer)
    letters = np.arange(97, 113)
    own = transform_logits(
        logits[letters],
        replace(params, regex=None),
        token_ids=[],
        prompt_tokens=0,
        eos_token_ids=(),
    )
    np.testing.assert_array_equal(got[letters], own)
    assert np.isneginf(np.delete(got, letters)).all()
    if not options:
        weights = np.exp(logits[letters].astype(np.float64) / 0.7)
        counts = np.zeros(257)
        for seed in range(4000):
            counts[sample_token(logits, params, **situation, seed=seed, choice=0, steer=steer)] += 1
        np.testing.assert_allclose(counts[letters] / 4000, weights / weights.sum(), atol=0.035)
        assert counts[letters].sum() == 4000


def test_greedy_takes_the_likeliest_of_what_is_allowed():
    got = make_model().generate("ab", regex="[a-z]{6}")
    history = [*b"ab"]
    for token_id in got.token_ids:
        logits = fakes.endless(tuple(history), 257)
        assert token_id == 97 + logits[97:123].argmax()
        history.append(token_id)


def test_penalties_and_processors_act_before_the_constraint_which_they_cannot_break():
    def only_q(token_ids, logits):
        assert np.isfinite(logits[: fakes.END]).all()
        logits[ord("q")] += 100
        return logits

    got = make_model().generate("ab", regex="[a-q]{3}r", logits_processors=[only_q], logit_bias={115: 100})
    assert got.text == "qqqr"


def test_the_text_ends_by_itself_where_nothing_can_follow_and_by_the_end_token_where_something_could():
    model = make_model(fakes.hashed)
    got = model.generate("ab", regex="abc")
    assert (got.token_ids, got.finish_reason) == ([*b"abc"], "stop")
    reasons = set()
    for seed in range(60):
        got = model.generate("ab", regex="[a-c]{2,}", temperature=3, seed=seed, max_new_tokens=6)
        ended = got.token_ids[-1] == fakes.END
        assert len(got.text) >= 2
        assert (got.finish_reason == "stop") == ended
        assert len(got.token_ids) == 6 or ended
        reasons.add(got.finish_reason)
    assert reasons == {"stop", "length"}


def test_without_an_end_token_a_text_ends_where_nothing_can_follow():
    for options in ({"ignore_eos": True}, {}):
        eos = (fakes.END,) if options else ()
        model = GPT2(fakes.FakeBackend(fakes.config(eos=eos), fakes.hashed), TOKENIZER)
        got = model.generate("ab", choice=["yes", "no"], temperature=1, **options)
        assert (got.text in ("yes", "no"), got.finish_reason) == (True, "stop")
        got = model.generate("ab", regex="[ab]+", temperature=1, max_new_tokens=30, **options)
        assert (len(got.text), got.finish_reason) == (30, "length")


def test_stop_strings_and_stop_tokens_still_end_the_text():
    model = make_model()
    got = model.generate("ab", regex="abc,def", stop=",")
    assert (got.text, got.finish_reason) == ("abc", "stop")
    got = model.generate("ab", regex="abc,def", stop_token_ids=[ord(",")])
    assert (got.text, got.finish_reason) == ("abc", "stop")


# The same text in every way of asking for it


@pytest.mark.parametrize("asked", ASKED)
@pytest.mark.parametrize("params", [{}, {"temperature": 0.8}, {"temperature": 1.5, "top_k": 2}], ids=str)
@pytest.mark.parametrize("source", SOURCES)
def test_speculation_gives_the_same_text(source, params, asked):
    options = {"max_new_tokens": 50, "seed": 1, "logprobs": 1, "n": 3, **params, **ASKED[asked]}
    results = []
    for how in ({}, SOURCES[source]):
        how = {**how}
        if "draft" in how:
            how["draft"] = fakes.FakeBackend(fakes.config(), how["draft"])
        engine = Engine(fakes.FakeBackend(big(), walk), TOKENIZER, **how)
        requests = engine.submit(PROMPT, SamplingParams(**options))
        run(engine)
        results.append([(r.generated, r.text, r.finish_reason, r.logprobs, repr(r.error)) for r in requests])
    assert results[0] == results[1]
    assert all(error == "None" for *_, error in results[0])


def test_guesses_that_the_constraint_refuses_are_not_read():
    batches = []
    backend = fakes.FakeBackend(big(), walk, before=lambda batch: batches.append(batch.tokens.tolist()))
    with GPT2(backend, TOKENIZER, speculation="prompt_lookup") as model:
        got = model.generate("abcdabcdabcdabc", regex="dabx+y", max_new_tokens=20)
    assert got.text.startswith("dabx")
    assert all(ord("c") not in tokens for tokens in batches[1:])


def test_batches_streams_and_choices_give_the_same_text():
    options = {"temperature": 1, "max_new_tokens": 60, "json_schema": PERSON, "logprobs": 1}
    prompts, seeds = ["a", "bc", "def"], [1, 2, 3]
    alone = [
        make_model(context=96).generate(p, seed=s, **options) for p, s in zip(prompts, seeds, strict=True)
    ]
    model = make_model(context=96)
    assert texts(model.generate(prompts, seed=seeds, **options)) == texts(alone)
    pieces = [*model.stream(prompts, seed=seeds, **options)]
    for i, want in enumerate(alone):
        own = [piece for piece in pieces if piece.prompt == i]
        assert "".join(piece.text for piece in own) == want.text
        assert [piece.token_id for piece in own] == want.token_ids
    three = model.generate("a", seed=1, n=3, **options)
    assert texts(three[:1]) == texts(alone[:1])
    assert len({generation.text for generation in three}) == 3
    mixed = model.generate(
        prompts,
        params=[
            SamplingParams(regex="[ab]{3}"),
            SamplingParams(max_new_tokens=5),
            SamplingParams(choice=["x"]),
        ],
    )
    assert (re.fullmatch("[ab]{3}", mixed[0].text) is not None, mixed[2].text) == (True, "x")
    assert texts(mixed[1:2]) == texts([model.generate("bc", max_new_tokens=5)])


def test_every_backend_gives_the_same_text(tmp_path):
    from gpt2core.checkpoint.open import open_checkpoint

    folder = testing.random_checkpoint(tmp_path / "m", n_positions=128, vocab_size=257)
    weights = open_checkpoint(folder).weights
    got = {}
    for name in available():
        for how in ({}, {"speculation": "prompt_lookup"}):
            engine = Engine(create_backend(name, weights, threads=1), TOKENIZER, **how)
            requests = []
            for options in (*ASKED.values(), {"json_schema": PERSON}):
                params = SamplingParams(max_new_tokens=100, temperature=0.9, seed=5, **options)
                requests += engine.submit([*b"abcabc"], params)
            run(engine)
            assert [request.error for request in requests] == [None] * 5
            got[name, *how] = tuple(tuple(request.generated) for request in requests)
    assert len(got) == 10
    assert len({*got.values()}) == 1, got
