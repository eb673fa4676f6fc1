"""StreamDecoder: pieces that join to the whole, and never half a character."""

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizer_folders import gpt2_tokenizer, small_tokenizer, stream, texts
from tokenizers import decoders, models, pre_tokenizers

from gpt2core.errors import UnsupportedCheckpointError
from gpt2core.tokenizer.tokenizer import Tokenizer

IDS = st.lists(st.integers(0, 50300) | st.sampled_from([50256, 50257, 2**31 - 1]), max_size=30)
TEXTS = texts(st.characters(exclude_categories=["Cs"]))

gpt2 = pytest.fixture(scope="session")(gpt2_tokenizer)
small = pytest.fixture(scope="session")(small_tokenizer)


@given(ids=IDS)
def test_streamed_pieces_of_any_ids_join_to_the_whole(gpt2, ids):
    assert "".join(stream(gpt2, ids)) == gpt2.decode(ids, skip_special=True)


@given(ids=st.lists(st.integers(0, 305), max_size=40))
def test_streamed_pieces_of_any_bytes_join_to_the_whole(small, ids):
    assert "".join(stream(small, ids)) == small.decode(ids, skip_special=True)


@given(text=TEXTS)
def test_a_stream_never_shows_half_a_character(small, text):
    pieces = stream(small, small.encode(text))
    assert "".join(pieces) == text
    assert sum(piece.count("\ufffd") for piece in pieces) == text.count("\ufffd")
    assert pieces[-1] == ""


def test_a_stream_gives_a_character_with_its_last_byte(gpt2):
    ids = gpt2.encode("é😀x")
    assert stream(gpt2, ids) == ["é", "", "😀", "x", ""]


def test_a_special_token_in_the_middle_of_a_character_does_not_break_it(gpt2):
    first, second = gpt2.encode("😀")
    assert stream(gpt2, [first, 50256, second, 50256]) == ["", "", "😀", "", ""]


def test_an_incomplete_character_at_the_end_becomes_one_replacement(gpt2):
    first, _ = gpt2.encode("😀")
    assert stream(gpt2, [15496, first]) == ["Hello", "", "\ufffd"]


def test_invalid_bytes_are_shown_as_soon_as_they_are_certain(gpt2):
    first, _ = gpt2.encode("😀")
    assert stream(gpt2, [first, 15496]) == ["", "\ufffdHello", ""]


def test_streams_of_one_tokenizer_do_not_mix(gpt2):
    first, second = gpt2.encode("😀")
    one, two = gpt2.stream_decoder(), gpt2.stream_decoder()
    assert (one.push(first), two.push(15496), one.push(second)) == ("", "Hello", "😀")


# Other decoders than byte-level


def with_decoder(vocab, decoder):
    raw = tokenizers.Tokenizer(models.WordLevel(vocab | {"[UNK]": len(vocab)}, unk_token="[UNK]"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    raw.decoder = decoder
    raw.add_special_tokens(["<s>"])
    return Tokenizer(raw)


LLAMA = decoders.Sequence(
    [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
)
PIECES = [
    "▁the",
    "▁",
    "cat",
    "##s",
    "##",
    ".",
    " ",
    "n't",
    "do",
    "'",
    "<0xE2>",
    "<0x82>",
    "<0xAC>",
    "<0x41>",
    "é",
    "w</w>",
]
VOCABULARY = {piece: i for i, piece in enumerate(PIECES)}
OTHERS = {
    "none": None,
    "WordPiece": decoders.WordPiece(),
    "WordPiece without cleanup": decoders.WordPiece(cleanup=False),
    "Metaspace": decoders.Metaspace(),
    "Metaspace never": decoders.Metaspace(prepend_scheme="never"),
    "Llama": LLAMA,
}


@pytest.mark.parametrize("name", OTHERS)
@given(ids=st.lists(st.integers(0, len(PIECES) + 3), max_size=12))
def test_streamed_pieces_of_other_decoders_join_to_the_whole(name, ids):
    tokenizer = with_decoder(VOCABULARY, OTHERS[name])
    whole = tokenizer.decode(ids, skip_special=True)
    assert "".join(stream(tokenizer, ids)) == whole
    assert whole == tokenizer._inner.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("name", OTHERS)
def test_other_decoders_stream_as_they_go(name):
    pieces = stream(with_decoder({"cat": 0, "sat": 1, "mat": 2}, OTHERS[name]), [0, 1, 2])
    assert [bool(piece) for piece in pieces] == [True, True, True, False]


@pytest.mark.parametrize(
    ("decoder", "shown"),
    [
        (decoders.BPEDecoder(), 'is {"type": "BPEDecoder"'),
        (decoders.CTC(), 'is {"type": "CTC"'),
        (decoders.Sequence([decoders.Fuse(), decoders.Replace("ca", "x")]), 'holds {"type": "Replace"'),
        (decoders.Sequence([decoders.Fuse(), decoders.Strip(" ", 0, 1)]), 'holds {"type": "Strip"'),
        (decoders.Sequence([decoders.WordPiece(), decoders.Fuse()]), 'holds {"type": "WordPiece"'),
    ],
)
def test_a_decoder_whose_text_cannot_be_streamed_is_refused_by_name(decoder, shown):
    with pytest.raises(UnsupportedCheckpointError) as caught:
        with_decoder(VOCABULARY, decoder)
    assert f"the tokenizer's decoder {shown}" in str(caught.value)
    assert "which is not supported; supported are ByteLevel" in str(caught.value)


def test_a_sentencepiece_stream_gives_a_character_after_its_last_byte():
    tokenizer = with_decoder(VOCABULARY, LLAMA)
    ids = [VOCABULARY[piece] for piece in ("▁the", "<0xE2>", "<0x82>", "<0xAC>", "▁", "cat")]
    assert stream(tokenizer, ids) == ["the", "", "", "", "€ ", "cat", ""]
    assert tokenizer.token_text(VOCABULARY["cat"]) == "cat"
    assert tokenizer.token_bytes(len(PIECES) + 9) == b""
