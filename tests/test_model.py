"""GPT2: what callers get, on a scripted backend."""

import gc
import time

import fakes
import numpy as np
import pytest
from engines import HOT, idle, make_model, texts

from gpt2core.batch import Batch
from gpt2core.errors import (
    BackendError,
    ContextLengthError,
    InvalidSamplingError,
    NumericalError,
    RequestError,
)
from gpt2core.sampling.draw import token_logprobs
from gpt2core.sampling.params import SamplingParams

# generate


def test_a_generation_says_what_was_generated_and_how():
    model = make_model(fakes.scripted({b"ab": b"cd"}))
    got = model.generate("ab", max_new_tokens=5, seed=3)
    assert (got.text, got.token_ids, got.finish_reason) == ("cd", [*b"cd", fakes.END], "stop")
    assert (got.prompt_tokens, got.logprobs, got.seed, got.choice) == (2, None, 3, 0)
    assert 0 < got.timing.ttft_s <= got.timing.elapsed_s
    assert got.timing.tokens_per_s > 0


def test_timing_counts_from_submitting_and_the_speed_from_the_first_token():
    calls = []

    def slow(batch: Batch) -> None:
        calls.append(batch)
        time.sleep(0.06 if len(calls) == 1 else 0.02)

    timing = make_model(before=slow).generate("a", max_new_tokens=4).timing
    assert 0.06 <= timing.ttft_s <= timing.elapsed_s - 0.06
    assert timing.tokens_per_s == pytest.approx(3 / (timing.elapsed_s - timing.ttft_s))


def test_without_a_second_token_there_is_no_speed_and_without_a_first_no_ttft():
    model = make_model()
    timing = model.generate("a", max_new_tokens=1).timing
    assert timing.ttft_s > 0
    assert timing.tokens_per_s is None
    timing = model.generate("a", max_new_tokens=0).timing
    assert timing.ttft_s is None
    assert timing.elapsed_s > 0


def test_several_prompts_in_one_call_give_what_each_gives_alone():
    model = make_model()
    prompts = ["One", "Twenty", [1, 2, 3], "One"]
    batched = model.generate(prompts, max_new_tokens=20, **HOT)
    assert texts(batched) == texts(model.generate(p, max_new_tokens=20, **HOT) for p in prompts)
    assert len(model.backend.batches[1].lengths) == 4  # they did run as one batch


def test_more_prompts_than_slots_take_turns():
    model = make_model(max_batch=2)
    prompts = [[i] for i in range(7)]
    assert texts(model.generate(prompts, max_new_tokens=5, **HOT)) == texts(
        model.generate(p, max_new_tokens=5, **HOT) for p in prompts
    )
    assert max(len(batch.lengths) for batch in model.backend.batches) == 2


def test_choices_come_as_a_flat_list_prompt_after_prompt():
    model = make_model()
    three = model.generate("a", n=3, max_new_tokens=8, **HOT)
    assert [g.choice for g in three] == [0, 1, 2]
    assert len({tuple(g.token_ids) for g in three}) == 3
    four = model.generate(["a", "b"], n=2, max_new_tokens=8, **HOT)
    assert texts(four[:2]) == texts(three[:2])
    assert texts(four[2:]) == texts(model.generate("b", n=2, max_new_tokens=8, **HOT))
    assert texts(model.generate(["a"], max_new_tokens=8, **HOT)) == texts(three[:1])


def test_an_empty_list_gives_an_empty_list():
    model = make_model()
    assert model.generate([]) == []
    assert list(model.stream([])) == []


def test_token_ids_are_one_prompt_and_lists_of_them_are_several():
    model = make_model()
    want = model.generate("ab", max_new_tokens=4).token_ids
    assert model.generate([*b"ab"], max_new_tokens=4).token_ids == want
    assert model.generate((*b"ab",), max_new_tokens=4).token_ids == want
    assert model.generate(np.array([*b"ab"]), max_new_tokens=4).token_ids == want
    assert [g.token_ids for g in model.generate([[*b"ab"]], max_new_tokens=4)] == [want]
    assert [g.token_ids for g in model.generate(np.array([[*b"ab"]]), max_new_tokens=4)] == [want]


def test_keywords_take_precedence_over_params():
    model = make_model()
    params = SamplingParams(max_new_tokens=3, temperature=1.0, seed=1)
    assert texts([model.generate("a", params, seed=2)]) == texts(
        [model.generate("a", max_new_tokens=3, temperature=1.0, seed=2)]
    )


def test_a_seed_that_was_drawn_gives_the_text_again():
    model = make_model()
    first, second = model.generate(["a", "a"], max_new_tokens=20, temperature=1.0)
    assert first.seed != second.seed
    assert texts([model.generate("a", max_new_tokens=20, temperature=1.0, seed=second.seed)]) == texts(
        [second]
    )


def test_special_tokens_in_text_stay_text_unless_allowed():
    model = make_model()
    assert model.generate("<|endoftext|>", max_new_tokens=1).prompt_tokens == 13
    assert model.generate("<|endoftext|>", max_new_tokens=1, allow_special=True).prompt_tokens == 1
    assert next(model.stream("<|endoftext|>", max_new_tokens=0, echo=True)).text == "<|endoftext|>"


def test_echo_begins_text_and_logprobs_with_the_prompt_and_leaves_token_ids():
    model = make_model()
    plain = model.generate("héy", max_new_tokens=4, logprobs=1, **HOT)
    echoed = model.generate("héy", max_new_tokens=4, logprobs=1, echo=True, **HOT)
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
    model = make_model()
    for call in (model.generate, model.stream):
        with pytest.raises(kind, match=message):
            call(prompt, max_new_tokens=5)
    assert idle(model)
    assert model.backend.caches == []


def test_a_text_that_cannot_fit_is_refused_before_it_is_tokenized(monkeypatch):
    def encode(*args, **kwargs):
        raise AssertionError("tokenized")

    model = make_model()
    monkeypatch.setattr(model.tokenizer, "encode", encode)
    with pytest.raises(ContextLengthError, match="1000000 bytes"):
        model.generate("a" * 1_000_000)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_tokens": 3}, r"unknown sampling parameter 'max_tokens'; use max_new_tokens=100"),
        ({"temprature": 3}, r"did you mean 'temperature'\?"),
        ({"qqq": 3}, "unknown sampling parameter 'qqq'; known are max_new_tokens, "),
        ({"top_p": 2}, "top_p is 2"),
        ({"params": 5}, "params is 5; expected SamplingParams"),
        ({"params": SamplingParams(max_length=9), "max_new_tokens": 9}, "both given"),
    ],
)
def test_bad_options_are_refused_at_the_call(options, message):
    model = make_model()
    for call in (model.generate, model.stream):
        with pytest.raises(InvalidSamplingError, match=message):
            call("a", **options)


def test_a_limit_that_is_too_low_is_refused():
    with pytest.raises(RequestError, match="max_slots is 0"):
        make_model(max_batch=0)
    with pytest.raises(RequestError, match=r"cache_nbytes is 5; .* needs 2048 bytes"):
        make_model(cache_nbytes=5)


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
    model = make_model()
    options = {"max_new_tokens": 25, **HOT, **options}
    for prompt in ("héllo", ["a", "bcd", [1, 2, 3]]):
        whole = model.generate(prompt, **options)
        whole = whole if isinstance(whole, list) else [whole]
        pieces = list(model.stream(prompt, **options))
        for place, generation in enumerate(whole):
            index, choice = divmod(place, options.get("n", 1))
            mine = [p for p in pieces if (p.prompt, p.choice) == (index, choice)]
            assert "".join(p.text for p in mine) == generation.text
            assert [p.token_id for p in mine if p.token_id is not None] == generation.token_ids
            assert [entry for p in mine for entry in p.logprobs] == (generation.logprobs or [])
            assert [p.finish_reason for p in mine] == [None] * (len(mine) - 1) + [generation.finish_reason]


def test_a_split_character_comes_whole_and_a_possible_stop_is_held_back():
    model = make_model(fakes.scripted({b"p": "aé..x...".encode()}))
    got = [(p.text, p.finish_reason) for p in model.stream("p", stop="...")]
    assert got == [
        ("a", None), ("", None), ("é", None), ("", None), ("", None), ("..x", None),
        ("", None), ("", None), ("", "stop"),
    ]  # fmt: skip


def test_a_piece_comes_as_soon_as_its_token_is_drawn():
    model = make_model()
    stream = model.stream("a", max_new_tokens=10)
    for steps in (1, 2, 3):
        next(stream)
        assert len(model.backend.batches) == steps


def test_a_stream_does_nothing_before_the_first_next():
    model = make_model()
    stream = model.stream("a")
    assert idle(model)
    del stream


def test_leaving_the_loop_ends_the_generation():
    model = make_model()
    for piece in model.stream("a", max_new_tokens=50):
        if piece.text:
            break
    assert idle(model)
    stream = model.stream(["a", "b"], n=2, max_new_tokens=50)
    next(stream)
    assert model.engine.running == 4
    stream.close()
    assert idle(model)

    def fails() -> None:
        for _ in model.stream("a", max_new_tokens=50):
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fails()
    gc.collect()  # the traceback, and with it the loop's iterator
    assert idle(model)


def test_two_streams_that_are_read_in_turn_share_the_steps():
    model = make_model()
    want = [model.generate(p, max_new_tokens=10, **HOT).text for p in ("a", "b")]
    model.backend.batches.clear()
    a, b = (model.stream(p, max_new_tokens=10, **HOT) for p in ("a", "b"))
    got = list(zip(a, b, strict=True))
    assert ["".join(p.text for p in pieces) for pieces in zip(*got, strict=True)] == want
    assert len(model.backend.batches) <= 12


# Faults


def test_a_backend_that_fails_raises_its_error_with_the_cause_and_the_model_goes_on():
    calls = []

    def fail(batch):
        calls.append(batch)
        if len(calls) == 2:
            raise OSError("device lost")

    model = make_model(before=fail)
    with pytest.raises(BackendError, match="backend 'fake' failed in step 2: OSError: device lost") as caught:
        model.generate(["a", "b"], max_new_tokens=5)
    assert isinstance(caught.value.__cause__, OSError)
    assert idle(model)
    assert model.generate("a", max_new_tokens=5).token_ids


def test_a_stream_that_fails_gives_what_came_before_and_then_the_error():
    def poison(batch, logits):
        if batch.starts[0] >= 2:
            logits[0, 3] = np.nan

    model = make_model(after=poison)
    stream = model.stream("a", max_new_tokens=9)
    got = [next(stream).token_id, next(stream).token_id]
    with pytest.raises(NumericalError, match="not finite in step 3"):
        next(stream)
    assert got == make_model().generate("a", max_new_tokens=2).token_ids
    assert idle(model)


@pytest.mark.parametrize("call", ["generate", "stream", "logits", "score"])
def test_an_interrupt_leaves_nothing_running_and_the_model_usable(call):
    armed = [True]

    def interrupt(batch):
        if armed.pop() if armed else False:
            raise KeyboardInterrupt

    model = make_model(before=interrupt)
    with pytest.raises(KeyboardInterrupt):
        list(getattr(model, call)([1, 2, 3]))
    assert idle(model)
    assert texts([model.generate("a", max_new_tokens=5)]) == texts(
        [make_model().generate("a", max_new_tokens=5)]
    )


def test_after_close_every_call_is_refused_with_the_remedy():
    with make_model() as model:
        model.generate("a", max_new_tokens=1)
        stream = model.stream("a")
    model.close()
    assert model.backend.closed == 2
    calls = (
        lambda: model.generate("a"),
        lambda: model.generate([]),
        lambda: model.stream("a"),
        lambda: next(stream),
        lambda: model.logits([1]),
        lambda: model.score("ab"),
    )
    for call in calls:
        with pytest.raises(RequestError, match="this model is closed; load it again"):
            call()
