"""Reads SentencePiece's models (`spiece.model`) into a `tokenizers.Tokenizer`, without their library.

The file is a message of protocol buffers; its fields are those of `sentencepiece_model.proto` in
https://github.com/google/sentencepiece. Merges of its BPE are not in the file; they follow from the order of
the pieces, as in transformers' `convert_slow_tokenizer.py`.
"""

import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

SPACE: Final = "\u2581"
"""What a space becomes."""
_UNIGRAM, _BPE = 1, 2
_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4


class NotSentencePieceError(ValueError):
    """The bytes are no model that can be read; says why."""


@dataclass(frozen=True, slots=True)
class _Model:
    pieces: list[tuple[str, float, int]]  # text, score, kind
    algorithm: int
    byte_fallback: bool
    unknown: int
    character_map: bytes
    dummy_prefix: bool
    trims: bool


def build_tokenizer(data: bytes) -> Tokenizer:
    """A tokenizer with the ids that SentencePiece gives.

    What the model calls control pieces (`<s>`, `</s>`) becomes special, and text never gives them.

    Raises:
        NotSentencePieceError: `data` is damaged, or of an algorithm other than unigram and BPE.
    """
    model = _read_model(data)
    vocabulary = {text: i for i, (text, _, _) in enumerate(model.pieces)}
    if len(vocabulary) != len(model.pieces):
        raise NotSentencePieceError("has two pieces that are the same")
    if not 0 <= model.unknown < len(model.pieces):
        raise NotSentencePieceError(f"names piece {model.unknown} as unknown, and has {len(model.pieces)}")
    if model.algorithm == _UNIGRAM:
        scored = [(text, score) for text, score, _ in model.pieces]
        inner: models.Model = models.Unigram(scored, unk_id=model.unknown, byte_fallback=model.byte_fallback)
    elif model.algorithm == _BPE:
        inner = models.BPE(
            vocabulary,
            list(_find_merges(model.pieces, vocabulary)),
            unk_token=model.pieces[model.unknown][0],
            fuse_unk=True,
            byte_fallback=model.byte_fallback,
        )
    else:
        raise NotSentencePieceError(f"is of algorithm {model.algorithm}, and only unigram and BPE are read")
    tokenizer = Tokenizer(inner)
    steps: list[normalizers.Normalizer] = []
    if model.character_map:
        steps.append(normalizers.Precompiled(model.character_map))
    if model.trims:
        steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    steps.append(normalizers.Replace(" ", SPACE))
    if model.dummy_prefix:
        steps.append(normalizers.Prepend(SPACE))
    tokenizer.normalizer = normalizers.Sequence(steps)
    # A control piece that a text spells out stays text: its first character is cut off beforehand.
    hidden = [text for text, _, kind in model.pieces if kind in (_UNKNOWN, _CONTROL) and len(text) > 1]
    cuts = "|".join(f"{re.escape(text[0])}(?={re.escape(text[1:])})" for text in hidden)
    splits: list[pre_tokenizers.PreTokenizer] = []
    if cuts:
        splits.append(pre_tokenizers.Split(Regex(cuts), "isolated"))
    if model.algorithm == _UNIGRAM:
        splits.append(pre_tokenizers.Metaspace(SPACE, prepend_scheme="never", split=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(splits)
    last = [decoders.Strip(" ", 1, 0)] if model.dummy_prefix else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *last]
    )
    for text, _, kind in model.pieces:
        if kind == _CONTROL:
            tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False)])
        elif kind == _USER_DEFINED and model.algorithm == _BPE:  # unigram prefers it by its score of 0
            tokenizer.add_tokens([AddedToken(text, normalized=False)])
    return tokenizer


def _find_merges(
    pieces: list[tuple[str, float, int]], vocabulary: dict[str, int]
) -> Iterator[tuple[str, str]]:
    """The pairs of pieces that join to a piece, those of the greatest score first."""
    found = []
    for text, score, _ in pieces:
        local = []
        for cut in range(1, len(text)):
            left, right = text[:cut], text[cut:]
            if left in vocabulary and right in vocabulary:
                local.append((left, right, score))
        found += sorted(local, key=lambda pair: (vocabulary[pair[0]], vocabulary[pair[1]]))
    found.sort(key=lambda pair: (pair[2], len(pair[0]), len(pair[1])), reverse=True)
    return ((left, right) for left, right, _ in found)


def _read_model(data: bytes) -> _Model:
    pieces: list[tuple[str, float, int]] = []
    trainer: dict[int, int | bytes] = {}
    normalizer: dict[int, int | bytes] = {}
    try:
        for number, value in _iter_fields(data):
            if number == 1 and isinstance(value, bytes):
                fields = dict(_iter_fields(value))
                score, kind = fields.get(2, b""), fields.get(3, 1)
                [number_score] = struct.unpack("<f", score) if isinstance(score, bytes) and score else [0.0]
                text = fields.get(1, b"")
                if not isinstance(text, bytes) or not isinstance(kind, int):
                    raise NotSentencePieceError("holds a piece that is none")
                pieces.append((text.decode(), number_score, kind))
            elif number == 2 and isinstance(value, bytes):
                trainer = dict(_iter_fields(value))
            elif number == 3 and isinstance(value, bytes):
                normalizer = dict(_iter_fields(value))
    except (struct.error, UnicodeDecodeError) as error:
        raise NotSentencePieceError(f"is damaged: {error}") from error
    if not pieces:
        raise NotSentencePieceError("holds no pieces")
    characters = normalizer.get(2, b"")
    algorithm, fallback = trainer.get(3, _UNIGRAM), trainer.get(35, 0)
    unknown = trainer.get(40, next((i for i, piece in enumerate(pieces) if piece[2] == _UNKNOWN), 0))
    if not (isinstance(algorithm, int) and isinstance(unknown, int) and isinstance(characters, bytes)):
        raise NotSentencePieceError("holds a setting of another kind")
    return _Model(
        pieces, algorithm, bool(fallback), unknown, characters,
        dummy_prefix=bool(normalizer.get(3, 1)), trims=bool(normalizer.get(4, 1)),
    )  # fmt: skip


def _iter_fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """The fields of a message: a number and what it holds, whole numbers or bytes."""
    at = 0

    def read_number() -> int:
        nonlocal at
        number = 0
        for shift in range(0, 70, 7):
            if at >= len(data):
                break
            byte = data[at]
            at += 1
            number |= (byte & 0x7F) << shift
            if byte <= 0x7F:
                return number
        raise NotSentencePieceError("is damaged: a number has no end")

    while at < len(data):
        tag = read_number()
        kind = tag & 7
        if kind == 0:
            yield tag >> 3, read_number()
            continue
        if kind not in (1, 2, 5):
            raise NotSentencePieceError(f"is damaged: there is no field of kind {kind}")
        length = read_number() if kind == 2 else 8 if kind == 1 else 4
        value = data[at : at + length]
        if len(value) < length:
            raise NotSentencePieceError("is cut")
        at += length
        yield tag >> 3, value
