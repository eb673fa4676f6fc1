"""Runs the app under uvicorn: signals, drain and exit code."""

import asyncio
import contextlib
import errno
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any, Final

import uvicorn
from fastapi import FastAPI

from gpt2core import BackendError
from gpt2core.serve import logs
from gpt2core.serve.app import create_app, warn_of_typos
from gpt2core.serve.connection import connection_class
from gpt2core.serve.driver import Driver
from gpt2core.serve.settings import Settings

SIGNALS: Final = (signal.SIGINT, signal.SIGTERM)
DRAIN_GRACE_S: Final = 2.0
BACKLOG: Final = 2048
SPARE_DESCRIPTORS: Final = 64
"""Of open files, for all but connections."""
ACCEPT_PAUSE_S: Final = 1.0
"""Between two lines about connections that could not be accepted."""
DESCRIPTORS: Final = 2**20
"""Where the system sets no limit."""


def run(settings: Settings) -> None:
    """Serve until a signal ends it.

    Raises:
        RequestError: it would listen beyond this machine without a key.
        Gpt2CoreError: the model cannot be loaded.
        OSError: the address cannot be used.
    """
    settings.check_exposure()
    logs.configure(settings.log_level)
    warn_of_typos()
    app = create_app(settings)
    sock = listen(settings.host, settings.port)
    host, port = sock.getsockname()[:2]
    logs.event("info", "listening", host=host, port=port, model=settings.name)
    if sys.stderr.isatty():
        print(describe_address(settings, port), file=sys.stderr)
    server = Server(configure(app, settings), app.state.driver, settings.lame_duck_s)
    try:
        server.run(sockets=[sock])
    finally:
        sock.close()
    driver: Driver = app.state.driver
    if driver.failure is not None and driver.engine is None:
        raise driver.failure
    if not server.started:
        raise BackendError("the server could not start; its log says why")


def configure(app: FastAPI, settings: Settings) -> uvicorn.Config:
    """How uvicorn runs the app."""
    return uvicorn.Config(
        app,
        http=connection_class(settings, raise_descriptor_limit() - SPARE_DESCRIPTORS, app.state.doorkeeper),
        ws="none",
        log_config=None,
        access_log=False,
        server_header=False,
        date_header=False,
        timeout_graceful_shutdown=int(settings.drain_s + DRAIN_GRACE_S),
    )


def listen(host: str, port: int) -> socket.socket:
    """A socket that accepts connections.

    It names its protocol: asyncio sets TCP_NODELAY only on connections whose socket does, and without that
    each answer on a kept connection waits for the client's delayed acknowledgment, 40 ms.

    Raises:
        OSError: the address cannot be used.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        sock = socket.create_server((host, port), family=family, backlog=BACKLOG)
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            raise
        raise OSError(
            f"{host} port {port} is in use by another program; stop that, or choose another port with --port "
            "(0 takes a free one)"
        ) from error
    return socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP, fileno=sock.detach())


def describe_address(settings: Settings, port: int) -> str:
    """Where a person who has started the server can look at it."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(settings.host, settings.host)
    host = f"[{host}]" if ":" in host else host
    page = "" if settings.playground else "docs"
    key = "; leave the name empty, the API key is the password" if settings.api_keys else ""
    return f"Open http://{host}:{port}/{page} in a browser{key}. Ctrl-C stops the server."


def raise_descriptor_limit() -> int:
    """Let this process open as many files as it may; how many that is."""
    try:
        import resource
    except ImportError:  # Windows, which has no such limit
        return DESCRIPTORS
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with contextlib.suppress(ValueError, OSError):  # some systems allow less than they say
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return DESCRIPTORS if soft == resource.RLIM_INFINITY else soft


class Server(uvicorn.Server):
    """Drains after a signal, stops at once after a second one, and ends when the model cannot be loaded."""

    def __init__(self, config: uvicorn.Config, driver: Driver, lame_duck_s: float) -> None:
        super().__init__(config)
        self._driver = driver
        self._lame_duck_s = lame_duck_s
        self._has_signal = False
        self._told_s = -ACCEPT_PAUSE_S
        self._loop: asyncio.AbstractEventLoop

    async def startup(self, sockets: Any = None) -> None:
        """Begin to listen."""
        self._loop = asyncio.get_running_loop()
        self._loop.set_exception_handler(self._tell_error)
        await super().startup(sockets)

    def _tell_error(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """Log what nothing else caught.

        Python 3.11's asyncio goes on to accept when it has run out of descriptors, as often as the backlog is
        long, and says so each time: 2,048 tracebacks a second, for which the server waits if its log is read
        slowly.
        """
        error = context.get("exception")
        if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
            now_s = time.monotonic()
            if now_s - self._told_s >= ACCEPT_PAUSE_S:
                self._told_s = now_s
                logs.event("error", "out_of_descriptors", error=logs.describe_error(error))
            return
        loop.default_exception_handler(context)

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
        """The first signal drains, SIGTERM after the lame-duck time; the second ends it."""
        if self._has_signal:
            self.should_exit = self.force_exit = True
            return
        self._has_signal = True
        if sig == signal.SIGTERM and self._lame_duck_s > 0 and self._driver.state == "ready":
            self._loop.call_soon_threadsafe(self._leave)
        else:
            self._loop.call_soon_threadsafe(self._drain)

    def _leave(self) -> None:
        """Let load balancers see that it is not ready, while the requests they still send are answered."""
        self._driver.leave(self._lame_duck_s)
        self._loop.call_later(self._lame_duck_s, self._drain)

    def _drain(self) -> None:
        self.should_exit = True
        self._driver.drain()
