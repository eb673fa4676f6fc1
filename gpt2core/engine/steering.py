"""What steers a text token by token: functions of the caller's, and a constraint.

Their answers must depend on their arguments alone. Then a seed gives the same text alone, in a batch and with
speculation, which may ask about a token that another draw then replaces, and may ask twice.
"""

# V vocabulary

from collections.abc import Callable, Sequence
from typing import Any, Final, TypeAlias, TypedDict, TypeVar

import numpy as np

from gpt2core._shapes import Float, Float32
from gpt2core.constraints.matcher import Matcher
from gpt2core.errors import InvalidSamplingError, RequestError, in_short
from gpt2core.sampling.params import SamplingParams
from gpt2core.tokenizer.tokenizer import Tokenizer

LogitsProcessor: TypeAlias = Callable[[list[int], Float32[np.ndarray, "V"]], Any]
"""Is called with the token ids of prompt and text so far and the next token's logits, (V,) float32, which it
may change; returns logits (V,), of which -inf bans a token."""
StoppingFunction: TypeAlias = Callable[[list[int], str], object]
"""Is called with the token ids of prompt and text so far, and with the text so far, where U+FFFD stands for a
character that is not complete; "" without a tokenizer. Returns whether the text ends here."""

F = TypeVar("F", bound=Callable[..., object])
_NO_FUNCTIONS: Final = "; each must be a function, in a list, as [f]"


class Functions(TypedDict):
    """What `Engine.submit` takes of a caller's functions."""

    logits_processors: tuple[LogitsProcessor, ...]
    stopping: tuple[StoppingFunction, ...]


def check_functions(
    logits_processors: Sequence[LogitsProcessor], stopping: Sequence[StoppingFunction]
) -> Functions:
    """The functions, checked to be such.

    Raises:
        RequestError: one of the two is no list, or holds what cannot be called.
    """
    return {
        "logits_processors": _check("logits_processors", logits_processors),
        "stopping": _check("stopping", stopping),
    }


def take_functions(options: dict[str, Any]) -> Functions:
    """The functions among a call's options, which then are left without them.

    Raises:
        RequestError: as of `check_functions`.
    """
    return check_functions(options.pop("logits_processors", ()), options.pop("stopping", ()))


def _check(name: str, given: Sequence[F]) -> tuple[F, ...]:
    if not isinstance(given, list | tuple):
        raise RequestError(f"{name} is {in_short(given)}{_NO_FUNCTIONS}")
    for i, function in enumerate(given):
        if not callable(function):
            raise RequestError(f"{name}[{i}] is {in_short(function)}{_NO_FUNCTIONS}")
    return tuple(given)


class Steering:
    """What steers one text.

    Args:
        prompt_tokens: how many of its tokens are the prompt.
        functions: the caller's.
        decode: token ids to text.
        matcher: of the text's constraint, if it has one.
        min_new_tokens: so many tokens must be generated before the constraint may end the text.
    """

    def __init__(
        self,
        prompt_tokens: int,
        functions: Functions,
        decode: Callable[[list[int]], str],
        matcher: Matcher | None,
        min_new_tokens: int,
    ) -> None:
        self._prompt_tokens = prompt_tokens
        self._processors = functions["logits_processors"]
        self._stopping = functions["stopping"]
        self._decode = decode
        self._matcher = matcher
        self._min_new_tokens = min_new_tokens

    def edit(self, token_ids: Sequence[int], logits: Float[np.ndarray, "V"]) -> Float[np.ndarray, "V"]:
        """The logits that the next token is drawn from, before the temperature.

        Raises:
            RequestError: a function raised, or returned what are no logits; names it.
            InvalidSamplingError: the constraint leaves no token.
        """
        for i, function in enumerate(self._processors):
            given = logits.astype(np.float32)  # a copy: it may change its own
            result = _call("logits_processors", i, function, list(token_ids), given)
            logits = _check_logits(_name("logits_processors", i, function), result, len(logits))
        if self._matcher is not None:
            logits = self._matcher.restrict(list(token_ids[self._prompt_tokens :]), logits)
        return logits

    def ends(self, token_ids: Sequence[int]) -> bool:
        """Whether the text ends with the last of these tokens.

        Raises:
            RequestError: a function raised; names it.
            InvalidSamplingError: the constraint ends the text before `min_new_tokens`.
        """
        generated = list(token_ids[self._prompt_tokens :])
        if self._matcher is not None and self._matcher.is_complete(generated):
            if len(generated) < self._min_new_tokens:
                raise InvalidSamplingError(
                    f"the constraint ends the text after {len(generated)} tokens, and min_new_tokens is "
                    f"{self._min_new_tokens}; lower it"
                )
            return True
        if not self._stopping:
            return False
        text = self._decode(generated)
        return any(
            _call("stopping", i, function, list(token_ids), text) for i, function in enumerate(self._stopping)
        )

    def admit(self, token_ids: Sequence[int], proposal: list[int]) -> list[int]:
        """A guess of what follows, as far as the constraint allows it."""
        if self._matcher is None:
            return proposal
        generated = list(token_ids[self._prompt_tokens :])
        return proposal[: self._matcher.count_allowed(generated, proposal)]


def _name(kind: str, i: int, function: Callable[..., object]) -> str:
    return f"{kind}[{i}] ({getattr(function, '__qualname__', type(function).__qualname__)})"


def _call(kind: str, i: int, function: Callable[..., object], *args: object) -> object:
    try:
        result = function(*args)
        return bool(result) if kind == "stopping" else result
    except Exception as error:  # of whatever type the caller's function raises
        raise RequestError(
            f"{_name(kind, i, function)} raised {type(error).__name__}: {error}; mend it or leave it out"
        ) from error


def _check_logits(name: str, result: object, vocab_size: int) -> Float32[np.ndarray, "V"]:
    expected = f"expected float32 logits of shape ({vocab_size},)"
    if result is None:
        raise RequestError(f"{name} returned None; {expected}")
    array = np.asarray(result)
    if array.shape != (vocab_size,) or array.dtype.kind not in "fiu":
        raise RequestError(f"{name} returned an array of shape {array.shape} and {array.dtype}; {expected}")
    logits = array.astype(np.float32)
    greatest = logits.max()
    if not np.isfinite(greatest):
        at = int(logits.argmax())  # the first NaN, if there is one
        raise RequestError(
            f"{name} returned logits whose greatest is {greatest}, of token {at}; it must be a finite "
            "number, and -inf is for tokens that are not to be drawn"
        )
    return logits


def make_steering(
    prompt_tokens: int,
    params: SamplingParams,
    functions: Functions,
    tokenizer: Tokenizer | None,
    matcher: Matcher | None,
) -> Steering | None:
    """`Steering`, or None where there is nothing to steer by.

    Raises:
        RequestError: functions are to act on beams.
    """
    if matcher is None and not any(functions.values()):
        return None
    if params.num_beams > 1:
        raise RequestError(
            f"num_beams is {params.num_beams}; logits_processors and stopping do not act on beams: leave one "
            "of them out"
        )

    def decode(token_ids: list[int]) -> str:
        return "" if tokenizer is None else tokenizer.decode(token_ids, skip_special=True)

    return Steering(prompt_tokens, functions, decode, matcher, params.min_new_tokens)
