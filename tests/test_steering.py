"""The caller's functions, `logits_processors` and `stopping`, and parameters of each prompt."""

import fakes
import numpy as np
import pytest
from engines import HOT, TOKENIZER, alone, idle, make_engine, make_model, run, texts
from speculating import PARAMS, PROMPT, SOURCES, big, walk

from gpt2core import testing
from gpt2core.backends import available, create_backend
from gpt2core.engine.engine import Engine
from gpt2core.errors import InvalidSamplingError, RequestError
from gpt2core.model import GPT2
from gpt2core.sampling.draw import sample_token, transform_logits
from gpt2core.sampling.params import SamplingParams

AFTER_IT = [{}, {"temperature": 0.8}, {"temperature": 1.5, "top_k": 3}, {"temperature": 1, "top_p": 0.7}]
BEFORE_IT = {
    "logit_bias": {97: 2.0, 98: -3.0},
    "repetition_penalty": 1.5,
    "presence_penalty": 0.5,
    "frequency_penalty": 0.25,
    "no_repeat_ngram_size": 2,
    "min_new_tokens": 30,
}


def prefer_letters(token_ids, logits):
    """Of the letters each fourth, by what came before; the others are banned."""
    kept = np.full_like(logits, -np.inf)
    chosen = [*range(97 + (5 * len(token_ids) + token_ids[-1] // 4) % 4, 123, 4)]
    kept[chosen] = logits[chosen] + 1
    return kept


def prefer_late(token_ids, logits):
    return logits + np.arange(len(logits), dtype=np.float32) / 64


# What a processor does


@pytest.mark.parametrize("params", AFTER_IT, ids=str)
def test_processors_act_as_if_the_models_logits_were_theirs(params):
    def steered(history, vocab_size):
        logits = fakes.endless(history, vocab_size)
        edited = prefer_late([], prefer_letters(list(history), logits))
        return np.maximum(edited, np.float32(-1e30))  # a backend's must be finite

    options = {"max_new_tokens": 40, "seed": 3, **params}
    want = make_model(steered).generate("ab", **options)
    got = make_model().generate("ab", logits_processors=[prefer_letters, prefer_late], **options)
    assert texts([got]) == texts([want])
    assert got.token_ids != make_model().generate("ab", **options).token_ids


def test_a_processor_sees_prompt_text_and_logits_after_the_penalties_and_before_the_temperature():
    calls = []

    def watch(token_ids, logits):
        calls.append((token_ids, logits.copy()))
        return logits

    options = {
        "temperature": 0.7,
        "top_k": 2,
        "seed": 1,
        "max_new_tokens": 12,
        **BEFORE_IT,
        "min_new_tokens": 9,
    }
    got = make_model(fakes.hashed).generate("abab", logits_processors=[watch], **options)
    edits = SamplingParams(
        **BEFORE_IT | {"min_new_tokens": 9}
    )  # greedy: the order ends before the temperature
    assert len(calls) == len(got.token_ids) == 12
    for i, (token_ids, logits) in enumerate(calls):
        history = [*b"abab", *got.token_ids[:i]]
        assert token_ids == history
        assert (logits.dtype, logits.shape) == (np.float32, (257,))
        want = transform_logits(
            fakes.hashed(tuple(history), 257),
            edits,
            token_ids=history,
            prompt_tokens=4,
            eos_token_ids=(fakes.END,),
        )
        np.testing.assert_array_equal(logits, want.astype(np.float32))
        assert (logits[fakes.END] == -np.inf) == (i < 9)
    assert got.token_ids == make_model(fakes.hashed).generate("abab", **options).token_ids


def test_processors_act_in_their_order():
    def double(token_ids, logits):
        return logits * 2

    def greatest_wins(token_ids, logits):
        logits[logits < logits.max() - 1] = -np.inf
        return logits

    wide = make_model().generate("a", logits_processors=[greatest_wins, double], max_new_tokens=30, **HOT)
    narrow = make_model().generate("a", logits_processors=[double, greatest_wins], max_new_tokens=30, **HOT)
    assert wide.token_ids != narrow.token_ids


def test_what_a_processor_does_to_its_arguments_changes_neither_the_text_nor_the_log_probabilities():
    def vandal(token_ids, logits):
        result = logits.copy()
        logits[:] = 0
        token_ids.clear()
        return result

    options = {"max_new_tokens": 20, "logprobs": 2, **HOT}
    want, got = (
        make_model().generate("ab", **options),
        make_model().generate(
            "ab", logits_processors=[vandal], stopping=[lambda token_ids, text: token_ids.clear()], **options
        ),
    )
    assert (got.token_ids, got.logprobs) == (want.token_ids, want.logprobs)


@pytest.mark.parametrize("kind", [np.float64, np.float16, list, np.ascontiguousarray])
def test_a_processor_may_return_any_array_of_numbers(kind):
    def convert(token_ids, logits):
        return logits.astype(kind) if isinstance(kind, type) and kind is not list else kind(logits)

    got = make_model().generate("ab", logits_processors=[convert], max_new_tokens=5)
    assert len(got.token_ids) == 5


def test_logprobs_are_the_models_own():
    options = {"max_new_tokens": 10, "logprobs": 0, **HOT}
    got = make_model().generate("ab", logits_processors=[prefer_letters], **options)
    for i, entry in enumerate(got.logprobs):
        logits = fakes.endless((*b"ab", *got.token_ids[:i]), 257).astype(np.float64)
        want = logits[entry.token_id] - np.log(np.exp(logits).sum())
        assert entry.logprob == pytest.approx(want, abs=1e-9)


# What `stopping` does


def test_a_text_ends_with_the_token_after_which_a_function_says_so():
    calls = []

    def after_five(token_ids, text):
        calls.append((token_ids, text))
        return len(token_ids) == 2 + 5

    whole = make_model().generate("ab", max_new_tokens=20, **HOT)
    got = make_model().generate("ab", stopping=[after_five], max_new_tokens=20, **HOT)
    assert (got.token_ids, got.finish_reason) == (whole.token_ids[:5], "stop")
    assert got.text == TOKENIZER.decode(whole.token_ids[:5])
    assert calls == [
        ([*b"ab", *whole.token_ids[:i]], TOKENIZER.decode(whole.token_ids[:i])) for i in range(1, 6)
    ]


def test_the_first_of_several_functions_that_says_so_ends_the_text():
    model = make_model(fakes.scripted({b"a": b"one, two. three"}))
    stopping = [lambda _, text: text.endswith("."), lambda _, text: "," in text]
    assert model.generate("a", stopping=stopping).text == "one,"
    assert model.generate("a", stopping=stopping[:1]).text == "one, two."


def test_a_stop_string_an_end_token_and_the_last_token_come_first():
    model = make_model(fakes.scripted({b"a": b"bcd"}))
    seen = []

    def watch(token_ids, text):
        seen.append(text)
        return text == "bc"

    got = model.generate("a", stopping=[watch], stop="c")
    assert (got.text, got.finish_reason) == ("b", "stop")
    got = model.generate("a", stopping=[watch], stop_token_ids=[ord("c")])
    assert (got.text, got.token_ids, got.finish_reason) == ("b", [*b"bc"], "stop")
    got = model.generate("a", stopping=[watch], max_new_tokens=2)
    assert (got.text, got.finish_reason) == ("bc", "stop")
    assert seen == ["b", "bc", "b", "b", "bc"]  # the token that ends the text is not asked about


def test_half_a_character_is_shown_as_such_and_comes_out_at_the_end():
    model = make_model(fakes.scripted({b"a": "é".encode()}))
    seen = []
    got = model.generate("a", stopping=[lambda _, text: seen.append(text)])
    assert (got.text, seen) == ("é", ["\ufffd", "é"])
    assert model.generate("a", stopping=[lambda *_: True]).text == "\ufffd"


def test_without_a_tokenizer_there_is_no_text():
    seen = []
    engine = make_engine(tokenizer=None)
    [request] = engine.submit(
        [1], SamplingParams(max_new_tokens=3), stopping=[lambda _, text: seen.append(text)]
    )
    run(engine)
    assert (len(request.generated), seen) == (3, ["", "", ""])


# The same text in every way of asking for it


def sparse(token_ids, logits):
    """Of the letters that `walk` draws from, not the one two tokens before."""
    logits[token_ids[-2]] = -np.inf
    return logits


def at_a_sum(token_ids, text):
    return sum(token_ids[-3:]) % 40 == 0


@pytest.mark.parametrize("params", [name for name in PARAMS if name != "no token"])
@pytest.mark.parametrize("source", SOURCES)
def test_speculation_gives_the_same_text(source, params):
    options = {"max_new_tokens": 50, "seed": 1, "echo": False, **PARAMS[params]}
    results = []
    for how in ({}, SOURCES[source]):
        how = {**how}
        if "draft" in how:
            how["draft"] = fakes.FakeBackend(fakes.config(), how["draft"])
        engine = Engine(fakes.FakeBackend(big(), walk), TOKENIZER, **how)
        requests = engine.submit(
            PROMPT, SamplingParams(**options), logits_processors=[sparse], stopping=[at_a_sum]
        )
        run(engine)
        results.append([(r.generated, r.text, r.finish_reason, r.logprobs, repr(r.error)) for r in requests])
    assert results[0] == results[1]


def test_a_draft_model_is_steered_too_so_that_its_guesses_are_accepted():
    def odd(token_ids, logits):
        logits[::2] = -np.inf
        return logits

    draft = fakes.FakeBackend(fakes.config(), walk)
    with GPT2(fakes.FakeBackend(big(), walk), TOKENIZER, draft=draft) as model:
        got = model.generate(PROMPT, logits_processors=[odd], max_new_tokens=50, temperature=1, seed=2)
    assert got.timing.proposed_tokens == got.timing.accepted_tokens > 20


def test_batches_and_streams_give_the_same_text():
    functions = {
        "logits_processors": [prefer_letters],
        "stopping": [lambda _, text: len(text) > 5 and text[-1] in "abef"],
    }
    options = {"max_new_tokens": 40, **HOT, **functions}
    prompts = ["a", "bc", "def"]
    one_by_one = [make_model().generate(prompt, **options) for prompt in prompts]
    model = make_model()
    assert texts(model.generate(prompts, **options)) == texts(one_by_one)
    pieces = [*model.stream(prompts, **options)]
    for i, want in enumerate(one_by_one):
        own = [piece for piece in pieces if piece.prompt == i]
        assert "".join(piece.text for piece in own) == want.text
        assert (own[-1].finish_reason, [p.token_id for p in own]) == (want.finish_reason, want.token_ids)
    assert "stop" in {want.finish_reason for want in one_by_one}
    choices = model.generate("a", n=3, **options)
    assert texts(choices[:1]) == texts(one_by_one[:1])
    assert choices[1].text != choices[0].text


def test_every_backend_gives_the_same_text(tmp_path):
    from gpt2core.checkpoint.open import open_checkpoint

    weights = open_checkpoint(
        testing.random_checkpoint(tmp_path / "m", n_positions=64, vocab_size=257)
    ).weights
    got = {}
    for name in available():
        engine = Engine(create_backend(name, weights, threads=1), TOKENIZER, speculation="prompt_lookup")
        params = SamplingParams(max_new_tokens=40, temperature=0.9, seed=5)
        functions = {
            "logits_processors": [prefer_letters],
            "stopping": [lambda _, text: text.count("z") == 2],
        }
        [request] = engine.submit([*b"abcabc"], params, **functions)
        run(engine)
        assert request.error is None
        got[name] = request.generated
    assert len(got) == 5
    assert len({tuple(tokens) for tokens in got.values()}) == 1, got


# Faults


def fail(token_ids, second):
    if len(token_ids) == 4:
        raise KeyError("nothing here")
    return second if isinstance(second, np.ndarray) else False


@pytest.mark.parametrize("kind", ["logits_processors", "stopping"])
@pytest.mark.parametrize("how", [{}, {"speculation": "prompt_lookup"}], ids=str)
def test_a_function_that_raises_ends_its_own_request_only_and_is_named(kind, how):
    engine = Engine(fakes.FakeBackend(big(), walk), TOKENIZER, **how)
    params = SamplingParams(max_new_tokens=20, temperature=0.8, seed=1)
    functions = {kind: [lambda _, second: second if kind == "logits_processors" else False, fail]}
    [failing] = engine.submit([*b"ab"], params, **functions)
    [other] = engine.submit(PROMPT, params)
    run(engine)
    assert isinstance(failing.error, RequestError)
    assert isinstance(failing.error.__cause__, KeyError)
    assert f"{kind}[1] (fail) raised KeyError: 'nothing here'; mend it" in str(failing.error)
    assert len(failing.generated) == (2 if kind == "logits_processors" else 1)
    assert other.error is None
    [want] = (fresh := Engine(fakes.FakeBackend(big(), walk), TOKENIZER)).submit(PROMPT, params)
    run(fresh)
    assert other.generated == want.generated
    assert engine.running == 0


def test_generate_raises_what_a_function_did_and_the_model_goes_on():
    model = make_model()
    with pytest.raises(RequestError, match=r"logits_processors\[0\] \(fail\) raised KeyError"):
        model.generate(["ab", "abcdef"], logits_processors=[fail])
    assert idle(model)
    with pytest.raises(RequestError, match=r"stopping\[0\] \(fail\) raised KeyError"):
        list(model.stream("ab", stopping=[fail], max_new_tokens=9, logit_bias={0: -100}))
    assert idle(model)
    assert model.generate("ab", max_new_tokens=4).token_ids == alone(b"ab", max_new_tokens=4)


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (None, "returned None; expected float32 logits of shape (257,)"),
        (np.zeros(256, np.float32), "returned an array of shape (256,) and float32; expected"),
        (np.zeros((1, 257), np.float32), "returned an array of shape (1, 257) and float32; expected"),
        (np.zeros(257, bool), "returned an array of shape (257,) and bool; expected"),
        (["a"] * 257, "returned an array of shape (257,) and <U1; expected"),
        (np.full(257, np.nan), "returned logits whose greatest is nan, of token 0; it must be a finite"),
        (np.where(np.arange(257) == 7, np.inf, 0), "returned logits whose greatest is inf, of token 7"),
        (np.full(257, -np.inf), "returned logits whose greatest is -inf, of token 0"),
    ],
)
def test_what_is_no_logits_is_refused_by_name(result, message):
    with pytest.raises(RequestError) as error:
        make_model().generate("ab", logits_processors=[lambda token_ids, logits: result])
    assert message in str(error.value)
    assert str(error.value).startswith("logits_processors[0] (")


def test_an_interrupt_in_a_function_changes_nothing():
    model, interrupts = make_model(), [KeyboardInterrupt]

    def interrupted(token_ids, logits):
        if len(token_ids) == 5 and interrupts:
            raise interrupts.pop()
        return prefer_letters(token_ids, logits)

    engine = model.engine
    [request] = engine.submit(
        [*b"ab"], SamplingParams(max_new_tokens=9, **HOT), logits_processors=[interrupted]
    )
    with pytest.raises(KeyboardInterrupt):
        run(engine)
    run(engine)
    want = make_model().generate("ab", logits_processors=[prefer_letters], max_new_tokens=9, **HOT)
    assert request.generated == want.token_ids


@pytest.mark.parametrize("name", ["logits_processors", "stopping"])
@pytest.mark.parametrize("given", [len, None, [1], [len, "f"], "f", {len}])
def test_what_is_no_list_of_functions_is_refused_before_anything_runs(name, given):
    model = make_model()
    for call in (model.generate, model.stream):
        with pytest.raises(
            RequestError, match=rf"^{name}(\[\d\])? is .*; each must be a function, in a list"
        ):
            call("ab", **{name: given})
    with pytest.raises(RequestError, match=name):
        model.engine.submit([1], SamplingParams(), **{name: given})
    assert (idle(model), model.engine.steps) == (True, 0)


@pytest.mark.parametrize(
    ("name", "remedy"), [("logits_processor", "logits_processors=[f]"), ("stopping_criteria", "stopping=[g]")]
)
def test_the_names_of_transformers_are_answered(name, remedy):
    with pytest.raises(InvalidSamplingError) as error:
        make_model().generate("ab", **{name: []})
    assert remedy in str(error.value)


# Parameters and seeds of each prompt


def test_each_prompt_may_have_its_own_parameters_and_seed():
    model, prompts = make_model(), ["a", "bc", "def"]
    params = [
        SamplingParams(max_new_tokens=5),
        SamplingParams(max_new_tokens=9, temperature=1, n=2),
        SamplingParams(max_new_tokens=7, temperature=0.8, top_k=4, logprobs=1, stop="q"),
    ]
    want = [
        *[model.generate("a", params[0], seed=4)],
        *model.generate("bc", params[1], seed=5),
        *[model.generate("def", params[2], seed=6)],
    ]
    for seeds in ([4, 5, 6], (4, 5, 6)):
        got = model.generate(prompts, params, seed=seeds)
        assert texts(got) == texts(want)
        assert [g.seed for g in got] == [4, 5, 5, 6]
    assert texts(model.generate(prompts, tuple(params), seed=[4, 5, 6], top_p=1)) == texts(want)
    pieces = [*model.stream(prompts, params=params, seed=[4, 5, 6])]
    for i, own in ((0, want[0]), (2, want[3])):
        assert "".join(piece.text for piece in pieces if piece.prompt == i) == own.text
    assert texts(model.generate(prompts, seed=[4, 5, 6], temperature=1, max_new_tokens=9)) == texts(
        [
            model.generate(p, seed=s, temperature=1, max_new_tokens=9)
            for p, s in zip(prompts, [4, 5, 6], strict=True)
        ]
    )


def test_one_prompt_with_lists_of_one_is_one_text():
    model = make_model()
    want = model.generate("a", temperature=1, seed=3, max_new_tokens=4)
    got = model.generate("a", [SamplingParams(temperature=1, max_new_tokens=4)], seed=[3])
    assert texts([got]) == texts([want])
    assert model.generate([], []) == []


@pytest.mark.parametrize(
    ("prompts", "arguments", "message"),
    [
        (
            ["a", "b"],
            {"params": [SamplingParams()]},
            "params is a list of 1 for 2 prompts; give one for each",
        ),
        ("a", {"params": [SamplingParams()] * 2}, "params is a list of 2 for 1 prompt; give one for each"),
        (["a", "b"], {"seed": [1, 2, 3]}, "seed is a list of 3 for 2 prompts; give one for each"),
        (["a", "b"], {"seed": [1, -2]}, "prompt 1 of the list: seed is -2; it must be from 0"),
        (["a", "b"], {"params": [SamplingParams(), 3]}, "prompt 1 of the list: params is 3; expected Sampl"),
        (["a", "b"], {"params": [SamplingParams()] * 2, "top_p": 2}, "prompt 0 of the list: top_p is 2"),
        (
            ["a", "b"],
            {"params": [SamplingParams(), SamplingParams(max_new_tokens=100)]},
            "prompt 1 of the list: prompt has 1 tokens and max_new_tokens is 100",
        ),
    ],
)
def test_lists_that_do_not_fit_are_refused(prompts, arguments, message):
    model = make_model()
    for call in (model.generate, model.stream):
        with pytest.raises(RequestError) as error:
            call(prompts, **arguments)
        assert message in str(error.value)
    assert model.engine.steps == 0


def test_sampling_alone_takes_the_same_step():
    logits = fakes.hashed((1, 2), 257)
    situation = {"token_ids": [1, 2], "prompt_tokens": 2, "eos_token_ids": (256,)}
    params = SamplingParams(temperature=0.9, top_k=5)
    edited = transform_logits(logits, params, **situation, steer=prefer_letters)
    assert {*np.flatnonzero(edited > -np.inf)} <= {*range(97 + 2, 123, 4)}
    drawn = {
        sample_token(logits, params, **situation, seed=seed, choice=0, steer=prefer_letters)
        for seed in range(200)
    }
    assert 1 < len(drawn) <= 5
    assert drawn <= {*np.flatnonzero(edited > -np.inf)}


def test_coroutines_take_functions_and_parameters_of_each_prompt_too():
    import asyncio

    from gpt2core import AsyncGPT2

    options = {"max_new_tokens": 30, **HOT, "logits_processors": [prefer_letters], "stopping": [at_a_sum]}
    want = make_model().generate(["a", "bc"], [SamplingParams(), SamplingParams(n=2)], **options)

    async def ask():
        async with AsyncGPT2(make_model()) as model:
            got = await model.generate(["a", "bc"], [SamplingParams(), SamplingParams(n=2)], **options)
            pieces = [piece.text async for piece in model.stream("a", **options)]
            with pytest.raises(RequestError, match=r"stopping\[0\] is 3"):
                await model.generate("a", stopping=[3])
            return got, "".join(pieces)

    got, text = asyncio.run(ask())
    assert (texts(got), text) == (texts(want), want[0].text)


def test_a_prompt_that_was_cut_is_no_part_of_the_text_that_is_steered():
    seen = []
    options = {"max_new_tokens": 5, "overflow": "truncate", "regex": "[a-c]{5}", **HOT}
    got = make_model().generate("x" * 100, stopping=[lambda _, text: seen.append(text)], **options)
    assert (got.truncated_tokens, len(got.text), seen) == (41, 5, [got.text[:i] for i in range(1, 5)])
