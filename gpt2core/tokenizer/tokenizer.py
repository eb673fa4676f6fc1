"""Tokenizer: text to token ids and back, exactly; a wrapper of the `tokenizers` library.

GPT-2's tokens are pieces of UTF-8, not of text: a character may be split between tokens. So tokens are turned
into bytes, and bytes into text, here.
"""

import itertools
import json
import operator
import os
import re
import threading
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

import tokenizers
from tokenizers.decoders import ByteLevel
from tokenizers.pre_tokenizers import ByteLevel as ByteLevelSplit

from gpt2core._json import shown
from gpt2core.errors import RequestError, UnsupportedCheckpointError, in_short
from gpt2core.tokenizer.files import (
    add_special_tokens,
    chat_template_of,
    is_library_error,
    name_special_tokens,
    read_chat_template,
    read_special_tokens,
    read_tokenizer,
)
from gpt2core.tokenizer.stream import ByteStreamDecoder, StreamDecoder, TextStreamDecoder

MAX_TOKEN_ID: Final = 2**31 - 1
UNBOUNDED_TOKEN_BYTES: Final = 2**16
"""What `Tokenizer.max_token_bytes` says where one token may stand for text of any length."""


class Tokenizer:
    """One checkpoint's tokenizer. Safe to use from several threads at once.

    Attributes:
        byte_level: whether each token stands for certain bytes, as GPT-2's do, whatever stands beside it.
        special_ids: the special tokens, as `<|endoftext|>`; user text never becomes one of them by itself.
        special_tokens: names of special tokens, as "eos_token", with what they spell.
        chat_template: how the messages of a chat become a prompt, in Jinja; None where the checkpoint has
            none.
    """

    special_ids: frozenset[int]

    def __init__(
        self,
        inner: tokenizers.Tokenizer,
        *,
        special_tokens: Mapping[str, str] = MappingProxyType({}),
        chat_template: str | None = None,
    ) -> None:
        """Wrap a `tokenizers.Tokenizer`, which then belongs to this object.

        Raises:
            UnsupportedCheckpointError: its decoder is of a kind whose text cannot be streamed.
        """
        inner.no_truncation()  # settings of its training; transformers ignores them too
        inner.no_padding()
        if hasattr(inner.model, "dropout"):
            inner.model.dropout = None  # it would make encode random
        if inner.decoder is None and isinstance(inner.pre_tokenizer, ByteLevelSplit):
            inner.decoder = ByteLevel()
        _check_decoder(inner.decoder)
        inner.encode_special_tokens = True  # means: special tokens in text are encoded as text
        self._inner = inner
        self.special_tokens = dict(special_tokens)
        self.chat_template = chat_template
        self._with_special: tokenizers.Tokenizer | None = None
        self._with_special_lock = threading.Lock()
        self.byte_level = isinstance(inner.decoder, ByteLevel)
        self._added = inner.get_added_tokens_decoder()
        self.special_ids = frozenset(token_id for token_id, token in self._added.items() if token.special)
        self._bytes: dict[int, bytes] = {}
        for token_id, token in self._added.items():
            if token.special or inner.model.id_to_token(token_id) != token.content:
                self._bytes[token_id] = token.content.encode()  # literal, where tokenizers would garble "é"
        self._missing_bytes: frozenset[int] = frozenset()
        if self.byte_level and inner.normalizer is None and not self._has_unknown_token:
            self._missing_bytes = frozenset(
                byte for character, byte in _BYTE_OF.items() if inner.token_to_id(character) is None
            )

    @classmethod
    def from_folder(cls, folder: str | os.PathLike[str]) -> "Tokenizer":
        """Read `tokenizer.json`, or else `vocab.json` and `merges.txt`, or else BERT's `vocab.txt`.

        Raises:
            CheckpointError: the files are missing or broken; names file and remedy.
            UnsupportedCheckpointError: the decoder is of a kind whose text cannot be streamed.
        """
        folder = Path(folder)
        inner = read_tokenizer(folder)
        special_tokens = read_special_tokens(folder, inner)
        return cls(inner, special_tokens=special_tokens, chat_template=read_chat_template(folder))

    @classmethod
    def from_object(cls, given: Any) -> "Tokenizer":
        """A tokenizer that is in memory: this library's, transformers' (a fast one) or `tokenizers`' own.

        Of the latter two a copy, which is what reading their files would give.

        Raises:
            RequestError: it is none of these.
            UnsupportedCheckpointError: the decoder is of a kind whose text cannot be streamed.
        """
        if isinstance(given, cls):
            return given
        inner = getattr(given, "backend_tokenizer", given)
        if not isinstance(inner, tokenizers.Tokenizer):
            raise RequestError(
                f"tokenizer is a {type(given).__name__}; expected a fast tokenizer of transformers, a "
                "tokenizers.Tokenizer, a gpt2core.Tokenizer, or None for token ids alone"
            )
        fields = {"chat_template": getattr(given, "chat_template", None)}
        fields |= getattr(given, "special_tokens_map", {})
        inner = tokenizers.Tokenizer.from_str(inner.to_str())
        add_special_tokens(inner, [fields])
        return cls(
            inner,
            special_tokens=name_special_tokens(inner, [fields]),
            chat_template=chat_template_of(fields),
        )

    def files(self) -> dict[str, str]:
        """Names and texts of the files that read back as this tokenizer, here and in transformers."""
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",  # which takes tokenizer.json as it is
            "clean_up_tokenization_spaces": False,
            **self.special_tokens,
            **({} if self.chat_template is None else {"chat_template": self.chat_template}),
        }
        return {
            "tokenizer.json": self._inner.to_str(pretty=True),
            "tokenizer_config.json": json.dumps(config, indent=2) + "\n",
        }

    def encode(self, text: str, *, allow_special: bool = False, begin: bool = True) -> list[int]:
        """The token ids of `text`; special tokens that it spells out stay text unless `allow_special`.

        A tokenizer whose template begins each text with a token begins it here too, unless `begin` is False.

        Raises:
            RequestError: `text` is not a string of Unicode characters, or the vocabulary cannot express it.
        """
        if not isinstance(text, str):
            raise RequestError(f"text is a {type(text).__name__}, expected a str; decode bytes first")
        try:
            data = text.encode()
        except UnicodeEncodeError as error:
            raise RequestError(
                f"text holds a lone surrogate, U+{ord(text[error.start]):04X}, at character {error.start}; "
                "it is no Unicode character; remove it"
            ) from None
        if not self._missing_bytes.isdisjoint(data):
            self._check_alphabet(text, allow_special)
        inner = self._special_encoder() if allow_special else self._inner
        try:
            return inner.encode(text, add_special_tokens=begin).ids
        except BaseException as error:
            if not is_library_error(error):
                raise
            # As a vocabulary of words does that has no token for unknown ones.
            raise RequestError(f"this tokenizer cannot encode the text: {error}; change the text") from error

    def decode(self, token_ids: Sequence[int], *, skip_special: bool = False) -> str:
        """The text of `token_ids`; bytes that are not UTF-8 become U+FFFD, ids past the vocabulary nothing.

        Raises:
            RequestError: an id is not a whole number, is negative or above 2**31 - 1.
        """
        ids = [_check_id(token_id) for token_id in token_ids]
        if skip_special:
            ids = [token_id for token_id in ids if token_id not in self.special_ids]
        if not self.byte_level:
            return self._inner.decode(ids, skip_special_tokens=False)
        return b"".join(map(self._token_bytes, ids)).decode("utf-8", "replace")

    def locate(
        self, token_ids: Sequence[int], text: str | None = None, *, allow_special: bool = False
    ) -> tuple[str, list[tuple[int, int]]]:
        """Where the tokens of a text lie in its UTF-8, as (start, end) in bytes, and the text.

        Args:
            token_ids: what `encode` made of the text, or any.
            text: what they were made of; None takes what they stand for, each byte that is not UTF-8 being
                one U+FFFD.
            allow_special: as of `encode`.
        """
        pieces = list(map(self.token_bytes, token_ids))
        data = b"".join(pieces) if text is None or self.byte_level else None
        if text is not None and data != text.encode():
            inner = self._special_encoder() if allow_special else self._inner
            spans = inner.encode(text).offsets[: len(pieces)]  # in characters
            at = [0, *itertools.accumulate(len(character.encode()) for character in text)]
            return text, [(at[start], at[end]) for start, end in spans]
        assert data is not None
        if text is None:
            text = re.sub("[\ud800-\udfff]", "\ufffd", data.decode("utf-8", "surrogateescape"))
            if len(text.encode()) != len(data):  # a replacement is three bytes where one stood
                return text, self._replaced_spans(data, pieces)
        ends = list(itertools.accumulate(map(len, pieces)))
        return text, list(zip([0, *ends], ends, strict=False))

    @staticmethod
    def _replaced_spans(data: bytes, pieces: list[bytes]) -> list[tuple[int, int]]:
        """`locate`, in a text whose broken bytes were replaced."""
        at = [0]  # of each byte: where it lies in the new text
        for character in data.decode("utf-8", "surrogateescape"):
            if "\ud800" <= character <= "\udfff":
                at.append(at[-1] + 3)
            else:
                at += range(at[-1] + 1, at[-1] + 1 + len(character.encode()))
        ends = list(itertools.accumulate(map(len, pieces)))
        return [(at[start], at[end]) for start, end in zip([0, *ends], ends, strict=False)]

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that a token stands for; b"" for ids past the vocabulary, as padded embeddings have them.

        Of a tokenizer that is not byte-level: the UTF-8 of what the token gives alone.

        Raises:
            RequestError: the id is not a whole number, is negative or above 2**31 - 1.
        """
        return self._token_bytes(_check_id(token_id))

    def token_text(self, token_id: int) -> str:
        """A token for display: its bytes as text, U+FFFD for what is not UTF-8."""
        return self.token_bytes(token_id).decode("utf-8", "replace")

    def content(self, token_id: int) -> str | None:
        """A token as the vocabulary spells it, a space as "Ġ"; None past the vocabulary."""
        return self._inner.id_to_token(_check_id(token_id))

    @cached_property
    def vocab_size(self) -> int:
        """The greatest token id plus one, added tokens included."""
        return max(self._inner.get_vocab().values(), default=-1) + 1

    @cached_property
    def max_token_bytes(self) -> int:
        """A text of more than `n * max_token_bytes` bytes has more than n tokens.

        65536 where a token may stand for text of any length: a normalizer, an unknown token, a token that
        swallows the whitespace around it, a split that removes text.
        """
        if (
            not self.byte_level
            or self._inner.normalizer is not None
            or self._has_unknown_token
            or any(token.lstrip or token.rstrip for token in self._added.values())
            or not _keeps_text(self._inner.pre_tokenizer)
        ):
            return UNBOUNDED_TOKEN_BYTES
        longest_added = max((len(token.content.encode()) for token in self._added.values()), default=1)
        return max(longest_added, max(map(len, self._inner.get_vocab(with_added_tokens=False)), default=1))

    def stream_decoder(self) -> StreamDecoder:
        """A decoder for one text that arrives token by token."""
        return ByteStreamDecoder(self) if self.byte_level else TextStreamDecoder(self)

    @property
    def _has_unknown_token(self) -> bool:
        return getattr(self._inner.model, "unk_token", None) is not None

    def _token_bytes(self, token_id: int) -> bytes:
        known = self._bytes.get(token_id)
        if known is not None:
            return known
        token = self._inner.id_to_token(token_id)
        if token is None:
            return b""
        if self.byte_level:
            data = _spelled_bytes(token)
        else:
            data = self._inner.decode([token_id], skip_special_tokens=False).encode()
        self._bytes[token_id] = data
        return data

    def _special_encoder(self) -> tokenizers.Tokenizer:
        # A second object: encode_special_tokens is the object's, and another thread may be encoding.
        with self._with_special_lock:
            if self._with_special is None:
                self._with_special = tokenizers.Tokenizer.from_str(self._inner.to_str())
            return self._with_special

    def _check_alphabet(self, text: str, allow_special: bool) -> None:
        """Refuse a character that the vocabulary cannot spell; the library would leave it out silently."""
        rest = text
        for token in self._added.values():
            if allow_special or not token.special:
                rest = rest.replace(token.content, "")
        for character in rest:
            for byte in character.encode():
                if byte in self._missing_bytes:
                    raise RequestError(
                        f"text holds {character!r} at character {text.index(character)}, and this tokenizer "
                        f"has no token for the byte 0x{byte:02X}; remove it"
                    )


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's spelling of bytes in vocab.json: printable Latin-1 is itself, the rest moves to 256 and on.

    After `bytes_to_unicode` in OpenAI's gpt-2 (src/encoder.py).
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTE_OF: Final = _byte_alphabet()


def _spelled_bytes(token: str) -> bytes:
    """What a byte-level token stands for; one with a character outside the alphabet is literal."""
    try:
        return bytes([_BYTE_OF[character] for character in token])
    except KeyError:
        return token.encode()


def _check_id(token_id: object) -> int:
    try:
        number = operator.index(token_id)  # type: ignore[arg-type]
    except TypeError:
        number = None
    if number is None or isinstance(token_id, bool):
        raise RequestError(
            f"token id {in_short(token_id)} is a {type(token_id).__name__}, expected a whole number"
        )
    if not 0 <= number <= MAX_TOKEN_ID:
        raise RequestError(
            f"token id {in_short(number)} is out of range; it must be from 0 to {MAX_TOKEN_ID}"
        )
    return number


def _keeps_text(split: Any) -> bool:
    """Whether a pre-tokenizer passes on all of a text."""
    if split is None:
        return True
    state = json.loads(split.__getstate__())
    parts = state["pretokenizers"] if state["type"] == "Sequence" else [state]
    return all(
        part["type"] in ("ByteLevel", "Digits")
        or (part["type"] in ("Split", "Punctuation") and part["behavior"] != "Removed")
        for part in parts
    )


def _check_decoder(decoder: Any) -> None:
    """Refuse a decoder with which more tokens could change the text of those before; it could not stream."""
    if decoder is None:
        return
    state = json.loads(decoder.__getstate__())
    name = state["type"]
    if name in ("ByteLevel", "Metaspace", "WordPiece"):
        return
    parts = state["decoders"] if name == "Sequence" else [state]
    for part in parts:
        if part["type"] in ("ByteFallback", "Fuse", "Metaspace"):
            continue
        if part["type"] == "Replace" and len(part["pattern"].get("String", "")) == 1:
            continue
        if part["type"] == "Strip" and part["stop"] == 0:
            continue
        raise UnsupportedCheckpointError(
            f"the tokenizer's decoder {'holds' if name == 'Sequence' else 'is'} {shown(part)}, which is not "
            "supported; supported are ByteLevel (GPT-2's), Metaspace, WordPiece and SentencePiece's sequence"
        )
