"""Who may hold how many places, and what it costs to be refused."""

import contextlib
import json
import logging
import socket

import httpx2
import pytest
from serving import HANG_S, Fake, post_bytes, serving, strict, until

from gpt2core.serve.places import Places
from gpt2core.serve.service import Service
from gpt2core.serve.state import Client

ANN, BOB, CARL = (Client(f"192.0.2.{i}") for i in (1, 2, 3))


def refused(places, client, count=1):
    refusal = places.refuse(client, count)
    return refusal and refusal.code


def test_a_client_holds_at_most_its_share_and_others_get_the_rest():
    places = Places(96, running=32, share=0.5)
    places.take(ANN, 32)
    assert refused(places, ANN, 32) == "client_queue_full"
    assert refused(places, ANN, 16) is None
    places.take(ANN, 16)
    places.take(BOB, 48)
    assert refused(places, CARL) == "queue_full"
    places.take(ANN, -32)
    assert refused(places, CARL, 32) is None


def test_one_request_larger_than_a_share_runs_and_takes_nothing_from_others():
    places = Places(96, running=32, share=0.5)
    assert refused(places, ANN, 256) is None  # nothing else runs
    places.take(ANN, 256)
    assert refused(places, ANN) == "client_queue_full"
    assert refused(places, BOB, 48) is None
    assert refused(places, BOB, 49) == "queue_full"
    places.take(BOB, 48)
    places.take(ANN, -256)
    places.take(BOB, -48)
    assert places.used == 0
    assert refused(places, BOB, 96) is None


def test_keys_are_clients_of_their_own_and_unknown_addresses_are_not_bounded_as_one():
    places = Places(96, running=32, share=0.5)
    places.take(Client("192.0.2.1", 1), 48)
    assert refused(places, Client("192.0.2.1", 1)) == "client_queue_full"
    assert refused(places, Client("192.0.2.1", 2)) is None
    nobody = Client(None)
    places.take(nobody, 40)
    assert refused(places, nobody, 8) is None
    assert refused(places, nobody, 9) == "queue_full"


def ask_from(server, address, body):
    """Begin a request from an address of this machine, whose answer nobody reads."""
    connection = socket.create_connection(("127.0.0.1", server.port), HANG_S, (address, 0))
    connection.sendall(post_bytes(json.dumps(body).encode()))
    return connection


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_requests_that_are_never_read_do_not_hold_all_places(share):
    fake = Fake()
    with serving(fake.load, client_share=share) as server, contextlib.ExitStack() as stack:
        fake.gate.clear()
        body = {"prompt": ["a"] * 8, "n": 4, "max_new_tokens": 60, "stream": True}
        for _ in range(3):
            stack.enter_context(ask_from(server, "127.0.0.2", body))
        until(lambda: server.driver.places.used >= 32)
        if share == 1.0:  # as it was: nobody else gets in
            until(lambda: server.driver.places.used == 96)
            assert server.generate("ab", max_new_tokens=3).status_code == 429
        else:
            fake.gate.set()
            assert server.generate("ab", max_new_tokens=3).status_code == 200
        fake.gate.set()


def full(stack, fake, **settings):
    """A server whose places are all taken, by four clients."""
    server = stack.enter_context(
        serving(fake.load, max_batch=2, max_queue=2, max_prompts=1, max_n=4, **settings)
    )
    stack.callback(fake.gate.set)
    fake.gate.clear()
    for i in range(4):
        address = f"127.0.0.{10 + i}"
        key = "Authorization: Bearer k\r\n"
        connection = socket.create_connection(("127.0.0.1", server.port), HANG_S, (address, 0))
        stack.enter_context(connection)
        connection.sendall(post_bytes(b'{"prompt": "a", "max_new_tokens": 60}', extra=key))
    until(lambda: server.driver.places.used == 4)
    return server


def test_a_refusal_looks_at_no_body_and_keeps_the_connection(monkeypatch):
    with contextlib.ExitStack() as stack:
        server = full(stack, Fake())
        monkeypatch.setattr(Service, "encode", None)
        monkeypatch.setattr("gpt2core.serve.body.parse", None)
        for _ in range(3):
            answer = server.client.post("/v1/completions", content=b"{", headers={"X-Request-ID": "mine"})
            assert (answer.status_code, answer.json()["error"]["code"]) == (429, "queue_full")
            assert answer.headers["retry-after"] == "1"
            assert answer.headers["x-request-id"] == "mine"
            assert answer.headers["x-content-type-options"] == "nosniff"
        assert len(server.uvicorn.server_state.connections) == 5
        name = 'gpt2core_requests_total{method="POST",route="/v1/completions",status="429"}'
        assert server.metric(name) == 3


def test_a_page_of_an_allowed_origin_can_read_when_to_try_again():
    with contextlib.ExitStack() as stack:
        server = full(stack, Fake(), allowed_origins="https://a.example")
        answer = server.client.post("/generate", json={}, headers={"Origin": "https://a.example"})
        assert (answer.status_code, answer.headers["retry-after"]) == (429, "1")
        assert answer.headers["access-control-allow-origin"] == "https://a.example"
        assert "Retry-After" in answer.headers["access-control-expose-headers"]


def test_refusals_are_one_line_of_the_log_together(caplog):
    with contextlib.ExitStack() as stack, caplog.at_level(logging.INFO, "gpt2core.serve"):
        server = full(stack, Fake())
        for _ in range(20):
            assert server.generate("a").status_code == 429
        until(lambda: sum(r.fields["requests"] for r in caplog.records if r.msg == "refused") == 20)
        assert sum(r.msg == "refused" for r in caplog.records) < 20
        assert [r for r in caplog.records if r.msg == "request"] == []


def test_a_refusal_of_a_full_queue_needs_the_key_and_minds_the_size_of_the_body():
    with contextlib.ExitStack() as stack:
        server = full(stack, Fake(), api_key="k", max_body_nbytes=1000)
        assert server.generate("a").status_code == 401
        key = {"Authorization": "Bearer k"}
        assert (
            server.generate(
                "a",
            ).status_code
            == 401
        )
        answer = server.client.post("/generate", content=b"{}", headers=key)
        assert answer.status_code == 429
        answer = server.client.post("/generate", content=b" " * 2000, headers=key)
        assert answer.status_code == 413


def test_while_it_drains_a_full_server_says_so():
    with contextlib.ExitStack() as stack:
        server = full(stack, Fake())
        server.driver._loop.call_soon_threadsafe(server.driver.drain)
        until(lambda: server.driver.state == "draining")
        answer = httpx2.post(f"{server.url}/generate", json={"prompt": "a"})
        assert (answer.status_code, strict(answer.content)["error"]["code"]) == (503, "draining")
