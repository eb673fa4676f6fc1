"""Text that arrives token by token: never half a character, nothing that a stop string may still cut."""

import codecs
import re
from collections.abc import Sequence
from typing import Final, Protocol

_BYTE_TOKEN: Final = re.compile("<0x[0-9A-F]{2}>")


class _Tokens(Protocol):
    """What a stream decoder asks of a `Tokenizer`."""

    @property
    def special_ids(self) -> frozenset[int]: ...
    def content(self, token_id: int) -> str | None: ...
    def token_bytes(self, token_id: int) -> bytes: ...
    def decode(self, token_ids: Sequence[int]) -> str: ...


class StreamDecoder(Protocol):
    """Turns the tokens of one text into text, token by token.

    The pieces of `push` and at last of `flush` join to `tokenizer.decode(ids, skip_special=True)`.
    """

    def push(self, token_id: int) -> str:
        """Text that is certain with this token: "" while a character is incomplete, "" for special tokens."""
        ...

    def flush(self) -> str:
        """The rest; an incomplete character becomes U+FFFD."""
        ...


class ByteStreamDecoder:
    """`StreamDecoder` of byte-level tokenizers: UTF-8, character by character."""

    def __init__(self, tokenizer: _Tokens) -> None:
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        """Text that is certain with this token."""
        data = self._tokenizer.token_bytes(token_id)
        return "" if token_id in self._tokenizer.special_ids else self._utf8.decode(data)

    def flush(self) -> str:
        """The rest; an incomplete character becomes U+FFFD."""
        return self._utf8.decode(b"", final=True)


class TextStreamDecoder:
    """`StreamDecoder` of other tokenizers, whose tokens look different beside each other: decodes all again.

    More tokens never change the text of those before (the tokenizer refuses other decoders), except that
    bytes may join to a character: a run of them is held back.
    """

    def __init__(self, tokenizer: _Tokens) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._given = 0  # characters of their text

    def push(self, token_id: int) -> str:
        """Text that is certain with this token."""
        content = self._tokenizer.content(token_id)
        if content is None or token_id in self._tokenizer.special_ids:
            return ""
        self._ids.append(token_id)
        return "" if _BYTE_TOKEN.fullmatch(content) else self.flush()

    def flush(self) -> str:
        """The rest."""
        text = self._tokenizer.decode(self._ids)
        piece = text[self._given :]
        self._given = len(text)
        return piece


class TextStream:
    """Turns tokens into text that is certain: whole characters, and nothing that a stop string may still cut.

    The text is cut before the stop string that is complete first; of several that end at the same character,
    before the longest. So the cut depends on the text alone, not on how tokens divide it. Each stop string is
    matched by the automaton of Knuth, Morris and Pratt (1977): its state is the length of the longest suffix
    of the text that may begin it, which is what must be held back.
    """

    __slots__ = ("_borders", "_decoder", "_held", "_matched", "_stops", "stopped")

    def __init__(self, decoder: StreamDecoder, stops: Sequence[str] = ()) -> None:
        self._decoder = decoder
        self._stops = stops
        self._borders = [_borders(stop) for stop in stops]
        self._matched = [0] * len(stops)  # per stop string: how much of it the text's end may be
        self._held = ""
        self.stopped = False

    def push(self, token_id: int) -> str:
        """Take a token; return the text that is now certain."""
        text = self._decoder.push(token_id)
        return self._until_stop(text) if self._stops else text

    def flush(self) -> str:
        """Return the rest: no token follows."""
        text = self._decoder.flush()
        if not self._stops:
            return text
        text = self._until_stop(text)
        held, self._held = self._held, ""
        return text + held

    def _until_stop(self, text: str) -> str:
        if self.stopped:
            return ""
        for i, character in enumerate(text):
            longest = 0
            for s, stop in enumerate(self._stops):
                matched = self._matched[s]
                while matched and stop[matched] != character:
                    matched = self._borders[s][matched - 1]
                matched += stop[matched] == character
                self._matched[s] = matched
                if matched == len(stop):
                    longest = max(longest, matched)
            if longest:
                self.stopped = True
                text = (self._held + text[: i + 1])[:-longest]
                self._held = ""
                return text
        text = self._held + text
        certain = len(text) - max(self._matched)
        self._held = text[certain:]
        return text[:certain]


def _borders(stop: str) -> list[int]:
    """For each prefix of `stop`, the length of its longest proper prefix that is also its suffix."""
    borders = [0] * len(stop)
    length = 0
    for i in range(1, len(stop)):
        while length and stop[i] != stop[length]:
            length = borders[length - 1]
        length += stop[i] == stop[length]
        borders[i] = length
    return borders
