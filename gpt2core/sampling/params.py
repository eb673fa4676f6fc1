"""SamplingParams: how tokens are drawn and when generation ends, validated when made."""

import math
import numbers
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import InitVar, dataclass
from typing import Any, Final, Literal

from gpt2core.errors import ContextLengthError, InvalidSamplingError, in_short
from gpt2core.sampling.constraint import KINDS, check_constraint
from gpt2core.sampling.overflow import OVERFLOWS, Fit, Overflow, fit_prompt

MAX_COUNT: Final = 2**31 - 1
MAX_SEED: Final = 2**63 - 1
MAX_N: Final = 128
MAX_LENGTH_PENALTY: Final = 20
MAX_LOGPROBS: Final = 20
MAX_LOGIT_BIAS: Final = 1024
MAX_STOPS: Final = 16
MAX_STOP_CHARACTERS: Final = 1024
MAX_STOP_TOKEN_IDS: Final = 128


class _FrozenBias(Mapping[int, float]):
    """A mapping that can be hashed, so that SamplingParams can."""

    __slots__ = ("_values",)

    def __init__(self, values: Mapping[int, float]) -> None:
        self._values = dict(sorted(values.items()))

    def __getitem__(self, token_id: int) -> float:
        return self._values[token_id]

    def __iter__(self) -> Iterator[int]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __hash__(self) -> int:
        return hash(tuple(self._values.items()))

    def __repr__(self) -> str:
        return repr(self._values)


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How tokens are drawn and when generation ends. Validated when made; frozen, hashable, picklable.

    Names and meaning follow Hugging Face's `GenerationConfig` where it has the parameter, else OpenAI's API.
    `gpt2core.sampling.draw.transform_logits` says in which order they act.

    Attributes:
        max_new_tokens: at most so many tokens, from 0; None = what `max_length` leaves, or else 100 as far as
            the context reaches (with `overflow="slide"` it does not end).
        min_new_tokens: no token that ends the text is drawn before so many tokens.
        max_length: at most so many tokens with the prompt; not together with `max_new_tokens`.
        temperature: 0 = greedy, the likeliest token (then `top_k`, `top_p` and `min_p` change nothing).
        top_k: only the k likeliest tokens; None or 0 = all.
        top_p: only the likeliest tokens that together reach this probability; in (0, 1], 1 = all.
        min_p: only tokens at least this many times as likely as the likeliest; in [0, 1], 0 = all.
        repetition_penalty: above 0; above 1 makes tokens of prompt and text less likely, 1 = off.
        no_repeat_ngram_size: no n-gram of this many tokens occurs twice in prompt and text; 0 = off.
        presence_penalty: subtracted from the logit of each generated token; in [-2, 2].
        frequency_penalty: the same, times how often the token was generated; in [-2, 2].
        logit_bias: token id -> added to its logit, in [-100, 100]; at most 1024 tokens.
        stop: literal strings that end the text and are not part of it; one string or up to 16.
        stop_token_ids: tokens that end the text as the end-of-text token does: counted, but not part of it;
            at most 128.
        ignore_eos: the end-of-text token does not end the text.
        n: how many texts per prompt, 1 to 128.
        seed: in [0, 2**63); None = a fresh one.
        logprobs: also report the logarithm of each token's probability, and those of so many of the
            likeliest tokens, 0 to 20; None = report nothing.
        echo: the result begins with the prompt.
        overflow: where prompt and new tokens exceed the context: "error"; "truncate" leaves out as many of
            the prompt's first tokens as must be; "slide" goes on, whenever the context is full, with its
            newest half, which is read anew (`gpt2core.sampling.overflow`).
        num_beams: above 1 a beam search, which draws nothing: so many texts are followed side by side, and
            the `n` best are returned, best first (`gpt2core.sampling.beam_search`).
        length_penalty: of beams: a text's score is the sum of its logprobs divided by its length to this
            power; above 0 longer texts gain by it; in [-20, 20].
        early_stopping: of beams: True ends when there are `num_beams` ended texts; False when no running one
            will improve them, by a heuristic; "never" when none can.
        num_return_sequences: transformers' name for `n`.
        regex: a regular expression that the whole text matches, in the syntax of Rust's crate regex: without
            look-around, back references and word boundaries, and with classes such as that of digits in
            ASCII. At most 16,384 characters.
        json_schema: a JSON schema, as a dict or as JSON, that the text is an instance of, its properties in
            the schema's order; {"type": "object"} is any object. At most 65,536 characters.
        choice: the text is one of up to 1024 strings.
        grammar: a context-free grammar that the text follows, in llguidance's variant of Lark's syntax, or
            llama.cpp's GBNF. At most 16,384 characters and 512 colons.

    Of the last four one may be given. They need the extra `guidance`, and a tokenizer whose tokens are bytes.

    Raises:
        InvalidSamplingError: a value of the wrong type or out of its range, or two that contradict.
    """

    max_new_tokens: int | None = None
    min_new_tokens: int = 0
    max_length: int | None = None
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = _FrozenBias({})
    stop: str | Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    n: int = 1
    seed: int | None = None
    logprobs: int | None = None
    echo: bool = False
    overflow: Overflow = "error"
    num_beams: int = 1
    length_penalty: float = 1.0
    early_stopping: bool | Literal["never"] = False
    regex: str | None = None
    json_schema: str | Mapping[str, Any] | None = None
    choice: Sequence[str] | None = None
    grammar: str | None = None
    num_return_sequences: InitVar[int | None] = None

    def __post_init__(self, num_return_sequences: int | None) -> None:
        if num_return_sequences is not None:
            if self.n not in (1, num_return_sequences):
                raise InvalidSamplingError(
                    f"n is {in_short(self.n)} and num_return_sequences, its other name, is "
                    f"{in_short(num_return_sequences)}; leave one of them out"
                )
            object.__setattr__(self, "n", num_return_sequences)

        def integer(name: str, least: int, most: int, *, optional: bool = False) -> None:
            value = getattr(self, name)
            if not (optional and value is None):
                object.__setattr__(self, name, _integer(name, value, least, most))

        def real(name: str, least: float, most: float, *, above: bool = False, remedy: str = "") -> None:
            value = _real(name, getattr(self, name), least, most, above=above, remedy=remedy)
            object.__setattr__(self, name, value)

        integer("max_new_tokens", 0, MAX_COUNT, optional=True)
        integer("min_new_tokens", 0, MAX_COUNT)
        integer("max_length", 1, MAX_COUNT, optional=True)
        real(
            "temperature",
            0,
            math.inf,
            remedy="; 0 always takes the likeliest token, 1 leaves the model's distribution",
        )
        integer("top_k", 0, MAX_COUNT, optional=True)
        real("top_p", 0, 1, above=True, remedy="; 1 turns it off")
        real("min_p", 0, 1, remedy="; 0 turns it off")
        real("repetition_penalty", 0, math.inf, above=True, remedy="; 1 turns it off")
        integer("no_repeat_ngram_size", 0, MAX_COUNT)
        real("presence_penalty", -2, 2, remedy="; 0 turns it off")
        real("frequency_penalty", -2, 2, remedy="; 0 turns it off")
        object.__setattr__(self, "logit_bias", _bias(self.logit_bias))
        object.__setattr__(self, "stop", _stops(self.stop))
        object.__setattr__(self, "stop_token_ids", _stop_token_ids(self.stop_token_ids))
        integer("n", 1, MAX_N)
        integer("num_beams", 1, MAX_N)
        real("length_penalty", -MAX_LENGTH_PENALTY, MAX_LENGTH_PENALTY)
        integer("seed", 0, MAX_SEED, optional=True)
        integer("logprobs", 0, MAX_LOGPROBS, optional=True)
        for name in ("echo", "ignore_eos"):
            if not isinstance(value := getattr(self, name), bool):
                raise InvalidSamplingError(f"{name} is {in_short(value)}; it must be True or False")
        if not isinstance(self.overflow, str) or self.overflow not in OVERFLOWS:
            raise InvalidSamplingError(
                f"overflow is {in_short(self.overflow)}; it must be 'error', 'truncate' or 'slide'"
            )
        for name, value in check_constraint({kind: getattr(self, kind) for kind in KINDS}).items():
            object.__setattr__(self, name, value)
        self._check_beams()
        if self.max_new_tokens is not None and self.max_length is not None:
            raise InvalidSamplingError(
                f"max_new_tokens {self.max_new_tokens} and max_length {self.max_length} (prompt + new) are "
                "both given; leave one of them out"
            )
        most = self.max_new_tokens if self.max_new_tokens is not None else self.max_length
        if most is not None and self.min_new_tokens > most:
            name = "max_new_tokens" if self.max_new_tokens is not None else "max_length"
            raise InvalidSamplingError(
                f"min_new_tokens {self.min_new_tokens} is more than {name} {most}; lower it or raise {name}"
            )

    def _check_beams(self) -> None:
        if not isinstance(self.early_stopping, bool) and self.early_stopping != "never":
            raise InvalidSamplingError(
                f"early_stopping is {in_short(self.early_stopping)}; it must be True, False or 'never'"
            )
        beams = self.num_beams
        if beams == 1:
            if self.length_penalty != 1 or self.early_stopping is not False:
                raise InvalidSamplingError(
                    "length_penalty and early_stopping are of beam search; pass num_beams=4 or leave them out"
                )
            return
        if self.temperature != 0:
            raise InvalidSamplingError(
                f"num_beams is {beams} and temperature is {self.temperature}; a beam search draws nothing: "
                "leave one of them out"
            )
        if self.n > beams:
            raise InvalidSamplingError(
                f"n is {self.n} and num_beams is {beams}; a search gives as many texts as it has beams at "
                "most: lower n or raise num_beams"
            )
        if any(getattr(self, kind) is not None for kind in KINDS):
            raise InvalidSamplingError(
                f"num_beams is {beams}, and a constraint does not act on beams; leave one of them out"
            )
        if self.overflow == "slide":
            raise InvalidSamplingError(
                f"num_beams is {beams} and overflow is 'slide'; beams cannot slide: pass overflow='truncate'"
            )

    def resolve_max_new_tokens(self, prompt_tokens: int, context: int) -> int:
        """How many tokens at most a prompt of `prompt_tokens` gets in a model whose context is `context`.

        Raises:
            ContextLengthError: prompt and new tokens exceed the context, or the prompt exceeds `max_length`.
            InvalidSamplingError: `min_new_tokens` is more than what is left.
        """
        return self.fit(prompt_tokens, context).max_new_tokens

    def fit(self, prompt_tokens: int, context: int) -> Fit:
        """How a prompt of `prompt_tokens` runs in a model whose context is `context`, as `overflow` says.

        Raises:
            ContextLengthError, InvalidSamplingError: as of `resolve_max_new_tokens`; or `echo` with
                `logprobs` asks for the probabilities of tokens that are not read.
        """
        fit = fit_prompt(
            prompt_tokens,
            context,
            overflow=self.overflow,
            max_new_tokens=self.max_new_tokens,
            max_length=self.max_length,
            min_new_tokens=self.min_new_tokens,
        )
        if fit.skipped and self.overflow == "slide" and self.echo and self.logprobs is not None:
            raise ContextLengthError(
                f"prompt has {prompt_tokens} tokens, of which the context of {context} holds the newest "
                f"{prompt_tokens - fit.skipped}; echo with logprobs needs all: leave one of them out, or "
                "call score, which reads texts of any length"
            )
        return fit

    def check_vocabulary(self, vocab_size: int) -> None:
        """Refuse a `logit_bias` or `stop_token_ids` with tokens that the model does not have.

        Raises:
            InvalidSamplingError: naming the first such token id.
        """
        for name, token_ids in (("logit_bias", self.logit_bias), ("stop_token_ids", self.stop_token_ids)):
            for token_id in token_ids:
                if token_id >= vocab_size:
                    raise InvalidSamplingError(
                        f"{name} names token {token_id}; this model's vocabulary has {vocab_size} tokens, "
                        f"0 to {vocab_size - 1}"
                    )


def _integer(name: str, value: object, least: int, most: int) -> int:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise InvalidSamplingError(
            f"{name} is {in_short(value)}; it must be a whole number from {least} to {most}"
        )
    number = int(value)
    if not least <= number <= most:
        raise InvalidSamplingError(f"{name} is {in_short(number)}; it must be from {least} to {most}")
    return number


def _real(
    name: str, value: object, least: float, most: float, *, above: bool = False, remedy: str = ""
) -> float:
    low = f"above {least}" if above else f"at least {least}"
    limit = f"it must be a finite number {low}{'' if most == math.inf else f' and at most {most}'}{remedy}"
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise InvalidSamplingError(f"{name} is {in_short(value)}; {limit}")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number) or not least <= number <= most or (above and number == least):
        raise InvalidSamplingError(f"{name} is {in_short(value)}; {limit}")
    return number


def _bias(value: object) -> _FrozenBias:
    if isinstance(value, _FrozenBias):
        return value
    if not isinstance(value, Mapping):
        raise InvalidSamplingError(
            f"logit_bias is {in_short(value)}; it must map token ids to numbers, as {{50256: -100}}"
        )
    if len(value) > MAX_LOGIT_BIAS:
        raise InvalidSamplingError(
            f"logit_bias has {len(value)} entries; at most {MAX_LOGIT_BIAS} are allowed"
        )
    return _FrozenBias({
        _integer("a token id in logit_bias", token_id, 0, MAX_COUNT): _real(
            f"logit_bias of token {token_id}", bias, -100, 100
        )
        for token_id, bias in value.items()
    })  # fmt: skip


def _stops(value: object) -> tuple[str, ...]:
    if isinstance(value, str):
        value = (value,)
    if not isinstance(value, Sequence) or isinstance(value, bytes | bytearray | memoryview):
        raise InvalidSamplingError(f"stop is {in_short(value)}; it must be a string or a list of strings")
    if len(value) > MAX_STOPS:
        raise InvalidSamplingError(f"stop has {len(value)} strings; at most {MAX_STOPS} are allowed")
    for i, text in enumerate(value):
        if not isinstance(text, str):
            raise InvalidSamplingError(f"stop[{i}] is {in_short(text)}; it must be a string")
        if not 1 <= len(text) <= MAX_STOP_CHARACTERS:
            raise InvalidSamplingError(
                f"stop[{i}] has {len(text)} characters; it must have 1 to {MAX_STOP_CHARACTERS}"
            )
        if any("\ud800" <= character <= "\udfff" for character in text):
            raise InvalidSamplingError(f"stop[{i}] holds a lone surrogate, which no text contains; remove it")
    return tuple(value)


def _stop_token_ids(value: object) -> tuple[int, ...]:
    if not isinstance(value, Sequence) or isinstance(value, str | bytes | bytearray | memoryview):
        raise InvalidSamplingError(f"stop_token_ids is {in_short(value)}; it must be a list of token ids")
    if len(value) > MAX_STOP_TOKEN_IDS:
        raise InvalidSamplingError(
            f"stop_token_ids has {len(value)} tokens; at most {MAX_STOP_TOKEN_IDS} are allowed"
        )
    return tuple(_integer("a token id in stop_token_ids", token_id, 0, MAX_COUNT) for token_id in value)
