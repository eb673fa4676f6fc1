"""What people pass as a prompt and as options, turned into token ids and SamplingParams, or refused."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from typing import Any, Literal, TypeAlias, TypedDict, cast

from gpt2core.errors import ContextLengthError, InvalidSamplingError, RequestError, did_you_mean, in_short
from gpt2core.foreign_names import SAMPLING
from gpt2core.sampling.overflow import Overflow
from gpt2core.sampling.params import SamplingParams
from gpt2core.token_ids import TokenIds, is_tensor
from gpt2core.tokenizer.tokenizer import Tokenizer

Prompt: TypeAlias = str | TokenIds
"""A text, or the token ids of one."""
Prompts: TypeAlias = Prompt | Sequence[Prompt]
"""One prompt or several; an array (N, T) is N prompts of T tokens."""
Params: TypeAlias = SamplingParams | Sequence[SamplingParams] | None
"""Of all prompts, or of each its own; None = the defaults."""


class OneChoiceOptions(TypedDict, total=False):
    """The fields of `SamplingParams` but `n`, as keywords."""

    max_new_tokens: int | None
    min_new_tokens: int
    max_length: int | None
    temperature: float
    top_k: int | None
    top_p: float
    min_p: float
    repetition_penalty: float
    no_repeat_ngram_size: int
    presence_penalty: float
    frequency_penalty: float
    logit_bias: Mapping[int, float]
    stop: str | Sequence[str]
    stop_token_ids: Sequence[int]
    ignore_eos: bool
    seed: int | Sequence[int] | None
    logprobs: int | None
    echo: bool
    overflow: Overflow
    num_beams: int
    length_penalty: float
    early_stopping: bool | Literal["never"]
    regex: str | None
    json_schema: str | Mapping[str, Any] | None
    choice: Sequence[str] | None
    grammar: str | None


class SamplingOptions(OneChoiceOptions, total=False):
    """The fields of `SamplingParams` as keywords of `generate` and `stream`, and another name of `n`."""

    n: int
    num_return_sequences: int


def merge_options(params: SamplingParams | None, options: Mapping[str, Any]) -> SamplingParams:
    """Take `params`, or the defaults, with some fields replaced.

    Raises:
        InvalidSamplingError: an option is unknown (names the nearest that is known, or what another library's
            option is called here) or out of its range.
    """
    known = [*(field.name for field in fields(SamplingParams)), "num_return_sequences"]
    for name in options:
        if name not in known:
            remedy = SAMPLING.get(name) or did_you_mean(name, known).removeprefix("; ")
            remedy = remedy or f"known are {', '.join(known)}"
            raise InvalidSamplingError(f"unknown sampling parameter {name!r}; {remedy}")
    if params is None:
        return SamplingParams(**options)
    if not isinstance(params, SamplingParams):
        raise InvalidSamplingError(
            f"params is {in_short(params)}; expected SamplingParams, or pass its fields as keywords"
        )
    return replace(params, **options)


def merge_options_of_each(params: Params, options: Mapping[str, Any], prompts: int) -> list[SamplingParams]:
    """The parameters of each prompt: `merge_options`, where `params` and `seed` may hold one for each.

    Raises:
        InvalidSamplingError: what `merge_options` raises, of a list with the number of the one at fault; or
            there are more or fewer of them than prompts.
    """
    given, seeds = _of_each("params", params, prompts), _of_each("seed", options.get("seed"), prompts)
    if given is None and seeds is None:
        return [merge_options(cast(SamplingParams | None, params), options)] * prompts
    merged = []
    for i in range(prompts):
        own = options if seeds is None else {**options, "seed": seeds[i]}
        try:
            merged.append(merge_options(cast(Any, params) if given is None else given[i], own))
        except InvalidSamplingError as error:
            raise InvalidSamplingError(f"prompt {i} of the list: {error}") from None
    return merged


def _of_each(name: str, value: object, prompts: int) -> Sequence[Any] | None:
    """One value for each prompt; None where there is one for all of them."""
    if not isinstance(value, list | tuple):
        return None
    if len(value) != prompts:
        raise InvalidSamplingError(
            f"{name} is a list of {len(value)} for {prompts} prompt{'s' * (prompts != 1)}; give one for "
            "each, or one for all without a list"
        )
    return value


def split_prompts(prompt: Prompts) -> tuple[list[Prompt], bool]:
    """The prompts one by one, and whether it is one only: a text, or a sequence that begins with a number.

    Raises:
        RequestError: it is neither a text nor a sequence nor an array (T,) or (N, T).
    """
    if isinstance(prompt, str):
        return [prompt], True
    if is_tensor(prompt):
        if len(prompt.shape) not in (1, 2):
            raise RequestError(
                f"prompt is an array of shape {tuple(prompt.shape)}; expected (T,) for one prompt's token "
                "ids, or (N, T) for N prompts"
            )
        return ([prompt], True) if len(prompt.shape) == 1 else (prompt.tolist(), False)
    if not isinstance(prompt, Sequence) or isinstance(prompt, bytes | bytearray | memoryview):
        inside = " (the tokenizer's result holds them as ['input_ids'])" if hasattr(prompt, "keys") else ""
        raise RequestError(
            f"prompt is {in_short(prompt)}; expected a text, token ids{inside}, or a list of either"
        )
    if len(prompt) > 0 and _is_number(prompt[0]):
        return [cast(Prompt, prompt)], True
    return list(cast(Sequence[Prompt], prompt)), False


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) or (is_tensor(value) and len(value.shape) == 0)


def encode_prompt(text: str, tokenizer: Tokenizer, context: int | None, *, allow_special: bool) -> list[int]:
    """The token ids of a text that may fit a context; with None it may have any length.

    Raises:
        ContextLengthError: it has more bytes than the context can hold; found without tokenizing, which may
            be slow.
        RequestError: it is empty, or the tokenizer refuses it.
    """
    most = context * tokenizer.max_token_bytes if context is not None else None
    if most is not None and 4 * len(text) > most:  # a character has at most 4 bytes
        nbytes = len(text.encode(errors="surrogatepass"))
        if nbytes > most:
            raise ContextLengthError(
                f"prompt has {nbytes} bytes; this model's context of {context} tokens holds at most {most}; "
                "shorten the prompt"
            )
    if not text:
        raise RequestError('prompt is empty; give a text, or "<|endoftext|>" with allow_special=True')
    return tokenizer.encode(text, allow_special=allow_special)


def check_prompts(
    prompts: Sequence[Prompt],
    params: Sequence[SamplingParams],
    check: Callable[[Prompt, SamplingParams], list[int]],
    *,
    single: bool,
) -> list[list[int]]:
    """Each prompt's token ids as `check` gives them.

    Raises:
        RequestError: what `check` raises, of several prompts with the number of the one at fault.
    """
    checked = []
    for i, (given, own) in enumerate(zip(prompts, params, strict=True)):
        try:
            checked.append(check(given, own))
        except RequestError as error:
            if single:
                raise
            raise type(error)(f"prompt {i} of the list: {error}") from None
    return checked
