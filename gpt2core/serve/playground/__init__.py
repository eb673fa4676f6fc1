"""`/`: a page to try the model in a browser. Plain files of this package; nothing is loaded from elsewhere.

The page needs no inline script or style, so that the strictest Content-Security-Policy suits it.
"""

from collections.abc import Callable, Coroutine
from importlib.resources import files
from typing import Any, Final

from fastapi import APIRouter
from fastapi.responses import Response

from gpt2core.serve.driver import Driver
from gpt2core.serve.errors import json_response
from gpt2core.serve.settings import Settings

_ASSETS: Final = {
    "/": ("index.html", "text/html"),
    "/playground/app.js": ("app.js", "text/javascript"),
    "/playground/events.js": ("events.js", "text/javascript"),
    "/playground/messages.js": ("messages.js", "text/javascript"),
    "/playground/server.js": ("server.js", "text/javascript"),
    "/playground/tokens.js": ("tokens.js", "text/javascript"),
    "/playground/style.css": ("style.css", "text/css"),
    "/playground/icon.svg": ("icon.svg", "image/svg+xml"),
}


def router(driver: Driver, settings: Settings) -> APIRouter:
    """The page, its assets, and what it shows of the server before anything is run."""
    routes = assets()

    @routes.get("/playground/server.json")
    async def about() -> Response:
        engine = driver.engine  # None while the model is being loaded
        return json_response(
            {
                "model": settings.name,
                "backend": None if engine is None else engine.backend.name,
                "context": None if engine is None else engine.config.n_positions,
                "max_logprobs": settings.max_logprobs,
            }
        )

    return routes


def assets() -> APIRouter:
    """The page and its files, read once."""
    routes = APIRouter(include_in_schema=False)
    for path, (name, media_type) in _ASSETS.items():
        routes.get(path)(_answer(files(__package__).joinpath(name).read_bytes(), media_type))
    return routes


def _answer(content: bytes, media_type: str) -> Callable[[], Coroutine[Any, Any, Response]]:
    async def asset() -> Response:
        return Response(content, media_type=media_type)

    return asset
