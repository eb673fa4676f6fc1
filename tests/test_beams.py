"""Beam search: transformers' texts and scores, in a batch with others, and nothing left behind."""

import asyncio

import fakes
import numpy as np
import pytest
import torch
from engines import idle, make_engine, make_model, run, texts
from transformers import GPT2LMHeadModel

from gpt2core import (
    GPT2,
    AsyncGPT2,
    BackendError,
    InvalidSamplingError,
    NumericalError,
    RequestError,
    SamplingParams,
)
from gpt2core.backends import BUILT_IN
from gpt2core.testing import random_checkpoint

ENDS = list(range(5, 257, 13))  # of a random model's tokens one is likely to be among these
CASES = {
    "plain": {"num_beams": 4},
    "all": {"num_beams": 3, "n": 3, "stop_token_ids": ENDS},
    "early": {"num_beams": 4, "n": 2, "early_stopping": True, "stop_token_ids": ENDS},
    "never": {
        "num_beams": 5,
        "n": 5,
        "early_stopping": "never",
        "length_penalty": 2.0,
        "stop_token_ids": ENDS,
    },
    "short": {"num_beams": 4, "n": 4, "length_penalty": -1.0, "stop_token_ids": ENDS},
    "unscaled": {
        "num_beams": 6,
        "n": 6,
        "length_penalty": 0.0,
        "early_stopping": "never",
        "stop_token_ids": ENDS,
    },
    "penalized": {"num_beams": 4, "n": 2, "repetition_penalty": 1.5, "no_repeat_ngram_size": 2},
    "biased": {"num_beams": 3, "n": 3, "logit_bias": {7: 4.0, 200: -3.5}, "stop_token_ids": ENDS[:3]},
    "long": {"num_beams": 4, "n": 3, "min_new_tokens": 9, "stop_token_ids": ENDS, "ignore_eos": True},
    "two": {"num_beams": 2, "n": 1, "early_stopping": True, "length_penalty": 1.7, "stop_token_ids": ENDS},
}
NEW_TOKENS = 14
CLOSE = {"rtol": 1e-6, "atol": 1e-4}  # transformers adds up in float32


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return random_checkpoint(tmp_path_factory.mktemp("tiny"), n_layer=2)


@pytest.fixture(scope="module")
def hugging_face(folder):
    return GPT2LMHeadModel.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32).eval()


@torch.inference_mode()
def beams_of_transformers(model, ids, options):
    """Texts and scores, best first; each text ends with the token that ended it."""
    options = dict(options)
    ends = [*([] if options.pop("ignore_eos", False) else [0]), *options.pop("stop_token_ids", [])]
    if bias := options.pop("logit_bias", None):
        options["sequence_bias"] = [[[token_id], value] for token_id, value in bias.items()]
    got = model.generate(
        torch.tensor([ids]),
        attention_mask=torch.ones(1, len(ids), dtype=torch.int64),
        num_return_sequences=options.pop("n", 1),
        eos_token_id=ends,
        pad_token_id=256,
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        return_dict_in_generate=True,
        output_scores=True,
        **options,
    )
    found = []
    for sequence, score in zip(got.sequences.tolist(), got.sequences_scores.tolist(), strict=True):
        text = sequence[len(ids) :]
        end = next((i + 1 for i, token_id in enumerate(text) if token_id in ends), len(text))
        found.append((text[:end], score))
    return found


def prompts(count, length=5):
    rng = np.random.default_rng(length)
    return [rng.integers(1, 257, length + i % 4).tolist() for i in range(count)]


def as_list(result):
    return result if isinstance(result, list) else [result]


@pytest.mark.parametrize("case", CASES)
def test_fifty_prompts_have_the_texts_and_scores_of_transformers(folder, hugging_face, case):
    options = CASES[case]
    with GPT2.from_pretrained(folder, backend="numpy", max_batch=12) as model:
        got = as_list(model.generate(prompts(50), max_new_tokens=NEW_TOKENS, **options))
    for i, ids in enumerate(prompts(50)):
        want = beams_of_transformers(hugging_face, ids, options)
        mine = got[i * len(want) : (i + 1) * len(want)]
        assert [generation.token_ids for generation in mine] == [token_ids for token_ids, _ in want]
        np.testing.assert_allclose(
            [generation.score for generation in mine], [score for _, score in want], **CLOSE
        )
        assert [generation.choice for generation in mine] == list(range(len(want)))


@pytest.mark.parametrize("backend", BUILT_IN)
def test_every_backend_finds_these_texts(folder, hugging_face, backend):
    with GPT2.from_pretrained(folder, backend=backend) as model:
        for ids in prompts(3, 7):
            got = model.generate(ids, max_new_tokens=NEW_TOKENS, **CASES["never"])
            want = beams_of_transformers(hugging_face, ids, CASES["never"])
            assert [generation.token_ids for generation in got] == [token_ids for token_ids, _ in want]
            np.testing.assert_allclose(
                [generation.score for generation in got], [score for _, score in want], **CLOSE
            )


class Reading:
    """A backend that cannot copy: what differs is read."""

    name = "reading"

    def __init__(self, **options):
        self.inner = fakes.FakeBackend(fakes.config(), fakes.hashed, **options)
        self.config = self.inner.config
        self.new_cache, self.forward, self.close = self.inner.new_cache, self.inner.forward, self.inner.close


class Copying(Reading):
    """One that can."""

    name = "copying"

    def __init__(self, **options):
        super().__init__(**options)
        self.copied = 0

    def copy_cache(self, cache, source, target, start, end):
        held, given = cache.histories[target], cache.histories[source]
        assert start < end <= len(given)
        assert held[:start] == given[:start]
        cache.histories[target] = given[:end]
        self.copied += 1


BACKENDS = {"reading": Reading, "copying": Copying}
BEAMS = {"num_beams": 4, "n": 3, "max_new_tokens": 12, "stop_token_ids": ENDS, "length_penalty": 1.2}


def search(backend, ids, *, slots=4, step_tokens=512, prefix_cache=False, **params):
    engine = make_engine(backend, max_slots=slots, step_tokens=step_tokens, prefix_cache=prefix_cache)
    requests = engine.submit(ids, SamplingParams(**BEAMS | params))
    run(engine)
    assert (engine.running, engine.waiting) == (0, 0)
    return [(request.generated, request.score, request.finish_reason) for request in requests]


def test_copying_reads_each_token_once_and_finds_the_same():
    ids = [1, 2, 3, 4, 5, 6]
    reading, copying = Reading(), Copying()
    want = search(reading, ids)
    assert search(copying, ids) == want
    steps = len(copying.inner.batches)
    assert sum(len(batch.tokens) for batch in copying.inner.batches) == len(ids) + 4 * (steps - 1)
    assert copying.copied > 3
    assert sum(len(batch.tokens) for batch in reading.inner.batches) > 2 * len(ids) + 4 * (steps - 1)


@pytest.mark.parametrize("step_tokens", [1, 5, 512])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("prefix_cache", [False, True])
def test_beams_and_other_requests_share_a_batch_and_change_nothing(backend, step_tokens, prefix_cache):
    alone = {tuple(ids): search(Reading(), ids) for ids in prompts(6)}
    plain = {"max_new_tokens": 20, "temperature": 1.0, "seed": 3}
    engine = make_engine(BACKENDS[backend](), max_slots=9, step_tokens=step_tokens, prefix_cache=prefix_cache)
    want = {}
    for ids in prompts(6):
        fresh = make_engine(Reading())
        [want[tuple(ids)]] = fresh.submit(ids, SamplingParams(**plain))
        run(fresh)
    for _ in range(2):  # the second time slots hold what the first has left there
        searches = {tuple(ids): engine.submit(ids, SamplingParams(**BEAMS)) for ids in prompts(6)}
        others = {tuple(ids): engine.submit(ids, SamplingParams(**plain))[0] for ids in prompts(6)}
        run(engine)
        for ids, requests in searches.items():
            got = [(request.generated, request.score, request.finish_reason) for request in requests]
            assert got == alone[ids]
        for ids, request in others.items():
            assert request.generated == want[ids].generated
        assert engine._scheduler._given_by.free == 9
    assert any(len(batch.lengths) > 4 for batch in engine.backend.inner.batches)


def test_a_search_waits_until_all_its_beams_have_a_slot_and_is_not_overtaken():
    engine = make_engine(Copying(), max_slots=4)
    [first] = engine.submit([1, 2], SamplingParams(max_new_tokens=8, ignore_eos=True))
    search = engine.submit([3, 4], SamplingParams(**BEAMS))
    [last] = engine.submit([5, 6], SamplingParams(max_new_tokens=8))
    for _ in range(3):
        engine.step()
    assert (engine.running, engine.waiting) == (1, 2)
    assert [request.slot for request in (*search, last)] == [None] * 4
    run(engine, first)
    engine.step()
    assert (engine.running, engine.waiting) == (4, 1)
    run(engine)
    assert all(request.finished for request in (*search, last))


@pytest.mark.parametrize("steps", [0, 1, 2, 5])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_cancelled_search_frees_all_its_slots_and_the_others_go_on(backend, steps):
    engine = make_engine(BACKENDS[backend](), max_slots=6, prefix_cache=True)
    [beside] = engine.submit([1, 2], SamplingParams(max_new_tokens=30, ignore_eos=True))
    requests = engine.submit([3, 4, 5], SamplingParams(**BEAMS | {"stop_token_ids": ()}))
    for _ in range(steps):
        engine.step()
    engine.cancel(requests[1])
    assert [request.finish_reason for request in requests] == ["cancelled"] * 3
    assert [request.generated for request in requests] == [[]] * 3
    assert engine.running + engine.waiting == 1
    again = engine.submit([3, 4, 5], SamplingParams(**BEAMS))
    run(engine)
    assert [(r.generated, r.score, r.finish_reason) for r in again] == search(Reading(), [3, 4, 5])
    alone = make_engine(Reading())
    [want] = alone.submit([1, 2], SamplingParams(max_new_tokens=30, ignore_eos=True))
    run(alone)
    assert beside.generated == want.generated


def test_closing_ends_a_search():
    model = make_model()
    requests = model.engine.submit([1, 2], SamplingParams(**BEAMS))
    for _ in range(3):
        model.engine.step()
    model.close()
    assert [request.finish_reason for request in requests] == ["cancelled"] * 3
    assert idle(model)


@pytest.mark.parametrize("backend", BACKENDS)
def test_logits_that_are_not_finite_end_the_search_and_nothing_else(backend):
    def after(batch, logits):
        if len(batch.lengths) == 5 and batch.starts.max() > 6:
            logits[3] = np.nan

    engine = make_engine(BACKENDS[backend](after=after), max_slots=6)
    [beside] = engine.submit([1, 2], SamplingParams(max_new_tokens=30, ignore_eos=True))
    requests = engine.submit([3, 4, 5], SamplingParams(**BEAMS | {"stop_token_ids": ()}))
    updates = run(engine)
    assert all(isinstance(request.error, NumericalError) for request in requests)
    assert sum(update.error is not None for update in updates) == 3
    assert (beside.error, len(beside.generated)) == (None, 30)
    assert (engine.running, engine.waiting) == (0, 0)


def test_a_copy_that_fails_ends_its_search_and_nothing_else():
    class Broken(Copying):
        def copy_cache(self, cache, source, target, start, end):
            raise MemoryError("no")

    engine = make_engine(Broken(), max_slots=6, prefix_cache=True)
    [beside] = engine.submit([1, 2], SamplingParams(max_new_tokens=30, ignore_eos=True))
    requests = engine.submit([3, 4, 5], SamplingParams(**BEAMS))
    updates = run(engine)
    assert all(isinstance(request.error, BackendError) for request in requests)
    assert all("MemoryError: no" in str(request.error) for request in requests)
    assert sum(update.error is not None for update in updates) == 3
    assert (beside.error, len(beside.generated)) == (None, 30)
    assert engine._scheduler._given_by.free == 6


def test_an_interrupted_pass_is_repeated():
    interrupts = [KeyboardInterrupt(), KeyboardInterrupt()]

    def before(batch):
        if interrupts and batch.starts.max() > len(interrupts) * 4:
            raise interrupts.pop()

    engine = make_engine(Copying(before=before), max_slots=4)
    requests = engine.submit([1, 2, 3], SamplingParams(**BEAMS))
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            run(engine)
    run(engine)
    assert [(r.generated, r.score, r.finish_reason) for r in requests] == search(Reading(), [1, 2, 3])


def test_an_interrupted_copy_is_repeated():
    class Interrupted(Copying):
        def copy_cache(self, cache, source, target, start, end):
            if self.copied == 2:
                self.copied += 1
                raise KeyboardInterrupt
            super().copy_cache(cache, source, target, start, end)

    engine = make_engine(Interrupted(), max_slots=4)
    requests = engine.submit([1, 2, 3], SamplingParams(**BEAMS))
    with pytest.raises(KeyboardInterrupt):
        run(engine)
    run(engine)
    assert [(r.generated, r.score, r.finish_reason) for r in requests] == search(Reading(), [1, 2, 3])


def test_the_score_is_the_sum_of_the_logprobs_by_the_length():
    model = make_model(fakes.hashed)
    for generation in model.generate("abc", logprobs=2, **BEAMS):
        total = sum(entry.logprob for entry in generation.logprobs)
        assert [entry.token_id for entry in generation.logprobs] == generation.token_ids
        assert all(len(entry.top) == 2 for entry in generation.logprobs)
        assert generation.score == pytest.approx(total / len(generation.token_ids) ** 1.2, abs=1e-9)
    assert make_model().generate("a", max_new_tokens=1).score is None


def test_texts_begin_with_the_prompt_where_that_is_wanted_with_its_logprobs():
    model = make_model(fakes.hashed)
    plain = model.generate("abc", **BEAMS)
    got = model.generate("abc", echo=True, logprobs=0, **BEAMS)
    assert [generation.text for generation in got] == ["abc" + generation.text for generation in plain]
    first = [entry.logprob for entry in got[0].logprobs[:3]]
    assert first[0] is None
    assert all([entry.logprob for entry in generation.logprobs[:3]] == first for generation in got)
    assert [len(generation.logprobs) for generation in got] == [3 + len(one.token_ids) for one in plain]


def test_a_stop_string_ends_a_text_and_is_cut_off():
    script = {b: b + 1 for b in b"abcdefghijklmnopqrstuvwxy"}

    def alphabet(history, vocab_size):
        logits = fakes.hashed(history, vocab_size)
        logits[script.get(history[-1], ord("a"))] += 12
        logits[fakes.END] = -100
        return logits

    model = make_model(alphabet)
    best = model.generate("a", num_beams=3, max_new_tokens=20, stop=["fgh", "xyz"])
    assert (best.text, best.finish_reason) == ("bcde", "stop")
    assert bytes(best.token_ids) == b"bcdefgh"
    several = model.generate("a", num_beams=3, n=3, max_new_tokens=20, stop="fgh", early_stopping=True)
    assert all("fgh" not in generation.text for generation in several)
    assert sum(bytes(generation.token_ids).endswith(b"fgh") for generation in several) >= 1


def test_num_return_sequences_is_another_name_of_n():
    model = make_model(fakes.hashed)
    options = {"num_beams": 4, "max_new_tokens": 6}
    want = model.generate("ab", n=3, **options)
    assert texts(model.generate("ab", num_return_sequences=3, **options)) == texts(want)
    assert SamplingParams(num_beams=4, num_return_sequences=3) == SamplingParams(num_beams=4, n=3)
    assert [generation.score for generation in want] == sorted(
        (generation.score for generation in want), reverse=True
    )


def test_a_long_prompt_is_truncated_for_beams_too():
    model = make_model(fakes.hashed, context=16)
    options = {"num_beams": 3, "max_new_tokens": 6}
    got = model.generate(list(range(40)), overflow="truncate", **options)
    assert got.token_ids == model.generate(list(range(30, 40)), **options).token_ids
    assert got.truncated_tokens == 30


def test_speculation_leaves_beams_alone():
    ids = [1, 2, 3, 1, 2, 3, 1, 2]
    got = make_model(fakes.hashed, speculation="prompt_lookup").generate(ids, **BEAMS)
    assert texts(got) == texts(make_model(fakes.hashed).generate(ids, **BEAMS))


def test_coroutines_search_too():
    async def main():
        async with AsyncGPT2(make_model(fakes.hashed)) as model:
            with pytest.raises(RequestError, match="beams cannot be streamed"):
                model.stream("ab", **BEAMS)
            return await asyncio.gather(*(model.generate(prompt, **BEAMS) for prompt in ("ab", "cd")))

    want = make_model(fakes.hashed)
    assert [texts(got) for got in asyncio.run(main())] == [
        texts(want.generate(prompt, **BEAMS)) for prompt in ("ab", "cd")
    ]


@pytest.mark.parametrize(
    ("params", "error", "message"),
    [
        ({"num_beams": 0}, InvalidSamplingError, "num_beams is 0; it must be from 1 to 128"),
        (
            {"num_beams": 4, "temperature": 0.5},
            InvalidSamplingError,
            "temperature is 0.5; a beam search draws",
        ),
        ({"num_beams": 2, "n": 3}, InvalidSamplingError, "n is 3 and num_beams is 2; a search gives as many"),
        ({"num_beams": 2, "n": 2, "num_return_sequences": 1}, InvalidSamplingError, "its other name, is 1"),
        ({"num_beams": 2, "overflow": "slide"}, InvalidSamplingError, "beams cannot slide"),
        (
            {"num_beams": 2, "early_stopping": 1},
            InvalidSamplingError,
            "early_stopping is 1; it must be True,",
        ),
        ({"num_beams": 2, "length_penalty": 21}, InvalidSamplingError, "length_penalty is 21; it must be"),
        ({"length_penalty": 2.0}, InvalidSamplingError, "pass num_beams=4 or leave them out"),
        ({"early_stopping": True}, InvalidSamplingError, "pass num_beams=4 or leave them out"),
        ({"num_beams": 33}, RequestError, "num_beams is 33; this engine runs 32 texts at once; lower it"),
        (
            {"num_beams": 20, "stop_token_ids": ENDS},
            RequestError,
            "num_beams is 20; with a vocabulary of 257 tokens, 21 of which end a text, it can be at most 11",
        ),
        ({"num_beams": 2, "max_new_tokens": 0}, RequestError, "no token is wanted; pass max_new_tokens=1"),
        ({"num_beams": 2, "do_sample": True}, InvalidSamplingError, "temperature=0 takes the likeliest"),
        ({"num_beams": 2, "num_beam_groups": 2}, InvalidSamplingError, "not divided into groups here"),
    ],
)
def test_what_cannot_be_searched_is_refused_by_name(params, error, message):
    model = make_model()
    with pytest.raises(error, match=message):
        model.generate("ab", **params)
    assert model.backend.batches == []


def test_beams_are_not_streamed():
    with pytest.raises(RequestError, match="num_beams is 4; beams cannot be streamed"):
        make_model().stream("ab", **BEAMS)
    with pytest.raises(RequestError, match="num_beams is 4; beams cannot be streamed"):
        make_engine().submit([1], SamplingParams(**BEAMS), stream=True)


def test_a_search_that_bans_leave_nothing_for_says_so():
    """Four tokens, none of which may come twice: after three the text has nowhere to go."""
    config = fakes.config(vocab_size=4, eos=())
    options = {"num_beams": 2, "n": 2, "no_repeat_ngram_size": 1}
    with GPT2(fakes.FakeBackend(config, fakes.hashed), None) as model:
        for generation in model.generate([3], max_new_tokens=3, **options):
            assert {*generation.token_ids} == {0, 1, 2}
        with pytest.raises(InvalidSamplingError, match="only 0 of 2 texts are left of 2 beams"):
            model.generate([3], max_new_tokens=4, **options)
        assert idle(model)


@pytest.mark.parametrize(
    "options",
    [{"logits_processors": [lambda token_ids, logits: logits]}, {"stopping": [lambda token_ids, text: True]}],
)
def test_functions_do_not_act_on_beams_and_are_refused(options):
    with pytest.raises(RequestError, match="num_beams is 2; logits_processors and stopping do not act on"):
        make_model().generate("ab", num_beams=2, **options)


def test_a_constraint_does_not_act_on_beams_and_is_refused():
    with pytest.raises(InvalidSamplingError, match="num_beams is 2, and a constraint does not act on beams"):
        SamplingParams(num_beams=2, regex="a+")
