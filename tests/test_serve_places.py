"""Who may hold how many places, and what it costs to be refused."""

import contextlib
import json
import logging
import socket
import time

import httpx2
import pytest
from serving import HANG_S, Fake, post_bytes, raw, serving, strict, until

from gpt2core.serve.guard import Guard
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
    engine, inbox = server.driver.engine, server.driver._inbox
    until(lambda: engine.running + engine.waiting + len(inbox) == 4)  # all are encoded
    return server


def test_a_refusal_looks_at_no_body_and_keeps_the_connection(monkeypatch):
    with contextlib.ExitStack() as stack:
        server = full(stack, Fake())
        monkeypatch.setattr(Service, "encode", None)
        monkeypatch.setattr("gpt2core.serve.body.parse", None)
        for path in ["/v1/completions"] * 3 + ["/score"]:
            answer = server.client.post(path, content=b"{", headers={"X-Request-ID": "mine"})
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


# The same request once more


def send_all(connection, *parts):
    """Send parts, each in a segment of its own, and read one answer with its body."""
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    for part in parts:
        connection.sendall(part)
        time.sleep(0.02 if len(parts) > 1 else 0)
    return read_answer(connection)


def read_answer(connection):
    received = b""
    while b"\r\n\r\n" not in received:
        received += connection.recv(65536) or pytest.fail("closed")
    head, _, body = received.partition(b"\r\n\r\n")
    lines = dict(line.lower().split(b": ", 1) for line in head.split(b"\r\n")[1:])
    while len(body) < int(lines[b"content-length"]):
        body += connection.recv(65536)
    return int(head.split(b" ")[1]), lines, strict(body)


@contextlib.contextmanager
def watched(monkeypatch, **settings):
    """A full server, a connection to it, and the paths of the requests that its guard sees."""
    seen = []

    async def guard(self, scope, receive, send, inner=Guard.__call__):
        seen.append(scope.get("path"))
        await inner(self, scope, receive, send)

    fake = Fake()
    with contextlib.ExitStack() as stack:
        server = full(stack, fake, **settings)
        monkeypatch.setattr(Guard, "__call__", guard)
        connection = stack.enter_context(socket.create_connection(("127.0.0.1", server.port), HANG_S))
        yield server, fake, connection, seen


BODY = b'{"prompt": "a", "max_new_tokens": 2}'


def asking(extra="", body=BODY):
    return post_bytes(body, extra=extra).replace(b"Connection: close\r\n", b"")


def test_who_asks_again_while_the_queue_is_full_is_refused_without_the_app(monkeypatch):
    with watched(monkeypatch) as (server, fake, connection, seen):
        first = send_all(connection, asking())
        again = [send_all(connection, asking()) for _ in range(4)]
        split = asking().partition(b"\r\n\r\n")
        again.append(send_all(connection, split[0] + split[1], split[2]))  # as many clients send it
        again.append(send_all(connection, split[0] + split[1] + split[2][:9], split[2][9:]))
        assert seen == ["/generate"]
        assert first[0] == 429
        ids = [lines.pop(b"x-request-id") for _, lines, _ in (first, *again)]
        assert len(set(ids)) == len(ids)
        assert again == [first] * 6
        name = 'gpt2core_requests_total{method="POST",route="/generate",status="429"}'
        assert server.metric(name) == 7
        fake.gate.set()
        until(server.idle)
        status, _, answer = send_all(connection, asking())
        assert (status, answer["usage"]["completion_tokens"]) == (200, 2)


@pytest.mark.parametrize(
    ("extra", "body", "status"),
    [
        ("Host: evil", BODY, 400),
        ("Origin: http://evil.example\r\n", BODY, 403),
        ("Authorization: Bearer wrong\r\n", BODY, 401),
        ("", BODY, 401),
        ("Authorization: Bearer k\r\nX-Forwarded-For: 192.0.2.1\r\n", BODY, 429),
        ("Authorization: Bearer k\r\n", b" " * 2000, 413),
        ("Authorization: Bearer k\r\n", BODY + b" ", 429),
    ],
)
def test_other_headers_go_the_whole_way(monkeypatch, extra, body, status):
    with watched(monkeypatch, api_key="k", max_body_nbytes=1000) as (_, _, connection, seen):
        for _ in range(2):
            assert send_all(connection, asking("Authorization: Bearer k\r\n"))[0] == 429
        assert len(seen) == 1
        other = asking("" if extra.startswith("Host") else extra, body)
        if extra.startswith("Host"):
            other = other.replace(b"Host: 127.0.0.1", extra.encode())
        assert send_all(connection, other)[0] == status
        assert len(seen) == 2


def test_a_client_that_closes_after_each_request_is_refused_so_too(monkeypatch):
    with watched(monkeypatch) as (server, _, _, seen):
        answers = [raw(server.port, post_bytes(BODY, extra="X-Request-ID: mine\r\n")) for _ in range(3)]
        assert len(seen) == 1
        for answer in answers:
            head = answer.partition(b"\r\n\r\n")[0].lower()
            assert head.startswith(b"http/1.1 429")
            assert b"\r\nx-request-id: mine" in head
            assert b"\r\nconnection: close" in head


def test_requests_ahead_of_their_answers_are_all_answered(monkeypatch):
    with watched(monkeypatch) as (_, _, connection, seen):
        assert send_all(connection, asking())[0] == 429
        connection.sendall(asking() * 3)
        received = b""
        while received.count(b"HTTP/1.1 429") < 3 or not received.endswith(b"}"):
            received += connection.recv(65536)
        assert len(seen) == 4
        assert send_all(connection, asking())[0] == 429
        assert len(seen) == 4


def test_the_body_of_a_known_request_must_come_in_time(monkeypatch):
    with watched(monkeypatch, receipt_s=0.3) as (_, _, connection, seen):
        assert send_all(connection, asking())[0] == 429
        status, lines, body = send_all(connection, asking()[:-5])
        assert (status, body["error"]["code"], lines[b"connection"]) == (408, "slow_body", b"close")
        assert connection.recv(100) == b""
        assert len(seen) == 1


def test_refusals_that_nobody_reads_do_not_pile_up(monkeypatch):
    with watched(monkeypatch, stall_s=0.5) as (server, _, _, _), socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", server.port))
        assert send_all(connection, asking())[0] == 429
        port = connection.getsockname()[1]
        [served] = [c for c in server.uvicorn.server_state.connections if c.client[1] == port]
        waiting_nbytes = []
        with contextlib.suppress(ConnectionError):
            for _ in range(20_000):
                connection.sendall(asking())
                waiting_nbytes.append(served.transport.get_write_buffer_size())
                time.sleep(0.0003)
        assert served.transport.is_closing()
        assert 0 < max(waiting_nbytes) < 200_000
