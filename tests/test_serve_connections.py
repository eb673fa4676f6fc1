"""Connections: what they wait for, how much they may send and leave unread, and that they end."""

import contextlib
import json
import os
import resource
import socket
import subprocess
import sys
import time

import pytest
from serving import EVENT_LOOPS, HANG_S, Fake, post_bytes, raw, serving, strict, until

from gpt2core.serve.server import raise_descriptor_limit
from gpt2core.testing import random_checkpoint

LOOPS = pytest.mark.parametrize("loop", EVENT_LOOPS)
LIVEZ = b"GET /livez HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"


def connect(server):
    return socket.create_connection(("127.0.0.1", server.port), timeout=HANG_S)


def receive_answer(connection):
    """The next answer of a kept connection."""
    data = b""
    while b"\r\n\r\n" not in data:
        data += connection.recv(1)
    [length] = [int(line[15:]) for line in data.lower().split(b"\r\n") if line.startswith(b"content-length")]
    body = b""
    while len(body) < length:
        body += connection.recv(length - len(body))
    return data, body


def is_closed(connection, timeout_s):
    """Whether the server ends the connection in time."""
    connection.settimeout(timeout_s)
    try:
        while connection.recv(65536):
            pass
    except TimeoutError:
        return False
    except ConnectionError:
        pass
    return True


def send_slowly(connection, data, pause_s):
    """Send byte by byte; whether the server has ended the connection before the last."""
    connection.settimeout(pause_s)
    for i in range(len(data)):
        try:
            connection.sendall(data[i : i + 1])
            if not connection.recv(65536):
                return True
        except TimeoutError:
            continue
        except ConnectionError:
            return True
    return False


def memory_nbytes():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@LOOPS
def test_answers_leave_at_once_on_every_connection(loop):
    with serving(Fake().load, loop=loop) as server, connect(server) as connection:
        connection.sendall(LIVEZ)
        receive_answer(connection)
        [kept] = server.uvicorn.server_state.connections
        accepted = kept.transport.get_extra_info("socket")
        assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) == 1


# Headers


@LOOPS
@pytest.mark.parametrize("kept", [False, True], ids=["first request", "kept connection"])
def test_headers_without_an_end_are_cut_by_size_and_take_no_memory(loop, kept):
    with serving(Fake().load, loop=loop) as server, connect(server) as connection:
        if kept:
            connection.sendall(LIVEZ)
            receive_answer(connection)
        before_nbytes, sent_nbytes = memory_nbytes(), 0
        connection.sendall(LIVEZ[:-2] + b"X-Long: ")
        with contextlib.suppress(ConnectionError):
            while sent_nbytes < 2**26:
                sent_nbytes += connection.send(b"a" * 2**16)
        assert sent_nbytes < 2**26
        assert memory_nbytes() - before_nbytes < 2**25
        until(lambda: not server.uvicorn.server_state.connections)
        assert server.client.get("/livez").status_code == 200


@pytest.mark.parametrize(
    "lines",
    [
        "X-Long: " + "a" * 40_000 + "\r\n",
        "".join(f"X-{i}: a\r\n" for i in range(120)),
        "X-A: " + "a" * 500 + "\r\n",
    ],
    ids=["bytes", "lines", "within"],
)
def test_headers_of_too_many_bytes_or_lines_are_431(lines):
    with serving(Fake().load) as server:
        answer = raw(server.port, LIVEZ[:-2] + f"Connection: close\r\n{lines}\r\n".encode())
        status = int(answer.split(b" ", 2)[1])
        assert status == (200 if "X-A" in lines else 431)
        if status == 431:
            error = strict(answer.partition(b"\r\n\r\n")[2])["error"]
            assert error["code"] == "headers_too_large"


@LOOPS
@pytest.mark.parametrize("requests", [0, 2], ids=["first request", "later request"])
def test_headers_that_come_slowly_are_cut_on_every_request_of_a_connection(loop, requests):
    with serving(Fake().load, loop=loop, receipt_s=0.4) as server, connect(server) as connection:
        for _ in range(requests):
            connection.sendall(LIVEZ)
            receive_answer(connection)
        assert send_slowly(connection, LIVEZ[:-1] + b"X-Slow: aaaaaaaaaaaaaaaaaaaaaaaaaa", 0.05)
        until(lambda: not server.uvicorn.server_state.connections)


def test_a_body_that_comes_slowly_after_its_answer_ends_too():
    with serving(Fake().load, receipt_s=0.4) as server, connect(server) as connection:
        connection.sendall(post_bytes(b"", length=100_000, path="/nowhere").replace(b"close", b"keep-alive"))
        assert send_slowly(connection, b" " * 200, 0.05)


def test_a_connection_is_kept_for_as_long_as_the_setting_says():
    with serving(Fake().load, keep_alive_s=0.3) as server, connect(server) as connection:
        connection.sendall(LIVEZ)
        receive_answer(connection)
        assert is_closed(connection, HANG_S)


def test_what_is_not_http_is_400_in_json():
    with serving(Fake().load) as server:
        answer = raw(server.port, b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n")
        assert answer.startswith(b"HTTP/1.1 400 ")
        assert strict(answer.partition(b"\r\n\r\n")[2])["error"]["code"] == "malformed_request"
        server.check_works()


# Requests behind one another


def test_requests_that_come_before_the_answers_are_answered_in_order():
    fake = Fake()
    with serving(fake.load) as server, connect(server) as connection:
        fake.gate.clear()
        bodies = [json.dumps({"prompt": "a", "max_new_tokens": count}).encode() for count in (1, 2, 3)]
        requests = [post_bytes(body).replace(b"close", b"keep-alive") for body in bodies]
        connection.sendall(requests[0])
        until(lambda: server.driver.requests == 1)
        connection.sendall(requests[1] + requests[2][:50])
        time.sleep(0.05)
        connection.sendall(requests[2][50:])
        fake.gate.set()
        for count in (1, 2, 3):
            _, body = receive_answer(connection)
            assert strict(body)["usage"]["completion_tokens"] == count


@LOOPS
def test_a_client_that_leaves_is_seen_also_behind_a_request_sent_ahead(loop):
    fake = Fake()
    with serving(fake.load, loop=loop) as server:
        fake.delay_s = 0.01
        with connect(server) as connection:
            body = json.dumps({"prompt": "a", "max_new_tokens": 60}).encode()
            connection.sendall(post_bytes(body).replace(b"close", b"keep-alive"))
            until(lambda: server.driver.engine.running == 1)
            connection.sendall(LIVEZ * 3)
            time.sleep(0.05)
        fake.gate.clear()  # nothing ends it but that its client has gone
        until(lambda: server.driver.requests == 0)
        fake.gate.set()


def test_a_client_that_sends_on_and_on_ahead_is_let_go():
    fake = Fake()
    with serving(fake.load, max_body_nbytes=2000) as server, connect(server) as connection:
        fake.gate.clear()
        body = json.dumps({"prompt": "a", "max_new_tokens": 5}).encode()
        connection.sendall(post_bytes(body).replace(b"close", b"keep-alive"))
        until(lambda: server.driver.requests == 1)
        with contextlib.suppress(ConnectionError):
            for _ in range(10_000):
                connection.sendall(LIVEZ * 100)
        until(lambda: server.driver.requests == 0)
        fake.gate.set()


@LOOPS
def test_a_stream_for_http_1_0_has_no_chunks(loop):
    with serving(Fake().load, loop=loop) as server:
        body = json.dumps({"prompt": "a", "max_new_tokens": 3, "stream": True}).encode()
        answer = raw(server.port, post_bytes(body).replace(b"HTTP/1.1", b"HTTP/1.0"))
        head, _, events = answer.partition(b"\r\n\r\n")
        assert b"transfer-encoding" not in head.lower()
        assert events.startswith(b"data: ")
        assert events.endswith(b"data: [DONE]\n\n")


# Readers that stall


@LOOPS
@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
def test_a_client_that_reads_nothing_is_let_go_after_the_setting(loop, stream):
    with serving(Fake(context=2048).load, loop=loop, stall_s=0.3) as server, socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
        connection.connect(("127.0.0.1", server.port))
        until(lambda: server.uvicorn.server_state.connections)
        [kept] = server.uvicorn.server_state.connections
        until(lambda: kept.transport is not None)
        kept.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        body = {"prompt": "a", "max_new_tokens": 2000, "logprobs": 5, "stream": stream}
        connection.sendall(post_bytes(json.dumps(body).encode()))
        until(lambda: not server.uvicorn.server_state.connections)
        until(server.idle)
        server.check_works()


def test_a_client_that_reads_slowly_gets_all_of_its_answer():
    with serving(Fake(context=2048).load, stall_s=0.3) as server, socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", server.port))
        body = {"prompt": "a", "max_new_tokens": 1000, "logprobs": 5, "stream": True}
        connection.sendall(post_bytes(json.dumps(body).encode()))
        received = b""
        while chunk := connection.recv(8192):
            received += chunk
            time.sleep(0.01)
        assert b"data: [DONE]" in received


# Too many of them


def test_one_connection_too_many_is_503_and_is_logged(caplog):
    with serving(Fake().load, max_connections=3) as server, contextlib.ExitStack() as stack:
        caplog.set_level("WARNING", "gpt2core.serve")
        held = [stack.enter_context(connect(server)) for _ in range(3)]
        until(lambda: len(server.uvicorn.server_state.connections) == 3)
        answer = raw(server.port, b"")
        assert answer.startswith(b"HTTP/1.1 503 ")
        assert strict(answer.partition(b"\r\n\r\n")[2])["error"]["code"] == "too_many_connections"
        assert "too_many_connections" in [record.msg for record in caplog.records]
        for connection in held:
            connection.close()
        until(lambda: not server.uvicorn.server_state.connections)
        server.check_works()


@LOOPS
def test_more_clients_than_descriptors_are_refused_and_logged_and_the_server_lives_on(tmp_path, loop):
    most = 128
    environment = dict(os.environ)
    if loop == "asyncio":  # as where uvloop is not installed
        hidden = tmp_path / "hidden"
        hidden.mkdir()
        (hidden / "uvloop.py").write_text("raise ImportError")
        environment["PYTHONPATH"] = os.pathsep.join([str(hidden), os.environ.get("PYTHONPATH", "")])
    serve = f"{sys.executable} -m gpt2core serve --port 0 --backend numpy"
    command = ["sh", "-c", f"ulimit -n {most}; exec {serve} --model {random_checkpoint(tmp_path)}"]
    running = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    lines = iter(running.stderr)

    def read_until(name):
        return next(event for event in map(json.loads, lines) if event["event"] == name)

    def is_alive():
        try:
            return raw(port, LIVEZ[:-2] + b"Connection: close\r\n\r\n").startswith(b"HTTP/1.1 200")
        except ConnectionResetError:  # refused still: the server has not yet seen that the others went
            return False

    try:
        port = read_until("listening")["port"]
        read_until("ready")
        with contextlib.ExitStack() as stack:
            for _ in range(2 * most):
                stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=HANG_S))
            assert read_until("too_many_connections")["connections"] < most
        until(is_alive)
    finally:
        running.kill()
        running.wait()
        running.stderr.close()


def test_the_server_may_open_as_many_files_as_the_system_lets_it():
    assert raise_descriptor_limit() == resource.getrlimit(resource.RLIMIT_NOFILE)[1]
