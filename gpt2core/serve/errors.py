"""What a client is told when something fails: status, and `{"error": {"type", "code", "param", "message"}}`.

A message never repeats what the client sent, except numbers that have passed the schema.
"""

import json
from collections.abc import Iterable, Mapping
from typing import Any, Final, Literal

from fastapi import Request
from fastapi.responses import Response
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from gpt2core import BackendError, ContextLengthError, NumericalError, RequestError
from gpt2core.errors import ConstraintError
from gpt2core.serve import logs
from gpt2core.serve.state import find_state

CLIENT_GONE: Final = 499
ErrorType = Literal[
    "invalid_request_error",
    "authentication_error",
    "permission_error",
    "not_found_error",
    "rate_limit_error",
    "timeout_error",
    "numerical_error",
    "server_error",
    "unavailable_error",
]


class ErrorDetail(BaseModel):
    """What went wrong."""

    type: ErrorType
    code: str
    param: str | None
    message: str


class ErrorBody(BaseModel):
    """The body of every answer of status 400 and above."""

    error: ErrorDetail


class Refusal(Exception):
    """An answer other than the one asked for.

    `status` 422 stands for "a parameter is wrong" and becomes 400 below `/v1`.
    """

    def __init__(
        self,
        status: int,
        type: ErrorType,
        code: str,
        message: str,
        *,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.type = type
        self.code = code
        self.message = message
        self.param = param
        self.headers = dict(headers or {})

    @property
    def body(self) -> dict[str, Any]:
        """As JSON has it."""
        detail = {"type": self.type, "code": self.code, "param": self.param, "message": self.message}
        return {"error": detail}

    def response(self, path: str = "") -> Response:
        """As a whole answer to a request for `path`."""
        status = 400 if self.status == 422 and path.startswith("/v1/") else self.status
        return json_response(self.body, status=status, headers=self.headers)


class Disconnected(Exception):
    """The client is gone: nobody reads an answer."""


def json_text(value: object) -> bytes:
    """Strict JSON, in ASCII: no NaN, and no lone surrogate can break its encoding."""
    return json.dumps(value, allow_nan=False, separators=(",", ":")).encode()


def json_object(members: Mapping[str, bytes | Iterable[bytes]]) -> bytes:
    """An object whose members are JSON already, or lists of such.

    Encoding holds the interpreter: 32 texts of 1000 tokens with their probabilities, 12 MB, half a second in
    one call, and 20 ms a text when each is encoded by itself.
    """
    parts = []
    for name, value in members.items():
        value = value if isinstance(value, bytes) else b"[" + b",".join(value) + b"]"
        parts.append(json_text(name) + b":" + value)
    return b"{" + b",".join(parts) + b"}"


def json_response(value: object, *, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """A whole answer of strict JSON."""
    return Response(json_text(value), status, headers, media_type="application/json")


def invalid(message: str, *, param: str | None = None, code: str = "invalid_value") -> Refusal:
    """A parameter is wrong."""
    return Refusal(422, "invalid_request_error", code, message, param=param)


def headers_too_large(most_nbytes: int, most_lines: int) -> Refusal:
    """The headers are more than is taken."""
    return Refusal(
        431,
        "invalid_request_error",
        "headers_too_large",
        f"the request's headers have more than {most_nbytes} bytes or {most_lines} lines; send less",
        headers={"Connection": "close"},
    )


def slow_body(receipt_s: float) -> Refusal:
    """The body takes longer than it may."""
    message = f"the request's body did not arrive within {receipt_s:g} s"
    return Refusal(408, "timeout_error", "slow_body", message, headers={"Connection": "close"})


def unavailable(code: str, message: str) -> Refusal:
    """The server cannot work now."""
    return Refusal(503, "unavailable_error", code, message, headers={"Retry-After": "5"})


def deadline_exceeded(deadline_s: float) -> Refusal:
    """The time for one request is over."""
    return Refusal(
        504,
        "timeout_error",
        "deadline_exceeded",
        f"the request took longer than {deadline_s:g} s, the time for one request; ask for fewer tokens, or "
        "try again when the server has less to do",
    )


def to_refusal(error: BaseException) -> Refusal:
    """What a client is told about any error."""
    match error:
        case Refusal():
            return error
        case ContextLengthError():
            return invalid(str(error), param="prompt", code="context_length_exceeded")
        case ConstraintError(summary=summary):  # its message quotes what the client sent
            return invalid(summary)
        case RequestError():
            return invalid(str(error))
        case NumericalError():
            return Refusal(500, "numerical_error", "numerical_error", str(error))
        case BackendError():
            return engine_failed()
        case HTTPException(status_code=404):
            return Refusal(404, "not_found_error", "unknown_path", "there is no such path; see /docs")
        case HTTPException(status_code=405, headers=headers):
            message = "this path does not take this method; see /docs"
            return Refusal(405, "invalid_request_error", "method_not_allowed", message, headers=headers)
        case HTTPException(status_code=status):
            return Refusal(status, "invalid_request_error", "http_error", "the request cannot be answered")
    return Refusal(500, "server_error", "internal_error", "the server failed; its log says why")


def engine_failed() -> Refusal:
    """The engine has failed and does not come back by itself."""
    return unavailable(
        "engine_failed", "the engine has failed and must be restarted; the server's log says why"
    )


async def answer_error(request: Request, error: Exception) -> Response:
    """The exception handler of every route."""
    if isinstance(error, Disconnected):
        return Response(status_code=CLIENT_GONE)  # nobody reads it; the metrics count it
    refusal = to_refusal(error)
    if refusal.status >= 500 and not isinstance(error, Refusal):
        request_id = find_state(request.scope).request_id
        logs.event("error", "request_failed", error=logs.describe_error(error), request_id=request_id)
    return refusal.response(request.url.path)
