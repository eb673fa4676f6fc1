"""A request's body: strict JSON, then a schema; every fault is a `Refusal` that repeats nothing."""

import difflib
from collections.abc import Mapping
from typing import Any, TypeVar

from fastapi import Request
from pydantic import BaseModel, ValidationError

from gpt2core._json import JSONFault, loads_strict
from gpt2core.serve.errors import Refusal, invalid
from gpt2core.serve.settings import Settings

Model = TypeVar("Model", bound=BaseModel)


async def read_body(request: Request, model: type[Model], settings: Settings) -> Model:
    """The body of `request` as `model`.

    Raises:
        Refusal: 415 not JSON, or compressed; 413, 408 too large or too slow; 400 not strict JSON; 422 not
            what the schema allows.
    """
    check_type(request.headers)
    return validate(parse(await request.body(), settings.max_json_depth), model, settings)


def check_type(headers: Mapping[str, str]) -> None:
    """Refuse what does not say that it is JSON. A page of another origin cannot send it without asking."""
    kind, _, parameters = headers.get("content-type", "").lower().partition(";")
    charset = parameters.strip().removeprefix("charset=").strip('"')
    if kind.strip() != "application/json" or charset not in ("", "utf-8", "utf8"):
        raise _unsupported(
            "content_type", "the body must be JSON in UTF-8; send Content-Type: application/json"
        )
    if headers.get("content-encoding", "identity").lower() != "identity":
        raise _unsupported("content_encoding", "the body is compressed; send it as it is")


def parse(data: bytes, max_depth: int) -> Any:
    """The body's strict JSON; see `loads_strict`."""
    try:
        return loads_strict(data, max_depth=max_depth)
    except JSONFault as fault:
        raise _malformed(fault.summary) from None


def validate(value: Any, model: type[Model], settings: Settings) -> Model:
    """Make `value` a `model`."""
    if not isinstance(value, dict):
        raise invalid("the body must be a JSON object", code="invalid_body")
    try:
        return model.model_validate(value, strict=True, context=settings)
    except ValidationError as error:
        raise _refusal(error.errors(include_url=False, include_input=False), model) from None


_FAULTS = {
    "missing": "is missing",
    "string_type": "has the wrong type",
    "int_type": "must be a whole number",
    "float_type": "must be a number",
    "bool_type": "must be true or false",
    "dict_type": "must be an object",
    "list_type": "must be a list",
    "string_too_short": "is empty",
    "string_too_long": "is too long",
    "too_long": "is too long",
    "too_short": "is empty",
    "string_unicode": "holds a lone surrogate, which is no character",
    "none_required": "is not supported",
    "literal_error": "is not supported",
    "greater_than": "is too small",
    "greater_than_equal": "is too small",
    "less_than": "is too large",
    "less_than_equal": "is too large",
}
"""What pydantic found -> in words."""


def _refusal(errors: list[Any], model: type[BaseModel]) -> Refusal:
    """One fault of those that pydantic found; an unknown field first, since it explains others."""
    unknown = next((error for error in errors if error["type"] == "extra_forbidden"), None)
    if unknown is not None:
        known = [field.alias or name for name, field in model.model_fields.items()]
        near = difflib.get_close_matches(str(unknown["loc"][-1])[:64], known, n=1)
        remedy = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(known)}"
        return invalid(f"the body has a field that is not known here; {remedy}", code="unknown_field")
    error = errors[0]
    location = [str(part) for part in error["loc"]]
    name = location[0] if location else None  # deeper parts may be keys that the client chose
    if name is None:
        return invalid("the body is not valid")
    limits = model.model_fields[name].description or "see /docs"
    kind = _FAULTS.get(error["type"], "is not valid")
    return invalid(f"{name} {kind}; {limits}", param=name)


def _malformed(what: str) -> Refusal:
    return Refusal(400, "invalid_request_error", "malformed_json", f"the body {what}")


def _unsupported(code: str, message: str) -> Refusal:
    return Refusal(415, "invalid_request_error", code, message)
