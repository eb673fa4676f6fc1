"""How to score: choices that change the numbers, each explicit and checked when made."""

from dataclasses import dataclass, fields
from typing import Literal, TypedDict

from gpt2core import ModelConfig
from gpt2core.errors import RequestError, in_short

Marker = Literal["eos"] | int | None
"""No token, the model's end-of-text token, or a token by its id."""
MOST_TOP = 1000


class ScoreChoices(TypedDict, total=False):
    """The fields of `ScoreOptions`, as keywords."""

    bos: Marker
    end: Marker
    stride: int | None
    context: int | None
    top: int
    entropy: bool
    boundaries: bool
    allow_special: bool
    leading_space: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreOptions:
    """What a score depends on beside the model and the text.

    Attributes:
        bos: a token before the text, from which its first token is predicted; None: the first token is not
            scored.
        end: a token after the text, which is scored as part of it; None: the text may go on.
        stride: tokens that each further window of a long text adds; None: half of `context`, rounded up.
        context: most tokens that the model reads at a time; None: all that it can.
        top: how many of the likeliest tokens to name at each place.
        entropy: whether to keep the entropy of each prediction.
        boundaries: whether to keep, before each token and after the last, the probability that a word begins
            or the text ends there: what corrected words need.
        allow_special: whether special tokens that a text spells out become those tokens.
        leading_space: whether a text that begins without a space gets one.
    """

    bos: Marker = None
    end: Marker = None
    stride: int | None = None
    context: int | None = None
    top: int = 0
    entropy: bool = False
    boundaries: bool = False
    allow_special: bool = False
    leading_space: bool = False

    @classmethod
    def of(cls, choices: ScoreChoices) -> "ScoreOptions":
        """The choices, and defaults for the rest.

        Raises:
            RequestError: one is unknown.
        """
        known = [field.name for field in fields(cls)]
        for name in choices:
            if name not in known:
                raise RequestError(f"unknown option {in_short(name)} of score; known are {', '.join(known)}")
        return cls(**choices)

    def resolve(self, config: ModelConfig) -> "ResolvedOptions":
        """The same for one model, with nothing left open.

        Raises:
            RequestError: a value is out of its range for that model.
        """
        context = _whole_number("context", self.context, 1, config.n_positions, "this model's context")
        context = config.n_positions if context is None else context
        stride = _whole_number("stride", self.stride, 1, context, "the context of a window")
        _whole_number("top", self.top, 0, MOST_TOP, "what is kept of each prediction")
        return ResolvedOptions(
            bos=_marker("bos", self.bos, config),
            end=_marker("end", self.end, config),
            stride=(context + 1) // 2 if stride is None else stride,
            context=context,
            top=self.top,
            entropy=self.entropy,
            boundaries=self.boundaries,
            allow_special=self.allow_special,
            leading_space=self.leading_space,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ResolvedOptions:
    """`ScoreOptions` for one model; `bos` and `end` are token ids."""

    bos: int | None
    end: int | None
    stride: int
    context: int
    top: int
    entropy: bool
    boundaries: bool
    allow_special: bool
    leading_space: bool


def _whole_number(name: str, value: object, low: int, high: int, meaning: str) -> int | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise RequestError(
            f"{name} is {in_short(value)}; it must be a whole number from {low} to {high}, {meaning}"
        )
    return value


def _marker(name: str, value: object, config: ModelConfig) -> int | None:
    if value == "eos":
        if not config.eos_token_ids:
            raise RequestError(f"{name} is 'eos', and this model names no end-of-text token; give a token id")
        return config.eos_token_ids[0]
    if value is None or (type(value) is int and 0 <= value < config.vocab_size):
        return value if isinstance(value, int) else None
    raise RequestError(
        f"{name} is {in_short(value)}; it must be None, 'eos', or a token id below {config.vocab_size}"
    )
