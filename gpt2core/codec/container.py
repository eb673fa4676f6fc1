"""The bytes of a compressed file: a header, segments, an end. docs/codec.md describes each of them."""

import contextlib
import hashlib
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import BinaryIO, Final

from gpt2core.codec.errors import CodecError

MAGIC: Final = b"G2C"
VERSION: Final = 1
MODEL_DIGEST_NBYTES, TOKENIZER_DIGEST_NBYTES, WHOLE_DIGEST_NBYTES = 12, 6, 8
PRECISIONS: Final = ("float32", "bfloat16", "int8", "int4")
END, CODED, STORED, DEFLATED = range(4)
CONTINUES: Final = 0x80
"""Bit of a segment's kind: its first tokens are predicted from the segment before it."""
SEGMENT_NBYTES: Final = 2**24
"""Most bytes that a segment may stand for or hold; more than any writer makes."""
_WINDOWS: Final = 2**12
_LONGEST_HEAD: Final = 64


@dataclass(frozen=True, slots=True)
class Windows:
    """How a segment's tokens are predicted.

    Attributes:
        first: most new tokens of a segment's first window, which begins with the end-of-text token.
        carry: tokens that each later window repeats from before it; 0 begins each like the first.
        following: most new tokens of a later window.
        count: most windows of a segment.
    """

    first: int
    carry: int
    following: int
    count: int

    def tokens_of(self, *, continues: bool) -> int:
        """Most tokens of a segment; one that continues another has no first window."""
        return (self.following if continues else self.first) + (self.count - 1) * self.following

    def sizes(self, tokens: int, *, continues: bool) -> Iterator[int]:
        """The new tokens of each window of a segment of `tokens` tokens."""
        size = self.following if continues else self.first
        while tokens > 0:
            yield min(size, tokens)
            tokens -= size
            size = self.following

    def check(self, context: int) -> None:
        """Refuse what a model of this context cannot read.

        Raises:
            CodecError: a window is empty or longer than `context`.
        """
        fits = 1 <= self.first <= context and 1 <= self.following <= context
        if not (fits and self.carry + self.following <= context + 1 and 1 <= self.count <= _WINDOWS):
            raise CodecError(f"{self} is not for a model with a context of {context} tokens")


@dataclass(frozen=True, slots=True)
class Header:
    """What a reader must know and have.

    Attributes:
        bits: version of the backend's bits.
        precision: of the model's weights.
        windows: how tokens are predicted.
        model, tokenizer: digests.
    """

    bits: int
    precision: str
    windows: Windows
    model: bytes
    tokenizer: bytes

    def pack(self) -> bytes:
        """The header's bytes."""
        numbers = b"".join(pack_number(getattr(self.windows, field.name)) for field in fields(Windows))
        known = MAGIC + bytes([VERSION, self.bits, PRECISIONS.index(self.precision)])
        head = known + numbers + self.model + self.tokenizer
        return head + _check_sum(head, 4)


@dataclass(frozen=True, slots=True)
class Segment:
    """A part of the file with a check sum of its own.

    Attributes:
        kind: CODED, STORED or DEFLATED.
        continues: the first window carries tokens of the segment before.
        nbytes: bytes that it stands for.
        tokens: how many tokens are coded; 0 for the other kinds.
        check: CRC-32 of the bytes that it stands for.
        payload: what is kept of them.
    """

    kind: int
    continues: bool
    nbytes: int
    tokens: int
    check: int
    payload: bytes

    def pack(self) -> bytes:
        """The segment's bytes."""
        kind = bytes([self.kind | CONTINUES * self.continues])
        tokens = pack_number(self.tokens) if self.kind == CODED else b""
        head = kind + pack_number(self.nbytes) + tokens + pack_number(len(self.payload))
        head += self.check.to_bytes(4, "little")
        return head + _check_sum(head, 2) + self.payload


@dataclass(frozen=True, slots=True)
class End:
    """The last bytes of a file: the length of what it stands for, and a digest over all of that."""

    nbytes: int
    digest: bytes

    def pack(self) -> bytes:
        """The end's bytes."""
        head = bytes([END]) + pack_number(self.nbytes) + self.digest
        return head + _check_sum(head, 4)


def new_digest() -> "hashlib.blake2b":
    """What `End.digest` is made with."""
    return hashlib.blake2b(digest_size=WHOLE_DIGEST_NBYTES)


def pack_number(number: int) -> bytes:
    """LEB128: seven bits a byte, the lowest first, the top bit where more follow."""
    packed = bytearray()
    while number > 0x7F:
        packed.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*packed, number])


class Reader:
    """Reads a compressed file part by part, holding no more than one."""

    def __init__(self, source: BinaryIO) -> None:
        self._source = source
        self._ahead = b""

    def read_header(self) -> Header:
        """The header.

        Raises:
            CodecError: this is no such file, it is of a later version, or its header is damaged.
        """
        self._fill(_LONGEST_HEAD)
        if not self._ahead.startswith(MAGIC):
            raise CodecError(
                f"the file begins with {self._ahead[: len(MAGIC)]!r}, and a compressed one with {MAGIC!r}"
            )
        head = _Head(self._ahead)
        head.take(len(MAGIC))
        version = head.take(1)[0]
        if version != VERSION:
            raise CodecError(
                f"the file is of version {version}, and this release reads {VERSION}; upgrade gpt2core"
            )
        bits, precision = head.take(2)
        windows = Windows(*(head.number(2**20) for _ in fields(Windows)))
        model, tokenizer = head.take(MODEL_DIGEST_NBYTES), head.take(TOKENIZER_DIGEST_NBYTES)
        head.check(4)
        if precision >= len(PRECISIONS):
            raise CodecError(f"the file names precision {precision}, which this release does not know")
        self._ahead = self._ahead[head.at :]
        return Header(bits, PRECISIONS[precision], windows, model, tokenizer)

    def read_part(self) -> Segment | End:
        """The next segment, or the end.

        Raises:
            CodecError: it is damaged or cut.
        """
        self._fill(_LONGEST_HEAD)
        part, used, length = _read_head(self._ahead)
        self._fill(used + length)
        if len(self._ahead) < used + length:
            raise CodecError("the file is cut here")
        payload, self._ahead = self._ahead[used : used + length], self._ahead[used + length :]
        if isinstance(part, Segment):
            return replace(part, payload=payload)
        self._fill(1)
        if self._ahead:
            raise CodecError("bytes follow the end")
        return part

    def skip_damage(self) -> bool:
        """Go to the next place where a part begins, as far as its head's check can tell; False at the end."""
        while True:
            self._ahead = self._ahead[1:]
            self._fill(2**16)
            if not self._ahead:
                return False
            for i in range(max(1, len(self._ahead) - _LONGEST_HEAD)):
                with contextlib.suppress(CodecError):
                    _read_head(self._ahead[i : i + _LONGEST_HEAD])
                    self._ahead = self._ahead[i:]
                    return True
            self._ahead = self._ahead[i:]

    def _fill(self, count: int) -> None:
        while len(self._ahead) < count:
            more = self._source.read(count - len(self._ahead))
            if not more:
                break
            self._ahead += more


class _Head:
    """Takes a head apart; every step raises CodecError where it does not fit."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self.at = 0

    def take(self, count: int) -> bytes:
        taken = self._data[self.at : self.at + count]
        if len(taken) < count:
            raise CodecError("the file is cut here")
        self.at += count
        return taken

    def number(self, limit: int) -> int:
        number = 0
        for shift in range(0, 63, 7):
            byte = self.take(1)[0]
            number |= (byte & 0x7F) << shift
            if byte <= 0x7F:
                break
        if number > limit:
            raise CodecError(f"a number is {number}, and at most {limit} can stand here")
        return number

    def check(self, count: int) -> None:
        expected = _check_sum(self._data[: self.at], count)
        if self.take(count) != expected:
            raise CodecError("a check sum does not fit")


def _read_head(data: bytes) -> tuple[Segment | End, int, int]:
    """A segment without its payload, or the end; the bytes that it took; how many bytes the payload has."""
    head = _Head(data)
    kind = head.take(1)[0]
    continues, kind = bool(kind & CONTINUES), kind & ~CONTINUES
    if kind == END and not continues:
        end = End(head.number(2**62), head.take(WHOLE_DIGEST_NBYTES))
        head.check(4)
        return end, head.at, 0
    if kind not in (CODED, STORED, DEFLATED):
        raise CodecError(f"no segment is of kind {kind}")
    nbytes = head.number(SEGMENT_NBYTES)
    tokens = head.number(SEGMENT_NBYTES) if kind == CODED else 0
    length = head.number(SEGMENT_NBYTES)
    check = int.from_bytes(head.take(4), "little")
    head.check(2)
    return Segment(kind, continues, nbytes, tokens, check, b""), head.at, length


def _check_sum(data: bytes, count: int) -> bytes:
    return zlib.crc32(data).to_bytes(4, "little")[:count]
