"""GPT2: what callers get, from one thread or from many, on a scripted backend and on NumPy."""

import _thread
import gc
import math
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

from gpt2core import testing
from gpt2core.backends import create_backend
from gpt2core.batch import Batch
from gpt2core.errors import (
    BackendError,
    BackendUnavailableError,
    CheckpointError,
    ContextLengthError,
    InvalidSamplingError,
    NumericalError,
    RequestError,
)
from gpt2core.generation import score_windows
from gpt2core.model import GPT2
from gpt2core.reference import reference_logits
from gpt2core.sampling.draw import sample_token, token_logprobs
from gpt2core.sampling.params import SamplingParams

TOKENIZER = fakes.byte_tokenizer()
HOT = {"temperature": 1.0, "seed": 7}


def model(logits_of=fakes.endless, *, context=64, before=None, after=None, **options) -> GPT2:
    backend = fakes.FakeBackend(fakes.config(context), logits_of, before=before, after=after)
    return GPT2(backend, TOKENIZER, **options)


def idle(one: GPT2) -> bool:
    return (one.engine.running, one.engine.waiting) == (0, 0)


def texts(generations) -> list[tuple[str, list[int], str]]:
    return [(g.text, g.token_ids, g.finish_reason) for g in generations]


# generate


def test_a_generation_says_what_was_generated_and_how():
    one = model(fakes.scripted({b"ab": b"cd"}))
    got = one.generate("ab", max_new_tokens=5, seed=3)
    assert (got.text, got.token_ids, got.finish_reason) == ("cd", [*b"cd", fakes.END], "stop")
    assert (got.prompt_tokens, got.logprobs, got.seed, got.choice) == (2, None, 3, 0)
    assert 0 < got.timing.ttft_s <= got.timing.elapsed_s
    assert got.timing.tokens_per_s > 0


def test_timing_counts_from_submitting_and_the_speed_from_the_first_token():
    calls = []

    def slow(batch: Batch) -> None:
        calls.append(batch)
        time.sleep(0.06 if len(calls) == 1 else 0.02)

    timing = model(before=slow).generate("a", max_new_tokens=4).timing
    assert 0.06 <= timing.ttft_s <= timing.elapsed_s - 0.06
    assert timing.tokens_per_s == pytest.approx(3 / (timing.elapsed_s - timing.ttft_s))


def test_without_a_second_token_there_is_no_speed_and_without_a_first_no_ttft():
    one = model()
    timing = one.generate("a", max_new_tokens=1).timing
    assert timing.ttft_s > 0
    assert timing.tokens_per_s is None
    timing = one.generate("a", max_new_tokens=0).timing
    assert timing.ttft_s is None
    assert timing.elapsed_s > 0


def test_several_prompts_in_one_call_give_what_each_gives_alone():
    one = model()
    prompts = ["One", "Twenty", [1, 2, 3], "One"]
    batched = one.generate(prompts, max_new_tokens=20, **HOT)
    assert texts(batched) == texts(one.generate(p, max_new_tokens=20, **HOT) for p in prompts)
    assert len(one.backend.batches[1].lengths) == 4  # they did run as one batch


def test_more_prompts_than_slots_take_turns():
    one = model(max_batch=2)
    prompts = [[i] for i in range(7)]
    assert texts(one.generate(prompts, max_new_tokens=5, **HOT)) == texts(
        one.generate(p, max_new_tokens=5, **HOT) for p in prompts
    )
    assert max(len(batch.lengths) for batch in one.backend.batches) == 2


def test_choices_come_as_a_flat_list_prompt_after_prompt():
    one = model()
    three = one.generate("a", n=3, max_new_tokens=8, **HOT)
    assert [g.choice for g in three] == [0, 1, 2]
    assert len({tuple(g.token_ids) for g in three}) == 3
    four = one.generate(["a", "b"], n=2, max_new_tokens=8, **HOT)
    assert texts(four[:2]) == texts(three[:2])
    assert texts(four[2:]) == texts(one.generate("b", n=2, max_new_tokens=8, **HOT))
    assert texts(one.generate(["a"], max_new_tokens=8, **HOT)) == texts(three[:1])


def test_an_empty_list_gives_an_empty_list():
    one = model()
    assert one.generate([]) == []
    assert list(one.stream([])) == []


def test_token_ids_are_one_prompt_and_lists_of_them_are_several():
    one = model()
    want = one.generate("ab", max_new_tokens=4).token_ids
    assert one.generate([*b"ab"], max_new_tokens=4).token_ids == want
    assert one.generate((*b"ab",), max_new_tokens=4).token_ids == want
    assert one.generate(np.array([*b"ab"]), max_new_tokens=4).token_ids == want
    assert [g.token_ids for g in one.generate([[*b"ab"]], max_new_tokens=4)] == [want]
    assert [g.token_ids for g in one.generate(np.array([[*b"ab"]]), max_new_tokens=4)] == [want]


def test_keywords_take_precedence_over_params():
    one = model()
    params = SamplingParams(max_new_tokens=3, temperature=1.0, seed=1)
    assert texts([one.generate("a", params, seed=2)]) == texts(
        [one.generate("a", max_new_tokens=3, temperature=1.0, seed=2)]
    )


def test_a_seed_that_was_drawn_gives_the_text_again():
    one = model()
    first, second = one.generate(["a", "a"], max_new_tokens=20, temperature=1.0)
    assert first.seed != second.seed
    assert texts([one.generate("a", max_new_tokens=20, temperature=1.0, seed=second.seed)]) == texts([second])


def test_special_tokens_in_text_stay_text_unless_allowed():
    one = model()
    assert one.generate("<|endoftext|>", max_new_tokens=1).prompt_tokens == 13
    assert one.generate("<|endoftext|>", max_new_tokens=1, allow_special=True).prompt_tokens == 1
    assert next(one.stream("<|endoftext|>", max_new_tokens=0, echo=True)).text == "<|endoftext|>"


def test_echo_begins_text_and_logprobs_with_the_prompt_and_leaves_token_ids():
    one = model()
    plain = one.generate("héy", max_new_tokens=4, logprobs=1, **HOT)
    echoed = one.generate("héy", max_new_tokens=4, logprobs=1, echo=True, **HOT)
    assert echoed.text == "héy" + plain.text
    assert echoed.token_ids == plain.token_ids
    assert echoed.logprobs[4:] == plain.logprobs
    assert [entry.token_id for entry in echoed.logprobs[:4]] == [*"héy".encode()]
    assert echoed.logprobs[0].logprob is None
    tokens = [*"héy".encode(), *plain.token_ids]
    for i, entry in enumerate(echoed.logprobs[1:], 1):
        assert entry == token_logprobs(fakes.endless(tuple(tokens[:i]), 257), tokens[i], 1)


# What is refused


@pytest.mark.parametrize(
    ("prompt", "kind", "message"),
    [
        ("", RequestError, "prompt is empty; give a text, or"),
        ([[]], RequestError, "prompt 0 of the list: prompt is empty; give at least one token"),
        (["a", ""], RequestError, "prompt 1 of the list: prompt is empty"),
        ([1, 257], RequestError, "prompt holds 257 at place 1; .* whole numbers from 0 to 256"),
        ([True], RequestError, "prompt holds True at place 0"),
        ([1.5], RequestError, "prompt holds 1.5 at place 0"),
        ([[1], [-5]], RequestError, "prompt 1 of the list: prompt holds -5 at place 0"),
        (["a", 7], RequestError, "prompt 1 of the list: prompt is 7; expected a sequence of token ids"),
        ([None], RequestError, "prompt 0 of the list: prompt is None; expected"),
        ([1, "a"], RequestError, "prompt holds 'a' at place 1"),
        (b"bytes", RequestError, "prompt is b'bytes'; expected a text, token ids, or a list of either"),
        (None, RequestError, "prompt is None; expected a text"),
        ({"a": 1}, RequestError, "prompt is {'a': 1}; expected a text"),
        pytest.param(
            [10**5000], RequestError, "prompt holds a int that cannot be shown at place 0", id="huge"
        ),
        ("a\ud800b", RequestError, r"lone surrogate, U\+D800, at character 1"),
        ("x" * 65, ContextLengthError, "65 tokens.*context is 64.*shorten"),
        ("x" * 60, ContextLengthError, "60 tokens.*max_new_tokens is 5.*65.*context is 64.*shorten"),
        (["a", [1] * 60], ContextLengthError, "prompt 1 of the list: prompt has 60 tokens"),
        ("é" * 1000, ContextLengthError, "prompt has 2000 bytes; .* 64 tokens holds at most 832; shorten"),
        ("\ud800" * 1000, ContextLengthError, "prompt has 3000 bytes"),
    ],
    ids=lambda value: f"{value!r:.20}",
)
def test_a_bad_prompt_is_refused_at_the_call_with_value_limit_and_remedy(prompt, kind, message):
    one = model()
    for call in (one.generate, one.stream):
        with pytest.raises(kind, match=message):
            call(prompt, max_new_tokens=5)
    assert idle(one)
    assert one.backend.caches == []


def test_a_text_that_cannot_fit_is_refused_before_it_is_tokenized(monkeypatch):
    def encode(*args, **kwargs):
        raise AssertionError("tokenized")

    one = model()
    monkeypatch.setattr(one.tokenizer, "encode", encode)
    with pytest.raises(ContextLengthError, match="1000000 bytes"):
        one.generate("a" * 1_000_000)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_tokens": 3}, r"unknown sampling parameter 'max_tokens'; did you mean 'max_new_tokens'\?"),
        ({"temprature": 3}, r"did you mean 'temperature'\?"),
        ({"qqq": 3}, "unknown sampling parameter 'qqq'; known are max_new_tokens, "),
        ({"top_p": 2}, "top_p is 2"),
        ({"params": 5}, "params is 5; expected SamplingParams"),
        ({"params": SamplingParams(max_length=9), "max_new_tokens": 9}, "both given"),
    ],
)
def test_bad_options_are_refused_at_the_call(options, message):
    one = model()
    for call in (one.generate, one.stream):
        with pytest.raises(InvalidSamplingError, match=message):
            call("a", **options)


def test_a_limit_that_is_too_low_is_refused():
    with pytest.raises(RequestError, match="max_slots is 0"):
        model(max_batch=0)
    with pytest.raises(RequestError, match=r"cache_nbytes is 5; .* needs 2048 bytes"):
        model(cache_nbytes=5)


# stream


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"stop": ["nothing of this"]},
        {"echo": True, "logprobs": 2},
        {"n": 3, "logprobs": 0},
        {"max_new_tokens": 0},
        {"max_new_tokens": 0, "echo": True, "logprobs": 0},
    ],
    ids=str,
)
def test_pieces_join_to_what_generate_returns(options):
    one = model()
    options = {"max_new_tokens": 25, **HOT, **options}
    for prompt in ("héllo", ["a", "bcd", [1, 2, 3]]):
        whole = one.generate(prompt, **options)
        whole = whole if isinstance(whole, list) else [whole]
        pieces = list(one.stream(prompt, **options))
        for place, generation in enumerate(whole):
            index, choice = divmod(place, options.get("n", 1))
            mine = [p for p in pieces if (p.prompt, p.choice) == (index, choice)]
            assert "".join(p.text for p in mine) == generation.text
            assert [p.token_id for p in mine if p.token_id is not None] == generation.token_ids
            assert [entry for p in mine for entry in p.logprobs] == (generation.logprobs or [])
            assert [p.finish_reason for p in mine] == [None] * (len(mine) - 1) + [generation.finish_reason]


def test_a_split_character_comes_whole_and_a_possible_stop_is_held_back():
    one = model(fakes.scripted({b"p": "aé..x...".encode()}))
    got = [(p.text, p.finish_reason) for p in one.stream("p", stop="...")]
    assert got == [
        ("a", None), ("", None), ("é", None), ("", None), ("", None), ("..x", None),
        ("", None), ("", None), ("", "stop"),
    ]  # fmt: skip


def test_a_piece_comes_as_soon_as_its_token_is_drawn():
    one = model()
    stream = one.stream("a", max_new_tokens=10)
    for steps in (1, 2, 3):
        next(stream)
        assert len(one.backend.batches) == steps


def test_a_stream_does_nothing_before_the_first_next():
    one = model()
    stream = one.stream("a")
    assert idle(one)
    del stream


def test_leaving_the_loop_ends_the_generation():
    one = model()
    for piece in one.stream("a", max_new_tokens=50):
        if piece.text:
            break
    assert idle(one)
    stream = one.stream(["a", "b"], n=2, max_new_tokens=50)
    next(stream)
    assert one.engine.running == 4
    stream.close()
    assert idle(one)

    def fails() -> None:
        for _ in one.stream("a", max_new_tokens=50):
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fails()
    gc.collect()  # the traceback, and with it the loop's iterator
    assert idle(one)


def test_two_streams_that_are_read_in_turn_share_the_steps():
    one = model()
    want = [one.generate(p, max_new_tokens=10, **HOT).text for p in ("a", "b")]
    one.backend.batches.clear()
    a, b = (one.stream(p, max_new_tokens=10, **HOT) for p in ("a", "b"))
    got = list(zip(a, b, strict=True))
    assert ["".join(p.text for p in pieces) for pieces in zip(*got, strict=True)] == want
    assert len(one.backend.batches) <= 12


# Faults


def test_a_backend_that_fails_raises_its_error_with_the_cause_and_the_model_goes_on():
    calls = []

    def fail(batch):
        calls.append(batch)
        if len(calls) == 2:
            raise OSError("device lost")

    one = model(before=fail)
    with pytest.raises(BackendError, match="backend 'fake' failed in step 2: OSError: device lost") as caught:
        one.generate(["a", "b"], max_new_tokens=5)
    assert isinstance(caught.value.__cause__, OSError)
    assert idle(one)
    assert one.generate("a", max_new_tokens=5).token_ids


def test_a_stream_that_fails_gives_what_came_before_and_then_the_error():
    def poison(batch, logits):
        if batch.starts[0] >= 2:
            logits[0, 3] = np.nan

    one = model(after=poison)
    stream = one.stream("a", max_new_tokens=9)
    got = [next(stream).token_id, next(stream).token_id]
    with pytest.raises(NumericalError, match="not finite in step 3"):
        next(stream)
    assert got == model().generate("a", max_new_tokens=2).token_ids
    assert idle(one)


@pytest.mark.parametrize("call", ["generate", "stream", "logits", "score"])
def test_an_interrupt_leaves_nothing_running_and_the_model_usable(call):
    armed = [True]

    def interrupt(batch):
        if armed.pop() if armed else False:
            raise KeyboardInterrupt

    one = model(before=interrupt)
    with pytest.raises(KeyboardInterrupt):
        list(getattr(one, call)([1, 2, 3]))
    assert idle(one)
    assert texts([one.generate("a", max_new_tokens=5)]) == texts([model().generate("a", max_new_tokens=5)])


def test_after_close_every_call_is_refused_with_the_remedy():
    with model() as one:
        one.generate("a", max_new_tokens=1)
        stream = one.stream("a")
    one.close()
    assert one.backend.closed == 2
    calls = (
        lambda: one.generate("a"),
        lambda: one.generate([]),
        lambda: one.stream("a"),
        lambda: next(stream),
        lambda: one.logits([1]),
        lambda: one.score("ab"),
    )
    for call in calls:
        with pytest.raises(RequestError, match="this model is closed; load it again"):
            call()


# Threads


def test_16_threads_get_what_one_thread_gets():
    one = model(max_batch=8)
    rounds = 12

    def job(t: int, i: int):
        prompt, options = (
            [t, i],
            {"max_new_tokens": 1 + (7 * t + i) % 20, "temperature": 1.0, "seed": 100 * t + i},
        )
        if i % 4 == 0:
            return "".join(piece.text for piece in one.stream(prompt, **options))
        if i % 4 == 1:
            next(one.stream(prompt, **options))  # and leave
            return one.logits(prompt)[-1].tolist()
        if i % 4 == 2:
            return one.score([*prompt, 5]).logprobs.tolist()
        return one.generate([prompt, [i]], **options)[0].token_ids

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
    assert idle(one)
    assert not any(thread.is_alive() for thread in threads)


def gate():
    """A gate inside the backend: (what it calls, an event when it is reached, an event that opens it)."""
    entered, leave = threading.Event(), threading.Event()

    def before(batch):
        entered.set()
        assert leave.wait(10)

    return before, entered, leave


def start(function) -> tuple[threading.Thread, list]:
    result: list = []

    def work() -> None:
        try:
            result.append(function())
        except BaseException as error:
            result.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread, result


def wait_for(condition) -> None:
    deadline_s = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(0.001)


def test_threads_that_call_at_the_same_time_share_a_batch():
    before, entered, leave = gate()
    one = model(before=before)
    first, got = start(lambda: one.generate("a", max_new_tokens=30, **HOT))
    assert entered.wait(10)
    others = [start(lambda p=p: one.generate(p, max_new_tokens=30, **HOT)) for p in "bcd"]
    wait_for(lambda: one.engine.waiting == 3)
    leave.set()
    for thread in (first, *(thread for thread, _ in others)):
        thread.join(10)
    want = texts(model().generate(list("abcd"), max_new_tokens=30, **HOT))
    assert texts([*got, *(result[0] for _, result in others)]) == want
    assert len(one.backend.batches) == 31
    assert sum(len(batch.lengths) == 4 for batch in one.backend.batches) == 29


@pytest.mark.parametrize("streams", [False, True])
def test_who_waits_is_served_while_another_thread_goes_on_to_step(streams):
    entered, leave, served = threading.Event(), threading.Event(), threading.Event()

    def before(batch):
        entered.set()
        assert leave.wait(10)
        if batch.starts[0] == 30:  # the one who steps is not done yet
            assert served.wait(10)

    one = model(before=before)
    long, got = start(lambda: one.generate("a", max_new_tokens=40))
    assert entered.wait(10)

    def wait_and_tell():
        if streams:
            next(one.stream("b", max_new_tokens=50))
        else:
            one.generate("b", max_new_tokens=3)
        served.set()

    short, _ = start(wait_and_tell)
    wait_for(lambda: one.engine.waiting == 1)
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

    one = model(before=interrupt)
    leader, interrupted = start(lambda: one.generate("a", max_new_tokens=5))
    assert entered.wait(10)
    follower, got = start(lambda: one.generate("b", max_new_tokens=5, **HOT))
    streamer, pieces = start(lambda: list(one.stream("c", max_new_tokens=5, **HOT)))
    wait_for(lambda: one.engine.waiting == 2)
    leave.set()
    for thread in (leader, follower, streamer):
        thread.join(10)
    assert isinstance(interrupted[0], KeyboardInterrupt)
    assert texts(got) == texts([model().generate("b", max_new_tokens=5, **HOT)])
    assert "".join(p.text for p in pieces[0]) == model().generate("c", max_new_tokens=5, **HOT).text
    assert idle(one)


def test_ctrl_c_at_random_moments_harms_neither_other_threads_nor_the_model():
    # In a process without coverage: interrupted while it holds its own lock, coverage would wait for ever.
    command = "import test_model; test_model.interrupt_at_random_moments()"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("COV")}
    subprocess.run(
        [sys.executable, "-c", command], cwd=Path(__file__).parent, env=environment, timeout=240, check=True
    )


def interrupt_at_random_moments() -> None:
    """Sixty of them, while two other threads generate."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # whoever started this may have it ignored
    one = model(max_batch=4)
    prompts, options = [[i] for i in range(6)], {"max_new_tokens": 20, **HOT}
    want = texts(one.generate(prompts, **options))
    over = threading.Event()

    def others() -> bool:
        while not over.is_set():
            assert texts(one.generate(prompts[:3], **options)) == want[:3]
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
                    assert texts(one.generate(prompts, **options)) == want
                else:
                    list(one.stream(prompts, **options))
        except KeyboardInterrupt:
            hits += 1
        thread.join(10)
    over.set()
    for thread, _ in started:
        thread.join(10)
    assert hits == 60
    assert [got for _, got in started] == [[True], [True]]
    assert idle(one)
    assert texts(one.generate(prompts, **options)) == want
    assert max(batch.slots.max() for batch in one.backend.batches[-40:]) == 3  # every slot is still there


def test_when_the_thread_that_steps_is_done_another_takes_over():
    before, entered, leave = gate()
    one = model(before=before)
    short, _ = start(lambda: one.generate("a", max_new_tokens=1))
    assert entered.wait(10)
    long, got = start(lambda: one.generate("b", max_new_tokens=40, **HOT))
    wait_for(lambda: one.engine.waiting == 1)
    leave.set()
    short.join(10)
    long.join(10)
    assert texts(got) == texts([model().generate("b", max_new_tokens=40, **HOT)])


def test_close_in_another_thread_ends_generations_as_cancelled():
    before, entered, leave = gate()
    one = model(before=before, max_batch=1)
    leading, got = start(lambda: one.generate("a", max_new_tokens=50))
    assert entered.wait(10)
    waiting, pieces = start(lambda: list(one.stream("c", max_new_tokens=50)))
    wait_for(lambda: one.engine.waiting == 1)
    closing, _ = start(one.close)
    leave.set()
    for thread in (leading, waiting, closing):
        thread.join(10)
    assert not any(thread.is_alive() for thread in (leading, waiting, closing))
    assert {got[0].finish_reason, pieces[0][-1].finish_reason} <= {"cancelled", "length"}
    assert one.engine.closed


def test_what_a_close_cuts_short_says_so(monkeypatch):
    def closing(one: GPT2) -> GPT2:
        step = one.engine.step

        def step_and_close():
            updates = step()
            one.close()
            return updates

        monkeypatch.setattr(one.engine, "step", step_and_close)
        return one

    got = closing(model()).generate("a", max_new_tokens=50)
    assert (len(got.token_ids), got.finish_reason) == (1, "cancelled")
    pieces = list(closing(model()).stream("a", max_new_tokens=50))
    assert [(p.token_id is None, p.finish_reason) for p in pieces] == [(False, None), (True, "cancelled")]
    for call in (lambda one: one.logits([1] * 300), lambda one: one.score([1] * 300)):
        with pytest.raises(RequestError, match="this model is closed"):
            call(closing(model(context=300)))


def test_reading_logits_does_not_disturb_those_who_generate():
    one = model()
    stream = one.stream("abc", max_new_tokens=20, **HOT)
    got = [next(stream).text]
    np.testing.assert_array_equal(one.logits([5, 6])[1], fakes.endless((5, 6), 257))
    one.score([5, 6, 7])
    got += [piece.text for piece in stream]
    assert "".join(got) == model().generate("abc", max_new_tokens=20, **HOT).text


# logits and score


def test_logits_are_those_of_every_position():
    one = model(fakes.hashed, context=300)
    ids = [i % 256 for i in range(300)]
    got = one.logits(ids)
    assert (got.shape, got.dtype) == ((300, 257), np.float32)
    np.testing.assert_array_equal(got, [fakes.hashed(tuple(ids[: i + 1]), 257) for i in range(300)])


def test_logits_of_more_tokens_than_the_context_are_refused():
    with pytest.raises(ContextLengthError, match="65 tokens; this model's context is 64"):
        model().logits([1] * 65)
    with pytest.raises(RequestError, match="prompt is empty"):
        model().logits([])


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
    one = model(fakes.hashed)
    ids = [(7 * i) % 256 for i in range(tokens)]
    got = one.score(ids)
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
    one = model(fakes.hashed)
    text = "naïve €"
    got = one.score(text)
    assert got.token_ids == [*text.encode()]
    assert got.bits_per_byte == pytest.approx(-got.logprobs.sum() / math.log(2) / (len(text.encode()) - 1))
    assert one.score("a<|endoftext|>", allow_special=True).token_ids == [97, 256]
    assert len(one.score("a<|endoftext|>").token_ids) == 14


def test_a_text_the_model_finds_impossible_has_infinite_perplexity():
    def certain(history, vocab_size):
        logits = np.zeros(vocab_size, np.float32)
        logits[0] = 1e4
        return logits

    got = model(certain).score([1, 2, 3])
    assert got.perplexity == math.inf
    np.testing.assert_allclose(got.logprobs, -1e4)


def test_progress_is_told_after_each_window():
    told = []
    model(fakes.hashed).score([1] * 130, on_progress=lambda done, total: told.append((done, total)))
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
        model().score(text)


# On NumPy, end to end


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return testing.random_checkpoint(tmp_path_factory.mktemp("tiny"), seed=5, n_positions=64)


@pytest.fixture(scope="module")
def tiny(folder):
    with GPT2.from_pretrained(folder, backend="numpy", threads=1) as loaded:
        yield loaded


def test_from_pretrained_loads_what_lies_in_a_folder(tiny):
    assert tiny.backend.name == "numpy"
    assert tiny.config.n_positions == 64
    assert tiny.tokenizer.decode(tiny.tokenizer.encode("häh")) == "häh"


def test_auto_takes_the_backend_that_the_registry_chooses(folder, monkeypatch):
    monkeypatch.delenv("GPT2CORE_BACKEND", raising=False)
    with GPT2.from_pretrained(folder) as loaded:
        assert loaded.backend.name == "numpy"


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"backend": "nonesuch"}, BackendUnavailableError, "'nonesuch'; known are auto, numpy"),
        ({"precision": "float7"}, RequestError, "precision 'float7' is unknown"),
        ({"threads": 0}, RequestError, "threads"),
        ({"max_batch": 0}, RequestError, "max_slots is 0"),
    ],
)
def test_from_pretrained_refuses_what_it_cannot_do(folder, options, kind, message):
    with pytest.raises(kind, match=message):
        GPT2.from_pretrained(folder, **({"backend": "numpy"} | options))


def test_from_pretrained_names_a_folder_that_is_no_checkpoint(tmp_path):
    with pytest.raises(CheckpointError, match=r"config\.json"):
        GPT2.from_pretrained(tmp_path)


@pytest.mark.parametrize("options", [{"temperature": 0.0}, {"temperature": 1.3, "top_p": 0.9, "seed": 11}])
def test_generate_equals_a_loop_over_forward_and_sample_token(tiny, options):
    params = SamplingParams(max_new_tokens=40, **options)
    prompt = tiny.tokenizer.encode("Once upon a time")
    cache = tiny.backend.new_cache(1, 64)
    tokens, cached = list(prompt), 0
    while len(tokens) < len(prompt) + 40:
        logits = tiny.backend.forward(Batch.of([(tokens[cached:], cached, 0)]), cache)
        cached = len(tokens)
        token = sample_token(
            logits[0],
            params,
            token_ids=tokens,
            prompt_tokens=len(prompt),
            eos_token_ids=tiny.config.eos_token_ids,
            seed=params.seed or 0,
            choice=0,
        )
        tokens.append(token)
        if token in tiny.config.eos_token_ids:
            break
    assert tiny.generate("Once upon a time", params).token_ids == tokens[len(prompt) :]


def test_greedy_text_equals_that_of_transformers(folder, tiny, request):
    import torch
    from transformers import GPT2LMHeadModel

    threads = torch.get_num_threads()
    request.addfinalizer(lambda: torch.set_num_threads(threads))
    torch.set_num_threads(1)  # two threads that spin for each other are slow on a busy machine
    theirs = GPT2LMHeadModel.from_pretrained(folder, attn_implementation="eager").eval()
    for text in ("Once", "upon a time", "The quick brown fox", "Zoë"):
        ids = tiny.tokenizer.encode(text)
        with torch.no_grad():
            want = theirs.generate(
                torch.tensor([ids]),
                do_sample=False,
                max_new_tokens=40,
                pad_token_id=tiny.config.eos_token_ids[0],
            )
        assert tiny.generate(text, max_new_tokens=40).token_ids == want[0, len(ids) :].tolist()


def test_logits_and_score_agree_with_the_reference(folder, tiny):
    from gpt2core.checkpoint.open import open_checkpoint

    ids = [(11 * i) % 257 for i in range(64)]
    want = reference_logits(open_checkpoint(folder).weights, ids)
    np.testing.assert_allclose(tiny.logits(ids), want, atol=2e-4)
    logprobs = want - np.log(np.exp(want).sum(-1, keepdims=True))
    np.testing.assert_allclose(tiny.score(ids).logprobs, logprobs[np.arange(63), ids[1:]], atol=2e-4)


@pytest.mark.parametrize("backend", ["numpy", "native", "torch"])
def test_the_same_seed_gives_the_same_text_batched_streamed_and_on_every_backend(folder, tiny, backend):
    from gpt2core.checkpoint.open import open_checkpoint

    prompts = ["a", "Once upon", "b" * 20, "Zoë", "the end", "x", "yz"]
    want = [tiny.generate(p, max_new_tokens=25, temperature=0.9, seed=4).text for p in prompts]
    weights = open_checkpoint(folder).weights
    with GPT2(create_backend(backend, weights, threads=1), tiny.tokenizer, max_batch=3) as one:
        batched = one.generate(prompts, max_new_tokens=25, temperature=0.9, seed=4)
        assert [g.text for g in batched] == want
        pieces = list(one.stream(prompts, max_new_tokens=25, temperature=0.9, seed=4))
        assert ["".join(p.text for p in pieces if p.prompt == i) for i in range(len(prompts))] == want


def test_16_threads_on_numpy_get_what_one_gets(tiny):
    prompts = [f"thread {t}" for t in range(16)]
    want = [tiny.generate(p, max_new_tokens=12, **HOT).token_ids for p in prompts]
    started = [
        start(lambda p=p: [tiny.generate(p, max_new_tokens=12, **HOT).token_ids for _ in range(5)])
        for p in prompts
    ]
    for thread, _ in started:
        thread.join(60)
    assert [got[0] for _, got in started] == [[tokens] * 5 for tokens in want]
