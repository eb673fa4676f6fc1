"""Scores: every option against a float64 loop over transformers, on every backend; order and batches."""

import asyncio
import itertools
import math
import platform

import fakes
import numpy as np
import pytest
from engines import make_model
from hypothesis import given, settings
from hypothesis import strategies as st
from scoring_oracle import load_oracle, score_by_hand

from gpt2core import GPT2, RequestError
from gpt2core.backends.base import ScoresTokens
from gpt2core.testing import random_checkpoint
from gpt2core.token_scores import TokenQuery, score_logits

BACKENDS = ("numpy", "native", "torch", "jax", "onnx")
NATS = 1e-4
"""Most that a token's logarithm may differ from the float64 loop; 4e-6 was measured."""
TEXTS = ["Once upon a time there was a king.", "No.", "naïve €uro", "It was late; nobody came. " * 7]
CHOICES = {
    "defaults": {},
    "bos": {"bos": "eos"},
    "a token as bos": {"bos": 5},
    "end": {"end": "eos", "bos": "eos"},
    "stride": {"stride": 10},
    "exact": {"stride": 1, "context": 24},
    "context": {"context": 20, "bos": "eos"},
    "leading space": {"leading_space": True},
    "all that is kept": {"bos": "eos", "top": 5, "entropy": True, "boundaries": True},
    "all, in windows": {"context": 16, "stride": 5, "top": 3, "entropy": True, "boundaries": True},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return random_checkpoint(tmp_path_factory.mktemp("scoring") / "tiny", seed=3)


@pytest.fixture(scope="module")
def oracle(folder):
    return load_oracle(folder)


@pytest.fixture(scope="module", params=BACKENDS)
def model(request, folder):
    with GPT2.from_pretrained(folder, backend=request.param, threads=1) as model:
        yield model


@pytest.fixture(scope="module")
def native(folder):
    with GPT2.from_pretrained(folder, backend="native", threads=2) as model:
        yield model


def sequence_of(model, text, choices):
    """What the model reads, and the first of it that is scored."""
    text = " " + text if choices.get("leading_space") else text
    ids = model.tokenizer.encode(text)
    before, after = choices.get("bos"), choices.get("end")
    before = [] if before is None else [0 if before == "eos" else before]
    return [*before, *ids, *([0] if after else [])], 1


@pytest.mark.parametrize("name", CHOICES)
def test_every_choice_equals_a_float64_loop_over_transformers(model, oracle, name):
    choices = CHOICES[name]
    context = choices.get("context", 96)
    stride = choices.get("stride", (context + 1) // 2)
    for text, score in zip(TEXTS, model.score(TEXTS, **choices), strict=True):
        sequence, first = sequence_of(model, text, choices)
        want = score_by_hand(oracle, sequence, first, context, stride, choices.get("top", 0))
        logprobs = [w["logprob"] for w in want]
        np.testing.assert_allclose(score.logprobs, logprobs, atol=NATS, rtol=0)
        assert score.token_ids == sequence[1 if choices.get("bos") is not None else 0 :]
        assert score.perplexity == pytest.approx(math.exp(-np.mean(logprobs)), rel=NATS)
        for place, (rank, w) in enumerate(zip(score.ranks, want, strict=True)):
            close = np.abs(w["distribution"] - w["logprob"]) < 2 * NATS
            assert abs(int(rank) - w["rank"]) < close.sum(), place
        if choices.get("entropy"):
            np.testing.assert_allclose(score.entropies, [w["entropy"] for w in want], atol=NATS, rtol=0)
        else:
            assert score.entropies is None
        for alternatives, w in zip(score.top or (), want, strict=bool(score.top)):
            assert len(alternatives) == choices["top"]
            values = w["distribution"][[one.token_id for one in alternatives]]
            np.testing.assert_allclose([one.logprob for one in alternatives], values, atol=NATS, rtol=0)
            np.testing.assert_allclose(values, w["distribution"][w["top"]], atol=2 * NATS, rtol=0)


def test_boundaries_are_the_probability_of_a_space_or_the_end(native, oracle):
    text = "a bc"
    got = native.score(text, bos="eos", boundaries=True)
    ids = [0, *native.tokenizer.encode(text), 0]
    [space] = native.tokenizer.encode(" ")
    want = [
        np.logaddexp(w["distribution"][space], w["distribution"][0])
        for w in score_by_hand(oracle, ids, 1, 96, 48)
    ]
    np.testing.assert_allclose(got.boundary_logprobs, want, atol=NATS, rtol=0)


@settings(max_examples=25)
@given(st.data())
def test_native_gives_the_same_bits_in_any_order_batch_and_split(native, data):
    letters = st.sampled_from("ab é.\n")
    texts = data.draw(st.lists(st.text(letters, min_size=1, max_size=150), min_size=1, max_size=12))
    choices = data.draw(
        st.sampled_from(
            [{"bos": "eos"}, {"bos": "eos", "context": 30, "stride": 7, "boundaries": True, "top": 3}]
        )
    )
    alone = [native.score(text, **choices) for text in texts]
    order = data.draw(st.permutations(range(len(texts))))
    cut = data.draw(st.integers(0, len(texts)))
    shuffled = [*native.score([texts[i] for i in order[:cut]], **choices)]
    shuffled += native.score_iter((texts[i] for i in order[cut:]), **choices)
    for i, score in zip(order, shuffled, strict=True):
        same_bits(score, alone[i])


def same_bits(score, other):
    assert score.token_ids == other.token_ids
    np.testing.assert_array_equal(score.logprobs, other.logprobs)
    np.testing.assert_array_equal(score.ranks, other.ranks)
    assert (score.perplexity, score.bits_per_byte, score.top) == (
        other.perplexity,
        other.bits_per_byte,
        other.top,
    )
    if score.boundary_logprobs is not None:
        np.testing.assert_array_equal(score.boundary_logprobs, other.boundary_logprobs)


def test_native_gives_the_same_bits_beside_generation_and_with_other_threads(native, folder):
    pieces = native.stream("Once", max_new_tokens=40, temperature=1, seed=1)
    next(pieces)
    beside = native.score(TEXTS, bos="eos", top=2)
    list(pieces)
    with GPT2.from_pretrained(folder, backend="native", threads=3) as other:
        for one, two in zip(beside, other.score(TEXTS, bos="eos", top=2), strict=True):
            same_bits(one, two)


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "int8", "int4"])
@pytest.mark.parametrize("vocab_size", [257, 768, 2000])
def test_what_c_says_of_logits_is_what_float64_says(tmp_path, precision, vocab_size):
    """The tiles against the whole: the logits are the same, so only the sums differ."""
    folder = random_checkpoint(tmp_path, seed=1, vocab_size=vocab_size, n_embd=40)
    with GPT2.from_pretrained(folder, backend="native", precision=precision, threads=2) as model:
        backend = model.backend
        assert isinstance(backend, ScoresTokens)
        rng = np.random.default_rng(0)
        ids = rng.integers(vocab_size, size=90)
        members = (rng.random(vocab_size) < 0.3).astype(np.float32)
        targets = rng.integers(vocab_size, size=90).astype(np.int32)
        targets[:4] = 0, vocab_size - 1, 767 % vocab_size, 768 % vocab_size
        query = TokenQuery(targets, 12, members)
        from gpt2core.batch import whole_sequence

        batch = whole_sequence(model.config, ids.tolist())
        want = score_logits(backend.forward(batch, backend.new_cache(1, 96)), query)
        rest, got = backend.score(batch, backend.new_cache(1, 96), query)
        assert rest.shape == (0, vocab_size)
        for name in ("logprobs", "entropies", "member_logprobs", "top_logprobs"):
            np.testing.assert_allclose(getattr(got, name), getattr(want, name), atol=2e-7, rtol=1e-6)
        np.testing.assert_array_equal(got.ranks, want.ranks)
        np.testing.assert_array_equal(got.top_ids, want.top_ids)


def test_a_pass_of_more_tokens_than_c_takes_at_once_gives_the_same_bits(tmp_path):
    folder = random_checkpoint(tmp_path, seed=1, n_positions=700)
    with GPT2.from_pretrained(folder, backend="native", threads=2) as model:
        from gpt2core.batch import Batch

        ids = [(7 * i) % 257 for i in range(700)]
        batch = Batch.of([(ids, 0, 0)], range(700))
        query = TokenQuery(np.array(ids[200:], np.int32), 2)
        logits, scores = model.backend.score(batch, model.backend.new_cache(1, 700), query)
        whole = model.backend.forward(batch, model.backend.new_cache(1, 700))
        np.testing.assert_array_equal(logits, whole[:200])
        np.testing.assert_allclose(scores.logprobs, score_logits(whole[200:], query).logprobs, atol=1e-6)


def test_scores_and_texts_share_passes_and_do_not_change_each_other(native):
    alone = native.generate("Once upon", max_new_tokens=30, temperature=1.0, seed=4).text
    engine = native.engine
    before = engine.steps
    scores = native.score([f"text number {i}" for i in range(64)])
    assert engine.steps - before <= 64 * 14 / 512 + 2
    assert len(scores) == 64
    assert native.generate("Once upon", max_new_tokens=30, temperature=1.0, seed=4).text == alone


def test_each_place_has_the_likeliest_tokens_and_equals_come_by_id():
    def flat(history, vocab_size):
        logits = np.zeros(vocab_size, np.float32)
        logits[[7, 9]] = 2
        return logits

    score = make_model(flat).score([1, 9, 7], top=4)
    assert [[one.token_id for one in place] for place in score.top] == [[7, 9, 0, 1]] * 2
    assert score.ranks.tolist() == [1, 1]
    assert make_model(flat).score([1, 200], top=1).ranks.tolist() == [3]
    assert len(make_model(flat).score([1, 200], top=1000).top[0]) == 257


# Spans


def test_tokens_say_where_they_lie_in_characters_and_bytes():
    text = "aé€"
    score = make_model(fakes.hashed).score(text, bos="eos")
    assert score.byte_offsets == [(i, i + 1) for i in range(6)]
    assert score.offsets == [(0, 1), (1, 2), (1, 2), (2, 3), (2, 3), (2, 3)]
    assert score.tokens == ["a", *["\ufffd"] * 5]
    tokens = score.by_token(base=math.e)
    assert [t.surprisal for t in tokens] == (-score.logprobs).tolist()
    assert tokens[3].start == 2
    assert tokens[3].byte_start == 3


def test_spans_of_a_merged_vocabulary_are_those_of_transformers():
    from transformers import PreTrainedTokenizerFast

    from gpt2core.checkpoint.open import open_checkpoint

    text = "Once upon a time — the “naïve” king… said: hello,\n  there!"
    with GPT2.from_pretrained("demo", backend="numpy") as model:
        score = model.score(text, bos="eos")
        file = str(open_checkpoint("demo").folder / "tokenizer.json")
    theirs = PreTrainedTokenizerFast(tokenizer_file=file)(text, return_offsets_mapping=True)
    assert score.token_ids == theirs["input_ids"]
    for (start, end), (first, last) in zip(score.offsets, theirs["offset_mapping"], strict=True):
        assert end == last
        assert text[start:first].strip() == ""
    assert "".join(score.tokens[i] for i in range(3)) == text[: score.offsets[2][1]]


def test_token_ids_alone_have_the_text_that_they_spell():
    score = make_model(fakes.hashed).score([97, 0xE2, 98])
    assert score.text == "a\ufffdb"
    assert score.byte_offsets == [(0, 1), (1, 4), (4, 5)]
    assert score.tokens == ["a", "\ufffd", "b"]


# What is summed up


def test_perplexities_by_token_word_and_byte_are_of_what_is_predicted():
    score = make_model(fakes.hashed).score("one two  three", bos="eos")
    nats = -score.logprobs.sum()
    assert score.logprob == pytest.approx(-nats)
    assert score.perplexity == pytest.approx(math.exp(nats / 14))
    assert score.word_perplexity == pytest.approx(math.exp(nats / 3))
    assert score.byte_perplexity == pytest.approx(math.exp(nats / 14))
    assert score.bits_per_byte == pytest.approx(nats / math.log(2) / 14)
    later = make_model(fakes.hashed).score("o two")
    assert later.word_perplexity == pytest.approx(math.exp(-later.logprobs.sum()))


def test_an_average_over_windows_is_by_token():
    """The mean of the windows' means, as the popular recipe has it, is another number."""
    model = make_model(fakes.hashed)
    ids = [(5 * i) % 256 for i in range(100)]
    score = model.score(ids, stride=60)
    assert score.perplexity == pytest.approx(math.exp(-score.logprobs.mean()))
    windows = math.exp(-(score.logprobs[:64].mean() + score.logprobs[64:].mean()) / 2)
    assert score.perplexity != pytest.approx(windows, rel=1e-3)


# Many texts


def test_an_iterator_keeps_order_and_reads_ahead_a_bounded_number_of_texts():
    model, read = make_model(fakes.hashed), []

    def source():
        for i in itertools.count():
            read.append(i)
            yield "ab" * (1 + i % 5)

    scores = model.score_iter(source(), bos="eos")
    first = list(itertools.islice(scores, 3))
    assert [len(score.token_ids) for score in first] == [2, 4, 6]
    assert len(read) <= 1024
    scores.close()
    assert (model.engine.running, model.engine.waiting) == (0, 0)


def test_a_text_that_cannot_be_scored_ends_the_iterator_or_stands_in_its_place():
    model = make_model(fakes.hashed)
    texts = ["ab", "", "cd", [300, 1], "e"]
    got = list(model.score_iter(texts, errors="return"))
    assert [isinstance(one, RequestError) for one in got] == [False, True, False, True, True]
    with pytest.raises(RequestError, match="text 1: prompt is empty"):
        list(model.score_iter(texts))
    with pytest.raises(RequestError, match="text 3 of the list: prompt holds 300"):
        model.score(["ab", "ab", "cd", [300, 1]])


def test_an_event_loop_may_wait_for_scores():
    model = make_model(fakes.hashed)

    async def source():
        for text in ("ab", "cde"):
            yield text

    async def collect(texts):
        return [score.token_ids async for score in model.score_async(texts, bos="eos")]

    want = [[97, 98], [99, 100, 101]]
    assert asyncio.run(collect(source())) == want
    assert asyncio.run(collect(["ab", "cde"])) == want


def test_no_texts_have_no_scores():
    assert make_model().score([]) == []


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"stride": 0}, "stride is 0; it must be a whole number from 1 to 64"),
        ({"stride": 65}, "stride is 65"),
        ({"context": 65}, "context is 65; it must be a whole number from 1 to 64, this model's context"),
        ({"context": 8, "stride": 9}, "stride is 9; it must be a whole number from 1 to 8"),
        ({"top": 1001}, "top is 1001; it must be a whole number from 0 to 1000"),
        ({"top": True}, "top is True"),
        ({"bos": "bos"}, "bos is 'bos'; it must be None, 'eos', or a token id below 257"),
        ({"bos": 257}, "bos is 257"),
        ({"end": True}, "end is True"),
        ({"strides": 5}, "unknown option 'strides' of score; known are bos, end, stride"),
    ],
)
def test_choices_that_are_out_of_range_are_refused(choices, message):
    with pytest.raises(RequestError, match=message):
        make_model().score("abc", **choices)


def test_logits_that_are_not_finite_are_an_error_of_their_text(tmp_path, native):
    from dataclasses import replace

    from gpt2core import NumericalError
    from gpt2core.backends.native import NativeBackend
    from gpt2core.testing import random_config, random_weights

    weights = random_weights(random_config(), seed=1)
    table = weights.wte.copy()
    table[9] = np.nan
    backend = NativeBackend(replace(weights, wte=table, lm_head=weights.lm_head), threads=1)
    with GPT2(backend, native.tokenizer) as model:
        with pytest.raises(NumericalError, match="not finite in step 1 at token 3"):
            model.score([1, 2, 9, 4], bos="eos")
        assert len(model.score([1, 2, 3]).logprobs) == 2


FLAGS = ["-O1 -DGPT2CORE_SCALAR"]
if platform.machine() == "x86_64":
    FLAGS += ["-O1 -march=x86-64", "-O2 -march=native -mno-avx512f"]


@pytest.mark.parametrize("flags", FLAGS)
def test_scores_have_the_same_bits_from_every_build(native, folder, flags, tmp_path, monkeypatch):
    want = native.score(TEXTS, **CHOICES["all, in windows"])
    monkeypatch.setenv("GPT2CORE_CFLAGS", flags)
    monkeypatch.setenv("GPT2CORE_CACHE", str(tmp_path))
    with GPT2.from_pretrained(folder, backend="native", threads=2) as model:
        for one, two in zip(model.score(TEXTS, **CHOICES["all, in windows"]), want, strict=True):
            same_bits(one, two)
            np.testing.assert_array_equal(one.entropies, two.entropies)
