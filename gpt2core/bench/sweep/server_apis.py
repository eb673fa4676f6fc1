"""The two ways of asking a server to continue a prompt: `/generate`, and OpenAI's `/v1/completions`."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Protocol
from urllib.parse import urlsplit

from gpt2core.bench.errors import ServerError
from gpt2core.errors import RequestError


@dataclass(frozen=True, slots=True)
class Part:
    """What one JSON object of an answer says: all of it, or one event of a stream.

    Attributes:
        text: the whole text, or what this event adds.
        whole: whether `text` is the whole text even in a stream, whose events otherwise add to it.
        finish_reason, prompt_tokens, completion_tokens, model, backend: None where it does not tell.
    """

    text: str
    whole: bool
    finish_reason: str | None
    prompt_tokens: int | None
    completion_tokens: int | None
    model: str | None
    backend: str | None


class Api(Protocol):
    """How requests and answers look."""

    url: str

    @property
    def needs_prompt_tokens(self) -> bool:
        """Whether a total length can only be asked for with them."""

    def body(self, prompt: str, length: int, prompt_tokens: int | None, *, exact: bool) -> dict[str, Any]:
        """A request for `length` tokens in all; without `prompt_tokens` a short one that tells them."""

    def read(self, document: Mapping[str, Any]) -> Part:
        """Understand an answer or an event; may raise KeyError, TypeError or IndexError."""


class Generate:
    """`/generate`: a prompt and a total length."""

    needs_prompt_tokens: Final = False

    def __init__(self, url: str) -> None:
        self.url = url

    def body(self, prompt: str, length: int, prompt_tokens: int | None, *, exact: bool) -> dict[str, Any]:
        """As of `Api`."""
        body: dict[str, Any] = {"prompt": prompt, "max_length": length}
        if exact:
            body["min_new_tokens"] = 1 if prompt_tokens is None else length - prompt_tokens
        return body

    def read(self, document: Mapping[str, Any]) -> Part:
        """As of `Api`."""
        whole = "generations" in document or "generated_text" in document
        one = document["generations"][0] if document.get("generations") else document
        text = one["text"] if "text" in one else document.get("generated_text", "")
        return Part(
            text=_text(text),
            whole=whole,
            finish_reason=one.get("finish_reason"),
            prompt_tokens=one.get("prompt_tokens"),
            completion_tokens=one.get("completion_tokens"),
            model=document.get("model"),
            backend=document.get("backend"),
        )


class Completions:
    """`/v1/completions`: a prompt and a number of new tokens."""

    needs_prompt_tokens: Final = True

    def __init__(self, url: str, model: str) -> None:
        self.url = url
        self._model = model

    def body(self, prompt: str, length: int, prompt_tokens: int | None, *, exact: bool) -> dict[str, Any]:
        """As of `Api`. `min_tokens` is no field of OpenAI's; several engines have it."""
        new_tokens = 1 if prompt_tokens is None else length - prompt_tokens
        least = {"min_tokens": new_tokens} if exact else {}
        return {"model": self._model, "prompt": prompt, "max_tokens": new_tokens, **least}

    def read(self, document: Mapping[str, Any]) -> Part:
        """As of `Api`. The usage of a stream comes in an event without choices."""
        choice = document["choices"][0] if document["choices"] else {}
        usage = document.get("usage") or {}
        return Part(
            text=_text(choice.get("text") or ""),
            whole=False,
            finish_reason=choice.get("finish_reason"),
            prompt_tokens=usage.get("prompt_tokens"),
            completion_tokens=usage.get("completion_tokens"),
            model=document.get("model"),
            backend=None,
        )


@dataclass(frozen=True, slots=True)
class Address:
    """A server's URL, taken apart.

    Attributes:
        url: of the endpoint that generates, user and password included where they were given.
        shown: the same without them.
        models: of the list of models; None for `/generate`.
    """

    url: str
    shown: str
    models: str | None
    loopback: bool


def parse_url(url: str) -> Address:
    """Find the endpoint that a URL means.

    Raises:
        RequestError: it is no http or https URL.
    """
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError as error:
        raise RequestError(f"the URL cannot be read: {error}; give it as http://127.0.0.1:8000") from error
    if parts.scheme not in ("http", "https") or not host:
        raise RequestError(f"{parts.path[:60]!r} is no URL of a server; give it as http://127.0.0.1:8000")
    path, models = parts.path.rstrip("/"), None
    if path.endswith(("/v1", "/v1/completions")):
        path = path.removesuffix("/completions")
        models, path = f"{path}/models", f"{path}/completions"
    elif not path.endswith("/generate"):
        path += "/generate"
    bare = parts.netloc.rpartition("@")[2]
    return Address(
        url=f"{parts.scheme}://{parts.netloc}{path}",
        shown=f"{parts.scheme}://{bare}{path}",
        models=f"{parts.scheme}://{parts.netloc}{models}" if models else None,
        loopback=host in ("localhost", "::1") or host.startswith("127."),
    )


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise ServerError("the answer's text is no text", again=True)
    return value
