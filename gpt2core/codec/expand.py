"""From a compressed file to its bytes: segments that stand by themselves are decoded side by side."""

import io
import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import BinaryIO, Final

from gpt2core import GPT2, Batch
from gpt2core.codec.container import (
    CODED,
    DEFLATED,
    STORED,
    End,
    Header,
    Reader,
    Segment,
    Windows,
    new_digest,
)
from gpt2core.codec.errors import CodecError
from gpt2core.codec.frequencies import Table, UniformTable
from gpt2core.codec.prediction import Predictor
from gpt2core.codec.range_coder import RangeDecoder

_LANES: Final = 32
_CACHE_NBYTES: Final = 2**30
_PASS_TOKENS: Final = 2**11
"""About how many tokens a pass reads at most, and how many logits it gives in thousands."""


def expand(blob: bytes, model: GPT2, *, salvage: bool = False) -> bytes:
    """The bytes that `compress` was given.

    Args:
        blob: what `compress` gave.
        model: the one that compressed, in the same precision, on a backend with portable bits.
        salvage: leave out damaged segments instead of raising; see `expand_stream`.

    Raises:
        CodecError: the file is damaged, cut, of another model or precision, or of a later version.
        RequestError: the backend has no portable bits.
    """
    sink = io.BytesIO()
    expand_stream(io.BytesIO(blob), sink, model, salvage=salvage)
    return sink.getvalue()


def expand_stream(
    source: BinaryIO,
    sink: BinaryIO,
    model: GPT2,
    *,
    salvage: bool = False,
    progress: Callable[[int], object] = lambda nbytes: None,
) -> list[str]:
    """As `expand`, from one stream to another in memory that does not grow with them.

    What was written before an error is right as far as it goes: a segment is written when its check sum fits.

    Args:
        salvage: go on behind damage. Segments that continue a damaged one are lost with it.
        progress: is called with the bytes that are written.

    Returns:
        What was lost, one sentence each; empty unless `salvage`.
    """
    predictor = Predictor(model)
    reader = Reader(source)
    header = reader.read_header()
    _check_model(header, predictor)
    losses: list[str] = []
    nbytes, digest = 0, new_digest()
    segments = _Segments(reader, losses if salvage else None)
    decoder = _Decoder(predictor, header.windows)
    for number, segment, data in decoder.decode(segments):
        if data is None:
            loss = f"segment {number} ({segment.nbytes} bytes) is damaged"
            if not salvage:
                raise CodecError(f"{loss}; salvage reads what is behind it")
            losses.append(loss)
            continue
        sink.write(data)
        digest.update(data)
        nbytes += len(data)
        progress(nbytes)
    end = segments.end
    if not losses and (end is None or (end.nbytes, end.digest) != (nbytes, digest.digest())):
        raise CodecError(
            f"the {nbytes} bytes of all segments are not those that were compressed; segments are missing"
        )
    return losses


def _check_model(header: Header, predictor: Predictor) -> None:
    if header.precision != predictor.precision:
        raise CodecError(
            f"the file was made in {header.precision}, and the model runs in {predictor.precision}; "
            f"pass precision={header.precision!r}"
        )
    if header.bits != predictor.bits:
        raise CodecError(
            f"the file needs version {header.bits} of the backend's bits, and this release computes version "
            f"{predictor.bits}; take the release that made it"
        )
    if header.tokenizer != predictor.tokenizer_digest() or header.model != predictor.model_digest():
        raise CodecError("the file was made with another model; name the one that compressed it")
    header.windows.check(predictor.context)


class _Segments:
    """Numbers the segments of a file; keeps the end; with `losses` goes on behind what cannot be read."""

    def __init__(self, reader: Reader, losses: list[str] | None) -> None:
        self._reader = reader
        self._losses = losses
        self.end: End | None = None

    def __iter__(self) -> Iterator[tuple[int, Segment]]:
        number = 0
        while True:
            try:
                part = self._reader.read_part()
            except CodecError as error:
                if self._losses is None:
                    raise CodecError(f"segment {number}: {error}") from None
                self._losses.append(f"segment {number}: {error}")
                if not self._reader.skip_damage():
                    return
                number += 1
                continue
            if isinstance(part, End):
                self.end = part
                return
            yield number, part
            number += 1


class _Lane:
    """One segment on its way; the next token's frequencies are asked for by `row` and answered by `take`."""

    def __init__(self, segment: Segment, before: list[int], begin: list[int], windows: Windows) -> None:
        self.segment = segment
        self._decoder = RangeDecoder(segment.payload)
        self._history = list(before)
        self._first = len(before)
        self._begin = begin
        self._windows = windows
        self._sizes = windows.sizes(segment.tokens, continues=segment.continues)
        self._left = 0
        self._unread: list[int] = []
        self._cached = 0
        self._begin_window()

    @property
    def is_done(self) -> bool:
        return self._left == 0

    @property
    def ids(self) -> list[int]:
        """What is decoded so far."""
        return self._history[self._first :]

    @property
    def history(self) -> list[int]:
        return self._history

    def row(self) -> tuple[list[int], int]:
        """The tokens to read next, and how many are cached before them; no tokens where nothing is known."""
        return self._unread, self._cached

    def take(self, table: Table | UniformTable, row: int) -> None:
        """Decode the next token by a row's frequencies."""
        token_id, interval = table.find(row, self._decoder.position(table.total(row)))
        self._decoder.advance(*interval)
        self._history.append(token_id)
        self._cached += len(self._unread)
        self._unread = [token_id]
        self._left -= 1
        if not self._left:
            self._begin_window()

    def _begin_window(self) -> None:
        carry = self._windows.carry
        self._left = next(self._sizes, 0)
        self._unread = (self._history[-carry:] if carry else []) or self._begin
        self._cached = 0


class _Decoder:
    def __init__(self, predictor: Predictor, windows: Windows) -> None:
        self._predictor = predictor
        self._windows = windows
        slot_nbytes = max(1, predictor.backend.new_cache(1, predictor.context).nbytes)
        self._lanes = max(1, min(_LANES, _CACHE_NBYTES // slot_nbytes))
        self._cache = predictor.backend.new_cache(self._lanes, predictor.context)
        self._before: list[int] = []

    def decode(self, segments: Iterable[tuple[int, Segment]]) -> Iterator[tuple[int, Segment, bytes | None]]:
        """Each segment's number, and its bytes, or None where they do not fit their check sum."""
        group: list[tuple[int, Segment]] = []
        for number, segment in segments:
            if segment.continues or sum(member.kind == CODED for _, member in group) == self._lanes:
                yield from self._decode_group(group)
                group = []
            group.append((number, segment))
        yield from self._decode_group(group)

    def _decode_group(self, group: list[tuple[int, Segment]]) -> Iterator[tuple[int, Segment, bytes | None]]:
        lanes: dict[int, _Lane] = {}
        for number, segment in group:
            before = self._before if segment.continues else []
            fits = segment.tokens <= self._windows.tokens_of(continues=segment.continues)
            if segment.kind == CODED and fits and bool(before) == segment.continues:
                lanes[number] = _Lane(segment, before, self._predictor.begin, self._windows)
        self._run([*lanes.values()])
        for number, segment in group:
            lane = lanes.get(number)
            data = self._bytes_of(segment, lane)
            if len(data) != segment.nbytes or zlib.crc32(data) != segment.check:
                self._before = []
                yield number, segment, None
            else:
                carry = self._windows.carry
                self._before = lane.history[-carry:] if lane is not None and carry else []
                yield number, segment, data

    def _bytes_of(self, segment: Segment, lane: _Lane | None) -> bytes:
        if segment.kind == STORED:
            return segment.payload
        if segment.kind == DEFLATED:
            try:
                return zlib.decompressobj(wbits=-15).decompress(segment.payload, segment.nbytes + 1)
            except zlib.error:
                return b""
        if lane is None:
            return b""
        bytes_of = self._predictor.text.bytes_of
        return b"".join([bytes_of[token_id] for token_id in lane.ids])

    def _run(self, lanes: list[_Lane]) -> None:
        vocab_size = self._predictor.vocab_size
        uniform = UniformTable(vocab_size)
        while True:
            rows: list[tuple[_Lane, list[int], int, int]] = []
            for slot, lane in enumerate(lanes):
                while not lane.is_done and not lane.row()[0]:
                    lane.take(uniform, 0)
                if not lane.is_done:
                    rows.append((lane, *lane.row(), slot))
            if not rows:
                return
            for part in _split(rows):
                batch = Batch.of([(tokens, start, slot) for _, tokens, start, slot in part])
                table = Table(self._predictor.backend.forward(batch, self._cache))
                for row, (lane, *_) in enumerate(part):
                    lane.take(table, row)


def _split(
    rows: list[tuple[_Lane, list[int], int, int]],
) -> Iterator[list[tuple[_Lane, list[int], int, int]]]:
    """In passes of a bounded number of tokens."""
    part: list[tuple[_Lane, list[int], int, int]] = []
    tokens = 0
    for row in rows:
        if part and tokens + len(row[1]) > _PASS_TOKENS:
            yield part
            part, tokens = [], 0
        part.append(row)
        tokens += len(row[1])
    yield part
