"""CORS: pages of other origins that the settings allow may call, and may read what they need of an answer.

Here and not Starlette's middleware, because refusals that never reach the app need the same headers: a page
could not read them otherwise, and would see a network error instead of "try again in a second".
"""

from typing import Final

from starlette.datastructures import Headers
from starlette.responses import Response

METHODS: Final = "GET, HEAD, POST"
EXPOSED: Final = "Retry-After, X-Request-ID, X-Truncated-Tokens"
KEPT_S: Final = 600


class Cors:
    """What answers say to pages of `origins`."""

    def __init__(self, origins: tuple[str, ...]) -> None:
        self.origins = frozenset(origins)

    def headers(self, request: Headers) -> list[tuple[bytes, bytes]]:
        """What an answer has beside its own headers."""
        if not self.origins:
            return []
        headers = [(b"vary", b"Origin")]
        origin = request.get("origin")
        if origin in self.origins:
            headers.append((b"access-control-allow-origin", origin.encode("latin-1")))
            headers.append((b"access-control-expose-headers", EXPOSED.encode()))
        return headers

    def preflight(self, method: str, request: Headers) -> Response | None:
        """The answer to a browser that asks whether a page may call; None: it does not ask that.

        A page that may call may send any header: clients send many of their own (`x-stainless-*`).
        """
        if method != "OPTIONS" or "access-control-request-method" not in request:
            return None
        if request.get("origin") not in self.origins:
            return None
        headers = {"Access-Control-Allow-Methods": METHODS, "Access-Control-Max-Age": str(KEPT_S)}
        if asked := request.get("access-control-request-headers"):
            headers["Access-Control-Allow-Headers"] = asked
        return Response(headers=headers)
