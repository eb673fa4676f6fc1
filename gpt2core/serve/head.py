"""HEAD is answered wherever GET is: the same status and headers, and no body."""

from starlette.types import ASGIApp, Message, Receive, Scope, Send


class AnswerHead:
    """A middleware that lets the app answer HEAD as if it were GET, and keeps the body back."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        if scope["type"] != "http" or scope["method"] != "HEAD":
            await self._app(scope, receive, send)
            return

        async def send_without_body(message: Message) -> None:
            if message["type"] == "http.response.body":
                message = {**message, "body": b""}
            await send(message)

        asked = {**scope, "method": "GET"}
        try:
            await self._app(asked, receive, send_without_body)
        finally:
            if "route" in asked:  # the guard counts by it
                scope["route"] = asked["route"]
