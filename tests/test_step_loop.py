"""Threads that share one model, Ctrl-C among them: each gets what it would get alone."""

import _thread
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import fakes
import numpy as np
import pytest
from engines import HOT, gate, idle, make_model, start, texts, wait_for

from gpt2core.errors import (
    RequestError,
)
from gpt2core.model import GPT2


def test_16_threads_get_what_one_thread_gets():
    model = make_model(max_batch=8)
    rounds = 12

    def job(t: int, i: int):
        prompt, options = (
            [t, i],
            {"max_new_tokens": 1 + (7 * t + i) % 20, "temperature": 1.0, "seed": 100 * t + i},
        )
        if i % 4 == 0:
            return "".join(piece.text for piece in model.stream(prompt, **options))
        if i % 4 == 1:
            next(model.stream(prompt, **options))  # and leave
            return model.logits(prompt)[-1].tolist()
        if i % 4 == 2:
            return model.score([*prompt, 5]).logprobs.tolist()
        return model.generate([prompt, [i]], **options)[0].token_ids

    want = {(t, i): job(t, i) for t in range(16) for i in range(rounds)}
    got, errors = {}, []

    def work(t: int) -> None:
        try:
            for i in range(rounds):
                got[t, i] = job(t, i)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(t,), daemon=True) for t in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert errors == []
    assert got == want
    assert idle(model)
    assert not any(thread.is_alive() for thread in threads)


def test_threads_that_call_at_the_same_time_share_a_batch():
    before, entered, leave = gate()
    model = make_model(before=before)
    first, got = start(lambda: model.generate("a", max_new_tokens=30, **HOT))
    assert entered.wait(10)
    others = [start(lambda p=p: model.generate(p, max_new_tokens=30, **HOT)) for p in "bcd"]
    wait_for(lambda: model.engine.waiting == 3)
    leave.set()
    for thread in (first, *(thread for thread, _ in others)):
        thread.join(10)
    want = texts(make_model().generate(list("abcd"), max_new_tokens=30, **HOT))
    assert texts([*got, *(result[0] for _, result in others)]) == want
    assert len(model.backend.batches) == 31
    assert sum(len(batch.lengths) == 4 for batch in model.backend.batches) == 29


@pytest.mark.parametrize("streams", [False, True])
def test_who_waits_is_served_while_another_thread_goes_on_to_step(streams):
    entered, leave, served = threading.Event(), threading.Event(), threading.Event()

    def before(batch):
        entered.set()
        assert leave.wait(10)
        if batch.starts[0] == 30:  # the one who steps is not done yet
            assert served.wait(10)

    model = make_model(before=before)
    long, got = start(lambda: model.generate("a", max_new_tokens=40))
    assert entered.wait(10)

    def wait_and_tell():
        if streams:
            next(model.stream("b", max_new_tokens=50))
        else:
            model.generate("b", max_new_tokens=3)
        served.set()

    short, _ = start(wait_and_tell)
    wait_for(lambda: model.engine.waiting == 1)
    leave.set()
    long.join(20)
    short.join(20)
    assert served.is_set()
    assert len(got[0].token_ids) == 40


def test_when_the_thread_that_steps_is_interrupted_another_takes_over():
    entered, leave = threading.Event(), threading.Event()

    def interrupt(batch):
        if not leave.is_set():
            entered.set()
            assert leave.wait(10)
            raise KeyboardInterrupt

    model = make_model(before=interrupt)
    leader, interrupted = start(lambda: model.generate("a", max_new_tokens=5))
    assert entered.wait(10)
    follower, got = start(lambda: model.generate("b", max_new_tokens=5, **HOT))
    streamer, pieces = start(lambda: list(model.stream("c", max_new_tokens=5, **HOT)))
    wait_for(lambda: model.engine.waiting == 2)
    leave.set()
    for thread in (leader, follower, streamer):
        thread.join(10)
    assert isinstance(interrupted[0], KeyboardInterrupt)
    assert texts(got) == texts([make_model().generate("b", max_new_tokens=5, **HOT)])
    assert "".join(p.text for p in pieces[0]) == make_model().generate("c", max_new_tokens=5, **HOT).text
    assert idle(model)


def test_ctrl_c_at_random_moments_harms_neither_other_threads_nor_the_model():
    # In a process without coverage: interrupted while it holds its own lock, coverage would wait for ever.
    command = "import test_step_loop; test_step_loop.interrupt_at_random_moments()"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("COV")}
    subprocess.run(
        [sys.executable, "-c", command], cwd=Path(__file__).parent, env=environment, timeout=240, check=True
    )


def interrupt_at_random_moments() -> None:
    """Sixty of them, while two other threads generate."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # whoever started this may have it ignored
    model = make_model(max_batch=4)
    prompts, options = [[i] for i in range(6)], {"max_new_tokens": 20, **HOT}
    want = texts(model.generate(prompts, **options))
    over = threading.Event()

    def others() -> bool:
        while not over.is_set():
            assert texts(model.generate(prompts[:3], **options)) == want[:3]
        return True

    started = [start(others) for _ in range(2)]
    rng, hits = random.Random(0), 0
    for i in range(60):
        delay_s = 0.01 * rng.random()

        def interrupt(delay_s=delay_s) -> None:
            time.sleep(delay_s)
            _thread.interrupt_main()

        thread = threading.Thread(target=interrupt, daemon=True)
        try:
            thread.start()
            for _ in range(100):
                if i % 2:
                    assert texts(model.generate(prompts, **options)) == want
                else:
                    list(model.stream(prompts, **options))
        except KeyboardInterrupt:
            hits += 1
        thread.join(10)
    over.set()
    for thread, _ in started:
        thread.join(10)
    assert hits == 60
    assert [got for _, got in started] == [[True], [True]]
    assert idle(model)
    assert texts(model.generate(prompts, **options)) == want
    assert max(batch.slots.max() for batch in model.backend.batches[-40:]) == 3  # every slot is still there


def test_when_the_thread_that_steps_is_done_another_takes_over():
    before, entered, leave = gate()
    model = make_model(before=before)
    short, _ = start(lambda: model.generate("a", max_new_tokens=1))
    assert entered.wait(10)
    long, got = start(lambda: model.generate("b", max_new_tokens=40, **HOT))
    wait_for(lambda: model.engine.waiting == 1)
    leave.set()
    short.join(10)
    long.join(10)
    assert texts(got) == texts([make_model().generate("b", max_new_tokens=40, **HOT)])


def test_close_in_another_thread_lets_those_that_run_and_wait_go():
    before, entered, leave = gate()
    model = make_model(before=before, max_batch=1)
    leading, got = start(lambda: model.generate("a", max_new_tokens=50))
    assert entered.wait(10)
    waiting, pieces = start(lambda: list(model.stream("c", max_new_tokens=50)))
    wait_for(lambda: model.engine.waiting == 1)
    closing, _ = start(model.close)
    leave.set()
    for thread in (leading, waiting, closing):
        thread.join(10)
    assert not any(thread.is_alive() for thread in (leading, waiting, closing))
    assert len(got) == len(pieces) == 1  # neither raised; which of them was cut short is the next test's
    assert model.engine.closed


def test_what_a_close_cuts_short_says_so(monkeypatch):
    def closing(model: GPT2) -> GPT2:
        step = model.engine.step

        def step_and_close():
            updates = step()
            model.close()
            return updates

        monkeypatch.setattr(model.engine, "step", step_and_close)
        return model

    got = closing(make_model()).generate("a", max_new_tokens=50)
    assert (len(got.token_ids), got.finish_reason) == (1, "cancelled")
    pieces = list(closing(make_model()).stream("a", max_new_tokens=50))
    assert [(p.token_id is None, p.finish_reason) for p in pieces] == [(False, None), (True, "cancelled")]
    for call in (lambda model: model.logits([1] * 300), lambda model: model.score([1] * 300)):
        with pytest.raises(RequestError, match="this model is closed"):
            call(closing(make_model(context=300)))


def test_reading_logits_does_not_disturb_those_who_generate():
    model = make_model()
    stream = model.stream("abc", max_new_tokens=20, **HOT)
    got = [next(stream).text]
    np.testing.assert_array_equal(model.logits([5, 6])[1], fakes.endless((5, 6), 257))
    model.score([5, 6, 7])
    got += [piece.text for piece in stream]
    assert "".join(got) == make_model().generate("abc", max_new_tokens=20, **HOT).text
