"""`regex`, `json_schema`, `choice` and `grammar`: what they let through, text by text and token by token."""

import json
import re

import fakes
import jsonschema
import numpy as np
import pytest
import regex as partial
from constraining import ENDS, PERSON, SUM, constraints
from engines import TOKENIZER, make_model
from tokenizer_folders import gpt2_tokenizer, small_byte_level

from gpt2core.constraints.compiler import Constraints
from gpt2core.model import GPT2
from gpt2core.sampling.params import SamplingParams
from gpt2core.tokenizer.tokenizer import Tokenizer

REGEXES = (
    r"[0-9]{2,4}-[a-f]+(x|yz)?",
    r"(yes|no|maybe)",
    r"\d+(\.\d{1,3})?",
    r"[\w.-]+@\w{2,}\\d\s",
    r"\D{2}[^a\d]\S(\W|\w)[\s\S]",
    r"[^a-z\n]{1,8}!",
    r"(?i:abc)*\.",
    r"a?b?c?d",
    r"[à-ü]{1,5}😀?",
    r"/[a-z/\\]{0,6}/",
)


@pytest.fixture(scope="module")
def demo():
    with GPT2.from_pretrained("demo", backend="numpy") as model:
        yield model


@pytest.fixture(scope="module")
def demo_native():
    with GPT2.from_pretrained("demo", backend="native", threads=1) as model:
        yield model


def allowed(matcher, text: str) -> set[str]:
    """What may follow a text of bytes; "" is the end."""
    found = np.flatnonzero(matcher.allowed([*text.encode()]))
    return {"" if token_id == fakes.END else chr(token_id) for token_id in found}


# Every text matches


@pytest.mark.parametrize("pattern", REGEXES)
def test_texts_match_their_regex_over_hundreds_of_seeds(pattern):
    model, ended = make_model(context=128), 0
    for seed in range(40):
        params = SamplingParams(regex=pattern, temperature=1.5, max_new_tokens=90, seed=seed, n=3)
        for got in model.generate("ab", params):
            if got.finish_reason == "stop":
                ended += 1
                assert re.fullmatch(pattern, got.text), (seed, got.text)
            else:
                assert partial.fullmatch(pattern, got.text.rstrip("\ufffd"), partial=True), (seed, got.text)
    assert ended > 40


@pytest.mark.parametrize("which", ["demo", "demo_native"])
def test_a_language_models_texts_match_over_hundreds_of_seeds(which, request):
    model = request.getfixturevalue(which)
    pattern = r"The (king|queen) was [0-9]{2} years old, and (his|her) [a-z]{3,9} was (red|blue)\."
    params = SamplingParams(regex=pattern, temperature=1, max_new_tokens=60)
    got = model.generate(["Once: "] * 200, params, seed=[*range(200)])
    assert {generation.finish_reason for generation in got} == {"stop"}
    assert all(re.fullmatch(pattern, generation.text) for generation in got)
    assert len({generation.text for generation in got}) > 150


@pytest.mark.parametrize("which", ["demo", "demo_native"])
def test_json_is_an_instance_of_its_schema_over_hundreds_of_seeds(which, request):
    model = request.getfixturevalue(which)
    params = SamplingParams(json_schema=PERSON, temperature=1, max_new_tokens=100)
    got = model.generate(["A person: "] * 100, params, seed=[*range(100)])
    assert {generation.finish_reason for generation in got} == {"stop"}
    for generation in got:
        jsonschema.validate(json.loads(generation.text), PERSON)
        assert list(json.loads(generation.text)) == list(PERSON["properties"])
    assert len({generation.text for generation in got}) > 80


def test_any_object_is_json():
    model = make_model(context=256)
    params = SamplingParams(json_schema='{"type": "object"}', temperature=4, max_new_tokens=250)
    got = model.generate(["a"] * 40, params, seed=[*range(40)])
    whole = [generation.text for generation in got if generation.finish_reason == "stop"]
    assert all(isinstance(json.loads(text), dict) for text in whole)
    assert whole


def test_a_choice_is_one_of_the_texts_whatever_characters_they_have():
    choices = [
        "yes",
        'say "hi"',
        "new\nline",
        "é😀",
        "back\\slash",
        "\x01\x7f\u2028",
        "/x/",
        "a|b",
        "yes, sir",
    ]
    params = SamplingParams(choice=choices, temperature=20, max_new_tokens=20)
    got = make_model(fakes.hashed).generate(["a"] * 300, params, seed=[*range(300)])
    assert {generation.text for generation in got} == {*choices}
    assert {generation.finish_reason for generation in got} == {"stop"}


def test_a_grammar_may_nest():
    model, params = make_model(fakes.hashed, context=128), SamplingParams(grammar=SUM, temperature=4)
    got = model.generate(["a"] * 60, params, seed=[*range(60)])
    whole = [generation.text for generation in got if generation.finish_reason == "stop"]
    assert len(whole) > 30
    assert any("(" in text for text in whole)
    for text in whole:
        assert re.fullmatch(r"[0-9+ ()]+", text)
        assert isinstance(eval(re.sub(r"\b0+(?=\d)", "", text)), int), text


def test_llama_cpps_grammars_are_read_too():
    got = make_model().generate("a", grammar='root ::= "yes" | "no" [!?]+', temperature=1, max_new_tokens=9)
    assert re.fullmatch(r"yes|no[!?]+", got.text)


# What is allowed, token by token


@pytest.mark.parametrize("pattern", [r"(ab|abc)d?e", r"[0-9]{2}(:[0-9]{2})*", r"(x+yz?)*q"])
def test_a_token_is_allowed_exactly_where_the_text_can_still_match(pattern):
    rng = np.random.default_rng(0)
    matcher = constraints().start(SamplingParams(regex=pattern), ENDS)
    for _ in range(20):
        text = ""
        for _ in range(12):
            want = {
                character
                for character in map(chr, range(128))
                if partial.fullmatch(pattern, text + character, partial=True)
            }
            want |= {""} if re.fullmatch(pattern, text) else set()
            got = allowed(matcher, text)
            assert got == want, text
            assert matcher.is_complete([*text.encode()]) == (want <= {""}), text
            going_on = sorted(got - {""})
            if not going_on:
                break
            text += str(rng.choice(going_on))


def test_tokens_of_several_bytes_are_allowed_however_they_divide_the_text():
    tokenizer, choices = Tokenizer(small_byte_level()), ["the cat", "then 日本 😀"]
    spelled = [tokenizer.token_bytes(i) for i in range(300)]
    made = Constraints(tokenizer, fakes.config(vocab_size=301, eos=(300,)))
    matcher = made.start(SamplingParams(choice=choices), frozenset({300}))
    for done in ("", "t", "the", "the ca", "then 日", "then 日本 "):
        rests = [text[len(done) :].encode() for text in choices if text.startswith(done)]
        want = [i for i, piece in enumerate(spelled) if any(rest.startswith(piece) for rest in rests)]
        whole, single = tokenizer.encode(done), [spelled.index(bytes([byte])) for byte in done.encode()]
        for ids in (whole, single):
            assert np.flatnonzero(matcher.allowed(ids)).tolist() == want, done
        assert done in ("", "t") or len(whole) < len(single)
    half = spelled.index("😀".encode()[:1])
    ids = [*tokenizer.encode("then 日本 "), half]
    assert spelled.index("😀".encode()[1:2]) in np.flatnonzero(matcher.allowed(ids))
    assert not matcher.is_complete(ids)


def test_gpt2s_tokenizer_writes_characters_that_are_split_between_tokens():
    tokenizer = gpt2_tokenizer()
    size = tokenizer.vocab_size
    matcher = Constraints(tokenizer, fakes.config(vocab_size=size, eos=(50256,))).start(
        SamplingParams(regex="[😀-😎]{2}日"), frozenset({50256})
    )
    ids = tokenizer.encode("😀😎日")
    assert len(ids) > 3
    for i, token_id in enumerate(ids):
        mask = matcher.allowed(ids[:i])
        assert mask[token_id]
        assert not mask[50256]
    assert matcher.is_complete(ids)
    assert np.flatnonzero(matcher.allowed(ids)).tolist() == [50256]


def test_a_vocabulary_larger_or_smaller_than_the_tokenizers_has_its_own_tokens_only():
    params = SamplingParams(regex=r"[\s\S]{3}")
    for size in (100, 257, 300):
        eos = (fakes.END,) if size > 256 else ()
        matcher = constraints(size, eos=eos).start(params, frozenset(eos))
        mask = matcher.allowed([])
        assert mask.shape == (size,)
        assert {*range(100)} <= {*np.flatnonzero(mask).tolist()} <= {*range(min(size, 256))}
        assert np.flatnonzero(matcher.allowed([97, 97, 97])).tolist() == [*eos]
    model = GPT2(fakes.FakeBackend(fakes.config(vocab_size=300), fakes.hashed), TOKENIZER)
    for seed in range(50):
        assert re.fullmatch(r"[a-z]{5}", model.generate("a", regex="[a-z]{5}", temperature=9, seed=seed).text)


def test_special_tokens_are_no_text_and_each_token_that_ends_the_text_may_end_it():
    tokenizer = Tokenizer(small_byte_level(added=["<a>"]))
    config = fakes.config(vocab_size=302, eos=(300,))
    letter = tokenizer.encode("a")[0]
    for ends, want in (({300}, {300}), ({300, letter}, {300, letter}), (set(), set())):
        matcher = Constraints(tokenizer, config).start(SamplingParams(regex="<a>b?"), frozenset(ends))
        assert {*np.flatnonzero(matcher.allowed([])).tolist()} == {301, tokenizer.encode("<")[0]}
        found = {*np.flatnonzero(matcher.allowed([301])).tolist()}
        assert found == {tokenizer.encode("b")[0], *want}
    matcher = Constraints(tokenizer, config).start(SamplingParams(regex=r".*"), frozenset({300}))
    assert np.flatnonzero(~matcher.allowed([letter])[:302]).tolist() == [
        i for i in range(302) if i != 300 and not is_text(tokenizer.token_bytes(i))
    ]


def is_text(piece: bytes) -> bool:
    """Whether bytes can stand after a letter in UTF-8 without a line feed."""
    if b"\n" in piece:
        return False
    for rest in (b"", b"\x80", b"\x80\x80", b"\x80\x80\x80", b"\x90\x80", b"\x90\x80\x80", b"\xa0\x80"):
        try:
            (piece + rest).decode()
        except UnicodeDecodeError:
            continue
        return True
    return False


def test_the_answers_depend_on_the_tokens_given_and_not_on_those_before():
    rng = np.random.default_rng(1)
    made = constraints()
    params = SamplingParams(json_schema=PERSON)
    matcher, known = (
        made.start(params, ENDS),
        [*b'{"name": "Ada", "age": 36, "likes": ["tea", null], "happy": true}'],
    )
    for length in rng.integers(0, len(known) + 1, 60):
        tokens = known[: int(length)]
        fresh = made.start(params, ENDS)
        np.testing.assert_array_equal(matcher.allowed(tokens), fresh.allowed(tokens))
        assert matcher.is_complete(tokens) == fresh.is_complete(tokens) == (len(tokens) == len(known))
        follow = known[int(length) : int(length) + 4]
        wrong = [*follow[:2], 0, *follow[2:]]
        assert matcher.count_allowed(tokens, follow) == len(follow)
        assert matcher.count_allowed(tokens, wrong) == len(follow[:2])
        assert matcher.count_allowed(tokens, [*follow, fakes.END, 97]) == len(follow)
    branch = [*known[:10], *b"Bob"]
    np.testing.assert_array_equal(matcher.allowed(branch), made.start(params, ENDS).allowed(branch))
