"""Where tokens lie in a text: in bytes of its UTF-8, and in characters."""

from collections.abc import Sequence

Span = tuple[int, int]
"""Where something begins, and where it ends: the end is the first place behind it."""


def character_spans(text: str, byte_spans: Sequence[Span]) -> list[Span]:
    """The characters that spans of bytes touch; none for an empty span."""
    if text.isascii():
        return list(byte_spans)
    starts = []  # of each byte: its character
    for place, character in enumerate(text):
        starts += [place] * len(character.encode())
    starts.append(len(text))
    return [
        (starts[start], starts[end - 1] + 1 if end > start else starts[start]) for start, end in byte_spans
    ]
