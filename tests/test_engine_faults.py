"""Cancelling, backends that fail, interrupts and closing: each request ends once, and nothing leaks."""

import gc
import random
import threading
import time
import weakref

import fakes
import numpy as np
import pytest
from engines import HOT, TOKENIZER, alone, make_engine, run

from gpt2core.engine.engine import Engine
from gpt2core.engine.request import PromptLogprobs
from gpt2core.errors import (
    BackendError,
    InvalidSamplingError,
    NumericalError,
    RequestError,
)
from gpt2core.sampling.draw import sample_token, token_logprobs
from gpt2core.sampling.params import SamplingParams
from gpt2core.tokenizer.stream import TextStream

# Cancelling


def test_cancel_ends_a_sequence_that_waits_that_reads_its_prompt_or_that_decodes():
    engine = make_engine(max_slots=2, step_tokens=2)
    [decodes] = engine.submit([1], SamplingParams(max_new_tokens=30))
    [reads] = engine.submit([2] * 30, SamplingParams(max_new_tokens=30))
    [waits] = engine.submit([3], SamplingParams(max_new_tokens=30))
    engine.step()
    engine.step()
    for request in (decodes, reads, waits):
        engine.cancel(request)
        assert request.finish_reason == "cancelled"
        assert request.slot is None
        assert request.finished_s is not None
    assert (engine.running, engine.waiting) == (0, 0)
    assert engine.step() == []
    assert decodes.generated == alone([1], max_new_tokens=30)[:2]
    engine.cancel(decodes)  # once more does nothing
    assert engine.running == 0


def test_cancel_gives_out_the_text_that_was_held_back():
    engine = make_engine(fakes.FakeBackend(fakes.config(), fakes.scripted({b"p": b"xyzzy"})))
    [request] = engine.submit(
        list(b"p"), SamplingParams(max_new_tokens=30, stop="zzyz", logprobs=0), stream=True
    )
    for _ in range(4):
        engine.step()
    assert request.text == "xy"
    engine.cancel(request)
    assert request.text == "xyzz"
    assert "".join(piece.text for piece in request.pieces) == "xyzz"
    assert [piece.finish_reason for piece in request.pieces] == [None] * 4 + ["cancelled"]
    assert [entry.token_id for entry in request.logprobs] == [*b"xyzz"]


def test_cancel_during_a_step_frees_the_slot_at_once_and_the_step_reports_nothing_of_it():
    seen = []

    def cancel(batch):
        if len(backend.batches) == 3:
            engine.cancel(doomed)
            seen.append((doomed.finish_reason, engine.running))

    backend = fakes.FakeBackend(fakes.config(), fakes.endless, before=cancel)
    engine = make_engine(backend, max_slots=2)
    [doomed] = engine.submit([1], SamplingParams(max_new_tokens=30))
    [stays] = engine.submit([2], SamplingParams(max_new_tokens=6))
    [waits] = engine.submit([3], SamplingParams(max_new_tokens=6))
    updates = run(engine)
    assert seen == [("cancelled", 1)]
    assert len(doomed.generated) == 2
    assert [u.token_id for u in updates if u.request is doomed] == doomed.generated
    assert stays.generated == alone([2], max_new_tokens=6)
    assert waits.generated == alone([3], max_new_tokens=6)


def test_a_finaliser_that_cancels_in_the_middle_of_a_change_does_not_deadlock():
    """The cyclic collector may close an abandoned stream in any thread, also in the one that steps."""
    engine = make_engine()
    [doomed] = engine.submit([1], SamplingParams(max_new_tokens=30))
    [stays] = engine.submit([2], SamplingParams(max_new_tokens=5))
    engine.step()
    take_token = TextStream.push
    calls = []

    class Collected(TextStream):
        def push(self, token_id):
            calls.append(token_id)
            if len(calls) == 2:
                engine.cancel(doomed)
                assert doomed.finish_reason is None  # not here, in the middle of another's change
            return take_token(self, token_id)

    stays.stream = Collected(TOKENIZER.stream_decoder())
    engine.step()
    engine.step()
    assert doomed.finish_reason == "cancelled"
    run(engine)
    assert stays.generated == alone([2], max_new_tokens=5)
    assert engine.running == 0


def test_cancel_from_another_thread_does_not_wait_for_the_step():
    entered, leave = threading.Event(), threading.Event()

    def wait(batch):
        entered.set()
        assert leave.wait(10)

    engine = make_engine(fakes.FakeBackend(fakes.config(), before=wait))
    [request] = engine.submit([1], SamplingParams(max_new_tokens=5))
    thread = threading.Thread(target=engine.step)
    thread.start()
    assert entered.wait(10)
    engine.cancel(request)
    [late] = engine.submit([2], SamplingParams(max_new_tokens=1))
    assert request.finished
    assert (engine.running, engine.waiting) == (0, 1)
    leave.set()
    thread.join(10)
    run(engine)
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
    engine = make_engine(backend, max_slots=2)
    hit = [s for i in (1, 2) for s in engine.submit([i], SamplingParams(max_new_tokens=5))]
    [waits] = engine.submit([3], SamplingParams(max_new_tokens=5))
    engine.step()
    updates = engine.step()
    assert [(u.request, u.finish_reason) for u in updates] == [(s, None) for s in hit]
    for update in updates:
        assert type(update.error) is kind
        assert update.error is update.request.error
        assert update.error.__cause__ is raised
        assert "backend 'fake' failed in step 2" in str(update.error)
        assert type(raised).__name__ in str(update.error)
    assert updates[0].error is not updates[1].error
    run(engine)
    assert waits.generated == alone([3], max_new_tokens=5)
    assert engine.running == 0


def test_logits_of_a_wrong_shape_are_a_backend_error():
    class Short(fakes.FakeBackend):
        def forward(self, batch, cache):
            return super().forward(batch, cache)[:, :5]

    engine = make_engine(Short(fakes.config()))
    [request] = engine.submit([1], SamplingParams())
    run(engine)
    assert "returned logits of shape (1, 5) instead of (1, 257)" in str(request.error)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_logits_that_are_not_finite_end_only_their_own_request(value):
    def poison(batch, logits):
        if len(backend.batches) == 3:
            logits[1, 100] = value

    backend = fakes.FakeBackend(fakes.config(), fakes.endless, after=poison)
    engine = make_engine(backend)
    requests = [s for i in range(3) for s in engine.submit([i], SamplingParams(max_new_tokens=6, **HOT))]
    updates = run(engine)
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
    engine = make_engine(fakes.FakeBackend(fakes.config(), huge))
    [request] = engine.submit([1], SamplingParams(max_new_tokens=3))
    run(engine)
    assert request.generated == alone([1], huge, max_new_tokens=3)


def test_a_request_for_which_every_token_is_banned_ends_alone():
    config = fakes.config(vocab_size=3, eos=())
    engine = Engine(fakes.FakeBackend(config, lambda history, v: np.zeros(v, np.float32)))
    [request] = engine.submit([0], SamplingParams(max_new_tokens=50, no_repeat_ngram_size=1))
    [other] = engine.submit([0], SamplingParams(max_new_tokens=5))
    run(engine)
    assert isinstance(request.error, InvalidSamplingError)
    assert request.generated == [1, 2]
    assert other.generated == [0] * 5


def test_an_interrupt_in_the_backend_propagates_and_the_next_step_repeats_the_pass():
    def interrupt(batch):
        if len(backend.batches) == 2:
            raise KeyboardInterrupt

    backend = fakes.FakeBackend(fakes.config(), fakes.endless, before=interrupt)
    engine = make_engine(backend)
    [request] = engine.submit([1], SamplingParams(max_new_tokens=5, **HOT))
    engine.step()
    with pytest.raises(KeyboardInterrupt):
        engine.step()
    run(engine)
    assert request.generated == alone([1], max_new_tokens=5, **HOT)


def test_an_interrupt_between_reading_a_prompt_and_recording_it_counts_no_token_twice(monkeypatch):
    armed = [True]

    def interrupt(*args, **kwargs):
        if armed.pop() if armed else False:
            raise KeyboardInterrupt
        return sample_token(*args, **kwargs)

    monkeypatch.setattr("gpt2core.engine.rows.sample_token", interrupt)
    engine = make_engine()
    [request] = engine.submit([1, 2, 3], SamplingParams(max_new_tokens=2, echo=True, logprobs=1))
    with pytest.raises(KeyboardInterrupt):
        engine.step()
    run(engine)
    assert [entry.token_id for entry in request.logprobs] == request.token_ids
    assert request.generated == alone([1, 2, 3], max_new_tokens=2)


def test_an_interrupt_while_tokens_are_recorded_ends_that_steps_rows_and_leaves_the_engine_usable():
    engine = make_engine(max_slots=2)
    requests = [s for i in (1, 2) for s in engine.submit([i], SamplingParams(max_new_tokens=5))]
    [waits] = engine.submit([3], SamplingParams(max_new_tokens=5))
    engine.step()

    class Interrupted(TextStream):
        def push(self, token_id):
            raise KeyboardInterrupt

    requests[1].stream = Interrupted(TOKENIZER.stream_decoder())
    with pytest.raises(KeyboardInterrupt):
        engine.step()
    for request in requests:
        assert request.finished
        assert "interrupted in step 2: KeyboardInterrupt()" in str(request.error)
    [late] = engine.submit([4], SamplingParams(max_new_tokens=5))
    run(engine)
    assert waits.generated == alone([3], max_new_tokens=5)
    assert late.generated == alone([4], max_new_tokens=5)
    assert engine.running == 0


@pytest.mark.parametrize(
    "raised", [MemoryError(), BackendError("device is full"), RuntimeError("cannot allocate")]
)
def test_a_cache_that_cannot_be_made_is_an_error_of_submit_with_its_size_and_the_remedy(raised):
    class Full(fakes.FakeBackend):
        def new_cache(self, slots, capacity):
            raise raised

    engine = make_engine(Full(fakes.config()), max_slots=4)
    with pytest.raises(
        BackendError, match=r"cache of 4 slots \(some 8192 bytes\).*lower max_batch"
    ) as caught:
        engine.submit([1], SamplingParams())
    assert caught.value.__cause__ is raised
    assert engine.waiting == 0


# Closing and leaks


def test_close_cancels_everybody_and_refuses_what_comes_after():
    engine = make_engine(max_slots=1)
    requests = [s for i in range(3) for s in engine.submit([i], SamplingParams(max_new_tokens=9))]
    engine.step()
    engine.close()
    engine.close()
    assert engine.closed
    assert [s.finish_reason for s in requests] == ["cancelled"] * 3
    assert engine.step() == []
    with pytest.raises(RequestError, match="this model is closed; load it again"):
        engine.submit([1], SamplingParams())


def test_close_waits_for_the_step_under_way():
    entered, leave = threading.Event(), threading.Event()

    def wait(batch):
        entered.set()
        assert leave.wait(10)

    engine = make_engine(fakes.FakeBackend(fakes.config(), before=wait))
    [request] = engine.submit([1], SamplingParams(max_new_tokens=5))
    stepping = threading.Thread(target=engine.step)
    closing = threading.Thread(target=engine.close)
    stepping.start()
    assert entered.wait(10)
    closing.start()
    time.sleep(0.05)
    assert not engine.closed
    leave.set()
    stepping.join(10)
    closing.join(10)
    assert engine.closed
    assert request.finish_reason == "cancelled"
    assert len(request.generated) == 1


def test_2000_requests_a_fifth_of_them_cancelled_leave_nothing_behind():
    rng = random.Random(0)
    backend = fakes.FakeBackend(fakes.config(), lambda history, v: np.arange(v, dtype=np.float32))
    engine = make_engine(backend, max_slots=8)
    threads = threading.active_count()
    alive, pending = [], []
    gc.disable()  # nothing may need the collector: no cycles
    try:
        for i in range(2000):
            params = SamplingParams(max_new_tokens=rng.randint(0, 3), logprobs=0, echo=i % 3 == 0, stop="zz")
            [request] = engine.submit([rng.randrange(256)] * rng.randint(1, 9), params, stream=i % 2 == 0)
            alive.append(weakref.ref(request))
            pending.append(request)
            if i % 5 == 0:
                engine.cancel(pending[rng.randrange(len(pending))])
            if i % 3 == 0:
                engine.step()
                pending = [s for s in pending if not s.finished]
        run(engine)
        del request, pending
        assert sum(ref() is not None for ref in alive) == 0
    finally:
        gc.enable()
    assert (engine.running, engine.waiting) == (0, 0)
    assert threading.active_count() == threads
    full = [s for i in range(8) for s in engine.submit([i], SamplingParams(max_new_tokens=1))]
    run(engine)
    assert backend.batches[-1].slots.tolist() == list(range(8))  # every slot is there to be given again
    assert all(s.finished for s in full)


def test_failed_requests_leave_nothing_behind():
    def fail(batch):
        raise Broken("no")

    engine = make_engine(fakes.FakeBackend(fakes.config(), before=fail), max_slots=4)
    alive = []
    for i in range(50):
        alive += [weakref.ref(s) for s in engine.submit([i], SamplingParams())]
        engine.step()
    gc.collect()  # an error's traceback leads back to the frames that stepped
    assert sum(ref() is not None for ref in alive) == 0
    assert (engine.running, engine.waiting) == (0, 0)


def test_prompt_logprobs_stop_at_the_last_token():
    reader = PromptLogprobs([3, 1, 2], 1)
    logits = np.stack([fakes.hashed((i,), 257) for i in range(3)])
    reader(0, logits[:2])
    reader(2, logits[2:])
    reader(1, logits[1:])  # a chunk once more, as after an interrupt
    assert [entry.token_id for entry in reader.entries] == [1, 2]
    assert reader.entries[1] == token_logprobs(logits[1], 2, 1)
