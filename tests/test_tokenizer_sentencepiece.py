"""SentencePiece's models: the ids of its own library (tests/make_spiece_golden.py), and what is refused."""

import contextlib
import json
import random
from pathlib import Path

import pytest

from gpt2core import CheckpointError, RequestError
from gpt2core.tokenizer.tokenizer import Tokenizer

GOLDEN = Path(__file__).parent / "golden"
KINDS = ("uni", "bpe")
CASES = [
    (kind, *case)
    for kind, cases in json.loads((GOLDEN / "spiece.json").read_text()).items()
    for case in cases
]


def write_model(folder, kind, name="spiece.model"):
    (folder / name).write_bytes((GOLDEN / f"spiece-{kind}.model").read_bytes())
    return folder


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    return {kind: Tokenizer.from_folder(write_model(tmp_path_factory.mktemp(kind), kind)) for kind in KINDS}


@pytest.mark.parametrize(("kind", "text", "ids", "back"), CASES)
def test_ids_and_text_are_those_of_sentencepiece(tokenizers, kind, text, ids, back):
    assert tokenizers[kind].encode(text) == ids
    if " \u2047 " not in back:  # its sign for what is unknown
        assert tokenizers[kind].decode(ids) == back


@pytest.mark.parametrize("kind", KINDS)
def test_a_stream_adds_up_to_the_text(tokenizers, kind):
    for case in CASES:
        if case[0] == kind:
            decoder = tokenizers[kind].stream_decoder()
            text = "".join(decoder.push(token_id) for token_id in case[2]) + decoder.flush()
            assert text == tokenizers[kind].decode(case[2])


@pytest.mark.parametrize("kind", KINDS)
def test_control_pieces_that_a_text_spells_out_stay_text(tokenizers, kind):
    tokenizer = tokenizers[kind]
    assert tokenizer.content(1) == "<s>"
    assert tokenizer.special_ids >= {1, 2}
    assert not tokenizer.special_ids & set(tokenizer.encode("a <s> b</s> </s>"))
    assert 2 in tokenizer.encode("a </s>", allow_special=True)


@pytest.mark.parametrize("name", ["sentencepiece.bpe.model", "tokenizer.model"])
def test_other_names_of_the_file_are_read(tmp_path, name):
    assert Tokenizer.from_folder(write_model(tmp_path, "bpe", name)).encode("x")


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_models_are_read_or_refused_by_name(tmp_path, kind):
    whole = (GOLDEN / f"spiece-{kind}.model").read_bytes()
    rng = random.Random(0)
    file = tmp_path / "spiece.model"
    refused = 0
    for _ in range(60):
        damaged = bytearray(whole)
        at = rng.randrange(len(whole))
        damaged[at] ^= 1 << rng.randrange(8)
        file.write_bytes(damaged[: rng.choice([at, len(whole)])] or b"\n")
        with contextlib.suppress(RequestError):  # a vocabulary that was damaged cannot spell it
            try:
                Tokenizer.from_folder(tmp_path).encode("Once upon a time")
            except CheckpointError as error:
                refused += "spiece.model" in str(error)
    assert refused > 20


def test_a_model_of_words_is_refused(tmp_path):
    pieces = b"".join(
        b"\n" + bytes([len(text) + 2]) + b"\n" + bytes([len(text)]) + text for text in (b"<unk>", b"a")
    )
    (tmp_path / "spiece.model").write_bytes(pieces + b"\x12\x02\x18\x03")
    with pytest.raises(CheckpointError, match="algorithm 3, and only unigram and BPE"):
        Tokenizer.from_folder(tmp_path)
