"""Speculation: fewer passes, and the very same tokens, whatever is sampled and whoever else is there."""

import gc
import random
import runpy
import sys
import weakref
from dataclasses import replace
from itertools import product
from pathlib import Path

import fakes
import numpy as np
import pytest

from gpt2core import testing
from gpt2core.backends import available, create_backend
from gpt2core.backends.base import EstimatesCost
from gpt2core.engine.engine import Engine
from gpt2core.engine.request import Request, Update
from gpt2core.engine.speculation import ALLOWANCE, LENGTHS, MOST_TOKENS, PromptLookup, guess_extra_tokens_cost
from gpt2core.errors import BackendError, RequestError
from gpt2core.model import GPT2
from gpt2core.sampling.params import SamplingParams

TOKENIZER = fakes.byte_tokenizer()
LETTERS = [*b"abcdef"]
PROMPT = [*b"abcabcabc"]


def walk(history: tuple[int, ...], vocab_size: int) -> np.ndarray:
    """Logits of a text that repeats itself often: letters by the last two tokens, one of them likely."""
    logits = np.full(vocab_size, -50, np.float32)
    logits[LETTERS] = fakes.hashed(history[-2:], vocab_size)[LETTERS]
    logits[LETTERS[sum(history[-2:]) % 6]] += 5
    return logits


def chain(history: tuple[int, ...], vocab_size: int) -> np.ndarray:
    """Like `walk`, less sure of itself, by the last token alone."""
    logits = np.full(vocab_size, -np.float32(50))
    logits[LETTERS] = fakes.hashed(history[-1:], vocab_size)[LETTERS] / 4
    return logits


def fresh(history: tuple[int, ...], vocab_size: int) -> np.ndarray:
    """Logits of a text in which trigrams recur, and each time something new follows."""
    logits = np.zeros(vocab_size, np.float32)
    at = len(history) % 4
    logits[b"xyz"[at] if at < 3 else 100 + len(history) // 4 % 150] = 50
    return logits


def engine(logits_of=walk, *, context=64, before=None, after=None, draft=None, **options) -> Engine:
    """An engine on a large model; `draft` is the logits of a small one."""
    backend = fakes.FakeBackend(big(context), logits_of, before=before, after=after)
    if draft is not None and not isinstance(draft, fakes.FakeBackend):
        draft = fakes.FakeBackend(fakes.config(context), draft)
    return Engine(backend, TOKENIZER, draft=draft, **options)


def big(context: int = 64):
    """Of more parameters than the draft model's `fakes.config`."""
    return testing.random_config(
        "tiny",
        vocab_size=257,
        n_positions=context,
        n_embd=64,
        n_head=2,
        n_layer=4,
        eos_token_ids=(fakes.END,),
    )


def run(one: Engine) -> list[Update]:
    updates: list[Update] = []
    while one.running or one.waiting:
        updates += one.step()
        assert one.steps < 10_000
    return updates


def outcome(request: Request) -> tuple:
    return (
        request.generated,
        request.text,
        request.finish_reason,
        request.logprobs,
        repr(request.error),
    )


def generated(logits_of=walk, prompt=PROMPT, *, params=None, **options) -> tuple[list[tuple], Engine]:
    one = engine(logits_of, **options)
    requests = one.submit(prompt, SamplingParams(**{"max_new_tokens": 50, "seed": 1, **(params or {})}))
    run(one)
    return [outcome(request) for request in requests], one


SOURCES = {
    "prompt lookup": {"speculation": "prompt_lookup"},
    "a good draft": {"draft": walk},
    "a bad draft": {"draft": chain},
}
PARAMS = {
    "greedy": {},
    "warm": {"temperature": 0.8},
    "hot": {"temperature": 1.5},
    "top_k": {"temperature": 0.8, "top_k": 3},
    "top_p": {"temperature": 0.8, "top_p": 0.9},
    "min_p": {"temperature": 0.8, "min_p": 0.05},
    "repetition": {"repetition_penalty": 1.3},
    "presence and frequency": {"temperature": 0.8, "presence_penalty": 0.5, "frequency_penalty": 0.2},
    "n-grams": {"no_repeat_ngram_size": 5, "temperature": 0.8},
    "bias": {"temperature": 0.8, "logit_bias": {LETTERS[0]: 3.0, LETTERS[1]: -100}},
    "logprobs": {"temperature": 0.8, "logprobs": 2},
    "echo": {"temperature": 0.8, "logprobs": 2, "echo": True},
    "stop": {"temperature": 0.8, "stop": ["fa", "dd", "cbcb"]},
    "min_new_tokens": {"temperature": 0.8, "min_new_tokens": 40, "logit_bias": {fakes.END: 51.0}},
    "end of text": {"temperature": 0.8, "logit_bias": {fakes.END: 51.0}},
    "choices": {"temperature": 0.8, "n": 3},
    "one token": {"max_new_tokens": 1},
    "two tokens": {"max_new_tokens": 2},
    "no token": {"max_new_tokens": 0},
}


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("params", PARAMS)
def test_every_token_text_and_logprob_is_that_without_speculation(source, params):
    plain, without = generated(params=PARAMS[params])
    got, one = generated(params=PARAMS[params], **SOURCES[source])
    assert got == plain
    assert without.proposed_tokens == 0
    if source == "a good draft" and params in ("greedy", "warm", "top_p", "logprobs"):
        assert one.accepted_tokens == one.proposed_tokens > 20
        assert one.steps < without.steps / 2


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("temperature", [0, 0.8])
def test_the_same_holds_for_many_seeds_and_proposals_are_accepted_and_refused(seed, temperature):
    params = {"temperature": temperature, "seed": seed, "max_new_tokens": 200}
    plain, without = generated(params=params, context=256)
    got, one = generated(params=params, context=256, speculation="prompt_lookup")
    assert got == plain
    assert one.accepted_tokens > 10
    assert one.steps == without.steps - one.accepted_tokens
    if temperature:
        assert one.accepted_tokens < one.proposed_tokens


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
    one = engine(max_slots=rng.choice([1, 3, 4]), step_tokens=rng.choice([7, 64]), **SOURCES[source])
    todo = [*jobs, *[None] * 10]  # None: somebody who will be cancelled
    rng.shuffle(todo)
    kept, doomed = [], []
    while todo or one.running or one.waiting:
        for _ in range(min(len(todo), rng.choice([0, 0, 0, 1, 3]))):
            job = todo.pop()
            if job is None:
                doomed += one.submit(PROMPT, SamplingParams(max_new_tokens=40))
            else:
                kept.append((job, *one.submit(job[0], SamplingParams(**job[1]))))
        one.step()
        if doomed and rng.random() < 0.2:
            one.cancel(doomed.pop(rng.randrange(len(doomed))))
    assert len(kept) == 30
    assert one.proposed_tokens > 0
    for (prompt, params), request in kept:
        assert outcome(request) == generated(prompt=prompt, params=params)[0][0]


def test_one_step_holds_rows_with_and_without_proposals_and_a_chunk_of_a_prompt():
    backend_batches = []
    one = engine(before=backend_batches.append, speculation="prompt_lookup", step_tokens=40)
    requests = one.submit(PROMPT, SamplingParams(max_new_tokens=50))
    while not requests[0].accepted:
        one.step()
    requests += one.submit([*b"bd"], SamplingParams(max_new_tokens=30))
    one.step()
    one.step()
    requests += one.submit([*b"ace"] * 4, SamplingParams(max_new_tokens=20))
    run(one)
    lengths = [sorted(batch.lengths.tolist()) for batch in backend_batches]
    assert any(row[0] == 1 and row[-1] > 1 and len(row) == 2 for row in lengths)
    assert any(len(row) == 3 for row in lengths)
    for request, prompt, most in zip(requests, (PROMPT, b"bd", b"ace" * 4), (50, 30, 20), strict=True):
        assert outcome(request) == generated(prompt=[*prompt], params={"max_new_tokens": most})[0][0]


# How often


def test_a_text_that_repeats_itself_needs_far_fewer_passes():
    script = fakes.scripted({bytes(PROMPT): b"abcdefgh" * 30})
    [got], one = generated(script, params={"max_new_tokens": 200}, context=256, speculation="prompt_lookup")
    assert got[0] == [*b"abcdefgh" * 25]
    assert one.steps < 200 / 6
    assert one.accepted_tokens == 200 - one.steps


def test_refused_proposals_cost_no_more_than_their_share():
    prompt = [*b"xyz0"]
    for tokens in (100, 590):
        params = {"max_new_tokens": tokens}
        got, one = generated(fresh, prompt, params=params, context=1024, speculation="prompt_lookup")
        assert got == generated(fresh, prompt, params=params, context=1024)[0]
        assert one.accepted_tokens == 0
        wasted = guess_extra_tokens_cost(one.proposed_tokens, 1)
        assert 0 < wasted <= ALLOWANCE * tokens + guess_extra_tokens_cost(LENGTHS[0], 1) + 1e-6
        assert wasted <= 0.05 * tokens


def test_after_long_refusal_a_text_that_begins_to_repeat_itself_is_sped_up_again():
    text = [token for i in range(100) for token in (*b"xyz", 100 + i)]
    script = fakes.scripted({(1,): [*text, *b"abcdefgh" * 25]})
    _, one = generated(script, [1], params={"max_new_tokens": 600}, context=1024, speculation="prompt_lookup")
    assert one.accepted_tokens > 150


def test_proposals_have_few_lengths_and_a_step_has_a_limit():
    batches = []
    script = fakes.scripted({bytes(PROMPT): b"abcdefgh" * 30})
    one = engine(script, context=256, before=batches.append, speculation="prompt_lookup", max_slots=8)
    for i in range(3):
        one.submit(PROMPT, SamplingParams(max_new_tokens=200 - i))
    run(one)
    assert one.accepted_tokens > 100
    assert max(len(batch.tokens) for batch in batches[1:]) <= MOST_TOKENS
    lengths = {length for batch in batches[1:] for length in batch.lengths.tolist()}
    assert {1, 1 + LENGTHS[0]} < lengths


def test_beside_many_rows_nothing_is_proposed():
    one = engine(speculation="prompt_lookup", max_slots=8)
    for _ in range(5):  # times 0.2, of which each proposed token costs every row
        one.submit(PROMPT, SamplingParams(max_new_tokens=30))
    run(one)
    assert one.proposed_tokens == 0


@pytest.mark.parametrize(("price", "lengths"), [(0.01, {3, 7, 15}), (6.0, {7, 15}), (15.0, set())])
def test_what_cannot_pay_by_the_backends_own_price_is_not_proposed(price, lengths):
    class Priced(fakes.FakeBackend):
        def extra_tokens_cost(self, tokens: int, rows: int) -> float:
            return price

    script = fakes.scripted({bytes(PROMPT): b"abcdefgh" * 30})
    backend = Priced(big(256), script)
    one = Engine(backend, TOKENIZER, speculation="prompt_lookup")
    [request] = one.submit(PROMPT, SamplingParams(max_new_tokens=240))
    run(one)
    assert request.generated == [*b"abcdefgh" * 30]
    assert {int(batch.lengths[0]) - 1 for batch in backend.batches[1:-1]} - {0} == lengths


def test_prompts_come_first_in_a_steps_budget():
    batches = []
    one = engine(before=batches.append, context=512, speculation="prompt_lookup", step_tokens=16, max_slots=2)
    one.submit(PROMPT, SamplingParams(max_new_tokens=100))
    for _ in range(10):
        one.step()
    one.submit([*b"ab" * 100], SamplingParams(max_new_tokens=1))
    before = len(batches)
    while one.running == 2 or one.waiting:
        one.step()
    assert max(len(batch.tokens) for batch in batches[before:]) <= 16
    assert len(batches) - before <= 200 / 15 + 2


def test_prompt_lookup_copies_on_beyond_the_end_of_the_text():
    [request] = engine().submit([*b"q", *b"abcde" * 2], SamplingParams(max_new_tokens=5))
    assert PromptLookup().propose([(request, 12)]) == [[*b"abcdeabcdeab"]]
    [request] = engine().submit([*b"abcdxyabcdzzbcd"], SamplingParams(max_new_tokens=5))
    assert PromptLookup().propose([(request, 4)]) == [[*b"zzbc"]]  # the latest occurrence
    [request] = engine().submit([*b"abcdab"], SamplingParams(max_new_tokens=5))
    assert PromptLookup().propose([(request, 4)]) == [[]]


# The distribution


@pytest.mark.parametrize("source", [{"speculation": "prompt_lookup"}, {"draft": chain}, {"draft": walk}])
def test_tokens_after_a_token_have_the_models_distribution(source):
    """Chi-square over all transitions; without independence of rows it would be off by far more than 5 sd."""
    temperature = 0.8
    counts = np.zeros((257, 257))
    accepted = proposed = 0
    for seed in range(40):
        params = {"max_new_tokens": 200, "temperature": temperature, "seed": seed}
        [got], one = generated(chain, params=params, context=256, **source)
        proposed, accepted = proposed + one.proposed_tokens, accepted + one.accepted_tokens
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

    got, one = generated(spoilt, draft=chain)
    assert got == generated()[0]
    assert one.proposed_tokens > one.accepted_tokens


def test_a_text_without_a_token_left_fails_at_the_same_token():
    """A proposal may lead over positions at which nothing can be drawn."""
    outcomes, accepted = [], 0
    for draft in (None, fakes.FakeBackend(fakes.config(vocab_size=3, eos=()), fakes.hashed)):
        backend = fakes.FakeBackend(replace(big(), vocab_size=3, eos_token_ids=()), fakes.hashed)
        one = Engine(backend, draft=draft)
        requests = []
        for seed in range(20):
            params = SamplingParams(no_repeat_ngram_size=2, temperature=0.8, seed=seed)
            requests += one.submit([0, 1], params)
            run(one)
        assert all("no token can be drawn" in str(request.error) for request in requests)
        outcomes.append([outcome(request) for request in requests])
        accepted += one.accepted_tokens
    assert outcomes[0] == outcomes[1]
    assert accepted > 20


def test_a_pass_that_fails_ends_its_sequences_and_the_next_request_works():
    broken = []

    def before(batch):
        if broken and batch.lengths.max() > 1 and batch.starts.max() > 0:
            broken.clear()
            raise RuntimeError("out of order")

    one = engine(before=before, speculation="prompt_lookup")
    broken.append(True)
    [request] = one.submit(PROMPT, SamplingParams(max_new_tokens=50))
    run(one)
    assert isinstance(request.error, BackendError)
    [request] = one.submit(PROMPT, SamplingParams(max_new_tokens=50, seed=1))
    run(one)
    assert [outcome(request)] == generated()[0]


def test_an_interrupted_pass_with_proposals_is_repeated():
    interrupts = [True, True]

    def before(batch):
        if interrupts and batch.lengths.max() > 1 and batch.starts.max() > 0:
            interrupts.pop()
            raise KeyboardInterrupt

    one = engine(before=before, speculation="prompt_lookup")
    [request] = one.submit(PROMPT, SamplingParams(max_new_tokens=50, seed=1))
    caught = 0
    while one.running or one.waiting:
        try:
            one.step()
        except KeyboardInterrupt:
            caught += 1
    assert caught == 2
    assert [outcome(request)] == generated()[0]


@pytest.mark.parametrize("where", ["model", "draft"])
def test_who_is_cancelled_while_proposals_are_made_or_read_ends_there_and_leaves_no_trace(where):
    doomed = []

    def cancel(batch):
        if doomed and doomed[0].accepted > 3:
            one.cancel(doomed.pop())

    draft = fakes.FakeBackend(fakes.config(), walk, before=cancel if where == "draft" else None)
    one = engine(draft=draft, before=cancel if where == "model" else None, max_slots=1)
    doomed += one.submit(PROMPT, SamplingParams(max_new_tokens=50))
    [first] = doomed
    [second] = one.submit(PROMPT, SamplingParams(max_new_tokens=50, seed=1))
    run(one)
    assert first.finish_reason == "cancelled"
    assert 0 < len(first.generated) < 50
    assert [outcome(second)] == generated()[0]
    assert second.accepted > 10


@pytest.mark.parametrize("source", SOURCES)
def test_an_ended_sequence_is_not_kept(source):
    one = engine(**SOURCES[source])
    [request] = one.submit(PROMPT, SamplingParams(max_new_tokens=30))
    run(one)
    ended = weakref.ref(request)
    del request
    gc.collect()
    assert ended() is None


# Draft models


def test_a_draft_that_is_the_model_itself_is_always_right():
    params = {"temperature": 1.5, "max_new_tokens": 50}
    _, one = generated(params=params, draft=walk)
    assert one.accepted_tokens == one.proposed_tokens >= 40


def test_a_draft_as_large_as_the_model_is_tried_too():
    config = big()
    [got], one = generated(draft=fakes.FakeBackend(config, walk))
    assert [got] == generated()[0]
    assert one.accepted_tokens > 10


def test_a_bad_draft_is_asked_seldom():
    draft = fakes.FakeBackend(fakes.config(1024), fresh)
    params = {"max_new_tokens": 1000, "temperature": 0.8}
    got, one = generated(params=params, context=1024, draft=draft)
    assert got == generated(params=params, context=1024)[0]
    assert one.accepted_tokens < one.proposed_tokens / 4
    assert guess_extra_tokens_cost(one.proposed_tokens, 1) < 60


def test_a_draft_of_a_shorter_context_helps_as_far_as_it_reaches():
    draft = fakes.FakeBackend(fakes.config(24), walk)
    params = {"max_new_tokens": 100}
    got, one = generated(params=params, context=128, draft=draft)
    assert got == generated(params=params, context=128)[0]
    assert one.accepted_tokens == one.proposed_tokens
    assert 0 < one.accepted_tokens <= 16


def test_a_draft_catches_up_with_a_long_prompt_in_chunks():
    draft = fakes.FakeBackend(fakes.config(512), walk)
    prompt = [*b"abcdef"] * 50
    params = {"max_new_tokens": 60}
    got, one = generated(prompt=prompt, params=params, context=512, draft=draft, step_tokens=64)
    assert got == generated(prompt=prompt, params=params, context=512)[0]
    assert max(len(batch.tokens) for batch in draft.batches) == 64
    assert one.accepted_tokens > 10


def test_a_draft_that_fails_is_given_up_with_a_warning_and_the_text_goes_on():
    def before(batch):
        if len(draft.batches) == 5:
            raise ZeroDivisionError("in the draft")

    draft = fakes.FakeBackend(fakes.config(), walk, before=before)
    one = engine(draft=draft)
    [request] = one.submit(PROMPT, SamplingParams(max_new_tokens=50, seed=1))
    with pytest.warns(RuntimeWarning, match=r"speculation is off.*ZeroDivisionError\('in the draft'\)"):
        run(one)
    assert [outcome(request)] == generated()[0]
    assert len(draft.batches) == 5


def test_a_draft_without_finite_logits_proposes_nothing():
    def nothing(history, vocab_size):
        return np.full(vocab_size, np.nan, np.float32)

    got, one = generated(draft=nothing)
    assert got == generated()[0]
    assert one.proposed_tokens == 0


def test_options_that_cannot_be_are_refused(tmp_path):
    with pytest.raises(RequestError, match=r"speculation is 'ngram'; it must be 'off' or 'prompt_lookup'"):
        engine(speculation="ngram")
    with pytest.raises(RequestError, match="only one can propose"):
        engine(speculation="prompt_lookup", draft=walk)
    with pytest.raises(RequestError, match="vocabulary of 300 tokens and the model one of 257"):
        engine(draft=fakes.FakeBackend(fakes.config(vocab_size=300), walk))
    with pytest.raises(RequestError, match=r"needs [0-9]+ bytes"):
        engine(cache_nbytes=big().cache_nbytes(1, 64), draft=walk)
    folder = testing.random_checkpoint(tmp_path / "model")
    other = testing.random_checkpoint(tmp_path / "draft", seed=1)
    text = (other / "tokenizer.json").read_text()
    (other / "tokenizer.json").write_text(
        text.replace('"A":', '"\\u0000":').replace('"B":', '"A":', 1).replace('"\\u0000":', '"B":')
    )
    with pytest.raises(RequestError, match="another tokenizer than the model"):
        GPT2.from_pretrained(folder, draft_model=other)


# The facade, the command and the real backends


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return testing.random_checkpoint(tmp_path_factory.mktemp("tiny"), n_positions=128, vocab_size=257)


@pytest.mark.parametrize("temperature", [0, 0.8])
def test_a_stream_joins_to_the_same_text_piece_by_piece(temperature):
    def model(**options):
        return GPT2(fakes.FakeBackend(big(256), walk), TOKENIZER, **options)

    options = {"max_new_tokens": 200, "temperature": temperature, "seed": 5, "stop": "fff", "logprobs": 1}
    want = model().generate(PROMPT, **options)
    one = model(speculation="prompt_lookup")
    pieces = list(one.stream(PROMPT, **options))
    again = one.generate(PROMPT, **options)
    assert [piece.token_id for piece in pieces] == want.token_ids == again.token_ids
    assert "".join(piece.text for piece in pieces) == want.text == again.text
    assert pieces[-1].finish_reason == want.finish_reason
    assert (want.timing.proposed_tokens, want.timing.accepted_tokens) == (0, 0)
    assert 0 < again.timing.accepted_tokens <= again.timing.proposed_tokens
    assert one.speculated == (2 * again.timing.proposed_tokens, 2 * again.timing.accepted_tokens)


def test_leaving_a_stream_in_the_midst_of_an_accepted_proposal_frees_its_slot():
    backend = fakes.FakeBackend(big(), fakes.scripted({bytes(PROMPT): b"abc" * 20}))
    with GPT2(backend, TOKENIZER, speculation="prompt_lookup", max_batch=1) as one:
        for _ in one.stream(PROMPT, max_new_tokens=50):
            if one.speculated[1] > 3:
                break
        assert (one.engine.running, one.engine.waiting) == (0, 0)
        assert one.generate(PROMPT, max_new_tokens=50).text == "abc" * 16 + "ab"


@pytest.mark.parametrize("backend", available())
def test_every_backend_has_a_price_at_which_a_single_text_gains(folder, backend):
    from gpt2core.checkpoint.open import open_checkpoint

    made = create_backend(backend, open_checkpoint(folder).weights, threads=1)
    assert isinstance(made, EstimatesCost)
    costs = [made.extra_tokens_cost(n, 1) for n in LENGTHS]
    assert sorted(costs) == costs
    assert all(0 < cost < n for n, cost in zip(LENGTHS, costs, strict=True))


@pytest.mark.parametrize("backend", available())
def test_every_backend_gives_the_same_tokens_with_and_without(folder, backend):
    from gpt2core.checkpoint.open import open_checkpoint

    weights = open_checkpoint(folder).weights
    prompts = [[5, 6, 7, 8] * 5, [9] * 12]
    small = create_backend("numpy", weights, threads=1)
    results = []
    for options in ({}, {"speculation": "prompt_lookup"}, {"draft": small}):
        one = Engine(create_backend(backend, weights, threads=1), **options)
        results.append([])
        for prompt, temperature in product(prompts, (0, 0.5)):
            params = SamplingParams(max_new_tokens=60, temperature=temperature, seed=1, logit_bias={0: -100})
            [request] = one.submit(prompt, params)
            run(one)
            results[-1].append(request.generated)
        if options:
            assert one.proposed_tokens > 0
    assert results[1] == results[0]
    assert results[2] == results[0]


def test_the_example_measures_five_texts_and_single_passes(folder, monkeypatch, capsys):
    script = str(Path(__file__).parent.parent / "examples/speculation.py")
    args = [str(folder), "--backend", "numpy", "--threads", "1", "--rounds", "1", "--new-tokens", "40"]
    monkeypatch.setattr(sys, "argv", [script, *args])
    runpy.run_path(script, run_name="__main__")
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| ")][1:]
    assert [row[0] for row in rows] == [
        "| repeating",
        "| unrelated",
        "| misleading",
        "| the model's own, greedy",
        "| the model's own, temperature 0.8",
    ]
    assert {row[-1] for row in rows} == {"1 of 1 |"}  # the same tokens
    accepted = [row[-2].split(" of ") for row in rows]
    assert int(accepted[0][0]) == int(accepted[0][1]) > 20
    assert accepted[1] == ["0", "0"]
    assert int(accepted[2][0]) == 0 < int(accepted[2][1])
    monkeypatch.setattr(sys, "argv", [script, *args, "--passes"])
    runpy.run_path(script, run_name="__main__")
    assert [line.split()[1] for line in capsys.readouterr().out.splitlines()[2:]] == [
        "1",
        "2",
        "4",
        "8",
        "16",
    ]
