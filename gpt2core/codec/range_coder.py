"""A range coder: symbols of given frequencies to bytes, and back.

After G. N. N. Martin, "Range encoding: an algorithm for removing redundancy from a digitised message" (1979).
The range has 96 bits, so that what its division by a sum of up to 2**62 cuts off does not count.
"""

from typing import Final

STATE_NBYTES: Final = 12
_FULL: Final = 1 << 8 * STATE_NBYTES
_LEAST: Final = _FULL >> 8


class RangeEncoder:
    """Takes symbols in order; `finish` gives the bytes."""

    def __init__(self) -> None:
        self._low = 0
        self._range = _FULL
        self._bytes = bytearray()

    def encode(self, start: int, frequency: int, total: int) -> None:
        """Add a symbol that takes `frequency` >= 1 parts of `total`, from `start` on."""
        part = self._range // total
        self._low += part * start
        self._range = part * frequency
        while self._range < _LEAST:
            self._shift()
            self._range <<= 8

    def finish(self) -> bytes:
        """All bytes; those behind them count as zeros, and zeros at the end are left out."""
        # The number in [low, low + range) that ends in the most zero bits.
        for bits in range(8 * STATE_NBYTES, -1, -1):
            number = -(-self._low >> bits) << bits
            if number < self._low + self._range:
                break
        self._low = number
        for _ in range(STATE_NBYTES):
            self._shift()
        return bytes(self._bytes).rstrip(b"\0")

    def _shift(self) -> None:
        if self._low >= _FULL:  # carry
            self._low -= _FULL
            i = len(self._bytes) - 1
            while self._bytes[i] == 0xFF:
                self._bytes[i] = 0
                i -= 1
            self._bytes[i] += 1
        self._bytes.append(self._low >> 8 * (STATE_NBYTES - 1))
        self._low = (self._low << 8) & (_FULL - 1)


class RangeDecoder:
    """Gives the symbols back when asked with the encoder's frequencies; any bytes decode to something."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = STATE_NBYTES
        self._code = int.from_bytes(data[:STATE_NBYTES].ljust(STATE_NBYTES, b"\0"), "big")
        self._range = _FULL

    def position(self, total: int) -> int:
        """Where in [0, total) the next symbol lies; `advance` follows with the symbol that has it."""
        return min(self._code // (self._range // total), total - 1)

    def advance(self, start: int, frequency: int, total: int) -> None:
        """Take the symbol away."""
        part = self._range // total
        self._code -= part * start
        self._range = part * frequency
        while self._range < _LEAST:
            self._range <<= 8
            following = self._data[self._at] if self._at < len(self._data) else 0
            self._code = (self._code << 8 | following) & (_FULL - 1)
            self._at += 1
