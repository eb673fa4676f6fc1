"""What happens where a prompt, or what is generated after it, exceeds the model's context."""

from typing import Final, Literal, NamedTuple

from gpt2core.errors import ContextLengthError, InvalidSamplingError

Overflow = Literal["error", "truncate", "slide"]
OVERFLOWS: Final[tuple[Overflow, ...]] = ("error", "truncate", "slide")

DEFAULT_NEW_TOKENS: Final = 100


class Fit(NamedTuple):
    """How a prompt and what follows it lie in the context.

    Attributes:
        skipped: how many of the prompt's first tokens are not read.
        max_new_tokens: how many tokens may follow.
    """

    skipped: int
    max_new_tokens: int


def window_start(tokens: int, context: int) -> int:
    """The first token that the model still sees when `tokens` precede, with `overflow="slide"`.

    A text is read from its beginning until the context is full. The token after that sees the newest half
    only, itself included, which is read anew from position 0; then the context fills up again. That the start
    depends on the number of tokens alone, wherever the prompt ended, makes a text that is continued later
    the same as one that was written at once.
    """
    step = context + 1 - max(1, context // 2)
    return step * max(0, -((context - tokens) // step))


def fit_prompt(
    prompt_tokens: int,
    context: int,
    *,
    overflow: Overflow,
    max_new_tokens: int | None,
    max_length: int | None,
    min_new_tokens: int,
) -> Fit:
    """How a prompt of `prompt_tokens` runs in a model whose context is `context`.

    Raises:
        ContextLengthError: it cannot: prompt and new tokens exceed the context, or the prompt exceeds
            `max_length`, where `overflow` does not allow it.
        InvalidSamplingError: `min_new_tokens` is more than what may follow.
    """
    skipped = 0
    if overflow == "slide":
        skipped, most = window_start(prompt_tokens, context), DEFAULT_NEW_TOKENS
        if max_new_tokens is not None:
            most = max_new_tokens
        elif max_length is not None:
            most = _what_is_left(prompt_tokens, max_length)
    elif overflow == "truncate":
        skipped, most = _truncate(prompt_tokens, context, max_new_tokens, max_length, min_new_tokens)
    else:
        most = _without_overflow(prompt_tokens, context, max_new_tokens, max_length)
    if min_new_tokens > most:
        raise InvalidSamplingError(
            f"min_new_tokens is {min_new_tokens}; a prompt of {prompt_tokens} tokens gets at most "
            f"{most} new ones here (context {context}); lower it or pass max_new_tokens"
        )
    return Fit(skipped, most)


def _truncate(
    prompt_tokens: int,
    context: int,
    max_new_tokens: int | None,
    max_length: int | None,
    min_new_tokens: int,
) -> tuple[int, int]:
    """How many tokens the prompt loses, and how many may follow.

    Without `max_new_tokens` a prompt loses no more than lets 100 follow, or as many as half of the length.
    """
    if max_new_tokens is not None:
        if max_new_tokens >= context:
            raise ContextLengthError(
                f"max_new_tokens is {max_new_tokens}; this model's context is {context}, of which the prompt "
                f"keeps at least one token; pass max_new_tokens={context - 1} or less, or overflow='slide'"
            )
        return max(0, prompt_tokens + max_new_tokens - context), max_new_tokens
    if max_length is not None:
        _check_max_length(max_length, context)
    length = context if max_length is None else max_length
    least = min(length - 1, max(min_new_tokens, min(DEFAULT_NEW_TOKENS, length // 2)))
    kept = min(prompt_tokens, length - least)
    left = length - kept
    return prompt_tokens - kept, left if max_length is not None else min(DEFAULT_NEW_TOKENS, left)


def _without_overflow(
    prompt_tokens: int, context: int, max_new_tokens: int | None, max_length: int | None
) -> int:
    if prompt_tokens > context:
        raise ContextLengthError(
            f"prompt has {prompt_tokens} tokens; this model's context is {context}; "
            f"shorten the prompt by {prompt_tokens - context} tokens or more"
        )
    room = context - prompt_tokens
    if max_new_tokens is not None:
        if max_new_tokens > room:
            raise ContextLengthError(
                f"prompt has {prompt_tokens} tokens and max_new_tokens is {max_new_tokens}, "
                f"{prompt_tokens + max_new_tokens} in all; this model's context is {context}; "
                f"shorten the prompt or pass max_new_tokens={room} or less"
            )
        return max_new_tokens
    if max_length is not None:
        _check_max_length(max_length, context)
        return _what_is_left(prompt_tokens, max_length)
    if room == 0:
        raise ContextLengthError(
            f"prompt has {prompt_tokens} tokens and fills this model's context of {context}; "
            "shorten it, or pass max_new_tokens=0 if nothing is to be generated"
        )
    return min(DEFAULT_NEW_TOKENS, room)


def _check_max_length(max_length: int, context: int) -> None:
    if max_length > context:
        raise ContextLengthError(
            f"max_length is {max_length}; this model's context is {context}; "
            f"pass max_length={context} or less"
        )


def _what_is_left(prompt_tokens: int, max_length: int) -> int:
    if prompt_tokens > max_length:
        raise ContextLengthError(
            f"prompt has {prompt_tokens} tokens; max_length (prompt + new) is {max_length}; "
            "shorten the prompt or pass max_new_tokens instead"
        )
    return max_length - prompt_tokens
