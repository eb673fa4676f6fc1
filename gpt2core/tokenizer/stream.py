"""Text that arrives token by token: never half a character."""

import codecs
import re
from typing import TYPE_CHECKING, Final, Protocol

if TYPE_CHECKING:
    from gpt2core.tokenizer.tokenizer import Tokenizer

_BYTE_TOKEN: Final = re.compile("<0x[0-9A-F]{2}>")


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

    def __init__(self, tokenizer: "Tokenizer") -> None:
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

    More tokens never change the text of those before (the tokenizer refuses other decoders), except that bytes
    may join to a character: a run of them is held back.
    """

    def __init__(self, tokenizer: "Tokenizer") -> None:
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
