"""A request's body: strict JSON, then a schema; every fault is a `Refusal` that repeats nothing."""

import difflib
import json
from collections.abc import Mapping
from typing import Any, TypeVar

from fastapi import Request
from pydantic import BaseModel, ValidationError

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
    """Strict JSON: UTF-8 without a byte order mark, no key twice, no NaN, no number beyond float64."""
    try:
        value = json.loads(
            data.decode("utf-8"),
            object_pairs_hook=_unique,
            parse_constant=_no_constant,
            parse_float=_finite,
        )
    except _Fault as fault:
        raise _malformed(str(fault)) from None
    except UnicodeDecodeError:
        raise _malformed("is not UTF-8") from None
    except RecursionError:
        raise _malformed(f"nests deeper than {max_depth} levels") from None
    except ValueError:  # a syntax error, or an integer of thousands of digits; its text quotes the body
        raise _malformed("is not JSON, or begins with a byte order mark") from None
    if _depth(value, max_depth) > max_depth:
        raise _malformed(f"nests deeper than {max_depth} levels")
    return value


def validate(value: Any, model: type[Model], settings: Settings) -> Model:
    """Make `value` a `model`."""
    if not isinstance(value, dict):
        raise invalid("the body must be a JSON object", code="invalid_body")
    try:
        return model.model_validate(value, strict=True, context=settings)
    except ValidationError as error:
        raise _refusal(error.errors(include_url=False, include_input=False), model) from None


class _Fault(ValueError):
    """What is not strict about the JSON."""


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise _Fault("has a key twice in one object")
    return result


def _no_constant(name: str) -> None:
    raise _Fault("holds NaN or Infinity, which JSON does not have")


def _finite(text: str) -> float:
    value = float(text)
    if value in (float("inf"), float("-inf")):
        raise _Fault("holds a number that is too large for a float")
    return value


def _depth(value: Any, most: int) -> int:
    """How deep `value` nests; it stops counting beyond `most`."""
    level, depth = [value], 0
    while level and depth <= most:
        level = [child for parent in level for child in _children(parent)]
        depth += bool(level)
    return depth


def _children(value: Any) -> list[Any]:
    values = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [child for child in values if isinstance(child, dict | list)]


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
