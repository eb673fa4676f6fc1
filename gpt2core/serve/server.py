"""Runs the app under uvicorn: signals, drain and exit code."""

import asyncio
import contextlib
import signal
import socket
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any, Final

import uvicorn
from uvicorn.protocols.http.auto import AutoHTTPProtocol

from gpt2core import BackendError
from gpt2core.serve import logs
from gpt2core.serve.app import create_app
from gpt2core.serve.driver import Driver
from gpt2core.serve.settings import Settings

SIGNALS: Final = (signal.SIGINT, signal.SIGTERM)
DRAIN_GRACE_S: Final = 2.0
BACKLOG: Final = 2048


def run(settings: Settings) -> None:
    """Serve until a signal ends it.

    Raises:
        RequestError: it would listen beyond this machine without a key.
        Gpt2CoreError: the model cannot be loaded.
        OSError: the address cannot be used.
    """
    settings.check_exposure()
    logs.configure(settings.log_level)
    app = create_app(settings)
    config = uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        http=slow_client_protocol(settings.receipt_s),
        ws="none",
        log_config=None,
        access_log=False,
        server_header=False,
        date_header=False,
        timeout_graceful_shutdown=int(settings.drain_s + DRAIN_GRACE_S),
    )
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    sock = socket.create_server((settings.host, settings.port), family=family, backlog=BACKLOG)
    host, port = sock.getsockname()[:2]
    logs.event("info", "listening", host=host, port=port, model=settings.name)
    server = Server(config, app.state.driver)
    try:
        server.run(sockets=[sock])
    finally:
        sock.close()
    driver: Driver = app.state.driver
    if driver.failure is not None and driver.engine is None:
        raise driver.failure
    if not server.started:
        raise BackendError("the server could not start; its log says why")


class Server(uvicorn.Server):
    """Drains after a signal, stops at once after a second one, and ends when the model cannot be loaded."""

    def __init__(self, config: uvicorn.Config, driver: Driver) -> None:
        super().__init__(config)
        self._driver = driver
        self._loop: asyncio.AbstractEventLoop

    async def startup(self, sockets: Any = None) -> None:
        """Begin to listen."""
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)

    async def on_tick(self, counter: int) -> bool:
        """Ten times a second: whether to stop."""
        if self._driver.state == "failed" and self._driver.engine is None:
            self.should_exit = True  # it never worked: whoever started it should see why
        return await super().on_tick(counter)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Handle signals; unlike uvicorn's own, a drained server has ended well and does not die by one."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self.handle_exit) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal drains, the second ends it."""
        if self.should_exit:
            self.force_exit = True
            return
        self.should_exit = True
        self._loop.call_soon_threadsafe(self._driver.drain)


def slow_client_protocol(receipt_s: float) -> type[asyncio.Protocol]:
    """Uvicorn's protocol, but a connection whose first request does not begin in time is closed.

    The guard limits how slowly a body may come; before a request's headers are complete there is no guard.
    """

    class SlowClientProtocol(AutoHTTPProtocol):  # type: ignore[misc,valid-type]
        def connection_made(self, transport: asyncio.Transport) -> None:
            super().connection_made(transport)
            loop = asyncio.get_running_loop()
            self._patience = loop.call_later(receipt_s, self._close_unless_begun)

        def connection_lost(self, error: Exception | None) -> None:
            self._patience.cancel()  # it would keep the whole connection in memory until then
            super().connection_lost(error)

        def _close_unless_begun(self) -> None:
            if self.cycle is None and not self.transport.is_closing():
                self.transport.close()

    return SlowClientProtocol
