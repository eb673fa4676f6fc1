"""What must hold when something goes wrong: clients that leave, full queues, engines that break, signals."""

import concurrent.futures
import json
import signal
import socket
import time

import httpx2
import numpy as np
import pytest
from serving import HANG_S, Fake, events_of, post_bytes, process, serving, until

from gpt2core.errors import CheckpointError
from gpt2core.serve.errors import deadline_exceeded
from gpt2core.testing import random_checkpoint


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(random_checkpoint(tmp_path_factory.mktemp("tiny"), n_positions=512))


def in_threads(count, function):
    """Start calls at the same time; their results are futures."""
    pool = concurrent.futures.ThreadPoolExecutor(count)
    futures = [pool.submit(function, i) for i in range(count)]
    pool.shutdown(wait=False)
    return futures


# Clients that leave


def connect(server, *, stream, tokens=60):
    body = {"prompt": "ab", "max_new_tokens": tokens, "stream": stream}
    connection = socket.create_connection(("127.0.0.1", server.port), timeout=HANG_S)
    connection.sendall(post_bytes(json.dumps(body).encode()))
    return connection


@pytest.mark.parametrize("abrupt", [True, False], ids=["reset", "closed"])
@pytest.mark.parametrize("where", ["queued", "prefill", "stream", "waiting"])
def test_a_client_that_leaves_frees_its_slot_and_its_place(where, abrupt):
    fake = Fake()
    with serving(fake.load, max_batch=1, max_queue=64) as server:
        for _ in range(6):
            neighbour = None
            fake.delay_s = 0.005
            if where == "queued":
                neighbour = connect(server, stream=True)
                until(lambda: server.driver.engine.running == 1)
            if where == "prefill":
                fake.gate.clear()
            connection = connect(server, stream=where in ("queued", "stream"))
            if where == "stream":
                received = b""
                while b"data: " not in received:
                    received += connection.recv(65536)
            until(lambda: server.driver.engine.waiting == 1 or where != "queued")
            until(lambda: server.driver.requests >= 1)
            if abrupt:
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            connection.close()
            until(lambda n=neighbour: server.driver.requests == (n is not None))
            fake.gate.set()
            if neighbour is not None:
                assert server.driver.engine.running == 1  # the neighbour goes on
                neighbour.close()
            until(server.idle)
            fake.delay_s = 0.0
            server.check_works()


def test_a_client_that_left_before_its_answer_is_counted_and_is_no_error(caplog):
    fake = Fake()
    with serving(fake.load) as server:
        fake.delay_s = 0.01
        connection = connect(server, stream=False)
        until(lambda: server.driver.requests == 1)
        connection.close()
        until(server.idle)
        fake.delay_s = 0.0
        name = 'gpt2core_requests_total{method="POST",route="/generate",status="499"}'
        until(lambda: name in server.client.get("/metrics").text)
    assert "request_failed" not in [record.msg for record in caplog.records]


def test_a_client_that_leaves_during_its_upload_is_499_and_no_error(caplog):
    with serving(Fake().load) as server:
        with socket.create_connection(("127.0.0.1", server.port), timeout=HANG_S) as connection:
            connection.sendall(post_bytes(b'{"prompt": "a', length=1000))
            until(lambda: server.uvicorn.server_state.tasks)
        name = 'gpt2core_requests_total{method="POST",route="/generate",status="499"}'
        until(lambda: name in server.client.get("/metrics").text)
        assert 'status="500"' not in server.client.get("/metrics").text
    assert "request_failed" not in [record.msg for record in caplog.records]


def test_a_client_that_closes_only_its_sending_side_still_gets_its_answer_or_is_let_go():
    with serving(Fake().load) as server:
        connection = connect(server, stream=False, tokens=5)
        connection.shutdown(socket.SHUT_WR)
        connection.recv(65536)
        connection.close()
        until(server.idle)
        server.check_works()


def test_a_stream_that_nobody_reads_is_given_up_after_the_deadline(folder):
    with serving(model=folder, deadline_s=1.0) as server:
        body = {"prompt": "a", "max_new_tokens": 500, "logprobs": 5, "n": 4, "stream": True}
        with socket.socket() as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
            connection.connect(("127.0.0.1", server.port))
            connection.sendall(post_bytes(json.dumps(body).encode()))
            until(lambda: server.driver.requests == 1)
            until(server.idle)
            server.check_works()


# Back-pressure and deadlines


def test_a_full_queue_is_429_at_once_and_the_others_are_served():
    fake = Fake()
    with serving(fake.load, max_batch=4, max_queue=4, max_prompts=2, max_n=2, client_share=1) as server:
        fake.gate.clear()
        asked = in_threads(8, lambda i: server.generate("ab", max_new_tokens=3))
        until(lambda: server.driver.requests == 8)
        refused = server.generate("ab", max_new_tokens=3)
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "queue_full")
        assert int(refused.headers["retry-after"]) >= 1
        fake.gate.set()
        assert [one.result(HANG_S).status_code for one in asked] == [200] * 8
        until(server.idle)
        server.check_works()


@pytest.mark.parametrize("clients", [1, 8, 32, 128])
def test_any_number_of_clients_gets_answers_or_429_and_nothing_hangs(folder, clients):
    with serving(model=folder, client_share=1) as server:
        asked = in_threads(clients, lambda i: server.generate(f"ab {i}", max_new_tokens=4))
        statuses = [one.result(60).status_code for one in asked]
        assert set(statuses) <= {200, 429}
        assert statuses.count(200) >= min(clients, 96)
        until(server.idle)


def test_past_the_deadline_an_answer_is_504_and_a_stream_ends_with_an_error_and_no_done():
    fake = Fake()
    with serving(fake.load, deadline_s=0.3) as server:
        fake.delay_s = 0.05
        answer = server.generate("ab", max_new_tokens=50)
        assert (answer.status_code, answer.json()["error"]["code"]) == (504, "deadline_exceeded")
        events = server.events("/generate", {"prompt": "ab", "max_new_tokens": 50})
        assert len(events) > 1
        assert events[-1]["error"]["code"] == "deadline_exceeded"
        assert "[DONE]" not in events
        until(server.idle)
        fake.delay_s = 0.0
        server.check_works()


def test_a_short_request_takes_part_in_each_step_beside_a_long_one():
    fake = Fake(context=512)
    with serving(fake.load) as server:
        fake.delay_s = 0.004
        before = len(fake.backend.batches)
        [long] = in_threads(1, lambda i: server.generate("ab", max_new_tokens=500))
        until(lambda: server.driver.engine.running)
        for _ in range(3):
            first = len(fake.backend.batches)
            server.generate("cd", max_new_tokens=5)
            steps = [len(batch.lengths) for batch in fake.backend.batches[first:]]
            begin = steps.index(2)
            assert steps[begin : begin + 5] == [2] * 5  # its prompt and four tokens, one step after the other
            assert steps.count(2) == 5
        assert long.result(HANG_S).status_code == 200
        assert len(fake.backend.batches) - before == 500


# Engines that break


def test_logits_that_are_no_numbers_end_their_own_request_only():
    fake = Fake()
    with serving(fake.load) as server:

        def poison(batch, logits):
            logits[batch.lengths == 3] = np.nan  # the prefill of the prompt of three tokens

        fake.after = poison
        answer = server.generate("abc", max_new_tokens=3)
        assert (answer.status_code, answer.json()["error"]["type"]) == (500, "numerical_error")
        assert "'fake'" in answer.json()["error"]["message"]
        events = server.events("/generate", {"prompt": "abc", "max_new_tokens": 3})
        assert [list(event) for event in events] == [["error"]]
        server.check_works()
        assert server.client.get("/readyz").status_code == 200


@pytest.mark.parametrize(
    "error", [RuntimeError("broken"), SystemExit("gone")], ids=["exception in a step", "thread ends"]
)
def test_when_the_engine_breaks_every_waiter_has_an_error_and_readiness_says_so(error):
    fake = Fake()
    with serving(fake.load, max_batch=2) as server:
        fake.gate.clear()
        asked = in_threads(4, lambda i: server.generate("ab", max_new_tokens=5))
        streams = in_threads(
            2,
            lambda i: (
                server.client.post(
                    "/generate", json={"prompt": "ab", "max_new_tokens": 5, "stream": True}
                ).content
            ),
        )
        until(lambda: server.driver.requests == 6)
        fake.raises = error
        fake.gate.set()
        for one in asked:
            assert one.result(HANG_S).status_code == 503
            assert one.result().json()["error"]["code"] == "engine_failed"
        for one in streams:
            events = events_of(one.result(HANG_S))
            assert events[-1]["error"]["code"] == "engine_failed"
            assert "[DONE]" not in events
        fake.raises = None
        for path in ("/readyz", "/livez"):
            assert server.client.get(path).status_code == 503
        later = server.generate("ab")
        assert (later.status_code, later.json()["error"]["code"]) == (503, "engine_failed")
        assert server.driver.requests == 0


def test_while_the_model_is_loaded_it_is_live_and_not_ready():
    import threading

    fake, gate = Fake(), threading.Event()

    def load(settings):
        assert gate.wait(HANG_S)
        return fake.load(settings)

    with serving(load, ready=False) as server:
        assert server.client.get("/livez").status_code == 200
        ready = server.client.get("/readyz")
        assert (ready.status_code, ready.json()["error"]["code"]) == (503, "loading")
        assert server.generate("ab").status_code == 503
        assert server.client.get("/v1/models").status_code == 200
        gate.set()
        until(lambda: server.client.get("/readyz").status_code == 200)
        server.check_works()


def test_a_model_that_cannot_be_loaded_or_cannot_generate_is_never_ready():
    def load(settings):
        raise CheckpointError("no such model")

    broken = Fake()
    broken.raises = RuntimeError("broken")
    for loader in (load, broken.load):
        with serving(loader, ready=False) as server:
            until(lambda one=server: one.driver.state == "failed")
            assert server.client.get("/readyz").status_code == 503
            assert "no such model" not in server.client.get("/readyz").text


def test_an_error_that_nobody_expected_is_500_and_tells_nothing(monkeypatch):
    from gpt2core.serve.service import Service

    def broken(*_):
        raise ZeroDivisionError("secret")

    with serving(Fake().load) as server:
        with monkeypatch.context() as patch:
            patch.setattr(Service, "encode", broken)
            answer = server.generate("ab")
        assert (answer.status_code, answer.json()["error"]["code"]) == (500, "internal_error")
        assert "secret" not in answer.text
        until(server.idle)
        server.check_works()


def test_the_engine_and_the_model_are_closed_at_the_end():
    fake = Fake()
    with serving(fake.load) as server:
        server.check_works()
        engine = server.driver.engine
    assert engine.closed
    assert fake.backend.closed == 1


# Signals, on a process of its own


def test_after_sigterm_what_runs_is_finished_and_the_exit_code_is_0(folder):
    with process("--model", folder) as (running, url):

        def ask(i):
            body = {"prompt": f"ab {i}", "max_new_tokens": 300, "stream": i % 2 == 0}
            return httpx2.post(f"{url}/generate", json=body, timeout=HANG_S)

        asked = in_threads(10, ask)
        until(lambda: b"gpt2core_requests_running 10.0" in httpx2.get(f"{url}/metrics").content)
        running.send_signal(signal.SIGTERM)
        answers = [one.result(HANG_S) for one in asked]
        assert running.wait(HANG_S) == 0
    for i, answer in enumerate(answers):
        assert answer.status_code == 200
        if i % 2 == 0:
            *_, last, done = events_of(answer.content)
            assert (done, last["usage"]["completion_tokens"]) == ("[DONE]", 300)
        else:
            assert answer.json()["usage"]["completion_tokens"] == 300


def long_stream(url):
    """A stream that does not end by itself in the time of a test, begun."""
    client = httpx2.Client(timeout=HANG_S)
    body = {"prompt": "a", "max_new_tokens": 511, "stream": True, "n": 4}
    stream = client.stream("POST", f"{url}/generate", json=body)
    return client, stream


def test_kill_9_midway_is_an_error_for_the_client_and_never_a_clean_end(folder):
    with process("--model", folder) as (running, url):
        client, stream = long_stream(url)
        with client, stream as response:
            chunks = response.iter_raw()
            received = next(chunks)
            running.send_signal(signal.SIGKILL)
            with pytest.raises(httpx2.TransportError):
                received += b"".join(chunks)
        assert b"data: " in received
        assert b"[DONE]" not in received
        assert running.wait(HANG_S) == -signal.SIGKILL
    with process("--model", folder) as (_, url):
        assert httpx2.get(f"{url}/readyz").status_code == 200


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_stops_at_once(folder, second):
    with process("--model", folder) as (running, url):
        client, stream = long_stream(url)
        with client, stream as response:
            next(response.iter_raw())
            running.send_signal(signal.SIGTERM)
            time.sleep(0.3)
            begun_s = time.perf_counter()
            running.send_signal(second)
            running.wait(HANG_S)
            assert time.perf_counter() - begun_s < 4


def test_as_a_lame_duck_it_says_that_it_is_not_ready_and_answers(folder):
    with process("--model", folder, GPT2CORE_LAME_DUCK_S="1.5") as (running, url):
        assert httpx2.get(f"{url}/readyz").status_code == 200
        running.send_signal(signal.SIGTERM)
        until(lambda: httpx2.get(f"{url}/readyz").status_code == 503)
        assert httpx2.get(f"{url}/livez").status_code == 200
        body = {"prompt": "ab", "max_new_tokens": 3}
        assert httpx2.post(f"{url}/generate", json=body, timeout=HANG_S).status_code == 200
        assert running.wait(HANG_S) == 0


def test_a_second_signal_ends_a_lame_duck_at_once(folder):
    with process("--model", folder, GPT2CORE_LAME_DUCK_S="3600") as (running, url):
        running.send_signal(signal.SIGTERM)
        until(lambda: httpx2.get(f"{url}/readyz").status_code == 503)
        running.send_signal(signal.SIGTERM)
        assert running.wait(HANG_S) == 0


def test_what_is_not_done_when_the_drain_time_is_over_gets_an_error(folder):
    with process("--model", folder, "--drain", "0.2") as (running, url):
        client, stream = long_stream(url)
        with client, stream as response:
            running.send_signal(signal.SIGTERM)
            events = events_of(response.read())
            assert events[-1]["error"]["code"] == "draining"
            assert "[DONE]" not in events
        assert running.wait(HANG_S) == 0


def test_a_server_that_drains_accepts_nothing_more_and_says_so():
    fake = Fake()
    with serving(fake.load) as server, concurrent.futures.ThreadPoolExecutor() as pool:
        fake.gate.clear()
        running = pool.submit(server.generate, "a", max_new_tokens=3)
        until(lambda: server.driver.engine.running == 1)
        server.driver._loop.call_soon_threadsafe(server.driver.drain)
        until(lambda: server.driver.state == "draining")
        refused = server.generate("b", max_new_tokens=3)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "draining")
        assert server.client.get("/readyz").status_code == 503
        assert server.client.get("/livez").status_code == 200
        fake.gate.set()
        assert running.result(HANG_S).status_code == 200


def test_a_request_that_ends_while_the_engine_takes_it_over_leaves_nothing_behind(monkeypatch):
    fake = Fake()
    with serving(fake.load) as server:
        engine, loop = server.driver.engine, server.driver._loop
        submit = engine.submit

        def submit_and_lose(*args, **kwargs):
            requests = submit(*args, **kwargs)
            [ticket] = server.driver._tickets
            loop.call_soon_threadsafe(ticket.fail, deadline_exceeded(1))
            until(lambda: ticket.cancelled)
            return requests

        monkeypatch.setattr(engine, "submit", submit_and_lose)
        fake.gate.clear()  # no step may be needed for its end
        assert server.generate("a", max_new_tokens=40).status_code == 504
        until(server.idle)
        monkeypatch.undo()
        fake.gate.set()
        server.check_works()
