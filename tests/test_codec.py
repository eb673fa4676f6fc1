"""The codec as a whole: bytes in, fewer bytes out, and the very bytes back, or an error."""

import io
import pathlib
import random
import zlib

import pytest
from codec_models import TALE, fake_model, letters_model
from fuzz_codec import damage_files
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt2core import GPT2, RequestError
from gpt2core.codec import CodecError, compress, compress_stream, expand, expand_stream
from gpt2core.codec.container import END
from gpt2core.testing import FakeBackend

FAKE = fake_model()
planes = st.builds(
    lambda plane, rest: chr(min(plane * 0x10000 + rest, 0x10FFFF)),
    st.integers(0, 16),
    st.integers(0, 0xFFFF).filter(lambda rest: not 0xD800 <= rest <= 0xDFFF),
)
levels = st.integers(1, 9)


@given(st.binary(max_size=200), levels)
def test_any_bytes_come_back(data, level):
    assert expand(compress(data, FAKE, level=level), FAKE) == data


@settings(max_examples=40)
@given(st.integers(0, 900), st.integers(1, 300), st.binary(max_size=3), levels)
def test_text_that_the_model_knows_comes_back(start, length, binary, level):
    data = TALE[start:].encode()[:length] + binary + TALE[:length].encode()
    assert expand(compress(data, FAKE, level=level), FAKE) == data


@given(st.text(planes, max_size=60), levels)
def test_characters_of_every_plane_come_back(text, level):
    assert expand(compress(text.encode(), FAKE, level=level), FAKE).decode() == text


@given(st.lists(st.binary(min_size=1, max_size=60) | st.text(max_size=60).map(str.encode)), levels)
def test_mixtures_of_text_and_binary_come_back(parts, level):
    data = b"".join(parts)
    assert expand(compress(data, FAKE, level=level), FAKE) == data


@pytest.mark.parametrize("level", range(1, 10))
@pytest.mark.parametrize("context", [1, 2, 3, 16])
@pytest.mark.parametrize("eos", [(256,), ()])
def test_every_level_and_context_with_and_without_an_end_token(level, context, eos):
    model = fake_model(context, eos=eos)
    data = TALE[:300].encode()
    assert expand(compress(data, model, level=level), model) == data


def test_special_tokens_that_a_text_spells_out_stay_text():
    data = b"<|endoftext|> and <|endoftext|>"
    assert expand(compress(data, FAKE), FAKE) == data


def test_what_the_model_knows_takes_fewer_bits_than_deflate_needs():
    data = TALE[:130].encode()
    assert len(compress(data, FAKE)) - len(compress(b"", FAKE)) < 0.5 * len(zlib.compress(data, 9))


def test_an_empty_file_is_a_header_and_an_end():
    blob = compress(b"", FAKE)
    assert len(blob) <= 64
    assert expand(blob, FAKE) == b""


def test_binary_costs_little_more_than_storing_it():
    data = random.Random(0).randbytes(200_000)
    assert len(compress(data, FAKE)) <= 1.001 * len(data) + 64
    repeated = bytes(range(128, 256)) * 2000
    assert len(compress(repeated, FAKE)) < 0.05 * len(repeated)


def test_a_vocabulary_of_a_few_letters_stores_what_it_cannot_spell():
    model = letters_model()
    for data in (b"abcdefgh" * 20, b"abc xyz" * 20, "äöü".encode() * 50):
        assert expand(compress(data, model), model) == data


@pytest.mark.parametrize("level", [1, 6, 9])
def test_streams_give_what_bytes_give_and_are_read_and_written_in_parts(level):
    class Slow(io.BytesIO):
        def read(self, size=-1):
            return super().read(min(size, 777) if size > 0 else size)

    data = TALE.encode() + bytes(range(256)) * 4 + TALE.encode()
    sink, back, done = io.BytesIO(), io.BytesIO(), []
    assert compress_stream(Slow(data), sink, FAKE, level=level, progress=done.append) == len(sink.getvalue())
    assert done == sorted(done)
    assert done[-1] == len(data)
    assert sink.getvalue() == compress(data, FAKE, level=level)
    assert expand_stream(Slow(sink.getvalue()), back, FAKE) == []
    assert back.getvalue() == data


def test_more_segments_than_lanes_come_back_in_their_order():
    model = fake_model(64)
    data = 5 * TALE.encode()
    assert len(data) > 40 * 128
    assert expand(compress(data, model, level=1), model) == data
    assert max(len(batch.lengths) for batch in model.backend.batches) == 32


def test_a_level_out_of_range_and_a_backend_without_exact_bits_are_refused():
    with pytest.raises(RequestError, match="level is 10; it can be a whole number from 1 to 9"):
        compress(b"", FAKE, level=10)
    inexact = GPT2(FakeBackend(FAKE.config), FAKE.tokenizer)
    for call in (compress, expand):
        with pytest.raises(RequestError, match=r"same bits on every machine.*native"):
            call(b"", inexact)


# ------------------------------------------------------------------------------------------- what is refused


def test_another_model_precision_tokenizer_or_bits_is_named():
    blob = compress(TALE.encode(), FAKE)
    with pytest.raises(CodecError, match="another model"):
        expand(blob, fake_model(eos=()).__class__(fake_model(vocab_size=300).backend, FAKE.tokenizer))
    other = fake_model()
    other.backend.precision = "int8"
    with pytest.raises(CodecError, match="made in float32, and the model runs in int8"):
        expand(blob, other)
    other = fake_model()
    other.backend.bits_version = 2
    with pytest.raises(
        CodecError, match="version 1 of the backend's bits, and this release computes version 2"
    ):
        expand(blob, other)


def test_a_file_that_is_cut_anywhere_is_an_error():
    data = TALE[:200].encode()
    blob = compress(data, FAKE, level=1)
    for length in range(len(blob)):
        with pytest.raises(CodecError, match=r"cut|begins with|check sum"):
            expand(blob[:length], FAKE)


def test_damage_is_named_by_its_segment_and_the_others_are_salvaged():
    model = fake_model(8)
    data = TALE[:400].encode()
    blob = bytearray(compress(data, model, level=1))
    clean = expand(bytes(blob), model)
    assert clean == data
    blob[35 + 60] ^= 1  # within the payload of an early segment
    with pytest.raises(CodecError, match=r"segment \d+ .*damaged"):
        expand(bytes(blob), model)
    sink = io.BytesIO()
    [loss] = expand_stream(io.BytesIO(bytes(blob)), sink, model, salvage=True)
    assert "damaged" in loss
    kept = sink.getvalue()
    lost = len(data) - len(kept)
    assert 0 < lost <= 16
    assert any(data[:i] + data[i + lost :] == kept for i in range(len(data)))


def test_a_missing_segment_is_noticed_by_the_whole_digest():
    model = fake_model(8)
    one, two = compress(TALE[:16].encode(), model, level=1), compress(TALE[:32].encode(), model, level=1)
    end = two[two.rindex(bytes([END, 32])) :]
    with pytest.raises(CodecError, match="segments are missing"):
        expand(one[: one.rindex(bytes([END, 16]))] + end, model)


def test_a_damaged_file_gives_an_error_or_the_exact_bytes():
    outcomes = damage_files(1500, seed=1)
    assert outcomes["error"] > 1000
    assert outcomes["wrong"] == 0


def test_salvaging_never_gives_bytes_that_were_not_there():
    data = TALE.encode()
    blob = compress(data, FAKE, level=1)
    rng = random.Random(2)
    for _ in range(40):
        damaged = bytearray(blob)
        for _ in range(3):
            damaged[rng.randrange(35, len(blob))] ^= 1 << rng.randrange(8)
        sink = io.BytesIO()
        losses = expand_stream(io.BytesIO(bytes(damaged)), sink, FAKE, salvage=True)
        assert losses
        at = 0
        for i in range(0, len(sink.getvalue()), 4):
            at = data.find(sink.getvalue()[i : i + 4], at)
            assert at >= 0


def test_the_document_names_the_module_that_reads_and_writes():
    page = (pathlib.Path(__file__).parent.parent / "docs/codec.md").read_text()
    assert "gpt2core/codec/container.py" in page
