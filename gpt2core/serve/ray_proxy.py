"""What Ray's proxy says by itself, said as the API does: errors of requests that no replica has answered.

Without it a client whose replica was killed reads "Internal Server Error" as plain text. The proxies find it
by an environment variable, which `ray_app.build` sets for a Ray that starts after it; where `ray start` made
the cluster, set it there:

    export RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH=gpt2core.serve.ray_proxy:middlewares
"""

from typing import Final

from starlette.datastructures import Headers
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gpt2core.serve.errors import Refusal

VARIABLE: Final = "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"
IMPORT_PATH: Final = "gpt2core.serve.ray_proxy:middlewares"
_OF_RAY: Final = "/-/"
"""Paths that the proxy answers itself, for Ray's own probes."""


def middlewares() -> list[Middleware]:
    """What Ray puts around its proxy."""
    return [Middleware(SayAsApi)]


class SayAsApi:
    """Replaces errors in plain text, and answers where there is no answer at all.

    An answer that breaks off stays broken: nobody may take it for whole.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let the proxy answer a request."""
        if scope["type"] != "http" or scope["path"].startswith(_OF_RAY):
            await self._app(scope, receive, send)
            return
        begun = replaced = False

        async def send_as_api(message: Message) -> None:
            nonlocal begun, replaced
            if message["type"] == "http.response.start":
                begun = True
                if refusal := _find_refusal(message["status"], Headers(raw=message.get("headers", []))):
                    replaced = True
                    await refusal.response()(scope, receive, send)
            if not replaced:
                await send(message)

        await self._app(scope, receive, send_as_api)
        if not begun:
            await _lost().response()(scope, receive, send)


def _find_refusal(status: int, headers: Headers) -> Refusal | None:
    """What to say instead of an error of the proxy; None: it is a replica's answer, whose errors are JSON."""
    if status < 400 or not headers.get("content-type", "").startswith("text/plain"):
        return None
    again = {"Retry-After": headers.get("retry-after", "1")}
    match status:
        case 404:
            return Refusal(404, "not_found_error", "unknown_path", "no application is deployed at this path")
        case 408:
            return Refusal(408, "timeout_error", "timeout", "the request took longer than Ray's proxy waits")
        case 429:
            message = "all replicas have as much to do as they take; try again a little later"
            return Refusal(429, "rate_limit_error", "queue_full", message, headers=again)
        case 500:
            return _lost()
    message = "no replica can answer now; try again a little later"
    return Refusal(503, "unavailable_error", "no_replica", message, headers=again)


def _lost() -> Refusal:
    return Refusal(
        503,
        "unavailable_error",
        "replica_lost",
        "the replica that worked for this request has ended before its answer; send the request again",
        headers={"Retry-After": "1"},
    )
