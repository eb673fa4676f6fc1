"""Where one text stands in its constraint: which tokens may follow, and whether it is complete."""

# V vocabulary

from collections.abc import Sequence
from typing import Any

import numpy as np

from gpt2core._shapes import Bool, Float
from gpt2core.errors import ConstraintError, InvalidSamplingError


class Matcher:
    """Follows one text, back and forth: every answer depends on the tokens given, not on those before.

    Args:
        compiled: a matcher of llguidance at the beginning of a text.
        vocab_size: V of the model.
        end_token_ids: each ends the text: allowed where it may end, besides where it belongs to the text.
        special_end_ids: those that never belong to a text.
    """

    def __init__(
        self,
        compiled: Any,
        vocab_size: int,
        end_token_ids: frozenset[int],
        special_end_ids: frozenset[int],
    ) -> None:
        self._compiled = compiled
        self._inner = compiled.deep_copy()
        self._followed: list[int] = []
        self._vocab_size = vocab_size
        self._end_ids = [token_id for token_id in end_token_ids if token_id < vocab_size]
        self._special_end_ids = special_end_ids

    def restrict(self, generated: list[int], logits: Float[np.ndarray, "V"]) -> Float[np.ndarray, "V"]:
        """The logits of the tokens that may follow `generated`, -inf for the others.

        Raises:
            InvalidSamplingError: no token is left; says whether the constraint or the bans are why.
            ConstraintError: following the constraint takes more time or memory than is allowed.
        """
        allowed = self.allowed(generated)
        edited = np.where(allowed, logits, -np.inf)
        if edited.max() == -np.inf:
            at = f"after {len(generated)} tokens"
            if not allowed.any():
                raise InvalidSamplingError(
                    f"the constraint can neither go on nor end {at}: no token of this vocabulary fits; "
                    "change the constraint"
                )
            raise InvalidSamplingError(
                f"the constraint allows {np.count_nonzero(allowed)} tokens {at}, and all of them are banned; "
                "loosen logits_processors, no_repeat_ngram_size, min_new_tokens or the constraint"
            )
        return edited

    def allowed(self, generated: list[int]) -> Bool[np.ndarray, "V"]:
        """Which tokens may follow `generated`.

        Raises:
            ConstraintError: as of `restrict`.
        """
        self._follow(generated)
        bits = np.frombuffer(self._inner.compute_bitmask(), np.uint8)
        if self._inner.is_error():
            error = self._inner.get_error()
            self._restart()
            if error.startswith("NoExtension"):  # a dead end, which is found late
                return np.zeros(self._vocab_size, bool)
            raise _too_complex(error, len(generated))
        flags = np.unpackbits(bits, count=self._vocab_size + 1, bitorder="little").view(bool)
        allowed, may_end = flags[:-1], flags[-1]
        for token_id in self._end_ids:
            allowed[token_id] = may_end or (allowed[token_id] and token_id not in self._special_end_ids)
        return allowed

    def is_complete(self, generated: list[int]) -> bool:
        """Whether `generated` matches and nothing can follow it.

        Raises:
            ConstraintError: as of `restrict`.
        """
        self._follow(generated)
        return bool(self._inner.is_stopped())

    def count_allowed(self, generated: list[int], proposal: Sequence[int]) -> int:
        """How many tokens of `proposal` may follow `generated`, one after the other."""
        ends = next((i for i, token_id in enumerate(proposal) if token_id in self._end_ids), len(proposal))
        self._follow(generated)
        count = int(self._inner.validate_tokens(list(proposal[:ends])))
        if self._inner.is_error():
            self._restart()
        return count

    def _follow(self, generated: list[int]) -> None:
        """Stand behind these tokens."""
        known = len(self._followed)
        if self._followed != generated[:known]:
            pairs = enumerate(zip(self._followed, generated, strict=False))
            known = next((i for i, (old, new) in pairs if old != new), min(known, len(generated)))
            if not self._inner.rollback(len(self._followed) - known):
                self._restart()
                known = 0
            del self._followed[known:]
        if new := generated[known:]:
            if not self._inner.consume_tokens(new):
                error = self._inner.get_error()
                self._restart()
                raise _too_complex(error, len(generated))
            self._followed += new

    def _restart(self) -> None:
        """Stand at the beginning; what has failed cannot go back."""
        self._inner, self._followed = self._compiled.deep_copy(), []


def _too_complex(error: str, tokens: int) -> ConstraintError:
    summary = f"the constraint is too complex after {tokens} tokens; simplify it"
    return ConstraintError(f"{summary} ({error.partition(chr(10))[0]:.200})", summary)
