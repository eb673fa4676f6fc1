"""Pure ASGI around the whole app: who may ask, how much and how slowly, and which headers every answer has.

Pure ASGI, because a middleware that wraps requests and responses (Starlette's `BaseHTTPMiddleware`) hides
that a client has gone.
"""

import asyncio
import contextlib
import re
import time
import uuid
from typing import Final

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gpt2core.serve import logs
from gpt2core.serve.auth import find_key
from gpt2core.serve.cors import Cors
from gpt2core.serve.driver import Driver
from gpt2core.serve.errors import CLIENT_GONE, Disconnected, Refusal, headers_too_large, slow_body, to_refusal
from gpt2core.serve.metrics import Metrics
from gpt2core.serve.settings import LOOPBACK_HOSTS, Settings
from gpt2core.serve.state import Client, RequestState

SECURITY_HEADERS: Final = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}
_RAW_SECURITY_HEADERS: Final = [
    (name.lower().encode(), value.encode()) for name, value in SECURITY_HEADERS.items()
]
DISCARD_NBYTES: Final = 8 * 2**20
DISCARD_S: Final = 1.0
PROBES: Final = ("/livez", "/readyz", "/health")
PROBE_HOSTS: Final = frozenset(LOOPBACK_HOSTS)
"""A container's own health check asks by these, whatever names its clients use."""
TAKE_PLACES: Final = frozenset(
    (
        *("/generate", "/v1/completions", "/v1/chat/completions", "/v1/embeddings"),
        *("/tokenize", "/detokenize", "/score"),
    )
)
"""Where a POST needs a place."""
METHODS: Final = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
_REQUEST_ID: Final = re.compile(r"[A-Za-z0-9._-]{1,64}")
_HOST: Final = re.compile(r"(\[[0-9a-fA-F:.]+\]|[A-Za-z0-9._-]+)(?::\d{1,5})?")


class Guard:
    """The outermost middleware."""

    def __init__(self, app: ASGIApp, *, settings: Settings, metrics: Metrics, driver: Driver) -> None:
        self._app = app
        self._driver = driver
        self._keys = settings.api_keys
        self._settings = settings
        self._metrics = metrics
        self._host_names = settings.host_names
        self._cors = Cors(settings.allowed_origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request, or let the app answer it."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":  # a websocket: none is served here
            await receive()
            await send({"type": "websocket.close", "code": 1000})
            return
        exchange = Exchange(scope, receive, send, self._settings, self._metrics, self._driver)
        exchange.more_headers = self._cors.headers(exchange.headers)
        refusal = self.refuse(scope["path"], exchange.headers)
        if refusal is not None:
            await exchange.run(refusal.response())
        elif (preflight := self._cors.preflight(scope["method"], exchange.headers)) is not None:
            await exchange.run(preflight)
        elif (refusal := self.refuse_early(scope, exchange)) is not None:
            exchange.route = scope["path"]
            exchange.is_refused = True
            await exchange.run(_ReadAndRefuse(refusal))
        else:
            await exchange.run(self._app)

    def refuse_early(self, scope: Scope, exchange: "Exchange") -> Refusal | None:
        """Why a request for texts cannot have a single place: then nothing needs to look at its body.

        Who asks again and again while the queue is full costs the others a third of what it does when the
        routes refuse it: docs/robustness.md.
        """
        places = self._driver.places
        if places is None or scope["method"] != "POST" or scope["path"] not in TAKE_PLACES:
            return None
        if self._driver.state != "ready":
            return None
        if self._keys:
            number = find_key(self._keys, exchange.headers.get("authorization", ""))
            if number is None:  # the route says so
                return None
            exchange.state.client = Client(exchange.state.client.address, number)
        return places.refuse(exchange.state.client)

    def refuse(self, path: str, headers: Headers) -> Refusal | None:
        """Why a request is not let in."""
        lines = headers.raw
        header_nbytes = sum(len(name) + len(value) + 4 for name, value in lines)  # 4: ": " and the end
        settings = self._settings
        if len(lines) > settings.max_headers or header_nbytes > settings.max_header_nbytes:
            return headers_too_large(settings.max_header_nbytes, settings.max_headers)
        host = headers.getlist("host")
        name = _HOST.fullmatch(host[0]) if len(host) == 1 else None
        names = self._host_names | PROBE_HOSTS if path in PROBES else self._host_names
        if name is None or not names & {name[1].lower(), "*"}:
            return Refusal(
                400,
                "invalid_request_error",
                "unknown_host",
                "the Host header names no host of this server; add its name to GPT2CORE_ALLOWED_HOSTS",
            )
        origin = headers.get("origin")
        if origin is not None and origin not in self._cors.origins:
            scheme, _, authority = origin.partition("://")
            if scheme not in ("http", "https") or authority.lower() != host[0].lower():
                return Refusal(
                    403,
                    "permission_error",
                    "foreign_origin",
                    "pages of other origins may not call this server; see GPT2CORE_ALLOWED_ORIGINS",
                )
        return None


class Exchange:
    """One request and its answer."""

    def __init__(
        self,
        scope: Scope,
        receive: Receive,
        send: Send,
        settings: Settings,
        metrics: Metrics,
        driver: Driver,
    ) -> None:
        self.headers = Headers(scope=scope)
        self.route: str | None = None  # where no route was looked for
        self.more_headers: list[tuple[bytes, bytes]] = []
        self.is_refused = False  # for want of a place
        self._driver = driver
        self._scope = scope
        self._receive = receive
        self._send = send
        self._settings = settings
        self._metrics = metrics
        self._received_nbytes = 0
        self._complete = False
        self._status: int | None = None
        given = self.headers.get("x-request-id", "")
        has_given_id = _REQUEST_ID.fullmatch(given) is not None
        request_id = given if has_given_id else uuid.uuid4().hex
        address = scope["client"][0] if scope.get("client") else None
        begun_s = time.perf_counter()
        self.state = RequestState(request_id, begun_s, Client(address), has_given_id)
        self.state.attach(scope)

    async def run(self, app: ASGIApp) -> None:
        """Let `app` answer; count and log."""
        try:
            await app(self._scope, self.receive, self.send)
        except Exception as error:
            if self._status is not None:
                raise  # uvicorn then cuts the connection: nobody may take it for the answer's end
            logs.event(
                "error", "request_failed", error=logs.describe_error(error), request_id=self.state.request_id
            )
            await to_refusal(error).response()(self._scope, self._receive, self.send)
        finally:
            self._record()

    async def receive(self) -> Message:
        """The next message from the client; of a body no more and no slower than is allowed."""
        if self._complete:
            return await self._receive()
        settings = self._settings
        length = self.headers.get("content-length", "")
        if length.isdecimal() and (len(length) > 18 or int(length) > settings.max_body_nbytes):
            raise _too_large(settings.max_body_nbytes)
        left_s = self.state.begun_s + settings.receipt_s - time.perf_counter()
        try:
            async with asyncio.timeout(left_s):
                message = await self._receive()
        except TimeoutError:
            raise slow_body(settings.receipt_s) from None
        if message["type"] == "http.disconnect":  # before its body was here
            raise Disconnected
        self._received_nbytes += len(message.get("body", b""))
        if self._received_nbytes > settings.max_body_nbytes:
            raise _too_large(settings.max_body_nbytes)
        self._complete = not message.get("more_body", False)
        return message

    async def send(self, message: Message) -> None:
        """Pass a message of the answer on, with the headers that every answer has."""
        if message["type"] == "http.response.start":
            self._status = message["status"]
            length = self.headers.get("content-length", "")
            if self.is_refused and self._status == 429 and self._scope["http_version"] == "1.1":
                self.state.refused_with = [*_RAW_SECURITY_HEADERS, *self.more_headers]
                self.state.body_nbytes = int(length) if length.isdecimal() else None
            headers = [(name.lower(), value) for name, value in message.get("headers", [])]
            given = {name for name, _ in headers}
            headers += [pair for pair in _RAW_SECURITY_HEADERS if pair[0] not in given]
            headers += self.more_headers
            headers.append((b"x-request-id", self.state.request_id.encode()))
            message = {**message, "headers": headers}
        elif not message.get("more_body", False) and self._unread():
            await self._send({**message, "more_body": True})
            await self._discard()
            message = {"type": "http.response.body"}
        await self._send(message)

    def _unread(self) -> bool:
        """Whether an answer goes out before its request is in; not after 408, when enough was waited for."""
        announced = self.headers.get("content-length", "0") != "0" or "transfer-encoding" in self.headers
        return announced and not self._complete and self._status != 408

    async def _discard(self) -> None:
        """Read on a little: closing with data unread resets the connection, and the answer with it."""
        left_nbytes = DISCARD_NBYTES
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(DISCARD_S):
                while left_nbytes > 0:
                    message = await self._receive()
                    left_nbytes -= len(message.get("body", b""))
                    if message["type"] != "http.request" or not message.get("more_body", False):
                        return

    def _record(self) -> None:
        elapsed_s = time.perf_counter() - self.state.begun_s
        # Never the path itself: that is the client's.
        route = self.route
        if route is None:
            route = str(getattr(self._scope.get("route"), "path", "none"))
        method = self._scope["method"] if self._scope["method"] in METHODS else "other"
        status = self._status or CLIENT_GONE
        self._metrics.count_request(method, route, status, elapsed_s)
        level = "info"
        if route in (*PROBES, "/metrics"):
            level = "debug"
        elif status == 429 and self._driver.places is not None:
            self._driver.places.count_refusal(self.state.client)
            level = "debug"
        logs.event(
            level,
            "request",
            request_id=self.state.request_id,
            client=self.state.client.address,
            key=self.state.client.key,
            method=method,
            route=route,
            status=status,
            elapsed_ms=round(1000 * elapsed_s, 3),
            **self.state.log_fields,
        )


class _ReadAndRefuse:
    """Answers with a refusal once the body is in, so that the connection can be kept; does not look at it."""

    def __init__(self, refusal: Refusal) -> None:
        self._refusal = refusal

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        refusal = self._refusal
        try:
            while (await receive()).get("more_body", False):
                pass
        except Refusal as other:  # it is too large or too slow as well
            refusal = other
        except Disconnected:
            return
        await refusal.response()(scope, receive, send)


def _too_large(most_nbytes: int) -> Refusal:
    return Refusal(
        413,
        "invalid_request_error",
        "body_too_large",
        f"the request's body has more than {most_nbytes} bytes; send less",
        headers={"Connection": "close"},
    )
