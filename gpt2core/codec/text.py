"""From bytes to tokens that give back the very bytes."""

import re
from collections.abc import Iterator
from typing import BinaryIO, Final

from gpt2core import RequestError, Tokenizer

BLOCK_NBYTES: Final = 2**16
_BOUNDARY_NBYTES: Final = 2**10
"""A block ends behind the last white space in as many bytes at its end."""
_BINARY_SHARE: Final = 0.1
"""A block with more bytes that are not UTF-8 than this share is not taken for text."""
_ESCAPED = re.compile("([\udc80-\udcff]+)")


class ReversibleTokenizer:
    """Cuts bytes into tokens whose own bytes, one after the other, are those very bytes."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        self._tokenizer = tokenizer
        self.bytes_of = [tokenizer.token_bytes(i) for i in range(vocab_size)]
        """Of each token id of the model."""
        self._id_of_byte: dict[int, int] = {}
        for token_id, data in enumerate(self.bytes_of):
            if len(data) == 1 and token_id not in tokenizer.special_ids:
                self._id_of_byte.setdefault(data[0], token_id)

    def encode(self, data: bytes) -> list[int] | None:
        """Token ids of `data`; None where the vocabulary cannot spell it, or it is mostly not text."""
        text = data.decode("utf-8", "surrogateescape")
        ids: list[int] = []
        parts = _ESCAPED.split(text)  # text, bytes that are not UTF-8, text, ...
        if sum(map(len, parts[1::2])) > _BINARY_SHARE * len(data):
            return None
        for i, part in enumerate(parts):
            if not part:
                continue
            run = part.encode("utf-8", "surrogateescape")
            encoded = self._encode_text(part, run) if i % 2 == 0 else None
            if encoded is None:
                if not self._id_of_byte.keys() >= set(run):
                    return None
                encoded = [self._id_of_byte[byte] for byte in run]
            ids += encoded
        return ids

    def _encode_text(self, text: str, data: bytes) -> list[int] | None:
        try:
            ids = self._tokenizer.encode(text, begin=False)
        except RequestError:  # a character that the vocabulary does not have
            return None
        if any(token_id >= len(self.bytes_of) for token_id in ids):
            return None
        return ids if b"".join([self.bytes_of[token_id] for token_id in ids]) == data else None


def read_blocks(source: BinaryIO) -> Iterator[bytes]:
    """What `source` holds in blocks of at most `BLOCK_NBYTES`, cut where words end if that is near."""
    rest = b""
    while True:
        block = rest
        while len(block) < BLOCK_NBYTES:
            more = source.read(BLOCK_NBYTES - len(block))
            if not more:
                if block:
                    yield block
                return
            block += more
        cut = _find_boundary(block)
        yield block[:cut]
        rest = block[cut:]


def _find_boundary(block: bytes) -> int:
    tail = block[-_BOUNDARY_NBYTES:]
    space = max(tail.rfind(b" "), tail.rfind(b"\n"))
    if space > 0:
        return len(block) - len(tail) + space  # before it: a token begins with its space
    for back in range(1, 4):  # not within a character
        if block[-back] >= 0xC0:
            return len(block) - back
        if block[-back] < 0x80:
            break
    return len(block)
