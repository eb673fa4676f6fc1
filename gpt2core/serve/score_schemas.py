"""What `POST /score` takes and answers."""

from typing import Any, Literal

from pydantic import BaseModel, Field, ValidationInfo, model_validator

from gpt2core.serve.errors import invalid
from gpt2core.serve.schemas import ALLOW_SPECIAL, Body, TextsOrIds, split_texts
from gpt2core.serve.settings import Settings


class ScoreRequest(Body):
    """`POST /score`."""

    text: TextsOrIds = Field(
        description="a text, a list of texts, token ids, or a list of lists of token ids; none empty"
    )
    by: Literal["token", "word", "text"] = Field(
        default="text", description="token, word or text: what is told of each text beside its sums"
    )
    base: Literal["2", "e"] = Field(default="2", description="2 or e: surprisals in bits or in nats")
    corrected: bool = Field(
        default=False, description="true or false: whether a word's space counts with the word before it"
    )
    bos: Literal["eos"] | None = Field(
        default=None, description="eos, so that the first token is predicted too, or null"
    )
    end: Literal["eos"] | None = Field(
        default=None, description="eos, so that the end of the text is predicted too, or null"
    )
    stride: int | None = Field(
        default=None, ge=1, le=2**31 - 1, description="tokens that each window of a long text adds, from 1"
    )
    context: int | None = Field(
        default=None, ge=1, le=2**31 - 1, description="most tokens that are read at a time, from 1"
    )
    top: int = Field(default=0, ge=0, le=20, description="how many of the likeliest tokens, from 0 to 20")
    entropy: bool = Field(
        default=False, description="true or false: whether each prediction's entropy is told"
    )
    leading_space: bool = Field(
        default=False, description="true or false: whether a text without a space before it gets one"
    )
    allow_special: bool = ALLOW_SPECIAL

    @model_validator(mode="after")
    def _within_limits(self, info: ValidationInfo) -> "ScoreRequest":
        settings: Settings | None = info.context
        if settings is not None and len(self.texts) > settings.max_inputs:
            message = f"there are {len(self.texts)} texts; at most {settings.max_inputs} are allowed"
            raise invalid(message, param="text")
        return self

    @property
    def texts(self) -> list[str | list[int]]:
        """One or several, as a list."""
        return split_texts(self.text)

    def choices(self) -> dict[str, Any]:
        """As `GPT2.score` has them."""
        names = ("bos", "end", "stride", "context", "top", "entropy", "leading_space", "allow_special")
        return {name: getattr(self, name) for name in names} | {"boundaries": self.corrected}


class ScoredText(BaseModel):
    """One text; `tokens` or `words` as asked for."""

    index: int
    token_count: int
    scored_tokens: int
    logprob: float
    surprisal: float
    perplexity: float | None
    word_perplexity: float | None
    byte_perplexity: float | None
    bits_per_byte: float | None
    tokens: list[dict[str, Any]] | None
    words: list[dict[str, Any]] | None


class ScoreResponse(BaseModel):
    """The answer of `POST /score`."""

    model: str
    backend: str
    scores: list[ScoredText]
    usage: dict[str, int]
