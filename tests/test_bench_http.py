"""The classic benchmark against servers: good ones, slow ones, broken ones, dead ones."""

import json
import socket
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from gpt2core.bench import BenchmarkError, ClassicSettings, run_classic
from gpt2core.bench.store import read_log
from gpt2core.bench.sweep import server_target
from gpt2core.bench.sweep.server_target import parse_url
from gpt2core.cli import main
from gpt2core.errors import RequestError

PROMPTS, LENGTHS = ("One", "Two more"), (12, 16)
Answer = tuple[int, dict[str, str], list[bytes]]


class Server:
    """A server whose behaviour is one function: (path, body or None, headers) -> status, headers, chunks."""

    def __init__(self, behave: Callable[[str, dict | None, dict], Answer]) -> None:
        self.asked: list[tuple[str, dict | None]] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                self.answer(None)

            def do_POST(self):
                self.answer(json.loads(self.rfile.read(int(self.headers["content-length"]))))

            def answer(self, body):
                outer.asked.append((self.path, body))
                status, headers, chunks = behave(self.path, body, dict(self.headers))
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.end_headers()
                try:
                    for chunk in chunks:
                        self.wfile.write(chunk)
                        self.wfile.flush()
                except OSError:  # the client has gone
                    self.close_connection = True

            def log_message(self, *arguments):
                """Quietly."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._server.block_on_close = False
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def bodies(self) -> list[dict]:
        return [body for _, body in self.asked if body is not None]


@pytest.fixture
def serve():
    """Start a server; all end with the test."""
    servers: list[Server] = []

    def start(behave) -> Server:
        servers.append(Server(behave))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


def event(value) -> bytes:
    return b"data: " + (value if isinstance(value, bytes) else json.dumps(value).encode()) + b"\n\n"


JSON, EVENTS = {"content-type": "application/json"}, {"content-type": "text/event-stream; charset=utf-8"}


def refuse(status: int, message: str, **headers: str) -> Answer:
    return status, JSON | headers, [json.dumps({"error": {"message": message}}).encode()]


def generate(path, body, headers) -> Answer:
    """As `gpt2core serve`: one event per token, the whole answer, the end."""
    if path != "/generate":
        return refuse(404, "no such path")
    unknown = {*body} - {"prompt", "max_length", "min_new_tokens", "temperature", "seed", "stream"}
    if unknown:
        return refuse(422, f"unknown {unknown}")
    prompt, new = len(body["prompt"]), body["max_length"] - len(body["prompt"])
    if new <= 0:
        return refuse(422, f"prompt has {prompt} tokens")
    words = [f"w{body['seed']} " for _ in range(new - 1)] + [""]  # the last one gives no text of its own
    one = {
        "text": "".join(words),
        "finish_reason": "length",
        "prompt_tokens": prompt,
        "completion_tokens": new,
    }
    whole = {"generated_text": one["text"], "generations": [one], "model": "tiny", "backend": "numpy"}
    if not body.get("stream"):
        return 200, JSON, [json.dumps(whole).encode()]
    reasons = [None] * (new - 1) + ["length"]
    pieces = [{"text": word, "finish_reason": reason} for word, reason in zip(words, reasons, strict=True)]
    return 200, EVENTS, [*map(event, pieces), event(whole), event(b"[DONE]")]


def completions(path, body, headers) -> Answer:
    """As OpenAI's API, of an engine that knows no `min_tokens`."""
    if path == "/v1/models":
        return 200, JSON, [json.dumps({"data": [{"id": "first"}, {"id": "second"}]}).encode()]
    if path != "/v1/completions":
        return refuse(404, "no such path")
    if "min_tokens" in body:
        return refuse(400, "unknown field min_tokens")
    usage = {"prompt_tokens": len(body["prompt"]), "completion_tokens": body["max_tokens"]}
    text = "x" * body["max_tokens"]
    if not body.get("stream"):
        choice = {"text": text, "finish_reason": "length", "index": 0}
        return 200, JSON, [json.dumps({"choices": [choice], "usage": usage}).encode()]
    assert body["stream_options"] == {"include_usage": True}
    chunks = [{"choices": [{"text": one, "finish_reason": None}], "usage": None} for one in text]
    chunks.append({"choices": [{"text": "", "finish_reason": "length"}], "usage": None})
    return 200, EVENTS, [*map(event, chunks), event({"choices": [], "usage": usage}), event(b"[DONE]")]


def settings_for(url: str, **change) -> ClassicSettings:
    given = {
        "prompts": PROMPTS,
        "lengths": LENGTHS,
        "runs": 2,
        "seed": 3,
        "timeout_s": 20.0,
        "backoff_s": 0.0,
    }
    return ClassicSettings(url=url, **(given | change))


def measured(url: str, folder: Path, **change):
    return run_classic(settings_for(url, **change), output=folder, report=False)


def check_records(records, *, times: bool) -> None:
    assert len(records) == 12
    for record in records:
        assert (record["status"], record["attempts"], record["error"]) == ("ok", 1, None)
        assert record["prompt_tokens"] == len(record["prompt"])
        assert record["prompt_tokens"] + record["completion_tokens"] == record["length"]
        assert len(record["token_times_s"]) == (record["completion_tokens"] if times else 0)
        assert record["token_times_s"] == sorted(record["token_times_s"])
        if times:
            assert 0 < record["ttft_s"] == record["token_times_s"][0] <= record["elapsed_s"]
        else:
            assert record["ttft_s"] is None
        assert record["finish_reason"] == "length"


# Good servers


def test_a_streaming_server_is_timed_token_by_token(serve, tmp_path):
    server = serve(generate)
    result = measured(server.url, tmp_path)
    check_records(result.records, times=True)
    for record in result.records:
        assert record["text"] == f"w{record['seed']} " * (record["completion_tokens"] - 1)
        assert (record["url"], record["backend"], record["model"]) == (
            f"{server.url}/generate",
            "numpy",
            "tiny",
        )
    assert result.settings["exact_length"]
    assert result.settings["streamed"]
    asked = server.bodies()[-1]
    assert asked["min_new_tokens"] == asked["max_length"] - len(asked["prompt"])
    assert (asked["temperature"], asked["seed"]) == (0.8, 4)
    assert len(server.bodies()) == 3 + 12  # one finds the form, one for each prompt, one for each cell


def test_a_server_that_answers_at_once_is_timed_as_a_whole(serve, tmp_path):
    def whole(path, body, headers):
        return generate(path, body | {"stream": False}, headers)

    check_records(measured(serve(whole).url, tmp_path).records, times=False)


def test_a_server_that_refuses_streams_and_other_fields_is_asked_without_them(serve, tmp_path):
    def strict(path, body, headers):
        unknown = {*body} & {"stream", "min_new_tokens"}
        return refuse(400, "unknown") if unknown else generate(path, body, headers)

    result = measured(serve(strict).url, tmp_path)
    check_records(result.records, times=False)
    assert not result.settings["exact_length"]
    assert not result.settings["streamed"]


@pytest.mark.parametrize("end", ["/v1", "/v1/", "/v1/completions"])
def test_an_openai_style_server_is_timed_token_by_token(serve, tmp_path, end):
    server = serve(completions)
    result = measured(server.url + end, tmp_path)
    check_records(result.records, times=True)
    assert result.settings["model"] == "first"
    assert result.settings["url"] == f"{server.url}/v1/completions"
    assert not result.settings["exact_length"]
    assert {body["model"] for body in server.bodies()} == {"first"}


def test_a_model_that_is_named_is_asked_for(serve, tmp_path):
    server = serve(completions)
    assert measured(server.url + "/v1", tmp_path, model="mine").settings["model"] == "mine"
    assert {body["model"] for body in server.bodies()} == {"mine"}
    assert "/v1/models" not in {path for path, _ in server.asked}


def test_events_of_several_tokens_give_no_times_per_token(serve, tmp_path):
    def pairs(path, body, headers):
        status, kind, chunks = completions(path, body, headers)
        if kind is EVENTS:
            texts = [event({"choices": [{"text": "xx", "finish_reason": None}]})] * (len(chunks) // 3)
            chunks = [*texts, *chunks[-3:]]
        return status, kind, chunks

    for record in measured(serve(pairs).url + "/v1", tmp_path).records:
        assert record["token_times_s"] == []
        assert 0 < record["ttft_s"] <= record["elapsed_s"]


def test_an_end_of_text_before_the_length_is_counted(serve, tmp_path):
    def early(path, body, headers):
        one = {"text": "x", "finish_reason": "stop", "prompt_tokens": 3, "completion_tokens": 1}
        return 200, JSON, [json.dumps({"generations": [one]}).encode()]

    result = measured(serve(early).url, tmp_path)
    assert [summary.ended_early for summary in result.summaries] == [2, 2, 2, 2]


def test_a_generate_that_counts_no_tokens_is_measured_all_the_same(serve, tmp_path):
    result = measured(serve(lambda *asked: (200, JSON, [b'{"generated_text": "x"}'])).url, tmp_path)
    assert {record["completion_tokens"] for record in result.records} == {None}
    assert {summary.tokens_per_s for summary in result.summaries} == {None}
    assert not np.isnan(result.times_s).any()


def test_a_key_is_sent_and_neither_it_nor_a_password_is_written(serve, tmp_path, capfd, monkeypatch):
    seen = []

    def behave(path, body, headers):
        seen.append(headers.get("authorization") or headers.get("Authorization"))
        return generate(path, body, headers)

    server = serve(behave)
    monkeypatch.setenv("GPT2CORE_API_KEY", "sesame")
    args = ("--prompt", "One", "--lengths", "8", "--runs", "1", "--no-report", "--output")
    assert main(["bench", "--url", server.url, *args, str(tmp_path / "a")]) == 0
    assert {*seen} == {"Bearer sesame"}
    monkeypatch.delenv("GPT2CORE_API_KEY")
    url = server.url.replace("http://", "http://me:sesame@")
    assert main(["bench", "--url", url, *args, str(tmp_path / "b")]) == 0
    assert seen[-1].startswith("Basic ")
    written = [file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()]
    assert not any(b"sesame" in data for data in [*written, *map(str.encode, capfd.readouterr())])
    assert "sesame" not in repr(ClassicSettings(url=server.url, api_key="sesame"))


# Broken servers


def sometimes(bad: Callable[..., Answer], when: Callable[[int], bool], good=generate):
    """A server that is good while it is probed, and after that bad in the requests for which `when` holds."""
    count = -3

    def behave(path, body, headers):
        nonlocal count
        count += 1
        return bad(path, body, headers) if count > 0 and when(count) else good(path, body, headers)

    return behave


@pytest.mark.parametrize(
    ("status", "wait"),
    [(429, "0"), (500, "nan"), (502, "-1"), (503, "Tue, 24 Nov 2026 12:00 GMT"), (504, "")],
)
def test_a_server_that_recovers_is_asked_again(serve, tmp_path, status, wait):
    busy = sometimes(lambda *asked: refuse(status, "busy", **{"retry-after": wait}), lambda n: n in (1, 2, 7))
    result = measured(serve(busy).url, tmp_path)
    assert result.failures == []
    assert sorted(record["attempts"] for record in result.records) == [1] * 10 + [2, 3]


BROKEN = {
    "garbage": (lambda *a: (200, JSON, [b"\xff\xfe garbage"]), "ServerError: the answer is no JSON object"),
    "a list": (lambda *a: (200, JSON, [b"[1]"]), "ServerError: the answer is no JSON object"),
    "another form": (lambda *a: (200, JSON, [b'{"generations": [7]}']), "the answer has another form than"),
    "no text": (lambda *a: (200, JSON, [b'{"generated_text": 7}']), "the answer's text is no text"),
    "bad count": (
        lambda *a: (200, JSON, [b'{"generations": [{"text": "x", "prompt_tokens": "3"}]}']),
        "the answer's prompt_tokens is '3'",
    ),
    "error event": (
        lambda *a: (200, EVENTS, [event({"text": "x"}), event({"error": {"message": "engine died"}})]),
        "ServerError: the server reports: engine died",
    ),
    "cut stream": (
        lambda *a: (200, EVENTS, [event({"text": "x", "finish_reason": None})]),
        "ServerError: the stream ended before the text did",
    ),
    "garbage event": (lambda *a: (200, EVENTS, [event(b"garbage")]), "ServerError: the answer is no JSON"),
    "cut body": (lambda *a: (200, JSON | {"content-length": "99"}, [b"{}"]), "RemoteProtocolError"),
    "status": (lambda *a: refuse(500, "broken"), "ServerError: status 500 Internal Server Error: broken"),
    "plain status": (lambda *a: (503, {}, [b"come\nlater"]), "status 503 Service Unavailable: come later"),
    "redirect": (lambda *a: (302, {"location": "/"}, []), "ServerError: status 302 Found"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_answer_is_a_failed_cell_and_the_others_go_on(serve, tmp_path, name):
    bad, message = BROKEN[name]
    result = measured(serve(sometimes(bad, lambda n: n == 6)).url, tmp_path, retries=0)
    [record] = result.failures
    assert message in record["error"]
    assert "\n" not in record["error"]
    assert record["elapsed_s"] is None
    assert np.isnan(result.times_s).sum() == 1


def test_a_slow_server_is_cut_off_and_recorded(serve, tmp_path):
    def hang(path, body, headers):
        time.sleep(1.0)
        return generate(path, body, headers)

    def drip(path, body, headers):
        return (
            200,
            EVENTS,
            (time.sleep(0.05) or event({"text": "x", "finish_reason": None}) for _ in range(30)),
        )

    for number, (bad, message) in enumerate(((hang, "ReadTimeout"), (drip, "was not complete after 0.3 s"))):
        server = serve(sometimes(bad, lambda n: n == 6))
        result = measured(server.url, tmp_path / str(number), timeout_s=0.3, retries=0)
        [record] = result.failures
        assert message in record["error"]


def test_a_server_that_dies_in_the_middle_fails_its_cells_and_can_be_resumed(serve, tmp_path):
    alive = False
    dead = sometimes(lambda *asked: refuse(503, "dead"), lambda n: n > 9 and not alive)
    server = serve(dead)
    result = measured(server.url, tmp_path, retries=0)
    assert len(result.failures) == 3
    alive = True
    again = run_classic(settings_for(server.url, retries=0), output=tmp_path, report=False, resume=True)
    assert (again.failures, again.resumed) == ([], 5)
    cells = [tuple(record["cell"]) for record in read_log(tmp_path / "runs.jsonl")]
    assert sorted(cells) == sorted(settings_for(server.url).trials())


def test_an_answer_without_end_is_cut_off(serve, tmp_path, monkeypatch):
    monkeypatch.setattr(server_target, "MAX_ANSWER_NBYTES", 1000)
    with pytest.raises(BenchmarkError, match="the answer has more than 1000 bytes"):
        measured(serve(lambda *asked: (200, JSON, [b"x" * 2000])).url, tmp_path / "out")


# One clear line


def closed_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


@pytest.mark.parametrize("end", ["", "/v1"])
def test_a_dead_server_is_one_line_and_nothing_is_written(tmp_path, capfd, end):
    url = f"http://127.0.0.1:{closed_port()}{end}"
    args = ["bench", "--url", url, "--retries", "0", "--output", str(tmp_path / "out")]
    assert main(args) == 1
    out, err = capfd.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith(f"gpt2core: error: no server answers at {url}")
    assert "gpt2core serve" in err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("behave", "end", "message"),
    [
        (
            lambda *a: refuse(404, "nothing here"),
            "",
            "measured: status 404 Not Found: nothing here",
        ),
        (lambda *a: refuse(401, "who are you?"), "/v1", "status 401 Unauthorized: who are you?"),
        (lambda *a: refuse(422, "prompt is too long"), "", "status 422 .*: prompt is too long"),
        (lambda *a: (200, JSON, [b"{}"]), "/v1", "lists no model; name one with --model"),
        (lambda *a: (200, {"content-type": "text/html"}, [b"<html>"]), "", "the answer is no JSON object"),
    ],
)
def test_a_server_that_is_no_such_server_is_one_line(serve, tmp_path, behave, end, message):
    with pytest.raises(BenchmarkError, match=message) as caught:
        measured(serve(behave).url + end, tmp_path / "out", retries=0)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_an_openai_style_server_must_tell_the_prompts_tokens(serve, tmp_path):
    def silent(path, body, headers):
        answer = {"choices": [{"text": "x", "finish_reason": "length"}]}
        return 200, JSON, [json.dumps(answer).encode()]

    with pytest.raises(BenchmarkError, match=r"does not tell usage\.prompt_tokens"):
        measured(serve(silent).url + "/v1", tmp_path, model="x")


def test_a_prompt_that_does_not_fit_is_told_before_the_run(serve, tmp_path):
    change = {"prompts": ("One", "x" * 12)}
    with pytest.raises(BenchmarkError, match=r"refuses prompt 'xxxxxxxxxxxx': status 422 .* prompt has 12"):
        measured(serve(generate).url, tmp_path, **change)
    with pytest.raises(RequestError, match="prompt 1 has 12 tokens; total length 12 leaves it no new token"):
        measured(serve(completions).url + "/v1", tmp_path, **change)


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://x", "http://", "http://[x", "http://x:y", "x"])
def test_what_is_no_url_is_refused(url):
    with pytest.raises(RequestError, match="http://127"):
        parse_url(url)


@pytest.mark.parametrize(
    ("url", "want"),
    [
        ("http://a:1", "http://a:1/generate"),
        ("https://a/b/", "https://a/b/generate"),
        ("http://a/generate", "http://a/generate"),
        ("http://u:p@a/v1", "http://a/v1/completions"),
        ("http://[::1]:80/x/v1/completions", "http://[::1]:80/x/v1/completions"),
    ],
)
def test_the_endpoint_follows_from_the_url(url, want):
    assert parse_url(url).shown == want
    assert parse_url(url).loopback == ("::1" in url)


def test_a_missing_client_is_told_with_its_extra(monkeypatch, tmp_path):
    monkeypatch.setattr("gpt2core.bench.errors.find_spec", lambda name: name != "httpx2" or None)
    with pytest.raises(BenchmarkError, match=r"httpx2 is not installed.*gpt2core\[bench\]"):
        measured("http://127.0.0.1:1", tmp_path)
