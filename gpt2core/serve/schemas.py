"""What requests look like; every field has bounds, and an unknown one is refused.

The bounds here are the library's. A `Settings` object, given as validation context, sets lower ones; those
are refused by a `Refusal`, which pydantic lets pass.
"""

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, model_validator

from gpt2core import SamplingParams
from gpt2core.serve.constraint_schemas import Constrained, OpenAIConstrained
from gpt2core.serve.errors import invalid
from gpt2core.serve.settings import Settings

Text = Annotated[str, Field(min_length=1)]
TokenId = Annotated[int, Field(ge=0, le=2**31 - 1)]
Count = Annotated[int, Field(ge=0, le=2**31 - 1)]
Nothing = Annotated[list[Any], Field(max_length=0)] | None
StopTokenIds = Annotated[list[TokenId], Field(max_length=128)]
TextsOrIds = (
    Text
    | Annotated[list[Text], Field(min_length=1)]
    | Annotated[list[TokenId], Field(min_length=1)]
    | Annotated[list[Annotated[list[TokenId], Field(min_length=1)]], Field(min_length=1)]
)
Bias = dict[Annotated[str, Field(pattern=r"^[0-9]{1,10}$")], Annotated[float, Field(ge=-100, le=100)]]
Stops = (
    Annotated[str, Field(min_length=1, max_length=1024)]
    | Annotated[list[Annotated[str, Field(min_length=1, max_length=1024)]], Field(max_length=16)]
)
ModelName = Annotated[str, Field(min_length=1, max_length=256)] | None
MODEL: Any = Field(
    default=None, description="a name that GET /v1/models lists; null is the one model there is"
)
ALLOW_SPECIAL: Any = Field(
    default=False, description="true or false: whether <|endoftext|> in the prompt is that token"
)
Overflow = Literal["error", "truncate", "slide"]
OVERFLOW: Any = Field(
    default="error",
    description="where prompt and new tokens exceed the context: error; truncate, which leaves out the "
    "prompt's first tokens; or slide, which goes on with the newest half of the context",
)
USER: Any = Field(default=None, description="a text; is not used")
LIMITS: dict[str, tuple[str, str]] = {
    "n": ("maximum", "max_n"),
    "best_of": ("maximum", "max_n"),
    "logprobs": ("maximum", "max_logprobs"),
    "top_logprobs": ("maximum", "max_logprobs"),
    "logit_bias": ("maxProperties", "max_logit_bias"),
}
"""Field -> its bound's name in JSON Schema, and the setting that is this bound."""


class Body(BaseModel):
    """What every request's body shares."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, frozen=True)


class Options(Body):
    """What all ways of generating share."""

    PROMPT: ClassVar[str] = "prompt"

    @property
    def prompts(self) -> Sequence[Any]:
        """What is to be continued, one by one."""
        raise NotImplementedError

    @property
    def choices(self) -> int:
        """How many texts are generated for each prompt."""
        return getattr(self, "best_of", None) or getattr(self, "n", None) or 1

    @model_validator(mode="after")
    def _within_limits(self, info: ValidationInfo) -> Self:
        settings: Settings | None = info.context
        if settings is None:
            return self
        for name, (_, setting) in LIMITS.items():
            value, most = getattr(self, name, None), getattr(settings, setting)
            if isinstance(value, bool):
                continue
            size = value if isinstance(value, int) else len(value or ())
            if size > most:
                raise invalid(f"{name} is more than {most}, this server's limit", param=name)
        stops = [stop for stop in as_list(getattr(self, "stop", None)) if stop]
        if len(stops) > settings.max_stops:
            message = f"stop has {len(stops)} strings; at most {settings.max_stops} are allowed"
            raise invalid(message, param="stop")
        if any(len(stop.encode()) > settings.max_stop_nbytes for stop in stops):
            message = f"a stop string has more than {settings.max_stop_nbytes} bytes; shorten it"
            raise invalid(message, param="stop")
        prompts = len(self.prompts)
        if prompts > settings.max_prompts:
            message = f"there are {prompts} prompts; at most {settings.max_prompts} are allowed"
            raise invalid(message, param=self.PROMPT)
        texts = prompts * self.choices
        most = settings.max_batch + settings.max_queue
        if texts > most:
            message = f"the request asks for {texts} texts; this server holds at most {most}; ask for fewer"
            raise invalid(message, param=self.PROMPT)
        return self


class GenerateRequest(Constrained, Options):
    """`POST /generate`."""

    prompt: Text | Annotated[list[Text], Field(min_length=1)] = Field(
        description="a text, or a list of texts that run as one batch; none may be empty"
    )
    max_new_tokens: Count | None = Field(default=None, description="at most so many new tokens")
    max_length: Annotated[int, Field(ge=1, le=2**31 - 1)] | None = Field(
        default=None,
        description="at most so many tokens, prompt and new ones; not together with max_new_tokens",
    )
    min_new_tokens: Count = Field(default=0, description="no end of text before so many new tokens")
    temperature: Annotated[float, Field(ge=0, le=1e6)] = Field(
        default=0.0, description="from 0, the likeliest token each time; 1 is the model's own distribution"
    )
    top_k: Count | None = Field(default=None, description="only the k likeliest tokens")
    top_p: Annotated[float, Field(gt=0, le=1)] = Field(
        default=1.0, description="above 0 and at most 1: only the likeliest tokens that together reach it"
    )
    min_p: Annotated[float, Field(ge=0, le=1)] = Field(
        default=0.0, description="from 0 to 1: only tokens this many times as likely as the likeliest"
    )
    repetition_penalty: Annotated[float, Field(gt=0, le=1e6)] = Field(
        default=1.0, description="above 0; above 1 makes tokens that occurred less likely"
    )
    no_repeat_ngram_size: Count = Field(
        default=0, description="no n-gram of this many tokens occurs twice; 0 is off"
    )
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] = Field(default=0.0, description="from -2 to 2")
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] = Field(default=0.0, description="from -2 to 2")
    logit_bias: Bias | None = Field(
        default=None, description="token id -> added to its logit, from -100 to 100"
    )
    stop: Stops | None = Field(default=None, description="a string that ends the text, or a list of such")
    stop_token_ids: StopTokenIds = Field(default=[], description="token ids that end the text, at most 128")
    ignore_eos: bool = Field(
        default=False, description="true or false: whether the text goes on after the end-of-text token"
    )
    n: Annotated[int, Field(ge=1, le=128)] = Field(default=1, description="how many texts per prompt, from 1")
    seed: Annotated[int, Field(ge=0, le=2**63 - 1)] | None = Field(
        default=None, description="from 0 to 2**63 - 1: the same seed gives the same text"
    )
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = Field(
        default=None, description="report each token's log probability, and of so many alternatives, from 0"
    )
    echo: bool = Field(default=False, description="true or false: whether the text begins with the prompt")
    overflow: Overflow = OVERFLOW
    allow_special: bool = ALLOW_SPECIAL
    stream: bool = Field(
        default=False, description="true or false: whether the text comes as server-sent events"
    )

    @property
    def prompts(self) -> list[str]:
        """One or several, as a list."""
        return as_list(self.prompt)

    def params(self) -> SamplingParams:
        """As the library has them.

        Raises:
            InvalidSamplingError: two of them contradict.
        """
        given = self.model_dump(exclude={"prompt", "allow_special", "stream", "logit_bias", "stop"})
        return SamplingParams(**given, logit_bias=parse_bias(self.logit_bias), stop=tuple(as_list(self.stop)))


class StreamOptions(BaseModel):
    """`stream_options` of OpenAI's API, and of vLLM's."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    include_usage: bool | None = Field(default=False, description="whether a last event counts the tokens")
    continuous_usage_stats: bool | None = Field(
        default=False, description="whether, with include_usage, every event counts the tokens so far"
    )
    include_obfuscation: bool | None = Field(default=None, description="is not used")


class OpenAIOptions(OpenAIConstrained, Options):
    """What `/v1/completions` and `/v1/chat/completions` share: OpenAI's names, and vLLM's for the rest."""

    model: ModelName = MODEL
    temperature: Annotated[float, Field(ge=0, le=2)] | None = Field(default=1.0, description="from 0 to 2")
    top_p: Annotated[float, Field(gt=0, le=1)] | None = Field(
        default=1.0, description="above 0 and at most 1"
    )
    top_k: Annotated[int, Field(ge=-1, le=2**31 - 1)] | None = Field(
        default=None, description="only the k likeliest tokens; 0 and -1 are all"
    )
    min_p: Annotated[float, Field(ge=0, le=1)] | None = Field(
        default=0.0, description="from 0 to 1: only tokens this many times as likely as the likeliest"
    )
    repetition_penalty: Annotated[float, Field(gt=0, le=1e6)] | None = Field(
        default=1.0, description="above 0; above 1 makes tokens that occurred less likely"
    )
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = Field(
        default=0.0, description="from -2 to 2"
    )
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = Field(
        default=0.0, description="from -2 to 2"
    )
    logit_bias: Bias | None = Field(
        default=None, description="token id -> added to its logit, from -100 to 100"
    )
    min_tokens: Count | None = Field(default=0, description="no end of the text before so many new tokens")
    stop: Stops | Literal[""] | None = Field(
        default=None, description="a string that ends the text, or a list of such"
    )
    stop_token_ids: StopTokenIds | None = Field(
        default=None, description="token ids that end the text, at most 128"
    )
    ignore_eos: bool | None = Field(
        default=False, description="true or false: whether the text goes on after the end-of-text token"
    )
    n: Annotated[int, Field(ge=1, le=128)] | None = Field(
        default=1, description="how many texts per prompt, from 1"
    )
    seed: Annotated[int, Field(ge=0, le=2**63 - 1)] | None = Field(
        default=None, description="from 0 to 2**63 - 1"
    )
    stream: bool | None = Field(
        default=False, description="true or false: whether the text comes as server-sent events"
    )
    stream_options: StreamOptions | None = Field(default=None, description="an object with include_usage")
    overflow: Overflow | None = OVERFLOW
    return_token_ids: bool | None = Field(
        default=False, description="true or false: whether the answer has the token ids, the prompt's too"
    )
    user: Annotated[str, Field(max_length=256)] | None = USER

    @model_validator(mode="after")
    def _streams(self) -> Self:
        if self.stream_options is not None and not self.stream:
            message = "stream_options is for streams; leave it out, or ask for stream: true"
            raise invalid(message, param="stream_options")
        return self

    def sampling(self) -> dict[str, Any]:
        """What they say, as `SamplingParams` names it."""
        return {
            "temperature": 1.0 if self.temperature is None else self.temperature,
            "top_p": self.top_p or 1.0,
            "top_k": max(0, self.top_k or 0),
            "min_p": self.min_p or 0.0,
            "repetition_penalty": self.repetition_penalty or 1.0,
            "presence_penalty": self.presence_penalty or 0.0,
            "frequency_penalty": self.frequency_penalty or 0.0,
            "logit_bias": parse_bias(self.logit_bias),
            "min_new_tokens": self.min_tokens or 0,
            "stop": tuple(stop for stop in as_list(self.stop) if stop),
            "stop_token_ids": self.stop_token_ids or (),
            "ignore_eos": bool(self.ignore_eos),
            "n": self.choices,
            "seed": self.seed,
            "overflow": self.overflow or "error",
            **self.constraint(),
        }


class CompletionRequest(OpenAIOptions):
    """`POST /v1/completions`."""

    prompt: TextsOrIds = Field(
        description="a text, a list of texts, token ids, or a list of lists of token ids; none empty"
    )
    max_tokens: Count | None = Field(default=16, description="at most so many new tokens, from 0")
    best_of: Annotated[int, Field(ge=1, le=128)] | None = Field(
        default=None,
        description="from n: generate so many texts and return the n likeliest per token; not streamed",
    )
    echo: bool | None = Field(
        default=False, description="true or false: whether the text begins with the prompt"
    )
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = Field(
        default=None, description="report each token's log probability, and of so many alternatives, from 0"
    )
    allow_special: bool | None = ALLOW_SPECIAL
    suffix: Literal[""] | None = Field(
        default=None, description="these models cannot fill in before a suffix; leave it out"
    )

    @model_validator(mode="after")
    def _agrees(self) -> Self:
        n, best_of = self.n or 1, self.best_of or self.n or 1
        if best_of < n:
            raise invalid(f"best_of is {best_of}, less than n, {n}; raise it", param="best_of")
        if self.stream and best_of > n:
            message = "best_of above n cannot be streamed: the best are known at the end only"
            raise invalid(message, param="best_of")
        return self

    @property
    def prompts(self) -> list[str | list[int]]:
        """One or several, as a list."""
        return split_texts(self.prompt)

    def params(self) -> SamplingParams:
        """As the library has them; of `best_of` texts the logprobs are needed in any case.

        Raises:
            InvalidSamplingError: two of them contradict.
        """
        ranked = self.best_of is not None and self.best_of > (self.n or 1)
        return SamplingParams(
            **self.sampling(),
            max_new_tokens=16 if self.max_tokens is None else self.max_tokens,
            echo=bool(self.echo),
            logprobs=0 if ranked and self.logprobs is None else self.logprobs,
        )


class TextPart(BaseModel):
    """A part of a message."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    type: Literal["text"]
    text: str


class ChatMessage(BaseModel):
    """One turn of a chat; what answers of OpenAI's API hold beside it may stand there if it is empty."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    name: str | None = None
    refusal: None = None
    audio: None = None
    function_call: None = None
    tool_calls: Nothing = None
    annotations: Nothing = None

    def spelled(self) -> dict[str, str]:
        """As a template takes it."""
        content = self.content
        text = content if isinstance(content, str) else "\n".join(part.text for part in content)
        return {"role": self.role, "content": text} | ({"name": self.name} if self.name else {})


class ChatRequest(OpenAIOptions):
    """`POST /v1/chat/completions`."""

    PROMPT = "messages"

    messages: Annotated[list[ChatMessage], Field(min_length=1)] = Field(
        description="the chat so far: role (system, developer, user or assistant) and content, a text"
    )
    max_completion_tokens: Count | None = Field(
        default=None, description="at most so many new tokens; unset: as many as fit the context"
    )
    max_tokens: Count | None = Field(default=None, description="the same by its older name")
    logprobs: bool | None = Field(
        default=False, description="true or false: whether to report each token's log probability"
    )
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = Field(
        default=None, description="with logprobs: those of so many alternatives too"
    )
    add_generation_prompt: bool | None = Field(
        default=True, description="true or false: whether the prompt ends where the assistant begins"
    )
    tools: Nothing = Field(default=None, description="these models call no tools; leave it out")
    tool_choice: Literal["none"] | None = Field(default=None, description="none, or leave it out")
    store: Literal[False] | None = Field(default=None, description="nothing is stored; leave it out")

    @model_validator(mode="after")
    def _agrees(self) -> Self:
        if self.max_tokens is not None and self.max_completion_tokens not in (None, self.max_tokens):
            message = "max_tokens and max_completion_tokens differ; leave one of them out"
            raise invalid(message, param="max_completion_tokens")
        if self.top_logprobs is not None and not self.logprobs:
            message = "top_logprobs is for logprobs: true; leave it out, or ask for logprobs"
            raise invalid(message, param="top_logprobs")
        return self

    @property
    def prompts(self) -> list[list[ChatMessage]]:
        """The one chat."""
        return [self.messages]

    def params(self, context: int) -> SamplingParams:
        """As the library has them, for a model whose context is `context`.

        Raises:
            InvalidSamplingError: two of them contradict.
        """
        most = self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens
        if most is None and self.overflow == "slide":
            most = context
        return SamplingParams(
            **self.sampling(),
            max_new_tokens=most,
            max_length=context if most is None else None,
            logprobs=(self.top_logprobs or 0) if self.logprobs else None,
        )


class EmbeddingRequest(Body):
    """`POST /v1/embeddings`."""

    model: ModelName = MODEL
    input: TextsOrIds = Field(
        description="a text, a list of texts, token ids, or a list of lists of token ids; none empty"
    )
    encoding_format: Literal["float", "base64"] = Field(
        default="float", description="float, a list of numbers, or base64, of float32 in little-endian order"
    )
    dimensions: None = Field(
        default=None, description="an embedding has as many numbers as the model is wide; leave it out"
    )
    pooling_type: Literal["MEAN", "LAST"] = Field(
        default="MEAN", description="MEAN of the hidden states of all tokens, or that of the LAST"
    )
    normalize: bool = Field(
        default=True, description="true or false: whether each embedding has the length 1"
    )
    user: Annotated[str, Field(max_length=256)] | None = USER

    @model_validator(mode="after")
    def _within_limits(self, info: ValidationInfo) -> Self:
        settings: Settings | None = info.context
        if settings is not None and len(self.inputs) > settings.max_inputs:
            message = f"there are {len(self.inputs)} inputs; at most {settings.max_inputs} are allowed"
            raise invalid(message, param="input")
        return self

    @property
    def inputs(self) -> list[str | list[int]]:
        """One or several, as a list."""
        return split_texts(self.input)


class TokenizeRequest(Body):
    """`POST /tokenize`."""

    model: ModelName = MODEL
    prompt: str = Field(description="a text")
    add_special_tokens: bool = Field(
        default=True, description="true or false: whether a token that begins every text is added"
    )
    return_token_strs: bool | None = Field(
        default=False, description="true or false: whether the answer has the tokens as texts too"
    )
    allow_special: bool | None = ALLOW_SPECIAL


class DetokenizeRequest(Body):
    """`POST /detokenize`."""

    model: ModelName = MODEL
    tokens: list[TokenId] = Field(description="token ids")


def split_texts(given: Any) -> list[Any]:
    """Texts or token ids, of one text or several, as a list of texts or of lists of token ids."""
    return [given] if isinstance(given, list) and isinstance(given[0], int) else as_list(given)


def as_list(value: Any) -> list[Any]:
    """One value, or several, or None, as a list."""
    return value if isinstance(value, list) else [] if value is None else [value]


def parse_bias(given: dict[str, float] | None) -> dict[int, float]:
    """`logit_bias` with token ids as numbers, which JSON cannot have as keys."""
    return {int(token_id): bias for token_id, bias in (given or {}).items()}
