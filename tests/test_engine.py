"""submit, step, cancel: what each request gets does not depend on who else is there, and nothing leaks."""

import gc
import random
import threading
import time
import weakref

import fakes
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gpt2core.engine.engine import Engine
from gpt2core.engine.request import PromptLogprobs, Request, Update
from gpt2core.errors import (
    BackendError,
    ContextLengthError,
    InvalidSamplingError,
    NumericalError,
    RequestError,
)
from gpt2core.sampling.draw import sample_token, token_logprobs
from gpt2core.sampling.params import SamplingParams
from gpt2core.tokenizer.stream import TextStream

TOKENIZER = fakes.byte_tokenizer()
HOT = {"temperature": 1.0, "seed": 7}


def engine(backend=None, *, tokenizer=TOKENIZER, **options) -> Engine:
    return Engine(backend or fakes.FakeBackend(fakes.config(), fakes.endless), tokenizer, **options)


def run(one: Engine, *requests: Request) -> list[Update]:
    """Step until these requests (all, if none is named) have ended."""
    updates: list[Update] = []
    while one.running or one.waiting:
        news = one.step()
        assert news or one.running, "nobody runs, yet somebody waits"
        assert one.steps < 10_000
        updates += news
        if requests and all(s.finished for s in requests):
            break
    return updates


def alone(prompt, logits_of=fakes.endless, context=64, **params) -> list[int]:
    """The loop that the engine is to be equal to, written out for one request."""
    config = fakes.config(context)
    wanted = SamplingParams(**params)
    tokens = list(prompt)
    for _ in range(wanted.resolve_max_new_tokens(len(prompt), context)):
        tokens.append(
            sample_token(
                logits_of(tuple(tokens), config.vocab_size),
                wanted,
                token_ids=tokens,
                prompt_tokens=len(prompt),
                eos_token_ids=config.eos_token_ids,
                seed=wanted.seed or 0,
                choice=0,
            )
        )
        if tokens[-1] in config.eos_token_ids:
            break
    return tokens[len(prompt) :]


# One request


def test_a_sequence_equals_a_plain_loop_over_logits_and_sample_token():
    one = engine()
    [request] = one.submit([1, 2, 3], SamplingParams(max_new_tokens=20, **HOT))
    run(one)
    assert request.generated == alone([1, 2, 3], max_new_tokens=20, **HOT)
    assert request.finish_reason == "length"
    assert request.text == TOKENIZER.decode(request.generated, skip_special=True)


def test_the_end_of_text_token_is_kept_as_a_token_and_gives_no_text():
    backend = fakes.FakeBackend(fakes.config(), fakes.scripted({b"ab": b"cd"}))
    one = engine(backend)
    [request] = one.submit(iter(b"ab"), SamplingParams(max_new_tokens=10))
    run(one)
    assert request.generated == [*b"cd", fakes.END]
    assert (request.text, request.finish_reason) == ("cd", "stop")


def test_an_end_of_text_token_that_is_no_special_token_gives_no_text_either():
    one = engine(fakes.FakeBackend(fakes.config(eos=(ord("d"),)), fakes.scripted({b"ab": b"cde"})))
    [request] = one.submit(list(b"ab"), SamplingParams(max_new_tokens=10))
    run(one)
    assert (request.generated, request.text, request.finish_reason) == ([*b"cd"], "c", "stop")


def test_the_last_token_allowed_ends_with_length_also_in_the_middle_of_a_character():
    one = engine(fakes.FakeBackend(fakes.config(), fakes.scripted({b"a": "xé".encode()})))
    [request] = one.submit(list(b"a"), SamplingParams(max_new_tokens=2))
    run(one)
    assert (request.text, request.finish_reason) == ("x�", "length")


def test_a_context_can_be_filled_to_its_last_token():
    one = engine(fakes.FakeBackend(fakes.config(16), fakes.endless))
    [request] = one.submit([1] * 10, SamplingParams(max_new_tokens=6))
    run(one)
    assert len(request.token_ids) == 16
    assert request.generated == alone([1] * 10, context=16, max_new_tokens=6)


def test_no_new_token_means_that_the_prompt_is_read_and_no_token_drawn():
    backend = fakes.FakeBackend(fakes.config())
    one = engine(backend)
    [request] = one.submit([1, 2], SamplingParams(max_new_tokens=0))
    assert [(u.token_id, u.finish_reason) for u in run(one)] == [(None, "length")]
    assert request.generated == []
    assert request.first_token_s is None
    assert [len(batch.logits_at) for batch in backend.batches] == [0]


def test_echo_with_logprobs_gives_the_prompts_logprobs_and_then_each_tokens():
    prompt = list(b"hello")
    one = engine(step_tokens=2, max_slots=2)  # in chunks of 2
    [request] = one.submit(prompt, SamplingParams(max_new_tokens=3, echo=True, logprobs=2, **HOT))
    updates = run(one)
    assert request.text == "hello" + TOKENIZER.decode(request.generated)
    assert (updates[0].token_id, updates[0].text) == (None, "hello")
    first, *rest = request.logprobs
    assert (first.token_id, first.logprob, first.top) == (prompt[0], None, ())
    tokens = request.token_ids
    for i, entry in enumerate(rest, 1):
        assert entry == token_logprobs(fakes.endless(tuple(tokens[:i]), 257), tokens[i], 2)
    assert len(rest) == len(tokens) - 1


def test_choices_with_echo_and_logprobs_have_the_same_prompt_logprobs_each():
    one = engine()
    choices = one.submit([1, 2, 3], SamplingParams(max_new_tokens=2, echo=True, logprobs=1, n=3, **HOT))
    run(one)
    for choice in choices:
        assert [entry.token_id for entry in choice.logprobs] == choice.token_ids
        assert choice.logprobs[:3] == choices[0].logprobs[:3]


def test_echo_without_new_tokens_scores_the_prompt_only():
    one = engine()
    one.submit([5, 6, 7], SamplingParams(max_new_tokens=0, echo=True, logprobs=0))
    [update] = run(one)
    assert update.text == TOKENIZER.decode([5, 6, 7])
    assert [entry.token_id for entry in update.logprobs] == [5, 6, 7]
    assert update.finish_reason == "length"


def test_choices_share_the_seed_and_differ_by_their_number():
    one = engine()
    requests = one.submit([1], SamplingParams(max_new_tokens=12, n=3, temperature=1.0))
    run(one)
    assert [s.choice for s in requests] == [0, 1, 2]
    assert len({s.seed for s in requests}) == 1
    assert len({tuple(s.generated) for s in requests}) == 3
    [again] = one.submit([1], SamplingParams(max_new_tokens=12, temperature=1.0, seed=requests[0].seed))
    run(one)
    assert again.generated == requests[0].generated


def test_without_a_seed_each_prompt_draws_its_own():
    one = engine()
    seeds = {one.submit([1], SamplingParams())[0].seed for _ in range(10)}
    assert len(seeds) == 10
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_logits_are_read_at_the_positions_asked_for_and_in_order():
    read = []
    one = engine(fakes.FakeBackend(fakes.config(512)), step_tokens=90)
    prompt = [i % 250 for i in range(400)]
    one.submit(
        prompt,
        SamplingParams(max_new_tokens=0),
        logits_from=130,
        on_logits=lambda position, logits: read.append((position, logits.copy())),
    )
    run(one)
    assert [position for position, _ in read] == [130, 180, 270, 360]
    got = np.concatenate([logits for _, logits in read])
    want = [fakes.hashed(tuple(prompt[: i + 1]), 257) for i in range(130, 400)]
    np.testing.assert_array_equal(got, want)


def test_a_reader_of_prompt_logits_that_fails_ends_its_own_sequence_only():
    def fail(position, logits):
        raise ZeroDivisionError("in the reader")

    one = engine()
    [bad] = one.submit([1], SamplingParams(max_new_tokens=2), on_logits=fail)
    [good] = one.submit([2], SamplingParams(max_new_tokens=2))
    run(one)
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
    one = engine(max_slots=rng.choice([1, 3, 16]), step_tokens=rng.choice([1, 7, 64]))
    todo = [*jobs, *[None] * 15]  # None: somebody who will be cancelled
    rng.shuffle(todo)
    kept, doomed = [], []
    while todo or one.running or one.waiting:
        for _ in range(min(len(todo), rng.choice([0, 0, 1, 5]))):
            job = todo.pop()
            if job is None:
                doomed += one.submit(
                    [rng.randrange(256)] * rng.randint(1, 20), SamplingParams(max_new_tokens=40)
                )
            else:
                kept.append((job, *one.submit(job[0], SamplingParams(**job[1]))))
        one.step()
        if doomed and rng.random() < 0.4:
            one.cancel(doomed.pop(rng.randrange(len(doomed))))
    assert len(kept) == 40
    for (prompt, params), request in kept:
        assert request.generated == alone(prompt, **params)


def test_a_row_is_where_the_scheduler_says_and_free_slots_are_reused_lowest_first():
    backend = fakes.FakeBackend(fakes.config(), fakes.endless)
    one = engine(backend, max_slots=4)
    requests = [s for i in range(4) for s in one.submit([i], SamplingParams(max_new_tokens=30))]
    one.step()
    one.step()
    assert backend.batches[-1].slots.tolist() == [0, 1, 2, 3]
    one.cancel(requests[1])
    one.cancel(requests[3])
    one.submit([9], SamplingParams(max_new_tokens=30))
    one.step()
    one.step()
    assert backend.batches[-1].slots.tolist() == [0, 1, 2]
    assert backend.batches[-1].starts.tolist() == [3, 1, 3]


def test_a_step_decodes_first_and_gives_the_rest_of_the_budget_to_prompts():
    backend = fakes.FakeBackend(fakes.config(512), fakes.endless)
    one = engine(backend, max_slots=4, step_tokens=50)
    one.submit([1], SamplingParams(max_new_tokens=30))
    one.step()
    one.submit([2] * 100, SamplingParams(max_new_tokens=1))
    one.submit([3] * 10, SamplingParams(max_new_tokens=1))
    one.step()
    batch = backend.batches[-1]
    assert batch.lengths.tolist() == [1, 39, 10]
    assert batch.logits_at.tolist() == [0, 49]  # the long prompt is not read to its end yet


def test_slots_are_as_many_as_the_cache_may_hold():
    config = fakes.config()
    one_nbytes = config.cache_nbytes(1, 64)
    backend = fakes.FakeBackend(config)
    one = engine(backend, max_slots=32, cache_nbytes=3 * one_nbytes + 1)
    assert one.slots == 3
    assert engine(backend, max_slots=2, cache_nbytes=3 * one_nbytes).slots == 2
    assert backend.caches == []  # nothing is held before there is work
    one.submit([1], SamplingParams())
    [cache] = backend.caches
    assert (cache.slots, cache.capacity) == (3, 64)


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
        engine(**options)


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
        (np.array([[1, 2], [3, 4]]), r"prompt holds \[1, 2\] at place 0"),
        (np.array([1.5]), "prompt holds 1.5 at place 0"),
    ],
)
def test_a_prompt_that_is_not_token_ids_is_refused_by_value_and_limit(prompt, message):
    with pytest.raises(RequestError, match=message):
        engine().submit(prompt, SamplingParams())


def test_numpy_integers_are_token_ids():
    one = engine()
    [request] = one.submit(np.array([1, 2], np.uint8), SamplingParams(max_new_tokens=4))
    [other] = one.submit([np.int64(1), 2], SamplingParams(max_new_tokens=4))
    run(one)
    assert request.generated == other.generated == alone([1, 2], max_new_tokens=4)


def test_prompt_and_new_tokens_that_exceed_the_context_are_refused_with_all_numbers():
    with pytest.raises(
        ContextLengthError, match=r"60 tokens.*max_new_tokens is 5.*65.*context is 64.*shorten"
    ):
        engine().submit([1] * 60, SamplingParams(max_new_tokens=5))


def test_a_bias_outside_the_vocabulary_is_refused():
    with pytest.raises(InvalidSamplingError, match=r"257.*0 to 256"):
        engine().submit([1], SamplingParams(logit_bias={257: 1.0}))


@pytest.mark.parametrize("params", [{"stop": "x"}, {"echo": True}])
def test_what_needs_text_is_refused_without_a_tokenizer(params):
    with pytest.raises(RequestError, match="need text; make the engine with a tokenizer"):
        engine(tokenizer=None).submit([1], SamplingParams(**params))


def test_without_a_tokenizer_there_are_tokens_and_no_text():
    one = engine(tokenizer=None)
    [request] = one.submit([1], SamplingParams(max_new_tokens=4))
    [gone] = one.submit([1], SamplingParams(max_new_tokens=4))
    one.cancel(gone)
    updates = run(one)
    assert [u.token_id for u in updates] == request.generated == alone([1], max_new_tokens=4)
    assert request.text == gone.text == ""


# Stop strings


def cut(text: str, stops: list[str]) -> tuple[str, bool]:
    """By definition: before the stop string that is complete first, the longest of those."""
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            return text[: end - max(map(len, found))], True
    return text, False


STOPS = st.text("ab€é", min_size=1, max_size=5) | st.text("ab", min_size=1, max_size=8)


@settings(deadline=None, max_examples=300)
@given(
    text=st.text("ab€é", max_size=25) | st.text("ab", max_size=25),
    broken=st.lists(st.integers(128, 255), max_size=2),
    stops=st.lists(STOPS, min_size=1, max_size=4),
    new=st.integers(1, 40),
)
@example(text="aab", broken=[], stops=["ab", "aac"], new=9)
@example(text="abababc", broken=[], stops=["ababc"], new=40)
@example(text="xab", broken=[], stops=["b", "ab"], new=9)
@example(text="aabaabaaa", broken=[], stops=["aabaaa"], new=40)
@example(text="aabaaabaaa", broken=[], stops=["aabaaabaaa", "aabaaab!"], new=40)
@example(text="€", broken=[], stops=["€"], new=3)
@example(text="aaaa", broken=[], stops=["aaaaa"], new=4)
@example(text="ab", broken=[0xE2], stops=["�"], new=3)
def test_streamed_pieces_join_to_the_text_cut_before_the_first_stop_string(text, broken, stops, new):
    script = [*text.encode(), *broken]
    one = engine(fakes.FakeBackend(fakes.config(128), fakes.scripted({b"p": script})))
    [request] = one.submit(list(b"p"), SamplingParams(max_new_tokens=new, stop=stops))
    updates = run(one)
    assert "".join(u.text for u in updates) == request.text
    generated = request.generated
    assert generated == [*script, fakes.END][: len(generated)]
    whole = TOKENIZER.decode(generated, skip_special=True)
    assert request.text == cut(whole, stops)[0]
    reason = "stop" if cut(whole, stops)[1] or generated[-1] == fakes.END else "length"
    assert request.finish_reason == reason
    # Until then no stop string was complete, and the longest text that may begin one was held back, no more.
    decoder, certain, emitted = TOKENIZER.stream_decoder(), "", ""
    for update in updates[:-1]:
        certain += decoder.push(update.token_id)
        emitted += update.text
        assert not cut(certain, stops)[1]
        held = max((len(start) for start in starts_of(stops) if certain.endswith(start)), default=0)
        assert emitted == certain[: len(certain) - held]


def starts_of(stops: list[str]) -> set[str]:
    return {stop[:k] for stop in stops for k in range(1, len(stop))}


def test_a_stop_string_in_the_prompt_does_not_count():
    one = engine(fakes.FakeBackend(fakes.config(), fakes.scripted({b"a.": b"b.c"})))
    [request] = one.submit(list(b"a."), SamplingParams(max_new_tokens=9, stop=".", echo=True))
    run(one)
    assert (request.text, request.finish_reason) == ("a.b", "stop")
    assert request.generated == [*b"b."]


def test_text_after_a_stop_string_is_never_given_out():
    stream = TextStream(TOKENIZER.stream_decoder(), ["b"])
    assert [stream.push(token) for token in b"abc"] == ["a", "", ""]
    assert stream.stopped
    assert stream.flush() == ""


# Cancelling


def test_cancel_ends_a_sequence_that_waits_that_reads_its_prompt_or_that_decodes():
    one = engine(max_slots=2, step_tokens=2)
    [decodes] = one.submit([1], SamplingParams(max_new_tokens=30))
    [reads] = one.submit([2] * 30, SamplingParams(max_new_tokens=30))
    [waits] = one.submit([3], SamplingParams(max_new_tokens=30))
    one.step()
    one.step()
    for request in (decodes, reads, waits):
        one.cancel(request)
        assert request.finish_reason == "cancelled"
        assert request.slot is None
        assert request.finished_s is not None
    assert (one.running, one.waiting) == (0, 0)
    assert one.step() == []
    assert decodes.generated == alone([1], max_new_tokens=30)[:2]
    one.cancel(decodes)  # once more does nothing
    assert one.running == 0


def test_cancel_gives_out_the_text_that_was_held_back():
    one = engine(fakes.FakeBackend(fakes.config(), fakes.scripted({b"p": b"xyzzy"})))
    [request] = one.submit(
        list(b"p"), SamplingParams(max_new_tokens=30, stop="zzyz", logprobs=0), stream=True
    )
    for _ in range(4):
        one.step()
    assert request.text == "xy"
    one.cancel(request)
    assert request.text == "xyzz"
    assert "".join(piece.text for piece in request.pieces) == "xyzz"
    assert [piece.finish_reason for piece in request.pieces] == [None] * 4 + ["cancelled"]
    assert [entry.token_id for entry in request.logprobs] == [*b"xyzz"]


def test_cancel_during_a_step_frees_the_slot_at_once_and_the_step_reports_nothing_of_it():
    seen = []

    def cancel(batch):
        if len(backend.batches) == 3:
            one.cancel(doomed)
            seen.append((doomed.finish_reason, one.running))

    backend = fakes.FakeBackend(fakes.config(), fakes.endless, before=cancel)
    one = engine(backend, max_slots=2)
    [doomed] = one.submit([1], SamplingParams(max_new_tokens=30))
    [stays] = one.submit([2], SamplingParams(max_new_tokens=6))
    [waits] = one.submit([3], SamplingParams(max_new_tokens=6))
    updates = run(one)
    assert seen == [("cancelled", 1)]
    assert len(doomed.generated) == 2
    assert [u.token_id for u in updates if u.request is doomed] == doomed.generated
    assert stays.generated == alone([2], max_new_tokens=6)
    assert waits.generated == alone([3], max_new_tokens=6)


def test_a_finaliser_that_cancels_in_the_middle_of_a_change_does_not_deadlock():
    """The cyclic collector may close an abandoned stream in any thread, also in the one that steps."""
    one = engine()
    [doomed] = one.submit([1], SamplingParams(max_new_tokens=30))
    [stays] = one.submit([2], SamplingParams(max_new_tokens=5))
    one.step()
    take_token = TextStream.push
    calls = []

    class Collected(TextStream):
        def push(self, token_id):
            calls.append(token_id)
            if len(calls) == 2:
                one.cancel(doomed)
                assert doomed.finish_reason is None  # not here, in the middle of another's change
            return take_token(self, token_id)

    stays.stream = Collected(TOKENIZER.stream_decoder())
    one.step()
    one.step()
    assert doomed.finish_reason == "cancelled"
    run(one)
    assert stays.generated == alone([2], max_new_tokens=5)
    assert one.running == 0


def test_cancel_from_another_thread_does_not_wait_for_the_step():
    entered, leave = threading.Event(), threading.Event()

    def wait(batch):
        entered.set()
        assert leave.wait(10)

    one = engine(fakes.FakeBackend(fakes.config(), before=wait))
    [request] = one.submit([1], SamplingParams(max_new_tokens=5))
    thread = threading.Thread(target=one.step)
    thread.start()
    assert entered.wait(10)
    one.cancel(request)
    [late] = one.submit([2], SamplingParams(max_new_tokens=1))
    assert request.finished
    assert (one.running, one.waiting) == (0, 1)
    leave.set()
    thread.join(10)
    run(one)
    assert late.generated == alone([2], fakes.hashed, max_new_tokens=1)


# Faults


class Broken(Exception):
    pass


@pytest.mark.parametrize(
    ("raised", "kind"),
    [
        (Broken("no"), BackendError),
        (MemoryError(), BackendError),
        (RequestError("batch.tokens holds 9"), BackendError),
        (NumericalError("overflow"), NumericalError),
    ],
    ids=lambda value: getattr(value, "__name__", type(value).__name__),
)
def test_a_backend_that_raises_ends_the_rows_of_that_step_and_the_engine_goes_on(raised, kind):
    def fail(batch):
        if len(backend.batches) == 2:
            raise raised

    backend = fakes.FakeBackend(fakes.config(), fakes.endless, before=fail)
    one = engine(backend, max_slots=2)
    hit = [s for i in (1, 2) for s in one.submit([i], SamplingParams(max_new_tokens=5))]
    [waits] = one.submit([3], SamplingParams(max_new_tokens=5))
    one.step()
    updates = one.step()
    assert [(u.request, u.finish_reason) for u in updates] == [(s, None) for s in hit]
    for update in updates:
        assert type(update.error) is kind
        assert update.error is update.request.error
        assert update.error.__cause__ is raised
        assert "backend 'fake' failed in step 2" in str(update.error)
        assert type(raised).__name__ in str(update.error)
    assert updates[0].error is not updates[1].error
    run(one)
    assert waits.generated == alone([3], max_new_tokens=5)
    assert one.running == 0


def test_logits_of_a_wrong_shape_are_a_backend_error():
    class Short(fakes.FakeBackend):
        def forward(self, batch, cache):
            return super().forward(batch, cache)[:, :5]

    one = engine(Short(fakes.config()))
    [request] = one.submit([1], SamplingParams())
    run(one)
    assert "returned logits of shape (1, 5) instead of (1, 257)" in str(request.error)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_logits_that_are_not_finite_end_only_their_own_request(value):
    def poison(batch, logits):
        if len(backend.batches) == 3:
            logits[1, 100] = value

    backend = fakes.FakeBackend(fakes.config(), fakes.endless, after=poison)
    one = engine(backend)
    requests = [s for i in range(3) for s in one.submit([i], SamplingParams(max_new_tokens=6, **HOT))]
    updates = run(one)
    assert isinstance(requests[1].error, NumericalError)
    assert "backend 'fake' returned logits that are not finite in step 3 at token 3" in str(requests[1].error)
    assert requests[1].generated == alone([1], max_new_tokens=6, **HOT)[:2]
    assert [u.finish_reason for u in updates if u.request is requests[1]] == [None] * 3
    for i in (0, 2):
        assert requests[i].generated == alone([i], max_new_tokens=6, **HOT)


def test_logits_whose_sum_overflows_though_each_is_finite_are_accepted():
    def huge(history, vocab_size):
        return np.float32(1e37) * np.abs(fakes.hashed(history, vocab_size))

    with np.errstate(over="ignore"):
        assert huge((1,), 257).sum() == np.inf
    one = engine(fakes.FakeBackend(fakes.config(), huge))
    [request] = one.submit([1], SamplingParams(max_new_tokens=3))
    run(one)
    assert request.generated == alone([1], huge, max_new_tokens=3)


def test_a_request_for_which_every_token_is_banned_ends_alone():
    config = fakes.config(vocab_size=3, eos=())
    one = Engine(fakes.FakeBackend(config, lambda history, v: np.zeros(v, np.float32)))
    [request] = one.submit([0], SamplingParams(max_new_tokens=50, no_repeat_ngram_size=1))
    [other] = one.submit([0], SamplingParams(max_new_tokens=5))
    run(one)
    assert isinstance(request.error, InvalidSamplingError)
    assert request.generated == [1, 2]
    assert other.generated == [0] * 5


def test_an_interrupt_in_the_backend_propagates_and_the_next_step_repeats_the_pass():
    def interrupt(batch):
        if len(backend.batches) == 2:
            raise KeyboardInterrupt

    backend = fakes.FakeBackend(fakes.config(), fakes.endless, before=interrupt)
    one = engine(backend)
    [request] = one.submit([1], SamplingParams(max_new_tokens=5, **HOT))
    one.step()
    with pytest.raises(KeyboardInterrupt):
        one.step()
    run(one)
    assert request.generated == alone([1], max_new_tokens=5, **HOT)


def test_an_interrupt_between_reading_a_prompt_and_recording_it_counts_no_token_twice(monkeypatch):
    armed = [True]

    def interrupt(*args, **kwargs):
        if armed.pop() if armed else False:
            raise KeyboardInterrupt
        return sample_token(*args, **kwargs)

    monkeypatch.setattr("gpt2core.engine.rows.sample_token", interrupt)
    one = engine()
    [request] = one.submit([1, 2, 3], SamplingParams(max_new_tokens=2, echo=True, logprobs=1))
    with pytest.raises(KeyboardInterrupt):
        one.step()
    run(one)
    assert [entry.token_id for entry in request.logprobs] == request.token_ids
    assert request.generated == alone([1, 2, 3], max_new_tokens=2)


def test_an_interrupt_while_tokens_are_recorded_ends_that_steps_rows_and_leaves_the_engine_usable():
    one = engine(max_slots=2)
    requests = [s for i in (1, 2) for s in one.submit([i], SamplingParams(max_new_tokens=5))]
    [waits] = one.submit([3], SamplingParams(max_new_tokens=5))
    one.step()

    class Interrupted(TextStream):
        def push(self, token_id):
            raise KeyboardInterrupt

    requests[1].stream = Interrupted(TOKENIZER.stream_decoder())
    with pytest.raises(KeyboardInterrupt):
        one.step()
    for request in requests:
        assert request.finished
        assert "interrupted in step 2: KeyboardInterrupt()" in str(request.error)
    [late] = one.submit([4], SamplingParams(max_new_tokens=5))
    run(one)
    assert waits.generated == alone([3], max_new_tokens=5)
    assert late.generated == alone([4], max_new_tokens=5)
    assert one.running == 0


@pytest.mark.parametrize(
    "raised", [MemoryError(), BackendError("device is full"), RuntimeError("cannot allocate")]
)
def test_a_cache_that_cannot_be_made_is_an_error_of_submit_with_its_size_and_the_remedy(raised):
    class Full(fakes.FakeBackend):
        def new_cache(self, slots, capacity):
            raise raised

    one = engine(Full(fakes.config()), max_slots=4)
    with pytest.raises(
        BackendError, match=r"cache of 4 slots \(some 8192 bytes\).*lower max_batch"
    ) as caught:
        one.submit([1], SamplingParams())
    assert caught.value.__cause__ is raised
    assert one.waiting == 0


# Closing and leaks


def test_close_cancels_everybody_and_refuses_what_comes_after():
    one = engine(max_slots=1)
    requests = [s for i in range(3) for s in one.submit([i], SamplingParams(max_new_tokens=9))]
    one.step()
    one.close()
    one.close()
    assert one.closed
    assert [s.finish_reason for s in requests] == ["cancelled"] * 3
    assert one.step() == []
    with pytest.raises(RequestError, match="this model is closed; load it again"):
        one.submit([1], SamplingParams())


def test_close_waits_for_the_step_under_way():
    entered, leave = threading.Event(), threading.Event()

    def wait(batch):
        entered.set()
        assert leave.wait(10)

    one = engine(fakes.FakeBackend(fakes.config(), before=wait))
    [request] = one.submit([1], SamplingParams(max_new_tokens=5))
    stepping = threading.Thread(target=one.step)
    closing = threading.Thread(target=one.close)
    stepping.start()
    assert entered.wait(10)
    closing.start()
    time.sleep(0.05)
    assert not one.closed
    leave.set()
    stepping.join(10)
    closing.join(10)
    assert one.closed
    assert request.finish_reason == "cancelled"
    assert len(request.generated) == 1


def test_2000_requests_a_fifth_of_them_cancelled_leave_nothing_behind():
    rng = random.Random(0)
    backend = fakes.FakeBackend(fakes.config(), lambda history, v: np.arange(v, dtype=np.float32))
    one = engine(backend, max_slots=8)
    threads = threading.active_count()
    alive, pending = [], []
    gc.disable()  # nothing may need the collector: no cycles
    try:
        for i in range(2000):
            params = SamplingParams(max_new_tokens=rng.randint(0, 3), logprobs=0, echo=i % 3 == 0, stop="zz")
            [request] = one.submit([rng.randrange(256)] * rng.randint(1, 9), params, stream=i % 2 == 0)
            alive.append(weakref.ref(request))
            pending.append(request)
            if i % 5 == 0:
                one.cancel(pending[rng.randrange(len(pending))])
            if i % 3 == 0:
                one.step()
                pending = [s for s in pending if not s.finished]
        run(one)
        del request, pending
        assert sum(ref() is not None for ref in alive) == 0
    finally:
        gc.enable()
    assert (one.running, one.waiting) == (0, 0)
    assert threading.active_count() == threads
    full = [s for i in range(8) for s in one.submit([i], SamplingParams(max_new_tokens=1))]
    run(one)
    assert backend.batches[-1].slots.tolist() == list(range(8))  # every slot is there to be given again
    assert all(s.finished for s in full)


def test_failed_requests_leave_nothing_behind():
    def fail(batch):
        raise Broken("no")

    one = engine(fakes.FakeBackend(fakes.config(), before=fail), max_slots=4)
    alive = []
    for i in range(50):
        alive += [weakref.ref(s) for s in one.submit([i], SamplingParams())]
        one.step()
    gc.collect()  # an error's traceback leads back to the frames that stepped
    assert sum(ref() is not None for ref in alive) == 0
    assert (one.running, one.waiting) == (0, 0)


def test_prompt_logprobs_stop_at_the_last_token():
    reader = PromptLogprobs([3, 1, 2], 1)
    logits = np.stack([fakes.hashed((i,), 257) for i in range(3)])
    reader(0, logits[:2])
    reader(2, logits[2:])
    reader(1, logits[1:])  # a chunk once more, as after an interrupt
    assert [entry.token_id for entry in reader.entries] == [1, 2]
    assert reader.entries[1] == token_logprobs(logits[1], 2, 1)
