"""What every backend is asked: the texts, and the ways of running them.

The worker runs these cases and the parent compares what came back, so both derive them from the same texts.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

LONGEST: Final = 128
"""Tokens of the longest text; two further texts have at most `SHORTER`."""
SHORTER: Final = 48
ONE_BY_ONE: Final = 32
"""Tokens that are decoded one by one from the start; the last 8 are again."""

STORY: Final = """\
Once upon a time there was a poor miller who had three sons and a daughter. When he grew old, he called them
together and said: "Whoever brings me the water of life shall have the mill." The eldest rode out at dawn, and
before long he met a dwarf at the edge of the forest. "Where are you going?" asked the dwarf; but the young
man laughed and rode on. In 1812, so the neighbours say, it snowed until May; naïve people danced on the ice
of the river, and 37 of them never came home. The daughter, who had listened at the door, took a loaf of
bread, a lantern and her father's old coat, and went after her brothers on foot.
"""


@dataclass(frozen=True, slots=True)
class Row:
    """Tokens `start` to `end` of text number `text`, in cache slot `slot`."""

    text: int
    start: int
    end: int
    slot: int


@dataclass(frozen=True, slots=True)
class Case:
    """One way of running a backend: passes over rows, on a cache of its own; all logits are wanted."""

    name: str
    slots: int
    passes: tuple[tuple[Row, ...], ...]

    @property
    def rows(self) -> Iterator[Row]:
        """All rows, in the order in which their logits come."""
        for rows in self.passes:
            yield from rows

    @property
    def positions(self) -> int:
        """How many rows of logits come in all."""
        return sum(row.end - row.start for row in self.rows)


def texts_of(story_ids: Sequence[int], vocab_size: int, context: int) -> list[list[int]]:
    """Three texts: the story (repeated as far as is needed), its second half, and random tokens."""
    rng = np.random.default_rng(0)
    random_ids = rng.integers(0, vocab_size, LONGEST).tolist()
    story = [token for token in story_ids if token < vocab_size] or random_ids[::-1]
    story = (story * -(-LONGEST // len(story)))[:LONGEST]
    shorter = min(SHORTER, context)
    return [story[:context], story[LONGEST // 2 :][:shorter], random_ids[:shorter]]


def cases_of(lengths: Sequence[int]) -> list[Case]:
    """The cases for texts of these lengths."""
    longest = lengths[0]
    whole = Case("prefill", 1, ((Row(0, 0, longest, 0),),))
    chunked = Case("chunked prefill", 2, _chunks(longest, (1, 7, 2, 30, longest), slot=1))
    first = min(ONE_BY_ONE, longest)
    last = max(longest - 8, first)
    steps = (*[1] * first, last - first, *[1] * (longest - last))
    decode = Case("decode", 1, _chunks(longest, steps, slot=0))
    return [whole, chunked, decode, *(_ragged(rows, lengths) for rows in (1, 3, 8))]


def _chunks(length: int, sizes: Sequence[int], slot: int) -> tuple[tuple[Row, ...], ...]:
    passes, start = [], 0
    for size in sizes:
        end = min(start + size, length)
        if end > start:
            passes.append((Row(0, start, end, slot),))
        start = end
    return tuple(passes)


def _ragged(rows: int, lengths: Sequence[int]) -> Case:
    """Rows of different texts and lengths: they join one half after the other, so that prompts are read
    beside rows that decode, and then all decode; slots run against the order of rows.
    """
    ends: dict[int, int] = {}  # row -> tokens that are cached
    passes = []
    for step in range(6):
        batch = []
        for row in range(rows):
            text = row % len(lengths)
            if row not in ends:
                if step == 0 and rows > 1 and row % 2:
                    continue  # joins in the next pass
                start, end = 0, 1 + (5 * row + 11) % max(lengths[text] - 6, 1)
            else:
                start = ends[row]
                end = start + (4 if step == 2 and row % 3 == 0 else 1)  # a chunk beside decoding rows
            end = min(end, lengths[text])
            if end > start:
                batch.append(Row(text, start, end, rows - 1 - row))
                ends[row] = end
        if batch:
            passes.append(tuple(batch))
    return Case(f"batch of {rows}", rows, tuple(passes))
