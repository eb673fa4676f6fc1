"""From bytes to a compressed file: each segment is read by the model as a prompt, many tokens a pass."""

import io
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import BinaryIO, Final

from gpt2core import GPT2, Batch
from gpt2core.codec.container import (
    CODED,
    DEFLATED,
    SEGMENT_NBYTES,
    STORED,
    End,
    Header,
    Segment,
    Windows,
    new_digest,
)
from gpt2core.codec.frequencies import Interval, find_intervals
from gpt2core.codec.prediction import Predictor, windows_of_level
from gpt2core.codec.range_coder import RangeEncoder
from gpt2core.codec.text import read_blocks

DEFAULT_LEVEL: Final = 6
_LOGITS: Final = 2**22
"""About how many logits a pass gives at most."""


def compress(data: bytes, model: GPT2, *, level: int = DEFAULT_LEVEL) -> bytes:
    """Compress bytes; `expand` with the same model, on any machine, gives them back.

    Args:
        data: any bytes; text that the model knows becomes the smallest.
        model: on a backend with portable bits (`backend="native"`), in any precision.
        level: 1 to 9. A higher one gives tokens more context: the result is smaller, and fewer parts of it
            can be expanded side by side. Those of 8 and 9 are expanded one after the other.

    Raises:
        RequestError: the level is out of its range, or the backend has no portable bits.
    """
    sink = io.BytesIO()
    compress_stream(io.BytesIO(data), sink, model, level=level)
    return sink.getvalue()


def compress_stream(
    source: BinaryIO,
    sink: BinaryIO,
    model: GPT2,
    *,
    level: int = DEFAULT_LEVEL,
    progress: Callable[[int], object] = lambda nbytes: None,
) -> int:
    """As `compress`, from one stream to another in memory that does not grow with them.

    Args:
        progress: is called with the bytes of `source` that are done.

    Returns:
        The bytes written.
    """
    predictor = Predictor(model)
    windows, continuing = windows_of_level(level, predictor.context)
    header = Header(
        predictor.bits, predictor.precision, windows, predictor.model_digest(), predictor.tokenizer_digest()
    )
    written = sink.write(header.pack())
    coder = _SegmentCoder(predictor, windows)
    nbytes, digest = 0, new_digest()
    for data, ids in _cut(read_blocks(source), predictor, windows, continuing):
        written += sink.write(coder.code(data, ids, continuing).pack())
        digest.update(data)
        nbytes += len(data)
        progress(nbytes)
    return written + sink.write(End(nbytes, digest.digest()).pack())


def _cut(
    blocks: Iterator[bytes], predictor: Predictor, windows: Windows, continuing: bool
) -> Iterator[tuple[bytes, list[int] | None]]:
    """Bytes of one segment each, with their tokens, or None where they are to be stored."""
    bytes_of = predictor.text.bytes_of
    pending: list[int] = []
    follows = False  # the next segment continues one with tokens

    def take(count: int) -> tuple[bytes, list[int]]:
        nonlocal follows
        ids = pending[:count]
        del pending[:count]
        follows = continuing
        return b"".join([bytes_of[token_id] for token_id in ids]), ids

    for block in blocks:
        ids = predictor.text.encode(block)
        if ids is not None:
            pending += ids
        while pending:
            count = windows.tokens_of(continues=follows)
            if ids is not None and len(pending) < count:
                break
            yield take(count)
        if ids is None:
            follows = False
            yield block, None
    while pending:
        yield take(windows.tokens_of(continues=follows))


class _SegmentCoder:
    """Codes segments in their order, and remembers the tokens that the next one may continue."""

    def __init__(self, predictor: Predictor, windows: Windows) -> None:
        self._predictor = predictor
        self._windows = windows
        self._cache = predictor.backend.new_cache(1, predictor.context)
        self._before: list[int] = []
        """The last tokens, as many as a window carries; empty where nothing can be continued."""

    def code(self, data: bytes, ids: list[int] | None, continuing: bool) -> Segment:
        check = zlib.crc32(data)
        kind, payload = DEFLATED, zlib.compress(data, 9, wbits=-15)
        if len(payload) >= len(data):
            kind, payload = STORED, data
        if ids is not None and len(data) <= SEGMENT_NBYTES:
            continues = bool(self._before)
            coded = self._code_tokens(ids)
            if len(coded) < len(payload):
                if continuing:
                    self._before = [*self._before, *ids][-self._windows.carry :]
                return Segment(CODED, continues, len(data), len(ids), check, coded)
        self._before = []
        return Segment(kind, False, len(data), 0, check, payload)

    def _code_tokens(self, ids: list[int]) -> bytes:
        encoder = RangeEncoder()
        history = [*self._before, *ids]
        at = len(self._before)
        continues = bool(self._before)
        for size in self._windows.sizes(len(ids), continues=continues):
            before = history[at - self._windows.carry : at] if self._windows.carry and at else []
            window = history[at : at + size]
            for interval in self._iter_intervals(before or self._predictor.begin, window):
                encoder.encode(*interval)
            at += size
        return encoder.finish()

    def _iter_intervals(self, before: Sequence[int], ids: Sequence[int]) -> Iterator[Interval]:
        """The interval of each of `ids`, which follow `before`."""
        vocab_size = self._predictor.vocab_size
        left = list(ids)
        if not before:
            yield Interval(left.pop(0), 1, vocab_size)  # nothing is known: all are as likely
        tokens = [*before, *ids[:-1]]
        first_wanted = max(len(before) - 1, 0)
        step = max(1, _LOGITS // vocab_size)
        start = 0
        while start < len(tokens):
            end = min(max(start, first_wanted) + step, len(tokens))
            wanted = range(max(first_wanted - start, 0), end - start)
            batch = Batch.of([(tokens[start:end], start, 0)], wanted)
            logits = self._predictor.backend.forward(batch, self._cache)
            yield from find_intervals(logits, left[: len(wanted)])
            del left[: len(wanted)]
            start = end
