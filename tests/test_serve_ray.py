"""The server on Ray Serve, and offline generation with Ray Data, on a local Ray of two CPUs."""

import asyncio
import concurrent.futures
import contextlib
import importlib.util
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"  # every port on the loopback address
os.environ["RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"] = "gpt2core.serve.ray_proxy:middlewares"
os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)  # or Ray would write one into the home folder

import httpx2
import psutil
import pytest
from serving import HANG_S, events_of, until

from gpt2core import GPT2, BackendError, RequestError, SamplingParams
from gpt2core.serve import Settings
from gpt2core.testing import random_checkpoint

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of Ray's own modules
    import ray
    from ray import serve

    from gpt2core.serve.ray_app import Arguments, ReadyApp, Replica, build
    from gpt2core.serve.ray_proxy import SayAsApi

EXAMPLE = Path(__file__).parent.parent / "examples/batch_inference_ray.py"
ASKED = {"max_new_tokens": 30, "temperature": 0.9}
START_S = 120
pytestmark = pytest.mark.filterwarnings(r"ignore:.use_\w+. is deprecated")  # Ray Data's own


@pytest.fixture(scope="module")
def local_ray():
    ray.init(
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        object_store_memory=128 * 2**20,
        _node_ip_address="127.0.0.1",
    )
    yield
    serve.shutdown()
    ray.shutdown()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint of 14 MB in float32, so that it can be mapped as it is."""
    return random_checkpoint(tmp_path_factory.mktemp("mapped"), n_embd=256, n_layer=4, n_positions=1024)


@pytest.fixture(scope="module")
def url(local_ray, folder):
    """One replica, two when it has more to do than its batch holds."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    app = build(
        Arguments(
            model=str(folder),
            backend="numpy",
            log_level="warning",
            **{"max_replicas": 2, "cpus": 0.25, "target_ongoing_requests": 4, "upscale_delay_s": 0.5},
            **{"max_batch": 8, "max_queue": 8, "max_prompts": 2, "max_n": 2, "client_share": 1.0},
        )
    )
    serve.run(app, name="app", route_prefix="/")
    return f"http://127.0.0.1:{port}"


@pytest.fixture
def client(url):
    with httpx2.Client(base_url=url, timeout=START_S) as one:
        yield one


def running_replicas():
    return serve.status().applications["app"].deployments["gpt2core"].replica_states.get("RUNNING", 0)


def mappings_of(file):
    """pid -> the sizes of a mapped file's pages, of each process below this one that maps it."""
    found = {}
    for process in psutil.Process().children(recursive=True):
        try:
            maps = process.memory_maps()
        except psutil.Error:  # it has ended meanwhile
            continue
        for one in maps:
            if one.path == str(file):
                found[process.pid] = one
    return found


def test_every_port_is_on_the_loopback_address_but_the_one_that_ray_opens_for_a_replica(url):
    """Ray 2.60 has that address in its source; docs/ray.md and SECURITY.md say what to do about it."""
    local, others = 0, []
    for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
        with contextlib.suppress(psutil.NoSuchProcess):  # it has ended meanwhile
            name = " ".join(process.cmdline())
            for connection in process.net_connections():
                if connection.status == "LISTEN":
                    inside = connection.laddr.ip.removeprefix("::ffff:") in ("127.0.0.1", "::1")
                    local += inside
                    others += [] if inside else [name]
    assert local >= 5
    assert len(others) <= running_replicas()
    assert [name for name in others if not name.startswith("ray::ServeReplica:")] == []


def test_a_text_through_ray_is_the_library_s_text(client, folder):
    with GPT2.from_pretrained(folder, backend="numpy") as model:
        wanted = model.generate("Once upon a time", **ASKED, seed=7).text
    answer = client.post("/generate", json={"prompt": "Once upon a time", **ASKED, "seed": 7})
    assert (answer.status_code, answer.json()["generated_text"]) == (200, wanted)
    body = {"prompt": "Once upon a time", **ASKED, "seed": 7, "stream": True}
    *pieces, summary, done = events_of(client.post("/generate", json=body).content)
    assert "".join(piece["text"] for piece in pieces) == summary["generated_text"] == wanted
    assert done == "[DONE]"
    assert client.get("/").text.startswith("<!doctype html>")
    assert client.get("/nowhere").json()["error"]["code"] == "unknown_path"


def test_a_stream_comes_piece_by_piece_and_ends_its_work_when_the_client_leaves(client):
    def value(name):
        lines = client.get("/metrics").text.splitlines()
        return float(next(line.split()[1] for line in lines if line.startswith(f"{name} ")))

    before = value("gpt2core_generated_tokens_total")
    body = {"prompt": "Once", "max_new_tokens": 900, "logit_bias": {"0": -100}, "stream": True}
    with client.stream("POST", "/generate", json=body) as response:
        chunks = response.iter_bytes()  # a name: without one it would end, and the connection with it
        first = next(chunks)
        assert 1 <= first.count(b"data: ") < 450
        assert value("gpt2core_requests_running") == 1
    until(lambda: value("gpt2core_requests_running") == 0)
    assert value("gpt2core_generated_tokens_total") - before < 900


def test_more_requests_than_a_batch_holds_bring_a_second_replica_that_shares_the_checkpoint(client, folder):
    assert running_replicas() == 1
    stop = time.monotonic() + START_S

    def ask(i):
        texts = []
        while running_replicas() < 2 and time.monotonic() < stop:
            body = {"prompt": "One day", "max_new_tokens": 100, "temperature": 0.9, "seed": i}
            answer = client.post("/generate", json=body)
            assert answer.status_code == 200, answer.text
            texts.append(answer.json()["generated_text"])
        return texts

    with concurrent.futures.ThreadPoolExecutor(12) as pool:
        texts = list(pool.map(ask, range(12)))
    assert running_replicas() == 2
    assert all(len(set(mine)) == 1 for mine in texts if mine)  # one seed, one text, whoever else runs

    maps = mappings_of(folder / "model.safetensors")
    assert len(maps) == 2
    for one in maps.values():
        assert one.rss > 2**20
        assert one.private_dirty == 0  # no copy of it
        assert one.pss < 0.75 * one.rss  # both have the same pages


def test_a_full_replica_says_429_itself(client):
    body = {"prompt": ["a", "b"], "n": 2, "max_new_tokens": 400, "temperature": 1, "seed": 1}
    with concurrent.futures.ThreadPoolExecutor(24) as pool:
        answers = list(pool.map(lambda _: client.post("/generate", json=body), range(24)))
    statuses = {answer.status_code for answer in answers}
    assert statuses == {200, 429}
    refused = next(answer for answer in answers if answer.status_code == 429)
    assert refused.headers["retry-after"] == "1"
    assert refused.json()["error"]["code"] == "queue_full"


def test_requests_whose_replica_is_killed_get_an_error_of_the_api_or_a_broken_stream(client):
    """Each asks until its replica is killed; Ray then starts others, which answer again."""
    body = {"prompt": "Once", "max_new_tokens": 900, "logit_bias": {"0": -100}}
    begun = threading.Barrier(10)

    def ask(i):
        begun.wait()
        try:
            return client.post("/generate", json={**body, "stream": i % 3 == 0})
        except httpx2.RemoteProtocolError:  # its answer broke off
            return None

    with concurrent.futures.ThreadPoolExecutor(9) as pool:
        asked = [pool.submit(ask, i) for i in range(9)]
        begun.wait()
        time.sleep(0.5)
        for process in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                if process.cmdline()[0].startswith("ray::ServeReplica:"):
                    process.kill()
        answers = [one.result() for one in asked]
    assert [answer is None for answer in answers] == [True, False, False] * 3
    for answer in filter(None, answers):
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
        assert answer.json()["error"]["type"] == "unavailable_error"
        assert answer.json()["error"]["code"] in ("replica_lost", "no_replica")
    until(lambda: client.post("/generate", json={**body, "max_new_tokens": 2}).status_code == 200, START_S)


def test_a_running_stream_ends_whole_when_the_deployment_is_removed(client):
    body = {"prompt": "Once", "max_new_tokens": 400, "logit_bias": {"0": -100}, "stream": True}
    with client.stream("POST", "/generate", json=body) as response:
        chunks = response.iter_bytes()
        data = next(chunks)
        serve.delete("app", _blocking=False)
        data += b"".join(chunks)
    *_, summary, done = events_of(data)
    assert done == "[DONE]"
    assert summary["usage"]["completion_tokens"] == 400
    until(lambda: "app" not in serve.status().applications, START_S)


# Without a Ray


def through_the_proxy(*messages):
    """What a client reads of what Ray's proxy sends."""

    async def proxy(scope, receive, send):
        for message in messages:
            await send(message)

    async def run():
        sent = []

        async def send(message):
            sent.append(message)

        scope = {"type": "http", "path": "/generate", "method": "POST", "headers": []}
        await SayAsApi(proxy)(scope, None, send)
        return sent

    return asyncio.run(run())


def start(status, kind):
    return {"type": "http.response.start", "status": status, "headers": [(b"content-type", kind)]}


@pytest.mark.parametrize(
    ("status", "code"), [(404, "unknown_path"), (408, "timeout"), (429, "queue_full"), (503, "no_replica")]
)
def test_the_proxy_s_own_errors_have_the_api_s_body(status, code):
    text = {"type": "http.response.body", "body": b"Path not found"}
    begin, body = through_the_proxy(start(status, b"text/plain"), text)
    assert begin["status"] == status
    assert json.loads(body["body"])["error"]["code"] == code


def test_a_request_that_no_replica_has_answered_gets_an_error_and_one_half_answered_nothing_more():
    begin, body = through_the_proxy()
    assert begin["status"] == 503
    assert json.loads(body["body"])["error"]["code"] == "replica_lost"
    half = (
        start(200, b"text/event-stream"),
        {"type": "http.response.body", "body": b"data: 1", "more_body": True},
    )
    assert through_the_proxy(*half) == list(half)
    own = (start(503, b"application/json"), {"type": "http.response.body", "body": b"{}"})
    assert through_the_proxy(*own) == list(own)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"port": 9000}, "port is Ray's"),
        ({"max_bach": 4}, "max_bach"),
        ({"max_batch": 0}, "max_batch"),
        ({"allowed_hosts": "example.com"}, "no API key"),
    ],
)
def test_a_wrong_setting_is_refused_before_anything_is_deployed(given, message):
    with pytest.raises(RequestError, match=message):
        build(Arguments(**given))


def test_fewer_replicas_at_most_than_at_least_are_refused():
    with pytest.raises(ValueError, match="max_replicas 1 is less than min_replicas 2"):
        Arguments(min_replicas=2, max_replicas=1)


def test_a_host_beyond_this_machine_needs_a_key():
    settings = Arguments(allowed_hosts="example.com", api_key="secret").settings()
    assert (settings.api_keys, settings.threads) == ((b"secret",), 1)


def lifespan(app):
    """What an ASGI server is told when the app starts; then the app is stopped."""

    async def run():
        told, asked = [], asyncio.Queue()
        await asked.put({"type": "lifespan.startup"})

        async def send(message):
            told.append(message)
            await asked.put({"type": "lifespan.shutdown"})

        await app({"type": "lifespan", "asgi": {"version": "3.0"}, "state": {}}, asked.get, send)
        return told

    return asyncio.run(run())


def test_a_replica_has_started_when_its_model_is_loaded_and_not_before():
    app = ReadyApp(Settings(model="demo", backend="numpy", log_level="error"))
    begun, _ = lifespan(app)
    assert begun == {"type": "lifespan.startup.complete"}
    assert app._driver.engine is not None
    app.check()


def test_a_model_that_cannot_be_loaded_fails_the_start_with_the_reason(tmp_path):
    app = ReadyApp(Settings(model=str(tmp_path), log_level="error"))
    begun = lifespan(app)[0]
    assert begun["type"] == "lifespan.startup.failed"
    assert "config.json" in begun["message"]
    replica = Replica()
    replica.app = app
    with pytest.raises(BackendError, match=r"config\.json"):
        asyncio.run(replica.check_health())


# Offline


@pytest.fixture(scope="module")
def offline(tmp_path_factory):
    """The example as a module, prompts, and a checkpoint."""
    spec = importlib.util.spec_from_file_location("batch_inference_ray", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    ray.cloudpickle.register_pickle_by_value(module)
    folder = tmp_path_factory.mktemp("offline")
    prompts = folder / "prompts.txt"
    prompts.write_text(
        "".join(f"prompt number {i}\n" if i != 4 else "\n" for i in range(11)) + "x" * 500 + "\nlast"
    )
    yield module, prompts, str(random_checkpoint(folder / "model"))
    ray.cloudpickle.unregister_pickle_by_value(module)
    del sys.modules[spec.name]


def arguments(offline, output, *more):
    _, prompts, model = offline
    return [str(prompts), str(output), "--model", model, "--max-new-tokens", "12", "--seed", "3", *more]


def texts_of(output):
    lines = [line for path in sorted(output.glob("part-*")) for line in path.read_text().splitlines()]
    return [json.loads(line) for line in lines]


def test_offline_texts_depend_neither_on_the_parts_nor_on_the_actors(local_ray, offline, tmp_path):
    module, _, model_folder = offline
    module.main(arguments(offline, tmp_path / "one", "--part-size", "100"))
    module.main(arguments(offline, tmp_path / "two", "--part-size", "3", "--actors", "2"))
    assert len(list((tmp_path / "two").glob("part-*"))) == 5
    texts = texts_of(tmp_path / "one")
    assert texts == texts_of(tmp_path / "two")
    assert [one["index"] for one in texts] == [0, 1, 2, 3, *range(5, 13)]
    assert ["error" in one for one in texts] == [one["prompt"].startswith("xxx") for one in texts]
    with GPT2.from_pretrained(model_folder) as model:
        for one in texts[:3]:
            params = {"max_new_tokens": 12, "temperature": 0.8, "seed": module.seed_of(3, one["index"])}
            assert SamplingParams(**params).seed == one["seed"]
            assert model.generate(one["prompt"], **params).text == one["text"]


def test_what_is_finished_is_kept_and_what_is_missing_is_made(local_ray, offline, tmp_path, capsys):
    module = offline[0]
    output = tmp_path / "out"
    line = arguments(offline, output, "--part-size", "4")
    module.main(line)
    texts, kept = texts_of(output), {p.name: p.stat().st_mtime_ns for p in output.glob("part-*")}
    (output / "part-00001.jsonl").unlink()
    (output / ".part-00001.jsonl.123").write_text("half a")
    module.main(line)
    assert "4 parts, 3 of them done" in capsys.readouterr().err
    assert texts_of(output) == texts
    now = {path.name: path.stat().st_mtime_ns for path in output.glob("part-*")}
    assert {name for name in kept if now[name] != kept[name]} == {"part-00001.jsonl"}
    assert sorted(path.name for path in output.iterdir()) == [*sorted(kept), "run.json"]
    module.main(line)
    assert "4 parts, 4 of them done" in capsys.readouterr().err


@pytest.mark.parametrize("change", [["--temperature", "0.5"], ["--part-size", "5"], ["--backend", "torch"]])
def test_a_folder_of_another_run_is_refused(offline, tmp_path, change):
    module = offline[0]
    output = tmp_path / "out"
    parts, sha256 = module.parts_of(offline[1], 4)
    params = {"max_new_tokens": 12, "temperature": 0.8, "top_k": None, "top_p": 1.0}
    same = {"prompts_sha256": sha256, "model": offline[2], "revision": None, "backend": "auto", "seed": 3}
    work = module.Work(**same, precision="float32", part_size=4, params=params)
    assert module.prepare(output, work, parts) == parts
    with pytest.raises(SystemExit, match="holds a run that differs in"):
        module.main(arguments(offline, output, "--part-size", "4", *change))


def test_a_killed_run_is_taken_up_again(local_ray, offline, tmp_path):
    """As a program of its own, killed after its first part; what is missing is then made here."""
    module, output = offline[0], tmp_path / "out"
    line = arguments(offline, output, "--part-size", "1")
    program = subprocess.Popen(
        [sys.executable, EXAMPLE, *line], start_new_session=True, stderr=subprocess.DEVNULL
    )
    until(lambda: list(output.glob("part-*")) or program.poll() is not None, START_S)
    os.killpg(program.pid, signal.SIGKILL)
    program.wait(HANG_S)
    module.main(line)
    assert [one["index"] for one in texts_of(output)] == [0, 1, 2, 3, *range(5, 13)]
