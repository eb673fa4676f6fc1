"""`/`: a page to try the model in a browser. Plain files of this package; nothing is loaded from elsewhere.

The page needs no inline script or style, so that the strictest Content-Security-Policy suits it.
"""

from collections.abc import Callable, Coroutine
from importlib.resources import files
from typing import Any, Final

from fastapi import APIRouter
from fastapi.responses import Response

_ASSETS: Final = {
    "/": ("index.html", "text/html"),
    "/playground/app.js": ("app.js", "text/javascript"),
    "/playground/events.js": ("events.js", "text/javascript"),
    "/playground/tokens.js": ("tokens.js", "text/javascript"),
    "/playground/style.css": ("style.css", "text/css"),
    "/playground/icon.svg": ("icon.svg", "image/svg+xml"),
}


def routes() -> APIRouter:
    """The page and its assets, read once."""
    router = APIRouter(include_in_schema=False)
    for path, (name, media_type) in _ASSETS.items():
        router.get(path)(_answer(files(__package__).joinpath(name).read_bytes(), media_type))
    return router


def _answer(content: bytes, media_type: str) -> Callable[[], Coroutine[Any, Any, Response]]:
    async def asset() -> Response:
        return Response(content, media_type=media_type)

    return asset
