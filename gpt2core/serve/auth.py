"""The API key, as a dependency of routes: whatever a path looks like, the route that answers asks for it."""

import base64
import hmac
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request

from gpt2core.serve.errors import Refusal
from gpt2core.serve.settings import Settings
from gpt2core.serve.state import Client, find_state


def require_key(settings: Settings) -> Callable[[Request], Coroutine[Any, Any, None]]:
    """Make the dependency. It takes `Bearer KEY`, or, as from browsers, `Basic` with KEY as the password."""
    keys = settings.api_keys

    async def authorize(request: Request) -> None:
        if not keys:
            return
        number = find_key(keys, request.headers.get("authorization", ""))
        if number is not None:
            state = find_state(request.scope)
            state.client = Client(state.client.address, number)
            return
        schemes = 'Bearer realm="gpt2core"'
        if request.method == "GET":  # a page: a browser asks for the key, by the first scheme only
            schemes = f'Basic realm="gpt2core", charset="UTF-8", {schemes}'
        raise Refusal(
            401,
            "authentication_error",
            "invalid_api_key",
            "the API key is missing or wrong; send Authorization: Bearer KEY",
            headers={"WWW-Authenticate": schemes},
        )

    return authorize


def find_key(keys: tuple[bytes, ...], header: str) -> int | None:
    """Which of the keys an `Authorization` header brings, from 1; None: none of them."""
    given = _read_key(header)
    matches = [hmac.compare_digest(given, key) for key in keys]  # all of them: the time tells nothing
    return 1 + matches.index(True) if any(matches) else None


def _read_key(header: str) -> bytes:
    scheme, _, value = header.partition(" ")
    value = value.strip()
    if scheme.lower() == "bearer":
        return value.encode()
    if scheme.lower() == "basic":
        try:
            return base64.b64decode(value, validate=True).partition(b":")[2]
        except ValueError:
            return b""
    return b""
