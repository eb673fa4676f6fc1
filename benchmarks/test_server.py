"""What a client of the HTTP server waits for, beside the same work in this process."""

import socket
import threading
import time
from collections.abc import Iterator

import httpx2
import pytest
import uvicorn

from gpt2core import GPT2
from gpt2core.serve import Settings, create_app
from gpt2core.testing import random_checkpoint

READY_S = 60
BODY = {"prompt": "ab", "max_new_tokens": 1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny checkpoint, so that what is measured is the server."""
    return str(random_checkpoint(tmp_path_factory.mktemp("served"), "tiny"))


@pytest.fixture(scope="module")
def client(folder: str) -> Iterator[httpx2.Client]:
    """Of a server on a socket of this machine, in a thread of this process."""
    app = create_app(Settings(model=folder, backend="numpy"))
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, access_log=False, ws="none"))
    listening = socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    try:
        with httpx2.Client(
            base_url=f"http://127.0.0.1:{listening.getsockname()[1]}", timeout=READY_S
        ) as client:
            end_s = time.monotonic() + READY_S
            while client.get("/readyz").status_code != 200:
                assert time.monotonic() < end_s, "the server did not become ready"
                time.sleep(0.01)
            yield client
    finally:
        server.should_exit = True
        thread.join(READY_S)
        listening.close()


def test_round_trip(benchmark, client):
    """One greedy token by POST /generate."""
    benchmark.group = "one token: server and library"
    answer = benchmark(lambda: client.post("/generate", json=BODY))
    assert answer.json()["generations"][0]["completion_tokens"] == 1


def test_round_trip_of_a_stream(benchmark, client):
    """The same as server-sent events, to the last."""
    benchmark.group = "one token: server and library"
    answer = benchmark(lambda: client.post("/generate", json={**BODY, "stream": True}))
    assert answer.text.rstrip().endswith("data: [DONE]")


def test_in_this_process(benchmark, folder):
    """The same token without a server."""
    benchmark.group = "one token: server and library"
    with GPT2.from_pretrained(folder, backend="numpy") as model:
        generation = benchmark(model.generate, "ab", max_new_tokens=1)
    assert len(generation.token_ids) == 1
