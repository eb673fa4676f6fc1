"""The codec's parts by themselves: frequencies, range coder, container, reversible tokens."""

import decimal
import io
import math

import numpy as np
import pytest
from codec_models import letters_model
from fakes import byte_tokenizer
from hypothesis import given
from hypothesis import strategies as st

from gpt2core import NumericalError
from gpt2core.codec import CodecError
from gpt2core.codec.container import CODED, END, End, Header, Reader, Segment, Windows, pack_number
from gpt2core.codec.frequencies import ONE, RESOLUTION, count_frequencies
from gpt2core.codec.range_coder import RangeDecoder, RangeEncoder
from gpt2core.codec.text import BLOCK_NBYTES, ReversibleTokenizer, read_blocks

# ------------------------------------------------------------------------------------------- frequencies


def test_frequencies_are_the_exponentials_of_whole_steps():
    logits = np.array([[0, -1 / RESOLUTION, -1, -5.5, -20, -20.7, -20.8, -21, -100, -3e38]], np.float32)
    got = count_frequencies(logits)[0]
    for logit, frequency in zip(logits[0], got, strict=True):
        steps = math.floor(decimal.Decimal(float(-logit)) * RESOLUTION)
        exact = (decimal.Decimal(-steps) / RESOLUTION).exp() * ONE if steps < 10**6 else decimal.Decimal(0)
        assert frequency == max(1, math.floor(exact))


@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=40))
def test_every_token_can_be_coded_and_a_greater_logit_never_counts_less(values):
    logits = np.array([sorted(values)], np.float32)
    got = count_frequencies(logits)[0]
    assert got.min() >= 1
    assert got.max() == ONE
    assert (np.diff(got) >= 0).all()


def test_what_frequencies_cost_beyond_the_softmax_is_below_a_thousandth_of_a_bit():
    rng = np.random.default_rng(0)
    for scale in (0.1, 1, 3, 8):
        logits = (scale * rng.standard_normal((4, 50257))).astype(np.float32)
        exact = np.exp(logits.astype(np.float64) - logits.max(axis=1, keepdims=True))
        exact /= exact.sum(axis=1, keepdims=True)
        counted = count_frequencies(logits) / count_frequencies(logits).sum(axis=1, keepdims=True)
        assert (exact * np.log2(exact / counted)).sum(axis=1).max() < 1e-3


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
def test_logits_that_are_not_finite_are_refused(wrong):
    with pytest.raises(NumericalError, match="not finite"):
        count_frequencies(np.array([[0, wrong, 1]], np.float32))


# ------------------------------------------------------------------------------------------- range coder

symbols = st.integers(2, 2**62).flatmap(
    lambda total: st.integers(0, total - 1).flatmap(
        lambda start: st.tuples(st.just(start), st.integers(1, total - start), st.just(total))
    )
)


@given(st.lists(symbols, max_size=60))
def test_symbols_come_back_in_as_many_bits_as_they_hold(coded):
    encoder = RangeEncoder()
    for symbol in coded:
        encoder.encode(*symbol)
    data = encoder.finish()
    bits = sum(math.log2(total / frequency) for _, frequency, total in coded)
    assert 8 * len(data) <= bits + 16
    decoder = RangeDecoder(data)
    for start, frequency, total in coded:
        assert start <= decoder.position(total) < start + frequency
        decoder.advance(start, frequency, total)


def test_carries_run_through_many_bytes():
    encoder = RangeEncoder()
    for _ in range(200):  # the low end stays just below a carry, until the last symbol brings it
        encoder.encode(2**40 - 1, 1, 2**40)
    encoder.encode(1, 1, 2)
    decoder = RangeDecoder(encoder.finish())
    for _ in range(200):
        assert decoder.position(2**40) == 2**40 - 1
        decoder.advance(2**40 - 1, 1, 2**40)
    assert decoder.position(2) == 1


@given(st.binary(max_size=40), st.lists(st.integers(1, 1000), min_size=1, max_size=20))
def test_any_bytes_decode_to_some_symbols(data, frequencies):
    total = sum(frequencies)
    ends = np.cumsum(frequencies)
    decoder = RangeDecoder(data)
    for _ in range(50):
        symbol = int(ends.searchsorted(decoder.position(total), side="right"))
        decoder.advance(int(ends[symbol]) - frequencies[symbol], frequencies[symbol], total)


# ------------------------------------------------------------------------------------------- container

HEADER = Header(1, "int8", Windows(512, 256, 256, 32), bytes(range(12)), bytes(range(6)))
SEGMENT = Segment(CODED, True, 300, 70, 0xDEADBEEF, b"payload" * 20)


def test_a_file_reads_back_part_by_part():
    end = End(300, b"8 bytes.")
    reader = Reader(io.BytesIO(HEADER.pack() + SEGMENT.pack() + end.pack()))
    assert (reader.read_header(), reader.read_part(), reader.read_part()) == (HEADER, SEGMENT, end)


def test_heads_are_as_short_as_the_document_says():
    assert len(HEADER.pack()) == 3 + 3 + 7 + 12 + 6 + 4
    assert len(SEGMENT.pack()) - len(SEGMENT.payload) == 1 + 2 + 1 + 2 + 4 + 2
    assert len(End(300, bytes(8)).pack()) == 1 + 2 + 8 + 4


@pytest.mark.parametrize("whole", [HEADER.pack(), SEGMENT.pack()[:12], End(300, bytes(8)).pack()])
def test_any_changed_bit_of_a_head_is_noticed(whole):
    rest = b"" if whole[0] == END else SEGMENT.payload
    for bit in range(8 * len(whole)):
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        reader = Reader(io.BytesIO(bytes(damaged) + rest))
        with pytest.raises(CodecError):
            reader.read_header() if whole == HEADER.pack() else reader.read_part()


@pytest.mark.parametrize("count", [0, 2, 3, 10, 34])
def test_a_cut_header_is_said_to_be_cut(count):
    with pytest.raises(CodecError, match=r"cut|begins with"):
        Reader(io.BytesIO(HEADER.pack()[:count])).read_header()


def test_a_later_version_is_named():
    later = bytearray(HEADER.pack())
    later[3] = 2
    with pytest.raises(CodecError, match="version 2, and this release reads 1; upgrade"):
        Reader(io.BytesIO(bytes(later))).read_header()


def test_what_follows_the_end_is_an_error():
    reader = Reader(io.BytesIO(End(0, bytes(8)).pack() + b"x"))
    with pytest.raises(CodecError, match="follow the end"):
        reader.read_part()


def test_a_number_without_end_or_beyond_what_can_stand_there_is_refused():
    for number in (b"\xff" * 20, pack_number(2**24 + 1)):
        with pytest.raises(CodecError, match=r"at most|cut"):
            Reader(io.BytesIO(bytes([CODED]) + number)).read_part()


def test_reading_goes_on_at_the_next_head_behind_damage():
    damaged = bytearray(SEGMENT.pack())
    damaged[3] ^= 0x55
    reader = Reader(io.BytesIO(bytes(damaged) + bytes(70_000) + SEGMENT.pack() + End(1, bytes(8)).pack()))
    with pytest.raises(CodecError):
        reader.read_part()
    assert reader.skip_damage()
    assert reader.read_part() == SEGMENT
    assert reader.read_part() == End(1, bytes(8))
    assert not reader.skip_damage()


@pytest.mark.parametrize(
    "windows",
    [
        Windows(0, 0, 8, 1),
        Windows(17, 0, 8, 1),
        Windows(8, 9, 9, 2),
        Windows(8, 0, 0, 2),
        Windows(8, 0, 8, 5000),
        Windows(8, 0, 8, 0),
    ],
)
def test_windows_that_do_not_fit_the_model_are_refused(windows):
    Windows(16, 8, 9, 3).check(16)
    with pytest.raises(CodecError, match="context of 16"):
        windows.check(16)


# ------------------------------------------------------------------------------------------- tokens


@given(st.binary(max_size=300) | st.text(max_size=200).map(str.encode))
def test_tokens_give_back_the_very_bytes(data):
    text = ReversibleTokenizer(byte_tokenizer(), 257)
    ids = text.encode(data)
    if ids is not None:
        assert b"".join(text.bytes_of[token_id] for token_id in ids) == data
        assert 256 not in ids


def test_text_with_a_few_wrong_bytes_is_still_text():
    text = ReversibleTokenizer(byte_tokenizer(), 257)
    assert text.encode(b"a long enough line \xff\xfe and so on") is not None
    assert text.encode(bytes(range(128, 256))) is None


def test_a_vocabulary_that_cannot_spell_the_text_says_so():
    model = letters_model()
    text = ReversibleTokenizer(model.tokenizer, 8)
    assert text.encode(b"abcabc") == [0, 1, 2, 0, 1, 2]
    assert text.encode(b"abc xyz") is None


@given(st.binary(max_size=50), st.integers(0, 5))
def test_blocks_add_up_and_end_before_a_space_or_a_character(tail, shift):
    data = "wörter und mehr ".encode() * (2 * BLOCK_NBYTES // 17)
    data = data[shift:] + "ä".encode() * BLOCK_NBYTES + tail
    blocks = list(read_blocks(io.BytesIO(data)))
    assert b"".join(blocks) == data
    assert max(map(len, blocks)) <= BLOCK_NBYTES
    assert blocks[1].startswith(b" ")
    for block in blocks[3:-1]:
        block.decode()
