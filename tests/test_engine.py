"""submit and step: what each request gets does not depend on who else is there."""

import random

import fakes
import numpy as np
import pytest
from engines import HOT, TOKENIZER, alone, make_engine, run

from gpt2core.errors import (
    BackendError,
    ContextLengthError,
    InvalidSamplingError,
    RequestError,
)
from gpt2core.sampling.draw import token_logprobs
from gpt2core.sampling.params import SamplingParams

# One request


def test_a_sequence_equals_a_plain_loop_over_logits_and_sample_token():
    engine = make_engine()
    [request] = engine.submit([1, 2, 3], SamplingParams(max_new_tokens=20, **HOT))
    run(engine)
    assert request.generated == alone([1, 2, 3], max_new_tokens=20, **HOT)
    assert request.finish_reason == "length"
    assert request.text == TOKENIZER.decode(request.generated, skip_special=True)


def test_the_end_of_text_token_is_kept_as_a_token_and_gives_no_text():
    backend = fakes.FakeBackend(fakes.config(), fakes.scripted({b"ab": b"cd"}))
    engine = make_engine(backend)
    [request] = engine.submit(iter(b"ab"), SamplingParams(max_new_tokens=10))
    run(engine)
    assert request.generated == [*b"cd", fakes.END]
    assert (request.text, request.finish_reason) == ("cd", "stop")


def test_an_end_of_text_token_that_is_no_special_token_gives_no_text_either():
    engine = make_engine(fakes.FakeBackend(fakes.config(eos=(ord("d"),)), fakes.scripted({b"ab": b"cde"})))
    [request] = engine.submit(list(b"ab"), SamplingParams(max_new_tokens=10))
    run(engine)
    assert (request.generated, request.text, request.finish_reason) == ([*b"cd"], "c", "stop")


def test_a_stop_token_ends_the_text_as_the_end_of_text_token_does():
    backend = fakes.FakeBackend(fakes.config(), fakes.scripted({b"ab": b"cdef"}))
    engine = make_engine(backend)
    [request] = engine.submit(list(b"ab"), SamplingParams(max_new_tokens=10, stop_token_ids=[*b"e"]))
    run(engine)
    assert (request.generated, request.text, request.finish_reason) == ([*b"cde"], "cd", "stop")


def test_no_token_that_ends_the_text_is_drawn_before_min_new_tokens():
    engine = make_engine(fakes.FakeBackend(fakes.config(), lambda history, size: -np.arange(size) * 1.0))
    [request] = engine.submit(
        [7], SamplingParams(max_new_tokens=9, min_new_tokens=2, stop_token_ids=[0], ignore_eos=True)
    )
    run(engine)
    assert (request.generated, request.finish_reason) == ([1, 1, 0], "stop")


def test_with_ignore_eos_the_text_goes_on_after_the_end_of_text_token():
    backend = fakes.FakeBackend(fakes.config(), fakes.scripted({b"ab": [*b"cd", fakes.END, *b"ef"]}))
    engine = make_engine(backend)
    [request] = engine.submit(list(b"ab"), SamplingParams(max_new_tokens=5, ignore_eos=True))
    run(engine)
    assert (request.generated, request.finish_reason) == ([*b"cd", fakes.END, *b"ef"], "length")


def test_the_last_token_allowed_ends_with_length_also_in_the_middle_of_a_character():
    engine = make_engine(fakes.FakeBackend(fakes.config(), fakes.scripted({b"a": "xé".encode()})))
    [request] = engine.submit(list(b"a"), SamplingParams(max_new_tokens=2))
    run(engine)
    assert (request.text, request.finish_reason) == ("x�", "length")


def test_a_context_can_be_filled_to_its_last_token():
    engine = make_engine(fakes.FakeBackend(fakes.config(16), fakes.endless))
    [request] = engine.submit([1] * 10, SamplingParams(max_new_tokens=6))
    run(engine)
    assert len(request.token_ids) == 16
    assert request.generated == alone([1] * 10, context=16, max_new_tokens=6)


def test_no_new_token_means_that_the_prompt_is_read_and_no_token_drawn():
    backend = fakes.FakeBackend(fakes.config())
    engine = make_engine(backend)
    [request] = engine.submit([1, 2], SamplingParams(max_new_tokens=0))
    assert [(u.token_id, u.finish_reason) for u in run(engine)] == [(None, "length")]
    assert request.generated == []
    assert request.first_token_s is None
    assert [len(batch.logits_at) for batch in backend.batches] == [0]


def test_echo_with_logprobs_gives_the_prompts_logprobs_and_then_each_tokens():
    prompt = list(b"hello")
    engine = make_engine(step_tokens=2, max_slots=2)  # in chunks of 2
    [request] = engine.submit(prompt, SamplingParams(max_new_tokens=3, echo=True, logprobs=2, **HOT))
    updates = run(engine)
    assert request.text == "hello" + TOKENIZER.decode(request.generated)
    assert (updates[0].token_id, updates[0].text) == (None, "hello")
    first, *rest = request.logprobs
    assert (first.token_id, first.logprob, first.top) == (prompt[0], None, ())
    tokens = request.token_ids
    for i, entry in enumerate(rest, 1):
        assert entry == token_logprobs(fakes.endless(tuple(tokens[:i]), 257), tokens[i], 2)
    assert len(rest) == len(tokens) - 1


def test_logprobs_are_the_models_own_whatever_the_temperature():
    engine = make_engine()
    params = SamplingParams(max_new_tokens=6, logprobs=1, temperature=0.5, seed=7, top_k=9)
    [request] = engine.submit([1, 2], params)
    run(engine)
    for i, entry in enumerate(request.logprobs, 2):
        logits = fakes.endless(tuple(request.token_ids[:i]), 257).astype(np.float64)
        logprobs = logits - np.log(np.exp(logits).sum())
        assert entry.token_id == request.token_ids[i]
        assert entry.logprob == pytest.approx(logprobs[entry.token_id], abs=1e-6)
        assert entry.top == ((logprobs.argmax(), pytest.approx(logprobs.max(), abs=1e-6)),)


def test_choices_with_echo_and_logprobs_have_the_same_prompt_logprobs_each():
    engine = make_engine()
    choices = engine.submit([1, 2, 3], SamplingParams(max_new_tokens=2, echo=True, logprobs=1, n=3, **HOT))
    run(engine)
    for choice in choices:
        assert [entry.token_id for entry in choice.logprobs] == choice.token_ids
        assert choice.logprobs[:3] == choices[0].logprobs[:3]


def test_echo_without_new_tokens_scores_the_prompt_only():
    engine = make_engine()
    engine.submit([5, 6, 7], SamplingParams(max_new_tokens=0, echo=True, logprobs=0))
    [update] = run(engine)
    assert update.text == TOKENIZER.decode([5, 6, 7])
    assert [entry.token_id for entry in update.logprobs] == [5, 6, 7]
    assert update.finish_reason == "length"


def test_choices_share_the_seed_and_differ_by_their_number():
    engine = make_engine()
    requests = engine.submit([1], SamplingParams(max_new_tokens=12, n=3, temperature=1.0))
    run(engine)
    assert [s.choice for s in requests] == [0, 1, 2]
    assert len({s.seed for s in requests}) == 1
    assert len({tuple(s.generated) for s in requests}) == 3
    [again] = engine.submit([1], SamplingParams(max_new_tokens=12, temperature=1.0, seed=requests[0].seed))
    run(engine)
    assert again.generated == requests[0].generated


def test_without_a_seed_each_prompt_draws_its_own():
    engine = make_engine()
    seeds = {engine.submit([1], SamplingParams())[0].seed for _ in range(10)}
    assert len(seeds) == 10
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_logits_are_read_at_the_positions_asked_for_and_in_order():
    read = []
    engine = make_engine(fakes.FakeBackend(fakes.config(512)), step_tokens=90)
    prompt = [i % 250 for i in range(400)]
    engine.submit(
        prompt,
        SamplingParams(max_new_tokens=0),
        logits_from=130,
        on_logits=lambda position, logits: read.append((position, logits.copy())),
    )
    run(engine)
    assert [position for position, _ in read] == [130, 180, 270, 360]
    got = np.concatenate([logits for _, logits in read])
    want = [fakes.hashed(tuple(prompt[: i + 1]), 257) for i in range(130, 400)]
    np.testing.assert_array_equal(got, want)


def test_a_reader_of_prompt_logits_that_fails_ends_its_own_sequence_only():
    def fail(position, logits):
        raise ZeroDivisionError("in the reader")

    engine = make_engine()
    [bad] = engine.submit([1], SamplingParams(max_new_tokens=2), on_logits=fail)
    [good] = engine.submit([2], SamplingParams(max_new_tokens=2))
    run(engine)
    assert isinstance(bad.error, BackendError)
    assert "ZeroDivisionError: in the reader" in str(bad.error)
    assert good.generated == alone([2], max_new_tokens=2)


# Many requests


@pytest.mark.parametrize("seed", range(4))
def test_the_same_seed_gives_the_same_tokens_beside_anybody(seed):
    """Batch sizes, chunk sizes, orders of arrival, temperatures and cancelled neighbours are random."""
    rng = random.Random(seed)
    jobs = []
    for i in range(40):
        prompt = [rng.randrange(256) for _ in range(rng.choice([1, 2, 5, 30]))]
        jobs.append(
            (
                prompt,
                {"max_new_tokens": rng.randint(1, 30), "temperature": rng.choice([0, 0.5, 1.5]), "seed": i},
            )
        )
    engine = make_engine(max_slots=rng.choice([1, 3, 16]), step_tokens=rng.choice([1, 7, 64]))
    todo = [*jobs, *[None] * 15]  # None: somebody who will be cancelled
    rng.shuffle(todo)
    kept, doomed = [], []
    while todo or engine.running or engine.waiting:
        for _ in range(min(len(todo), rng.choice([0, 0, 1, 5]))):
            job = todo.pop()
            if job is None:
                doomed += engine.submit(
                    [rng.randrange(256)] * rng.randint(1, 20), SamplingParams(max_new_tokens=40)
                )
            else:
                kept.append((job, *engine.submit(job[0], SamplingParams(**job[1]))))
        engine.step()
        if doomed and rng.random() < 0.4:
            engine.cancel(doomed.pop(rng.randrange(len(doomed))))
    assert len(kept) == 40
    for (prompt, params), request in kept:
        assert request.generated == alone(prompt, **params)


def test_a_row_is_where_the_scheduler_says_and_free_slots_are_reused_lowest_first():
    backend = fakes.FakeBackend(fakes.config(), fakes.endless)
    engine = make_engine(backend, max_slots=4)
    requests = [s for i in range(4) for s in engine.submit([i], SamplingParams(max_new_tokens=30))]
    engine.step()
    engine.step()
    assert backend.batches[-1].slots.tolist() == [0, 1, 2, 3]
    engine.cancel(requests[1])
    engine.cancel(requests[3])
    engine.submit([9], SamplingParams(max_new_tokens=30))
    engine.step()
    engine.step()
    assert backend.batches[-1].slots.tolist() == [0, 1, 2]
    assert backend.batches[-1].starts.tolist() == [3, 1, 3]


def test_a_step_decodes_first_and_gives_the_rest_of_the_budget_to_prompts():
    backend = fakes.FakeBackend(fakes.config(512), fakes.endless)
    engine = make_engine(backend, max_slots=4, step_tokens=50)
    engine.submit([1], SamplingParams(max_new_tokens=30))
    engine.step()
    engine.submit([2] * 100, SamplingParams(max_new_tokens=1))
    engine.submit([3] * 10, SamplingParams(max_new_tokens=1))
    engine.step()
    batch = backend.batches[-1]
    assert batch.lengths.tolist() == [1, 39, 10]
    assert batch.logits_at.tolist() == [0, 49]  # the long prompt is not read to its end yet


def test_slots_are_as_many_as_the_cache_may_hold():
    config = fakes.config()
    one_nbytes = config.cache_nbytes(1, 64)
    backend = fakes.FakeBackend(config)
    engine = make_engine(backend, max_slots=32, cache_nbytes=3 * one_nbytes + 1)
    assert engine.slots == 3
    assert make_engine(backend, max_slots=2, cache_nbytes=3 * one_nbytes).slots == 2
    assert backend.caches == []  # nothing is held before there is work
    engine.submit([1], SamplingParams())
    [cache] = backend.caches
    assert (cache.slots, cache.capacity) == (3, 64)


def test_a_cache_limit_of_exactly_one_requests_bytes_gives_one_slot():
    engine = make_engine(cache_nbytes=fakes.config().cache_nbytes(1, 64))
    assert engine.slots == 1
    [request] = engine.submit([1], SamplingParams(max_new_tokens=3))
    run(engine)
    assert len(request.generated) == 3


def test_encode_takes_texts_and_token_ids_and_says_what_cannot_run():
    engine = make_engine()
    params = SamplingParams(max_new_tokens=5)
    assert engine.encode("ab", params) == engine.encode((97, 98), params) == [97, 98]
    assert engine.encode("<|endoftext|>", params, allow_special=True) == [fakes.END]
    with pytest.raises(ContextLengthError, match=r"60 tokens.*max_new_tokens is 5"):
        engine.encode("x" * 60, params)
    with pytest.raises(RequestError, match="prompt is a text; make the engine with a tokenizer"):
        make_engine(tokenizer=None).encode("ab", params)
    assert make_engine(tokenizer=None).encode([97], params) == [97]


# What is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_slots": 0}, "max_slots is 0; it must be a whole number of 1 or more"),
        ({"max_slots": True}, "max_slots is True"),
        ({"step_tokens": 2.5}, "step_tokens is 2.5; it must be a whole number of 1 or more"),
        ({"cache_nbytes": 2047}, "cache_nbytes is 2047; one request .* 64 tokens needs 2048 bytes; raise"),
        ({"cache_nbytes": float("nan")}, "cache_nbytes is nan; it must be a whole number"),
    ],
)
def test_limits_that_cannot_hold_are_refused_with_value_limit_and_remedy(options, message):
    with pytest.raises(RequestError, match=message):
        make_engine(**options)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([], "prompt is empty; give at least one token"),
        ([1, 257], r"prompt holds 257 at place 1; this model's token ids are whole numbers from 0 to 256"),
        ([-1], "prompt holds -1 at place 0"),
        ([True], "prompt holds True at place 0"),
        ([0, 1.0], "prompt holds 1.0 at place 1"),
        ([0, None], "prompt holds None at place 1"),
        ([[1]], r"prompt holds \[1\] at place 0"),
        ([2**70], "prompt holds 1180591620717411303424 at place 0"),
        ("text", "prompt is 'text'; expected a sequence of token ids"),
        (7, "prompt is 7; expected a sequence of token ids"),
        (np.array([[1, 2], [3, 4]]), r"prompt is an array of shape \(2, 2\); token ids of one text have"),
        (np.array([1.5]), "prompt holds 1.5 at place 0"),
    ],
)
def test_a_prompt_that_is_not_token_ids_is_refused_by_value_and_limit(prompt, message):
    with pytest.raises(RequestError, match=message):
        make_engine().submit(prompt, SamplingParams())


def test_numpy_integers_are_token_ids():
    engine = make_engine()
    [request] = engine.submit(np.array([1, 2], np.uint8), SamplingParams(max_new_tokens=4))
    [other] = engine.submit([np.int64(1), 2], SamplingParams(max_new_tokens=4))
    run(engine)
    assert request.generated == other.generated == alone([1, 2], max_new_tokens=4)


def test_prompt_and_new_tokens_that_exceed_the_context_are_refused_with_all_numbers():
    with pytest.raises(
        ContextLengthError, match=r"60 tokens.*max_new_tokens is 5.*65.*context is 64.*shorten"
    ):
        make_engine().submit([1] * 60, SamplingParams(max_new_tokens=5))


def test_a_bias_outside_the_vocabulary_is_refused():
    with pytest.raises(InvalidSamplingError, match=r"257.*0 to 256"):
        make_engine().submit([1], SamplingParams(logit_bias={257: 1.0}))


@pytest.mark.parametrize("params", [{"stop": "x"}, {"echo": True}])
def test_what_needs_text_is_refused_without_a_tokenizer(params):
    with pytest.raises(RequestError, match="need text; make the engine with a tokenizer"):
        make_engine(tokenizer=None).submit([1], SamplingParams(**params))


def test_without_a_tokenizer_there_are_tokens_and_no_text():
    engine = make_engine(tokenizer=None)
    [request] = engine.submit([1], SamplingParams(max_new_tokens=4))
    [gone] = engine.submit([1], SamplingParams(max_new_tokens=4))
    engine.cancel(gone)
    updates = run(engine)
    assert [u.token_id for u in updates] == request.generated == alone([1], max_new_tokens=4)
    assert request.text == gone.text == ""
