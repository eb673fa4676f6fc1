"""A headless browser, and a server whose answers a test plants."""

import contextlib
import shutil
import socket
import threading

import pytest
import uvicorn
from playwright.sync_api import sync_playwright


@pytest.fixture(scope="module")
def planted():
    # not above: this file may be read before shape checks are in place
    from pages import Planted
    from serving import HANG_S, until

    app = Planted()
    sock = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app.app, log_config=None, ws="none", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]}, daemon=True)
    thread.start()
    until(lambda: server.started)
    app.url = f"http://127.0.0.1:{sock.getsockname()[1]}/"
    yield app
    server.should_exit = True
    thread.join(HANG_S)
    sock.close()


@pytest.fixture(scope="module")
def browser():
    path = shutil.which("chromium")
    assert path, "these tests need a browser: apt-get install chromium"
    with (
        sync_playwright() as playwright,
        contextlib.closing(playwright.chromium.launch(executable_path=path)) as running,
    ):
        yield running


@pytest.fixture
def open_page(browser):
    """Opens a page; whatever the browser complains of fails the test, refused scripts and styles among it."""
    from serving import HANG_S

    complaints, contexts = [], []
    allowed = ["Autofocus processing was blocked"]  # a test may focus a field before the page does

    def open_(url, *, expected=(), **options):
        allowed.extend(expected)
        contexts.append(browser.new_context(**options))
        page = contexts[-1].new_page()
        page.set_default_timeout(1000 * HANG_S)
        page.on("console", lambda line: complaints.append(line.text) if line.type != "log" else None)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: complaints.append(request.url) if foreign(request, url) else None)
        page.goto(url)
        return page

    yield open_
    for context in contexts:
        context.close()
    assert [text for text in complaints if not any(part in text for part in allowed)] == []


def foreign(request, url):
    return not request.url.startswith(url)


@pytest.fixture
def page(planted, open_page):
    planted.forget()
    return open_page(planted.url, expected=["Failed to load resource"])
