"""What answers look like, for the description of the API."""

from typing import Literal

from pydantic import BaseModel


class TopLogprob(BaseModel):
    """A token that could have been drawn."""

    token: str
    token_id: int
    logprob: float


class TokenInfo(BaseModel):
    """A token of the text; the first of an echoed prompt has no logprob."""

    token: str
    token_id: int
    logprob: float | None
    top_logprobs: list[TopLogprob]


class GeneratedText(BaseModel):
    """One text."""

    text: str
    finish_reason: Literal["stop", "length"]
    prompt_tokens: int
    completion_tokens: int
    index: int
    choice: int
    seed: int
    truncated_tokens: int | None = None
    logprobs: list[TokenInfo] | None = None


class Usage(BaseModel):
    """Tokens of the whole request."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class GenerateResponse(BaseModel):
    """The answer of `POST /generate`, and the last event of its stream."""

    generated_text: str
    generations: list[GeneratedText]
    model: str
    backend: str
    seed: int
    elapsed_s: float
    usage: Usage


class CompletionLogprobs(BaseModel):
    """As OpenAI's completions have them: lists side by side."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(BaseModel):
    """One text."""

    text: str
    index: int
    logprobs: CompletionLogprobs | None
    finish_reason: Literal["stop", "length"] | None
    prompt_token_ids: list[int] | None = None
    token_ids: list[int] | None = None


class Completion(BaseModel):
    """The answer of `POST /v1/completions`."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage


class ChatTopLogprob(BaseModel):
    """A token that could have been drawn."""

    token: str
    logprob: float
    bytes: list[int]


class ChatTokenLogprob(ChatTopLogprob):
    """A token of the text."""

    top_logprobs: list[ChatTopLogprob]


class ChatLogprobs(BaseModel):
    """As OpenAI's chats have them."""

    content: list[ChatTokenLogprob]
    refusal: None


class ChatAnswer(BaseModel):
    """What the assistant says."""

    role: Literal["assistant"]
    content: str
    refusal: None


class ChatChoice(BaseModel):
    """One answer."""

    index: int
    message: ChatAnswer
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length"]
    token_ids: list[int] | None = None


class ChatCompletion(BaseModel):
    """The answer of `POST /v1/chat/completions`."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    prompt_token_ids: list[int] | None = None


class Embedding(BaseModel):
    """One vector: numbers, or base64 of float32 in little-endian order."""

    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class EmbeddingUsage(BaseModel):
    """Tokens of the whole request."""

    prompt_tokens: int
    total_tokens: int


class EmbeddingList(BaseModel):
    """The answer of `POST /v1/embeddings`."""

    object: Literal["list"]
    data: list[Embedding]
    model: str
    usage: EmbeddingUsage


class Tokens(BaseModel):
    """The answer of `POST /tokenize`."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class Detokenized(BaseModel):
    """The answer of `POST /detokenize`."""

    prompt: str


class ModelCard(BaseModel):
    """A model of this server."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    context: int | None


class ModelList(BaseModel):
    """The answer of `GET /v1/models`."""

    object: Literal["list"]
    data: list[ModelCard]


class Health(BaseModel):
    """The answer of `/livez`, `/readyz` and `/health`."""

    status: str


class Version(BaseModel):
    """The answer of `/version`."""

    version: str
