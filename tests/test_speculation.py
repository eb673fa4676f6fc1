"""Speculation: fewer passes, and the very same tokens, whatever is sampled and whoever else is there."""

import gc
import random
import weakref
from dataclasses import replace

import fakes
import numpy as np
import pytest
from engines import TOKENIZER, run
from speculating import (
    LETTERS,
    PARAMS,
    PROMPT,
    SOURCES,
    big,
    chain,
    fresh,
    generated,
    make_engine,
    outcome,
    walk,
)

from gpt2core.engine.engine import Engine
from gpt2core.engine.speculation import ALLOWANCE, LENGTHS, MOST_TOKENS, PromptLookup, guess_extra_tokens_cost
from gpt2core.errors import BackendError
from gpt2core.sampling.params import SamplingParams


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("params", PARAMS)
def test_every_token_text_and_logprob_is_that_without_speculation(source, params):
    plain, without = generated(params=PARAMS[params])
    got, engine = generated(params=PARAMS[params], **SOURCES[source])
    assert got == plain
    assert without.proposed_tokens == 0
    if source == "a good draft" and params in ("greedy", "warm", "top_p", "logprobs"):
        assert engine.accepted_tokens == engine.proposed_tokens > 20
        assert engine.steps < without.steps / 2


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("temperature", [0, 0.8])
def test_the_same_holds_for_many_seeds_and_proposals_are_accepted_and_refused(seed, temperature):
    params = {"temperature": temperature, "seed": seed, "max_new_tokens": 200}
    plain, without = generated(params=params, context=256)
    got, engine = generated(params=params, context=256, speculation="prompt_lookup")
    assert got == plain
    assert engine.accepted_tokens > 10
    assert engine.steps == without.steps - engine.accepted_tokens
    if temperature:
        assert engine.accepted_tokens < engine.proposed_tokens


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("source", SOURCES)
def test_in_batches_with_chunks_arrivals_and_cancelled_neighbours_nothing_changes(seed, source):
    rng = random.Random(seed)
    jobs = [
        (
            [rng.choice(LETTERS) for _ in range(rng.choice([1, 3, 9, 30]))],
            {"max_new_tokens": rng.randint(1, 30), "temperature": rng.choice([0, 0.8]), "seed": i},
        )
        for i in range(30)
    ]
    engine = make_engine(max_slots=rng.choice([1, 3, 4]), step_tokens=rng.choice([7, 64]), **SOURCES[source])
    todo = [*jobs, *[None] * 10]  # None: somebody who will be cancelled
    rng.shuffle(todo)
    kept, doomed = [], []
    while todo or engine.running or engine.waiting:
        for _ in range(min(len(todo), rng.choice([0, 0, 0, 1, 3]))):
            job = todo.pop()
            if job is None:
                doomed += engine.submit(PROMPT, SamplingParams(max_new_tokens=40))
            else:
                kept.append((job, *engine.submit(job[0], SamplingParams(**job[1]))))
        engine.step()
        if doomed and rng.random() < 0.2:
            engine.cancel(doomed.pop(rng.randrange(len(doomed))))
    assert len(kept) == 30
    assert engine.proposed_tokens > 0
    for (prompt, params), request in kept:
        assert outcome(request) == generated(prompt=prompt, params=params)[0][0]


def test_one_step_holds_rows_with_and_without_proposals_and_a_chunk_of_a_prompt():
    backend_batches = []
    engine = make_engine(before=backend_batches.append, speculation="prompt_lookup", step_tokens=40)
    requests = engine.submit(PROMPT, SamplingParams(max_new_tokens=50))
    while not requests[0].accepted:
        engine.step()
    requests += engine.submit([*b"bd"], SamplingParams(max_new_tokens=30))
    engine.step()
    engine.step()
    requests += engine.submit([*b"ace"] * 4, SamplingParams(max_new_tokens=20))
    run(engine)
    lengths = [sorted(batch.lengths.tolist()) for batch in backend_batches]
    assert any(row[0] == 1 and row[-1] > 1 and len(row) == 2 for row in lengths)
    assert any(len(row) == 3 for row in lengths)
    for request, prompt, most in zip(requests, (PROMPT, b"bd", b"ace" * 4), (50, 30, 20), strict=True):
        assert outcome(request) == generated(prompt=[*prompt], params={"max_new_tokens": most})[0][0]


# How often


def test_a_text_that_repeats_itself_needs_far_fewer_passes():
    script = fakes.scripted({bytes(PROMPT): b"abcdefgh" * 30})
    [got], engine = generated(
        script, params={"max_new_tokens": 200}, context=256, speculation="prompt_lookup"
    )
    assert got[0] == [*b"abcdefgh" * 25]
    assert engine.steps < 200 / 6
    assert engine.accepted_tokens == 200 - engine.steps


def test_refused_proposals_cost_no_more_than_their_share():
    prompt = [*b"xyz0"]
    for tokens in (100, 590):
        params = {"max_new_tokens": tokens}
        got, engine = generated(fresh, prompt, params=params, context=1024, speculation="prompt_lookup")
        assert got == generated(fresh, prompt, params=params, context=1024)[0]
        assert engine.accepted_tokens == 0
        wasted = guess_extra_tokens_cost(engine.proposed_tokens, 1)
        assert 0 < wasted <= ALLOWANCE * tokens + guess_extra_tokens_cost(LENGTHS[0], 1) + 1e-6
        assert wasted <= 0.05 * tokens


def test_after_long_refusal_a_text_that_begins_to_repeat_itself_is_sped_up_again():
    text = [token for i in range(100) for token in (*b"xyz", 100 + i)]
    script = fakes.scripted({(1,): [*text, *b"abcdefgh" * 25]})
    _, engine = generated(
        script, [1], params={"max_new_tokens": 600}, context=1024, speculation="prompt_lookup"
    )
    assert engine.accepted_tokens > 150


def test_proposals_have_few_lengths_and_a_step_has_a_limit():
    batches = []
    script = fakes.scripted({bytes(PROMPT): b"abcdefgh" * 30})
    engine = make_engine(script, context=256, before=batches.append, speculation="prompt_lookup", max_slots=8)
    for i in range(3):
        engine.submit(PROMPT, SamplingParams(max_new_tokens=200 - i))
    run(engine)
    assert engine.accepted_tokens > 100
    assert max(len(batch.tokens) for batch in batches[1:]) <= MOST_TOKENS
    lengths = {length for batch in batches[1:] for length in batch.lengths.tolist()}
    assert {1, 1 + LENGTHS[0]} < lengths


def test_beside_many_rows_nothing_is_proposed():
    engine = make_engine(speculation="prompt_lookup", max_slots=8)
    for _ in range(5):  # times 0.2, of which each proposed token costs every row
        engine.submit(PROMPT, SamplingParams(max_new_tokens=30))
    run(engine)
    assert engine.proposed_tokens == 0


@pytest.mark.parametrize(("price", "lengths"), [(0.01, {3, 7, 15}), (6.0, {7, 15}), (15.0, set())])
def test_what_cannot_pay_by_the_backends_own_price_is_not_proposed(price, lengths):
    class Priced(fakes.FakeBackend):
        def extra_tokens_cost(self, tokens: int, rows: int) -> float:
            return price

    script = fakes.scripted({bytes(PROMPT): b"abcdefgh" * 30})
    backend = Priced(big(256), script)
    engine = Engine(backend, TOKENIZER, speculation="prompt_lookup")
    [request] = engine.submit(PROMPT, SamplingParams(max_new_tokens=240))
    run(engine)
    assert request.generated == [*b"abcdefgh" * 30]
    assert {int(batch.lengths[0]) - 1 for batch in backend.batches[1:-1]} - {0} == lengths


def test_prompts_come_first_in_a_steps_budget():
    batches = []
    engine = make_engine(
        before=batches.append, context=512, speculation="prompt_lookup", step_tokens=16, max_slots=2
    )
    engine.submit(PROMPT, SamplingParams(max_new_tokens=100))
    for _ in range(10):
        engine.step()
    engine.submit([*b"ab" * 100], SamplingParams(max_new_tokens=1))
    before = len(batches)
    while engine.running == 2 or engine.waiting:
        engine.step()
    assert max(len(batch.tokens) for batch in batches[before:]) <= 16
    assert len(batches) - before <= 200 / 15 + 2


def test_prompt_lookup_copies_on_beyond_the_end_of_the_text():
    [request] = make_engine().submit([*b"q", *b"abcde" * 2], SamplingParams(max_new_tokens=5))
    assert PromptLookup().propose([(request, 12)]) == [[*b"abcdeabcdeab"]]
    [request] = make_engine().submit([*b"abcdxyabcdzzbcd"], SamplingParams(max_new_tokens=5))
    assert PromptLookup().propose([(request, 4)]) == [[*b"zzbc"]]  # the latest occurrence
    [request] = make_engine().submit([*b"abcdab"], SamplingParams(max_new_tokens=5))
    assert PromptLookup().propose([(request, 4)]) == [[]]


def test_guesses_beyond_the_end_of_text_are_not_counted_as_accepted():
    prompt = [*b"abcd", fakes.END, *b"xyz", *b"abc"]
    script = fakes.scripted({tuple(prompt): [*b"d", fakes.END, *b"xyzabcd"]})
    [got], engine = generated(script, prompt, speculation="prompt_lookup")
    assert got[0] == [*b"d", fakes.END]
    assert (engine.steps, engine.accepted_tokens) == (2, 1)  # one reads the prompt, the other draws the end
    prompt = [*b"abcdef", fakes.END, *b"xyz", *b"abc"]
    script = fakes.scripted({tuple(prompt): [*b"def", fakes.END, *b"xyzabcdef"]})
    [got], engine = generated(script, prompt, speculation="prompt_lookup")
    assert got[0] == [*b"def", fakes.END]
    assert (engine.steps, engine.accepted_tokens) == (2, 3)


def test_what_long_acceptance_earned_is_not_spent_on_long_refusal():
    refused = [token for i in range(100) for token in (*b"xyz", 100 + i)]
    tokens = 400 + len(refused)
    script = fakes.scripted({(1,): [*b"abcdefgh" * 50, *refused]})
    _, engine = generated(
        script, [1], params={"max_new_tokens": tokens}, context=1024, speculation="prompt_lookup"
    )
    assert engine.accepted_tokens > 300
    most_credit = guess_extra_tokens_cost(LENGTHS[-1], 1)
    wasted = guess_extra_tokens_cost(engine.proposed_tokens - engine.accepted_tokens, 1)
    assert wasted <= 2 * most_credit + ALLOWANCE * tokens


def test_proposals_that_are_refused_for_their_greater_part_become_shorter():
    # Three letters of each proposal are right, and what follows them is new each time.
    text = [token for i in range(80) for token in (*b"abcdef", 120 + i)]
    script = fakes.scripted({(1,): text})
    [got], engine = generated(
        script, [1], params={"max_new_tokens": len(text)}, context=1024, speculation="prompt_lookup"
    )
    assert got[0] == text
    assert engine.accepted_tokens > 150
    assert engine.proposed_tokens < 2 * engine.accepted_tokens


# The distribution


@pytest.mark.parametrize("source", [{"speculation": "prompt_lookup"}, {"draft": chain}, {"draft": walk}])
def test_tokens_after_a_token_have_the_models_distribution(source):
    """Chi-square over all transitions; without independence of rows it would be off by far more than 5 sd."""
    temperature = 0.8
    counts = np.zeros((257, 257))
    accepted = proposed = 0
    for seed in range(40):
        params = {"max_new_tokens": 200, "temperature": temperature, "seed": seed}
        [got], engine = generated(chain, params=params, context=256, **source)
        proposed, accepted = proposed + engine.proposed_tokens, accepted + engine.accepted_tokens
        tokens = [PROMPT[-1], *got[0]]
        np.add.at(counts, (tokens[:-1], tokens[1:]), 1)
    assert 50 < accepted < proposed or source == {"draft": chain}
    assert accepted > 50
    statistic, freedom = 0.0, 0
    for token in LETTERS:
        logits = chain((token,), 257)[LETTERS].astype(float) / temperature
        expected = np.exp(logits) / np.exp(logits).sum() * counts[token].sum()
        assert expected.min() > 5
        statistic += float(((counts[token, LETTERS] - expected) ** 2 / expected).sum())
        freedom += len(LETTERS) - 1
    assert abs(statistic - freedom) < 4 * (2 * freedom) ** 0.5


# Faults


@pytest.mark.parametrize("at", range(12, 40, 3))
def test_logits_that_are_not_finite_end_a_text_at_the_same_token(at):
    def spoilt(history, vocab_size):
        logits = walk(history, vocab_size)
        if len(history) >= at:
            logits[5] = np.nan
        return logits

    plain, _ = generated(spoilt)
    got, _ = generated(spoilt, speculation="prompt_lookup")
    assert len(got[0][0]) == len(plain[0][0]) == at - len(PROMPT)
    assert got[0][:4] == plain[0][:4]
    assert "NumericalError" in got[0][4]


def test_logits_that_are_not_finite_beyond_a_refused_token_harm_nobody():
    real = {tuple(PROMPT + generated()[0][0][0][:i]) for i in range(51)}

    def spoilt(history, vocab_size):
        logits = walk(history, vocab_size)
        if history not in real:  # only a wrong guess leads there
            logits[:] = np.nan
        return logits

    got, engine = generated(spoilt, draft=chain)
    assert got == generated()[0]
    assert engine.proposed_tokens > engine.accepted_tokens


def test_a_text_without_a_token_left_fails_at_the_same_token():
    """A proposal may lead over positions at which nothing can be drawn."""
    outcomes, accepted = [], 0
    for draft in (None, fakes.FakeBackend(fakes.config(vocab_size=3, eos=()), fakes.hashed)):
        backend = fakes.FakeBackend(replace(big(), vocab_size=3, eos_token_ids=()), fakes.hashed)
        engine = Engine(backend, draft=draft)
        requests = []
        for seed in range(20):
            params = SamplingParams(no_repeat_ngram_size=2, temperature=0.8, seed=seed)
            requests += engine.submit([0, 1], params)
            run(engine)
        assert all("no token can be drawn" in str(request.error) for request in requests)
        outcomes.append([outcome(request) for request in requests])
        accepted += engine.accepted_tokens
    assert outcomes[0] == outcomes[1]
    assert accepted > 20


def test_a_pass_that_fails_ends_its_sequences_and_the_next_request_works():
    broken = []

    def before(batch):
        if broken and batch.lengths.max() > 1 and batch.starts.max() > 0:
            broken.clear()
            raise RuntimeError("out of order")

    engine = make_engine(before=before, speculation="prompt_lookup")
    broken.append(True)
    [request] = engine.submit(PROMPT, SamplingParams(max_new_tokens=50))
    run(engine)
    assert isinstance(request.error, BackendError)
    [request] = engine.submit(PROMPT, SamplingParams(max_new_tokens=50, seed=1))
    run(engine)
    assert [outcome(request)] == generated()[0]


def test_an_interrupted_pass_with_proposals_is_repeated():
    interrupts = [True, True]

    def before(batch):
        if interrupts and batch.lengths.max() > 1 and batch.starts.max() > 0:
            interrupts.pop()
            raise KeyboardInterrupt

    engine = make_engine(before=before, speculation="prompt_lookup")
    [request] = engine.submit(PROMPT, SamplingParams(max_new_tokens=50, seed=1))
    caught = 0
    while engine.running or engine.waiting:
        try:
            engine.step()
        except KeyboardInterrupt:
            caught += 1
    assert caught == 2
    assert [outcome(request)] == generated()[0]


@pytest.mark.parametrize("where", ["model", "draft"])
def test_who_is_cancelled_while_proposals_are_made_or_read_ends_there_and_leaves_no_trace(where):
    doomed = []

    def cancel(batch):
        if doomed and doomed[0].accepted > 3:
            engine.cancel(doomed.pop())

    draft = fakes.FakeBackend(fakes.config(), walk, before=cancel if where == "draft" else None)
    engine = make_engine(draft=draft, before=cancel if where == "model" else None, max_slots=1)
    doomed += engine.submit(PROMPT, SamplingParams(max_new_tokens=50))
    [first] = doomed
    [second] = engine.submit(PROMPT, SamplingParams(max_new_tokens=50, seed=1))
    run(engine)
    assert first.finish_reason == "cancelled"
    assert 0 < len(first.generated) < 50
    assert [outcome(second)] == generated()[0]
    assert second.accepted > 10


@pytest.mark.parametrize("source", SOURCES)
def test_an_ended_sequence_is_not_kept(source):
    engine = make_engine(**SOURCES[source])
    [request] = engine.submit(PROMPT, SamplingParams(max_new_tokens=30))
    run(engine)
    ended = weakref.ref(request)
    del request
    gc.collect()
    assert ended() is None
