"""What people pass as a prompt and as options, turned into token ids and SamplingParams, or refused."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields, replace
from typing import Any, TypeAlias, TypedDict, cast

import numpy as np

from gpt2core.errors import ContextLengthError, InvalidSamplingError, RequestError, in_short
from gpt2core.sampling.params import SamplingParams
from gpt2core.tokenizer.tokenizer import Tokenizer

Prompt: TypeAlias = str | Sequence[int]
"""A text, or the token ids of one."""


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
    seed: int | None
    logprobs: int | None
    echo: bool


class SamplingOptions(OneChoiceOptions, total=False):
    """The fields of `SamplingParams` as keywords of `generate` and `stream`."""

    n: int


def merge_options(params: SamplingParams | None, options: Mapping[str, Any]) -> SamplingParams:
    """Take `params`, or the defaults, with some fields replaced.

    Raises:
        InvalidSamplingError: an option is unknown (names the nearest that is known) or out of its range.
    """
    known = [field.name for field in fields(SamplingParams)]
    for name in options:
        if name not in known:
            import difflib

            near = difflib.get_close_matches(name, known, n=1)
            remedy = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(known)}"
            raise InvalidSamplingError(f"unknown sampling parameter {name!r}; {remedy}")
    if params is None:
        return SamplingParams(**options)
    if not isinstance(params, SamplingParams):
        raise InvalidSamplingError(
            f"params is {in_short(params)}; expected SamplingParams, or pass its fields as keywords"
        )
    return replace(params, **options)


def split_prompts(prompt: Prompt | Sequence[Prompt]) -> tuple[list[Prompt], bool]:
    """The prompts one by one, and whether it is one only: a text, or a sequence that begins with a number.

    Raises:
        RequestError: it is neither a text nor a sequence.
    """
    if isinstance(prompt, str):
        return [prompt], True
    if isinstance(prompt, np.ndarray):
        prompt = prompt.tolist()
    if not isinstance(prompt, Sequence) or isinstance(prompt, bytes | bytearray | memoryview):
        raise RequestError(f"prompt is {in_short(prompt)}; expected a text, token ids, or a list of either")
    if len(prompt) > 0 and isinstance(prompt[0], int | float | np.number):
        return [cast(Prompt, prompt)], True
    return list(cast(Sequence[Prompt], prompt)), False


def encode_prompt(text: str, tokenizer: Tokenizer, context: int, *, allow_special: bool) -> list[int]:
    """The token ids of a text that may fit a context.

    Raises:
        ContextLengthError: it has more bytes than the context can hold; found without tokenizing, which may
            be slow.
        RequestError: it is empty, or the tokenizer refuses it.
    """
    most = context * tokenizer.max_token_bytes
    if 4 * len(text) > most:  # a character has at most 4 bytes
        nbytes = len(text.encode(errors="surrogatepass"))
        if nbytes > most:
            raise ContextLengthError(
                f"prompt has {nbytes} bytes; this model's context of {context} tokens holds at most {most}; "
                "shorten the prompt"
            )
    if not text:
        raise RequestError('prompt is empty; give a text, or "<|endoftext|>" with allow_special=True')
    return tokenizer.encode(text, allow_special=allow_special)


def check_token_ids(token_ids: Iterable[int], vocab_size: int) -> list[int]:
    """The token ids as a new list of plain ints.

    Raises:
        RequestError: there are none, or one of them is not a whole number in [0, vocab_size).
    """
    if isinstance(token_ids, str | bytes) or not isinstance(token_ids, Iterable):
        raise RequestError(f"prompt is {in_short(token_ids)}; expected a sequence of token ids")
    if isinstance(token_ids, np.ndarray):
        token_ids = token_ids.tolist()
    ids = list(token_ids)
    for place, value in enumerate(ids):
        if type(value) is not int:
            ids[place] = int(value) if isinstance(value, np.integer) else -1
        if not 0 <= ids[place] < vocab_size:
            raise RequestError(
                f"prompt holds {in_short(value)} at place {place}; this model's token ids are whole numbers "
                f"from 0 to {vocab_size - 1}"
            )
    if not ids:
        raise RequestError("prompt is empty; give at least one token, for example the end-of-text token")
    return ids


def check_prompts(
    prompt: Prompt | Sequence[Prompt], check: Callable[[Prompt], list[int]]
) -> tuple[list[list[int]], bool]:
    """Each prompt's token ids as `check` gives them, and whether it is one prompt.

    Raises:
        RequestError: what `check` raises, of several prompts with the number of the one at fault.
    """
    prompts, single = split_prompts(prompt)
    checked = []
    for i, given in enumerate(prompts):
        try:
            checked.append(check(given))
        except RequestError as error:
            if single:
                raise
            raise type(error)(f"prompt {i} of the list: {error}") from None
    return checked, single
