"""A server for tests: the real app under real uvicorn on a socket, or as a process of its own."""

import contextlib
import importlib.util
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx2
import uvicorn
from fakes import FakeBackend, byte_tokenizer, config, endless

from gpt2core import GPT2
from gpt2core.serve import Settings, create_app
from gpt2core.serve.app import load_model
from gpt2core.serve.server import configure, listen

EVENT_LOOPS = ("asyncio", "uvloop") if importlib.util.find_spec("uvloop") else ("asyncio",)
"""The extra `dev` brings both, the extra `serve` one; scripts/test-extras runs tests with that alone."""
HANG_S = 20
"""What takes so long on the slowest machine hangs."""


def until(true: Callable[[], object], timeout_s: float = HANG_S) -> None:
    """Wait until something is so."""
    end_s = time.monotonic() + timeout_s
    while not true():
        assert time.monotonic() < end_s, "it did not come to be"
        time.sleep(0.002)


class Server:
    """An app that answers on `url`."""

    def __init__(self, settings: Settings, load: Callable[[Settings], GPT2], loop: str) -> None:
        self.settings = settings
        self.app = create_app(settings, load=load)
        self.driver = self.app.state.driver
        config = configure(self.app, settings)
        config.loop = loop
        self.socket = listen("127.0.0.1", 0)
        self.port = self.socket.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.client = httpx2.Client(base_url=self.url, timeout=HANG_S)
        self.uvicorn = uvicorn.Server(config)
        self.thread = threading.Thread(
            target=self.uvicorn.run, kwargs={"sockets": [self.socket]}, daemon=True
        )

    def post(self, path: str, body: Any, **options: Any) -> httpx2.Response:
        return self.client.post(path, json=body, **options)

    def generate(self, prompt: Any = "ab", **options: Any) -> httpx2.Response:
        return self.post("/generate", {"prompt": prompt, **options})

    def events(self, path: str, body: Any) -> list[Any]:
        """All events of a stream; `[DONE]` is the string."""
        with self.client.stream("POST", path, json={**body, "stream": True}) as response:
            assert response.status_code == 200, response.read()
            assert response.headers["content-type"].startswith("text/event-stream")
            return events_of(response.read())

    def metric(self, name: str) -> float:
        found = re.search(rf"^{re.escape(name)} (\S+)$", self.client.get("/metrics").text, re.MULTILINE)
        assert found, name
        return float(found[1])

    def idle(self) -> bool:
        """Whether every slot and every place of the queue is free."""
        engine = self.driver.engine
        return not (self.driver.requests or engine.running or engine.waiting or self.driver._ticket_of)

    def check_works(self) -> None:
        """The next request is answered."""
        assert self.generate("next", max_new_tokens=3).status_code == 200


def events_of(data: bytes) -> list[Any]:
    texts = [part.removeprefix(b"data: ") for part in data.split(b"\n\n") if part]
    return [text.decode() if text == b"[DONE]" else strict(text) for text in texts]


def strict(data: bytes | str) -> Any:
    """JSON without NaN."""

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} in JSON")

    return json.loads(data, parse_constant=refuse)


@contextlib.contextmanager
def serving(
    load: Callable[[Settings], GPT2] = load_model, *, ready: bool = True, loop: str = "auto", **settings: Any
) -> Iterator[Server]:
    """Run a server in a thread of this process."""
    server = Server(Settings(**settings), load, loop)
    server.thread.start()
    try:
        until(lambda: server.uvicorn.started)
        if ready:
            until(lambda: server.driver.state == "ready")
        yield server
    finally:
        server.uvicorn.should_exit = True
        server.thread.join(HANG_S)
        assert not server.thread.is_alive()
        server.client.close()
        server.socket.close()


class Fake:
    """A model whose steps a test can hold, slow down or break."""

    def __init__(self, context: int = 64, logits_of: Any = endless) -> None:
        self.gate = threading.Event()  # steps wait for it
        self.gate.set()
        self.delay_s = 0.0
        self.raises: BaseException | None = None
        self.after: Callable[..., None] | None = None
        self.backend = FakeBackend(config(context), logits_of, before=self._before, after=self._after)

    def load(self, settings: Settings) -> GPT2:
        limits = {"max_batch": settings.max_batch, "cache_nbytes": settings.cache_nbytes}
        return GPT2(self.backend, byte_tokenizer(), **limits, speculation=settings.speculation)

    def _before(self, batch: Any) -> None:
        if self.delay_s:
            time.sleep(self.delay_s)
        assert self.gate.wait(HANG_S)
        if self.raises is not None:
            raise self.raises

    def _after(self, batch: Any, logits: Any) -> None:
        if self.after is not None:
            self.after(batch, logits)


@contextlib.contextmanager
def process(*options: str, **environment: str) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """`gpt2core serve` as a process of its own, ready; and its URL."""
    command = [sys.executable, "-m", "gpt2core", "serve", "--port", "0", *options]
    running = subprocess.Popen(command, stderr=subprocess.PIPE, env={**os.environ, **environment})
    assert running.stderr is not None
    reader = threading.Thread(target=running.stderr.read, daemon=True)  # or it would block on a full pipe
    try:
        port = 0
        for line in running.stderr:
            if not line.startswith(b"{"):  # native says so when it is compiled first
                continue
            event = json.loads(line)
            port = event["port"] if event["event"] == "listening" else port
            if event["event"] == "ready":
                break
        assert port, running.wait(HANG_S)
        reader.start()
        yield running, f"http://127.0.0.1:{port}"
    finally:
        if running.poll() is None:
            running.send_signal(signal.SIGKILL)
        running.wait(HANG_S)
        if reader.ident is not None:
            reader.join(HANG_S)
        running.stderr.close()


def raw(port: int, data: bytes, *, half_close: bool = False) -> bytes:
    """Send bytes as they are and read until the server closes."""
    with socket.create_connection(("127.0.0.1", port), timeout=HANG_S) as connection:
        connection.sendall(data)
        if half_close:
            connection.shutdown(socket.SHUT_WR)
        received = b""
        while chunk := connection.recv(65536):
            received += chunk
        return received


def post_bytes(body: bytes, *, path: str = "/generate", length: int | None = None, extra: str = "") -> bytes:
    """A whole request, for `raw`; the server closes after it."""
    return (
        f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nConnection: close\r\n"
        f"Content-Length: {len(body) if length is None else length}\r\n{extra}\r\n"
    ).encode() + body
