"""How many prompt tokens a step may take beside texts that stream, so that these do not stutter.

A step that also reads a part of a prompt takes longer, and every text that decodes waits for it. How much
longer depends on the backend, the machine and the shape, so it is measured as the engine runs: the pacer
keeps how long steps without prompts take, by their number of rows, and what a prompt token has added to the
last steps with prompts, and allows as many tokens as keep a step within `stretch` times the former.
"""

from typing import Final

LEAST_TOKENS: Final = 16
"""Of prompts, however much they delay: with fewer they would never end; and as long as nothing is known."""
GROWTH: Final = 2
"""A step takes at most so many times the prompt tokens of the one before: cost is not linear."""
WEIGHT: Final = 0.3
"""Of the latest time in the mean of all."""


class Pacer:
    """Measures steps and says how many prompt tokens the next one may take.

    Args:
        stretch: how many times as long as a step without prompts one with prompts may take; more than 1.
    """

    def __init__(self, stretch: float) -> None:
        self._stretch = stretch
        self._decode_s: dict[int, float] = {}  # by the number of rows
        self._token_s: float | None = None
        self._last_tokens = LEAST_TOKENS

    def limit(self, rows: int) -> int | None:
        """How many prompt tokens may go beside `rows` that decode; None: any, since nobody waits for them."""
        if rows == 0:
            return None
        if self._token_s is None:
            return LEAST_TOKENS
        room_s = (self._stretch - 1) * self._estimate_decode_s(rows)
        most = GROWTH * self._last_tokens
        return max(LEAST_TOKENS, most if self._token_s * most <= room_s else int(room_s / self._token_s))

    def observe(self, rows: int, prompt_tokens: int, elapsed_s: float) -> None:
        """Take note of a step of `rows` that decode and `prompt_tokens` beside them."""
        if rows == 0:
            return
        if prompt_tokens == 0:
            before_s = self._decode_s.get(rows, elapsed_s)
            self._decode_s[rows] = _mean(before_s, min(elapsed_s, 2 * before_s))  # a hiccup counts little
            return
        if not self._decode_s:
            return
        added_s = max(0.0, elapsed_s - self._estimate_decode_s(rows)) / prompt_tokens
        if self._token_s is None:
            self._token_s = added_s
        else:
            self._token_s = _mean(
                self._token_s, min(added_s, 4 * self._token_s) if self._token_s else added_s
            )
        self._last_tokens = max(prompt_tokens, LEAST_TOKENS)

    def _estimate_decode_s(self, rows: int) -> float:
        """Of a step of so many rows, or of the nearest number that is known, rather of fewer."""
        fewer = [known for known in self._decode_s if known <= rows]
        return self._decode_s[max(fewer) if fewer else min(self._decode_s)]


def _mean(before: float, latest: float) -> float:
    return (1 - WEIGHT) * before + WEIGHT * latest
