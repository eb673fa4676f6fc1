"""`overflow`: texts longer than the context, against a plain loop that reads every context anew."""

import fakes
import numpy as np
import pytest
from engines import make_engine, make_model, run

from gpt2core import (
    GPT2,
    BackendError,
    ContextLengthError,
    InvalidSamplingError,
    RequestError,
    SamplingParams,
)
from gpt2core.backends import BUILT_IN
from gpt2core.sampling.draw import sample_token, token_logprobs
from gpt2core.sampling.overflow import window_start
from gpt2core.testing import random_checkpoint

CONTEXT = 16
GREEDY = {"overflow": "slide"}
DRAWN = GREEDY | {"temperature": 0.9, "top_k": 50, "seed": 5}
RICH = DRAWN | {
    "repetition_penalty": 1.3,
    "presence_penalty": 0.5,
    "frequency_penalty": 0.3,
    "no_repeat_ngram_size": 3,
    "min_new_tokens": 45,
}


def starts(context):
    """Where the context begins after 1, 2, 3, ... tokens: when it is full, its newest half is kept."""
    start, length = 0, 0
    while True:
        length += 1
        if length - start > context:
            start = length - max(1, context // 2)
        yield start


def slide_alone(logits_of, prompt, config, *, choice=0, **sampling):
    """The loop that the engine is to be equal to: each token from the logits of its whole context."""
    params, tokens, begins = SamplingParams(**sampling), list(prompt), starts(config.n_positions)
    start = [next(begins) for _ in prompt][-1]
    for _ in range(params.max_new_tokens):
        token = sample_token(
            logits_of(tokens[start:]),
            params,
            token_ids=tokens,
            prompt_tokens=len(prompt),
            eos_token_ids=config.eos_token_ids,
            seed=params.seed or 0,
            choice=choice,
        )
        tokens.append(token)
        if token in config.eos_token_ids:
            break
        start = next(begins)
    return tokens[len(prompt) :]


def alone_on_fake(prompt, context=CONTEXT, **sampling):
    config = fakes.config(context)

    def logits_of(tokens):
        return fakes.endless(tuple(tokens), config.vocab_size)

    return slide_alone(logits_of, prompt, config, **sampling)


@pytest.mark.parametrize("context", [1, 2, 3, 7, 16])
def test_the_context_begins_where_the_rule_says(context):
    begins = starts(context)
    assert [window_start(tokens, context) for tokens in range(1, 90)] == [next(begins) for _ in range(1, 90)]


@pytest.mark.parametrize("sampling", [GREEDY, DRAWN, RICH], ids=["greedy", "drawn", "rich"])
@pytest.mark.parametrize("backend", BUILT_IN)
def test_a_text_that_slides_equals_the_plain_loop_on_every_backend(tmp_path, backend, sampling):
    folder = random_checkpoint(tmp_path, n_positions=24, n_layer=2)
    with GPT2.from_pretrained(folder, backend=backend) as model:
        want = slide_alone(
            lambda tokens: model.logits(tokens)[-1],
            [7, 8, 9],
            model.config,
            max_new_tokens=70,
            **sampling,
        )
        got = model.generate([7, 8, 9], max_new_tokens=70, **sampling)
        assert got.token_ids == want
        assert got.finish_reason == ("length" if len(want) == 70 else "stop")
        assert (got.prompt_tokens, got.truncated_tokens) == (3, 0)
        assert [piece.token_id for piece in model.stream([7, 8, 9], max_new_tokens=70, **sampling)] == want


def test_native_reads_the_same_bits_anew(tmp_path):
    """Of a pass over the newest half: the logprobs are those of a text that begins there."""
    folder = random_checkpoint(tmp_path, n_positions=24)
    with GPT2.from_pretrained(folder, backend="native") as model:
        got = model.generate([7, 8, 9], max_new_tokens=60, logprobs=3, ignore_eos=True, **DRAWN)
        tokens, begins = [7, 8, 9, *got.token_ids], starts(24)
        start = [next(begins) for _ in range(3)][-1]
        for i, entry in enumerate(got.logprobs, 3):
            logits = model.logits(tokens[start:i])[-1]
            assert token_logprobs(logits, entry.token_id, 3) == entry
            start = next(begins)


@pytest.mark.parametrize("options", [{}, {"step_tokens": 5}, {"prefix_cache": True}, {"max_slots": 2}])
def test_in_a_batch_each_text_slides_as_it_would_alone(options):
    engine = make_engine(fakes.FakeBackend(fakes.config(CONTEXT), fakes.endless), **options)
    cases = [
        (list(range(1, n + 1)), {"temperature": t, "seed": n}) for n in (1, 5, 16, 17, 40) for t in (0, 1)
    ]
    requests = [
        engine.submit(prompt, SamplingParams(max_new_tokens=50, overflow="slide", **sampling), stream=True)[0]
        for prompt, sampling in cases
    ]
    [beside] = engine.submit([3, 4], SamplingParams(max_new_tokens=14))
    run(engine)
    for request, (prompt, sampling) in zip(requests, cases, strict=True):
        assert request.generated == alone_on_fake(prompt, max_new_tokens=50, **sampling)
        assert [piece.token_id for piece in request.pieces] == request.generated
        assert request.slot is None
    assert beside.generated == alone_on_fake([3, 4], max_new_tokens=14)
    assert all(
        len(batch.tokens) <= max(options.get("step_tokens", 512), 64) for batch in engine.backend.batches
    )


def test_choices_and_speculation_change_nothing():
    sampling = {"max_new_tokens": 60, "temperature": 0.7, "top_k": 2, "seed": 11}
    want = [alone_on_fake([1, 2, 1, 2, 1], choice=i, **sampling) for i in range(3)]
    for speculation in ("off", "prompt_lookup"):
        model = make_model(context=CONTEXT, speculation=speculation)
        got = model.generate([1, 2, 1, 2, 1], n=3, overflow="slide", **sampling)
        assert [generation.token_ids for generation in got] == want


def test_guesses_never_reach_beyond_the_context():
    def repeating(history, vocab_size):  # prompt lookup guesses this text, and is right
        logits = np.zeros(vocab_size, np.float32)
        logits[(history[-1] + 1) % 4] = 9
        return logits

    model = make_model(repeating, context=CONTEXT, speculation="prompt_lookup", max_batch=1)
    got = model.generate([0, 1, 2, 3, 0, 1, 2], max_new_tokens=90, overflow="slide")
    assert got.token_ids == [(3 + i) % 4 for i in range(90)]
    assert got.timing.accepted_tokens > 20


def test_a_text_that_is_continued_later_is_the_one_written_at_once():
    model = make_model(context=CONTEXT)
    whole = model.generate([5, 6], max_new_tokens=80, overflow="slide", temperature=1, seed=2).token_ids
    for cut in (1, 13, 14, 15, 16, 40, 79):
        later = model.generate(
            [5, 6, *whole[:cut]], max_new_tokens=80 - cut, overflow="slide", temperature=1, seed=2
        )
        assert later.token_ids == whole[cut:]
        assert later.truncated_tokens == window_start(2 + cut, CONTEXT)
        assert later.prompt_tokens == 2 + cut - later.truncated_tokens


def test_only_what_the_context_holds_is_read_and_penalties_see_all():
    model = make_model(context=CONTEXT)
    prompt = list(range(100))
    got = model.generate(prompt, max_new_tokens=1, overflow="slide", no_repeat_ngram_size=1)
    assert sum(len(batch.tokens) for batch in model.backend.batches) == got.prompt_tokens <= CONTEXT
    banned = {*prompt}
    assert got.token_ids[0] not in banned


def test_the_end_of_text_a_stop_string_and_a_cancelled_request_end_a_text_that_slides():
    script = list(b"abcdefghijklmnopqrstuvwxyz")

    def alphabet(history, vocab_size):
        logits = np.zeros(vocab_size, np.float32)
        logits[fakes.END if history[-1] == ord("z") else history[-1] + 1] = 9
        return logits

    model = make_model(alphabet, context=8)
    got = model.generate("a", max_new_tokens=500, overflow="slide")
    assert (got.text, got.finish_reason) == (bytes(script[1:]).decode(), "stop")
    got = model.generate("a", max_new_tokens=500, overflow="slide", stop="tu")
    assert (got.text, got.finish_reason) == ("bcdefghijklmnopqrs", "stop")
    pieces = model.stream("a", max_new_tokens=500, overflow="slide")
    assert "".join(next(pieces).text for _ in range(15)) == "bcdefghijklmnop"
    pieces.close()
    assert (model.engine.running, model.engine.waiting) == (0, 0)


def test_a_pass_that_fails_while_it_reads_anew_ends_that_request_alone():
    def before(batch):
        if batch.starts[-1] == 0 and batch.lengths[-1] == CONTEXT // 2:
            raise RuntimeError("no")

    engine = make_engine(fakes.FakeBackend(fakes.config(CONTEXT), fakes.endless, before=before))
    [failing] = engine.submit([1, 2], SamplingParams(max_new_tokens=40, overflow="slide"))
    run(engine)
    assert isinstance(failing.error, BackendError)
    assert failing.generated == alone_on_fake([1, 2], max_new_tokens=CONTEXT - 1)
    [other] = engine.submit([1, 2], SamplingParams(max_new_tokens=5))
    run(engine)
    assert other.error is None


@pytest.mark.parametrize(
    ("sampling", "prompt", "skipped", "new"),
    [
        ({"max_new_tokens": 10}, 60, 6, 10),
        ({"max_new_tokens": 10}, 54, 0, 10),
        ({"max_new_tokens": 63}, 60, 59, 63),
        ({"max_new_tokens": 0}, 70, 6, 0),
        ({}, 20, 0, 44),  # as without overflow
        ({}, 32, 0, 32),
        ({}, 33, 1, 32),  # half of the length follows
        ({}, 500, 468, 32),
        ({"min_new_tokens": 50}, 500, 486, 50),
        ({"max_length": 40}, 500, 480, 20),
        ({"max_length": 40}, 15, 0, 25),
        ({"max_length": 1}, 500, 499, 0),
    ],
)
def test_truncate_leaves_out_as_few_tokens_as_must_be(sampling, prompt, skipped, new):
    assert SamplingParams(overflow="truncate", **sampling).fit(prompt, 64) == (skipped, new)


def test_a_long_context_leaves_room_for_a_hundred_tokens():
    assert SamplingParams(overflow="truncate").fit(1000, 1024) == (76, 100)
    assert SamplingParams(overflow="truncate").fit(900, 1024) == (0, 100)


@pytest.mark.parametrize(
    ("sampling", "new"), [({}, 100), ({"max_new_tokens": 7}, 7), ({"max_length": 500}, 490)]
)
def test_a_text_that_slides_is_bounded_by_what_was_asked_for_alone(sampling, new):
    assert SamplingParams(overflow="slide", **sampling).fit(10, 64).max_new_tokens == new


def test_a_truncated_prompt_gives_the_text_of_its_end_and_says_so():
    model = make_model(context=CONTEXT)
    prompt = "what a long prompt this is"
    sampling = {"max_new_tokens": 6, "temperature": 1, "seed": 4, "repetition_penalty": 1.5}
    want = model.generate(prompt[-10:], **sampling)
    got = model.generate(prompt, overflow="truncate", **sampling)
    assert (got.token_ids, got.text, got.seed) == (want.token_ids, want.text, want.seed)
    assert (got.prompt_tokens, got.truncated_tokens) == (10, len(prompt) - 10)
    pieces = list(model.stream(prompt, overflow="truncate", **sampling))
    assert "".join(piece.text for piece in pieces) == want.text
    assert {piece.truncated_tokens for piece in pieces} == {len(prompt) - 10}
    assert want.truncated_tokens == 0


def test_what_is_echoed_of_a_truncated_prompt_is_what_was_read():
    model = make_model(context=CONTEXT)
    got = model.generate("0123456789abcdef", max_new_tokens=6, overflow="truncate", echo=True, logprobs=0)
    assert got.text.startswith("6789abcdef")
    assert len(got.logprobs) == 10 + 6


def test_prompts_of_one_call_are_truncated_each_by_itself():
    model = make_model(context=CONTEXT)
    short, long = model.generate([[1, 2], list(range(30))], max_new_tokens=10, overflow="truncate")
    assert (short.truncated_tokens, short.prompt_tokens) == (0, 2)
    assert (long.truncated_tokens, long.prompt_tokens) == (24, 6)


@pytest.mark.parametrize("overflow", ["truncate", "slide"])
def test_a_text_far_longer_than_the_context_is_tokenized_and_cut(overflow):
    got = make_model(context=CONTEXT).generate("x" * 100_000, max_new_tokens=3, overflow=overflow)
    assert got.prompt_tokens + got.truncated_tokens == 100_000
    assert got.prompt_tokens <= CONTEXT


@pytest.mark.parametrize(
    ("sampling", "error", "message"),
    [
        ({"overflow": "wrap"}, InvalidSamplingError, "overflow is 'wrap'; it must be 'error', 'truncate' or"),
        ({"overflow": ["slide"]}, InvalidSamplingError, r"overflow is \['slide'\]; it must be"),
        (
            {"overflow": "truncate", "max_new_tokens": 16},
            ContextLengthError,
            "max_new_tokens is 16; this model's context is 16, of which the prompt keeps at least one token; "
            "pass max_new_tokens=15 or less, or overflow='slide'",
        ),
        (
            {"overflow": "truncate", "max_length": 17},
            ContextLengthError,
            "max_length is 17; this model's context is 16; pass max_length=16 or less",
        ),
        ({"overflow": "slide", "max_length": 20}, ContextLengthError, "prompt has 30 tokens; max_length"),
        (
            {"overflow": "slide", "min_new_tokens": 101},
            InvalidSamplingError,
            "min_new_tokens is 101; a prompt",
        ),
        (
            {"overflow": "slide", "echo": True, "logprobs": 0},
            ContextLengthError,
            "prompt has 30 tokens, of which the context of 16 holds the newest 12; echo with logprobs",
        ),
        ({"truncate_prompt_tokens": 9}, InvalidSamplingError, "use overflow='truncate'"),
    ],
)
def test_what_cannot_be_is_refused_by_name(sampling, error, message):
    model = make_model(context=CONTEXT)
    with pytest.raises(error, match=message):
        model.generate(list(range(30)), **sampling)
    assert model.backend.batches == []


@pytest.mark.parametrize("overflow", ["truncate", "slide"])
def test_logits_are_read_of_whole_prompts_only(overflow):
    with pytest.raises(RequestError, match=f"overflow is '{overflow}'; logits are read at the positions"):
        make_engine().submit([1, 2], SamplingParams(overflow=overflow), on_logits=lambda at, logits: None)
