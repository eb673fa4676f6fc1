"""The OpenAPI description: bodies are read by hand (`body.py`), so their schemas are added by hand too."""

from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel

from gpt2core import __version__
from gpt2core.serve.errors import ErrorBody
from gpt2core.serve.schemas import (
    LIMITS,
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    EmbeddingRequest,
    GenerateRequest,
    TokenizeRequest,
)
from gpt2core.serve.score_schemas import ScoreRequest
from gpt2core.serve.settings import Settings

REQUESTS: tuple[type[BaseModel], ...] = (
    GenerateRequest,
    CompletionRequest,
    ChatRequest,
    EmbeddingRequest,
    TokenizeRequest,
    DetokenizeRequest,
    ScoreRequest,
)
_REF = "#/components/schemas/{model}"
_MEANING = {
    400: "Malformed JSON or UTF-8, an unknown Host, or (below /v1) a bad parameter",
    401: "The API key is missing or wrong",
    403: "The page that asks is of another origin",
    404: "There is no such model",
    408: "The body came too slowly",
    413: "The body is too large",
    415: "The body is not JSON, or is compressed",
    422: "A parameter is unknown or out of its range, or the prompt is too long",
    429: "The queue is full; Retry-After says when to try again",
    500: "The model gave what is no number, or the server failed",
    503: "The model is being loaded, the server is stopping, or the engine has failed",
    504: "The request took too long",
}
_EVENT_STREAM = {
    "schema": {
        "type": "object",
        "properties": {"data": {"type": "string"}},
        "required": ["data"],
    },
    "example": 'data: {"index":0,"choice":0,"text":" there","token_id":612,"finish_reason":null}\n\n'
    "data: [DONE]\n\n",
}


def takes(model: type[BaseModel], examples: Mapping[str, Any]) -> dict[str, Any]:
    """`openapi_extra` of a route whose body is `model`."""
    schema = {"$ref": _REF.format(model=model.__name__)}
    content = {"application/json": {"schema": schema, "examples": dict(examples)}}
    return {"requestBody": {"required": True, "content": content}}


def answers(
    model: type[BaseModel],
    *,
    takes_body: bool = False,
    stream: bool = False,
    bad_parameter: int = 422,
    unknown_model: bool = False,
    open_to_all: bool = False,
) -> dict[int | str, dict[str, Any]]:
    """`responses` of a route: the statuses that it can have. What streams takes a body."""
    statuses = {400, 403} | (set() if open_to_all else {401})
    if takes_body or stream:
        statuses |= {408, 413, 415, 429, 500, 503, 504, bad_parameter}
    if unknown_model or bad_parameter == 400:
        statuses.add(404)
    ok: dict[str, Any] = {"model": model, "description": "Done"}
    if stream:
        ok["content"] = {"text/event-stream": _EVENT_STREAM}
    refusals: dict[int | str, dict[str, Any]] = {
        status: {"model": ErrorBody, "description": _MEANING[status]} for status in sorted(statuses)
    }
    return {200: ok, **refusals}


def describe(app: FastAPI, settings: Settings) -> dict[str, Any]:
    """The whole description, with this server's own limits."""
    document = get_openapi(
        title="gpt2core",
        version=__version__,
        summary="GPT-2-family language models over HTTP",
        routes=app.routes,
    )
    schemas = document.setdefault("components", {}).setdefault("schemas", {})
    for model in REQUESTS:
        schema = model.model_json_schema(ref_template=_REF)
        schemas.update(schema.pop("$defs", {}))
        for name, (bound, setting) in LIMITS.items():
            _bound(schema["properties"].get(name, {}), bound, getattr(settings, setting))
        schemas[model.__name__] = schema
    if settings.api_keys:
        bearer = {"type": "http", "scheme": "bearer"}
        document["components"]["securitySchemes"] = {"key": bearer}
        document["security"] = [{"key": []}]
    return document


def _bound(schema: dict[str, Any], bound: str, value: int) -> None:
    """Set a bound where the schema, or the part of it that is not null, can have one."""
    for part in schema.get("anyOf", [schema]):
        if part.get("type") in ("integer", "object"):
            part[bound] = value
