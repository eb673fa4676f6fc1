"""How many prompt tokens a step may take beside texts that stream, so that these do not stutter.

A step that also reads a part of a prompt takes longer, and every text that decodes waits for it. How much
longer depends on the backend, the machine, the shape and the position, so it is measured as the engine runs:
the pacer keeps how long steps without prompts take, by their number of rows, and what a prompt token adds,
and allows as many tokens as keep a step within `stretch` times the former.

Both are estimated so that a wrong one makes a part too small rather than too large: of steps without prompts
a shorter time is believed sooner than a longer one, of the cost of a token a greater one sooner than a
smaller one. As long as no cost is known, a part is small. One that has fitted is followed by one a little
larger, whatever a token has cost: where parts are padded, or have a price of their own, more tokens may cost
no more.
"""

import math
from typing import Final

from gpt2core.errors import RequestError

LEAST_TOKENS: Final = 8
"""Of prompts, however much they delay: with fewer they would hardly end."""
FIRST_TOKENS: Final = 4
"""As long as no cost is known."""
GROWTH: Final = 1.5
"""A step takes at most so many times the prompt tokens of the one before: cost is not linear."""
TRUST_SOON: Final = 0.6
TRUST_LATE: Final = 0.15
"""Of the latest time in the mean of all, by its direction."""
HICCUP: Final = 3
"""A time is taken for at most so many times the one that was expected: other programs run too."""


class Pacer:
    """Measures steps and says how many prompt tokens the next one may take.

    Args:
        stretch: how many times as long as a step without prompts one with prompts may take; more than 1.

    Raises:
        RequestError: it is not.
    """

    def __init__(self, stretch: float) -> None:
        if not (math.isfinite(stretch) and stretch > 1):
            raise RequestError(f"stretch is {stretch!r}; it must be a number above 1")
        self._stretch = stretch
        self._decode_s: dict[int, float] = {}  # by the number of rows
        self._token_s: float | None = None
        self._most_tokens = LEAST_TOKENS  # of the next step
        self._tried_tokens = LEAST_TOKENS  # that it may have, whatever they are expected to cost

    def limit(self, rows: int) -> int | None:
        """How many prompt tokens may go beside `rows` that decode; None: any, since nobody waits for them."""
        if rows == 0:
            return None
        if self._token_s is None:
            return FIRST_TOKENS
        room_s = (self._stretch - 1) * self._estimate_decode_s(rows)
        fitting = room_s / self._token_s if self._token_s * self._most_tokens > room_s else self._most_tokens
        return max(int(fitting), self._tried_tokens)

    def observe(self, rows: int, prompt_tokens: int, elapsed_s: float) -> None:
        """Take note of a step of `rows` that decode and `prompt_tokens` beside them."""
        if rows == 0:
            return
        if prompt_tokens == 0:
            before_s = self._decode_s.get(rows, elapsed_s)
            weight = TRUST_SOON if elapsed_s < before_s else TRUST_LATE
            self._decode_s[rows] = _mean(before_s, min(elapsed_s, HICCUP * before_s), weight)
            return
        if not self._decode_s:
            return
        decode_s = self._estimate_decode_s(rows)
        added_s = max(0.0, elapsed_s - decode_s)
        token_s = added_s / prompt_tokens
        room_s = (self._stretch - 1) * decode_s
        fits = added_s <= room_s
        if self._token_s:
            weight = TRUST_SOON if token_s > self._token_s else TRUST_LATE
            token_s = _mean(self._token_s, min(token_s, HICCUP * self._token_s), weight)
        self._token_s = token_s
        self._most_tokens = max(LEAST_TOKENS, prompt_tokens + 1, int(GROWTH * prompt_tokens))
        self._tried_tokens = prompt_tokens + max(1, prompt_tokens // 8) if fits else LEAST_TOKENS

    def _estimate_decode_s(self, rows: int) -> float:
        """Of a step of so many rows, or of the nearest number that is known, rather of fewer."""
        fewer = [known for known in self._decode_s if known <= rows]
        return self._decode_s[max(fewer) if fewer else min(self._decode_s)]


def _mean(before: float, latest: float, weight: float) -> float:
    return (1 - weight) * before + weight * latest
