"""What the server refuses, with which status, and that no answer repeats what the client sent."""

import base64
import json
import logging
import socket

import pytest
from fastapi.routing import APIRoute
from serving import HANG_S, Fake, post_bytes, raw, serving, strict, until

import gpt2core
from gpt2core.errors import RequestError
from gpt2core.serve import Settings, logs
from gpt2core.serve.guard import SECURITY_HEADERS


@pytest.fixture(scope="module")
def server():
    with serving(Fake().load, receipt_s=1.0) as running:
        yield running


@pytest.fixture(scope="module")
def keyed(tmp_path_factory):
    keys = tmp_path_factory.mktemp("keys") / "keys"
    keys.write_text("first-key\n\nsecond-key\n")
    with serving(Fake().load, api_key_file=keys) as running:
        yield running


def status_of(answer: bytes) -> int:
    return int(answer.split(b" ", 2)[1])


def error_of(answer: bytes) -> dict:
    head, _, body = answer.partition(b"\r\n\r\n")
    assert b"application/json" in head.lower()
    document = strict(body)
    assert set(document) == {"error"}
    assert set(document["error"]) == {"type", "code", "param", "message"}
    return document["error"]


MALFORMED = [
    b"",
    b"{",
    b'{"prompt": "a"',
    b'{"prompt": "a"}x',
    b"{'prompt': 'a'}",
    b'\xef\xbb\xbf{"prompt": "a"}',
    b'{"prompt": "\xff\xfe"}',
    b'{"prompt": "\xed\xa0\x80"}',
    '{"prompt": "a"}'.encode("utf-16"),
    b'{"prompt": "a", "temperature": NaN}',
    b'{"prompt": "a", "temperature": Infinity}',
    b'{"prompt": "a", "temperature": -Infinity}',
    b'{"prompt": "a", "temperature": 1e400}',
    b'{"prompt": "a", "temperature": -1e999}',
    b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}",
    b'{"prompt": "a", "prompt": "b"}',
    b'{"prompt": "a", "logit_bias": {"1": 2, "1": 3}}',
    b"[" * 100_000,
    b'{"a":' * 20_000,
    b'{"prompt": ' + b"[" * 40 + b"]" * 40 + b"}",
    b"[" * 100_000 + b"]" * 100_000,
]
BAD = [
    b"null",
    b"[]",
    b'"text"',
    b"{}",
    b'{"prompt": null}',
    b'{"prompt": ""}',
    b'{"prompt": []}',
    b'{"prompt": [""]}',
    b'{"prompt": 5}',
    b'{"prompt": [1, 2]}',
    b'{"prompt": {"a": 1}}',
    b'{"prompt": "\\ud800"}',
    b'{"prompt": "\\udfff a"}',
    b'{"\\ud800": 1, "prompt": "a"}',
    b'{"prompt": "a", "unknown": 1}',
    b'{"prompt": "a", "n": true}',
    b'{"prompt": "a", "seed": false}',
    b'{"prompt": "a", "max_new_tokens": true}',
    b'{"prompt": "a", "temperature": true}',
    b'{"prompt": "a", "stream": 1}',
    b'{"prompt": "a", "echo": "yes"}',
    b'{"prompt": "a", "n": 1.0}',
    b'{"prompt": "a", "n": "1"}',
    b'{"prompt": "a", "n": 0}',
    b'{"prompt": "a", "n": 9223372036854775808}',
    b'{"prompt": "a", "seed": 9223372036854775808}',
    b'{"prompt": "a", "seed": -1}',
    b'{"prompt": "a", "max_new_tokens": 9223372036854775807}',
    b'{"prompt": "a", "max_new_tokens": 1000}',
    b'{"prompt": "a", "max_length": 0}',
    b'{"prompt": "a", "max_length": 5, "max_new_tokens": 4}',
    b'{"prompt": "a", "max_new_tokens": 2, "min_new_tokens": 3}',
    b'{"prompt": "a", "temperature": -0.5}',
    b'{"prompt": "a", "temperature": 1e308}',
    b'{"prompt": "a", "top_p": 0}',
    b'{"prompt": "a", "top_p": 1.5}',
    b'{"prompt": "a", "logprobs": 6}',
    b'{"prompt": "a", "logit_bias": {"-1": 1}}',
    b'{"prompt": "a", "logit_bias": {"1": 1000}}',
    b'{"prompt": "a", "logit_bias": {"9999999999": 1}}',
    b'{"prompt": "a", "stop": ["a", "b", "c", "d", "e"]}',
    b'{"prompt": "a", "stop": ""}',
    b'{"prompt": "a", "stop": "' + b"x" * 65 + b'"}',
    b'{"prompt": "a", "stop": "\\ud800"}',
    b'{"prompt": "' + b"a" * 65 + b'"}',
    b'{"prompt": "' + b"a" * 5000 + b'"}',
    b'{"prompt": [' + b",".join([b'"a"'] * 65) + b"]}",
]


@pytest.mark.parametrize("body", MALFORMED, ids=lambda body: repr(body[:40]))
@pytest.mark.parametrize("path", ["/generate", "/v1/completions"])
def test_what_is_not_strict_json_is_400(server, path, body):
    answer = raw(server.port, post_bytes(body, path=path))
    assert (status_of(answer), error_of(answer)["code"]) == (400, "malformed_json")


@pytest.mark.parametrize("body", BAD, ids=lambda body: repr(body[:50]))
def test_a_bad_parameter_is_422_with_strict_json_and_nothing_echoed(server, body):
    answer = raw(server.port, post_bytes(body))
    error = error_of(answer)
    assert (status_of(answer), error["type"]) == (422, "invalid_request_error")
    for part in (b"\\ud800", b"\\udfff", b"unknown", b"xxxx", b"yes", b"aaaa"):
        if part in body:
            assert part not in answer.lower().replace(b"unknown_field", b"")


def test_nul_and_every_other_character_in_a_prompt_is_accepted(server):
    for text in ("a\0b", "\u2028", "\U0010ffff", "\x7f\x1b"):
        assert server.generate(text, max_new_tokens=1).status_code == 200


def test_the_nearest_name_is_offered_for_an_unknown_field(server):
    error = server.generate("a", max_tokens=3).json()["error"]
    assert "did you mean 'max_new_tokens'?" in error["message"]
    assert server.generate("a", temprature=1).json()["error"]["message"].endswith("'temperature'?")


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Content-Type": "text/plain"}, 415),
        ({"Content-Type": "application/x-www-form-urlencoded"}, 415),
        ({"Content-Type": "application/json; charset=latin-1"}, 415),
        ({"Content-Type": "application/json", "Content-Encoding": "gzip"}, 415),
        ({"Content-Type": "application/json; charset=utf-8"}, 200),
        ({"Content-Type": "Application/JSON"}, 200),
        ({"Content-Type": "application/json", "Host": "evil.example"}, 400),
        ({"Content-Type": "application/json", "Host": "127.0.0.1.evil.example"}, 400),
        ({"Content-Type": "application/json", "Host": "127.0.0.1@evil"}, 400),
        ({"Content-Type": "application/json", "Host": "localhost"}, 200),
        ({"Content-Type": "application/json", "Host": "[::1]:80"}, 200),
        ({"Content-Type": "application/json", "Origin": "http://evil.example"}, 403),
        ({"Content-Type": "application/json", "Origin": "null"}, 403),
        ({"Content-Type": "application/json", "Origin": "http://localhost:1", "Host": "localhost"}, 403),
        ({"Content-Type": "application/json", "Origin": "http://localhost", "Host": "localhost"}, 200),
    ],
)
def test_headers_decide_who_may_ask(server, headers, status):
    answer = server.client.post("/generate", content=b'{"prompt":"a","max_new_tokens":1}', headers=headers)
    assert answer.status_code == status


def test_two_hosts_or_none_are_refused(server):
    assert status_of(raw(server.port, b"GET /livez HTTP/1.0\r\n\r\n")) == 400
    two = b"GET /livez HTTP/1.1\r\nHost: localhost\r\nHost: evil\r\nConnection: close\r\n\r\n"
    assert status_of(raw(server.port, two)) == 400


def test_there_are_no_cors_headers_unless_an_origin_is_allowed(server):
    assert not [n for n in server.client.get("/livez").headers if n.startswith("access-control")]
    with serving(Fake().load, allowed_origins="https://a.example") as other:
        origin = {"Origin": "https://a.example"}
        answer = other.client.get("/livez", headers=origin)
        assert answer.headers["access-control-allow-origin"] == "https://a.example"
        asking = {**origin, "Access-Control-Request-Method": "POST"}
        assert other.client.options("/generate", headers=asking).status_code == 200
        assert other.client.options("/generate", headers=origin).status_code == 405
        assert other.client.get("/livez", headers={"Origin": "https://b.example"}).status_code == 403


STAINLESS = (  # of OpenAI's client for JavaScript, in a browser
    "authorization,content-type,x-stainless-arch,x-stainless-lang,x-stainless-os,x-stainless-package-version,"
    "x-stainless-retry-count,x-stainless-runtime,x-stainless-runtime-version,x-stainless-timeout"
)


def test_openai_s_client_in_a_page_of_an_allowed_origin_may_ask_and_read_what_it_needs():
    with serving(Fake().load, allowed_origins="https://a.example", api_key="k", max_queue=0) as server:
        asking = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": STAINLESS}
        answer = server.client.options("/v1/completions", headers={"Origin": "https://a.example", **asking})
        assert answer.status_code == 200
        assert answer.headers["access-control-allow-origin"] == "https://a.example"
        assert "POST" in answer.headers["access-control-allow-methods"]
        assert answer.headers["access-control-allow-headers"] == STAINLESS
        assert answer.headers["vary"] == "Origin"
        foreign = server.client.options("/v1/completions", headers={"Origin": "https://b.example", **asking})
        assert foreign.status_code == 403
        assert not [name for name in foreign.headers if name.startswith("access-control")]


@pytest.mark.parametrize(
    ("path", "body", "headers", "status"),
    [
        ("/v1/completions", b'{"prompt":"a","max_tokens":1}', {}, 200),
        ("/v1/completions", b'{"prompt":"a","max_tokens":1,"stream":true}', {}, 200),
        ("/v1/completions", b"{", {}, 400),
        ("/v1/completions", b"{}", {"Authorization": "Bearer wrong"}, 401),
        ("/nope", b"{}", {}, 404),
        ("/v1/completions", b" " * 300_000, {}, 413),
    ],
)
def test_a_page_of_an_allowed_origin_can_read_every_answer(path, body, headers, status):
    with serving(Fake().load, allowed_origins="https://a.example", api_key="k") as server:
        headers = {"Authorization": "Bearer k", "Origin": "https://a.example", **headers}
        headers["Content-Type"] = "application/json"
        answer = server.client.post(path, content=body, headers=headers)
        assert answer.status_code == status
        assert answer.headers["access-control-allow-origin"] == "https://a.example"
        exposed = {
            name.strip().lower() for name in answer.headers["access-control-expose-headers"].split(",")
        }
        assert exposed == {"x-request-id", "retry-after", "x-truncated-tokens"}


def test_head_is_answered_wherever_get_is_and_without_a_body(server):
    got = [path for path, method in routes_of(server.app).items() if method == "GET"]
    assert len(got) >= 12
    for path in got:
        path = path.replace("{model:path}", "demo")
        whole, head = server.client.get(path), server.client.head(path)
        assert head.status_code == whole.status_code, path
        assert head.headers["content-type"] == whole.headers["content-type"]
        assert "content-length" in head.headers
        sent = raw(
            server.port, f"HEAD {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode()
        )
        assert sent.endswith(b"\r\n\r\n")
    assert server.client.head("/generate").status_code == 405
    assert server.metric('gpt2core_requests_total{method="HEAD",route="/livez",status="200"}') == 2


def test_health_is_that_of_llama_server_and_version_that_of_vllm(server):
    assert server.client.get("/health").json() == {"status": "ok"}
    assert server.client.get("/version").json() == {"version": gpt2core.__version__}
    with serving(lambda settings: until(lambda: False, 1), ready=False) as loading:
        assert loading.client.get("/health").status_code == 503


@pytest.mark.parametrize("path", ["/nope", "/generate/", "/v1", "/v1/edits", "/docs/../x", "//livez"])
def test_an_unknown_path_is_404(server, path):
    answer = raw(server.port, f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
    assert (status_of(answer), error_of(answer)["code"]) == (404, "unknown_path")


def test_a_wrong_method_is_405_and_says_which_is_right(server):
    answer = server.client.get("/generate")
    assert (answer.status_code, answer.headers["allow"]) == (405, "POST")
    assert server.client.post("/livez").status_code == 405


@pytest.mark.parametrize("announced", [True, False])
def test_a_body_beyond_the_limit_is_413(server, announced):
    body = b'{"prompt":"' + b"a" * 300_000 + b'"}'
    content = body if announced else iter([body[:200_000], body[200_000:]])
    answer = server.client.post("/generate", content=content, headers={"Content-Type": "application/json"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (413, "body_too_large")


def test_a_megabyte_is_refused_by_its_announced_length_before_it_is_sent(server):
    assert status_of(raw(server.port, post_bytes(b"", length=2**20))) == 413
    assert status_of(raw(server.port, post_bytes(b"", length=10**30))) in (400, 413)


def test_a_client_that_sends_a_megabyte_in_one_go_can_read_the_refusal(server):
    for _ in range(5):
        assert status_of(raw(server.port, post_bytes(b"x" * 2**21))) == 413


def test_a_slow_body_is_408(server):
    answer = raw(server.port, post_bytes(b'{"prompt":', length=100))
    assert (status_of(answer), error_of(answer)["code"]) == (408, "slow_body")


def test_a_connection_whose_request_does_not_begin_is_closed(server):
    with socket.create_connection(("127.0.0.1", server.port), timeout=HANG_S) as connection:
        connection.sendall(b"GET /livez HTTP/1.1\r\nHost: lo")
        assert connection.recv(100) == b""


def test_every_answer_has_the_security_headers(server):
    answers = [
        server.client.get("/livez"),
        server.client.get("/nope"),
        server.client.get("/docs"),
        server.client.get("/livez", headers={"Host": "evil"}),
        server.generate("a", max_new_tokens=1),
        server.generate("a", max_new_tokens=1, stream=True),
        server.generate("", max_new_tokens=1),
    ]
    for answer in answers:
        assert {name: answer.headers[name] for name in SECURITY_HEADERS} == SECURITY_HEADERS
        assert "unsafe" not in answer.headers["content-security-policy"]
        assert "server" not in answer.headers


def test_one_character_of_128_kib_is_done_or_refused_and_others_are_answered_meanwhile(server):
    for character in ("a", " ", "\U0001f600", "\n"):
        text = character * (131_072 // len(character.encode()))
        assert server.generate(text, max_new_tokens=1).status_code in (413, 422)  # in JSON it may double
    server.check_works()


def test_probes_may_call_the_server_by_a_loopback_name_whatever_hosts_are_allowed():
    with serving(Fake().load, allowed_hosts=("api.example.org",), host="0.0.0.0", api_key="k") as running:
        for host in ("127.0.0.1", "localhost:8000", "[::1]:80", "api.example.org"):
            for path in ("/livez", "/readyz", "/health"):
                assert running.client.get(path, headers={"Host": host}).status_code == 200
        for path, host in (("/livez", "evil"), ("/v1/models", "localhost"), ("/livez/", "localhost")):
            assert running.client.get(path, headers={"Host": host}).status_code == 400


# Keys


def routes_of(app):
    """Every path of the app, found as a client would have to find them."""
    found = {}
    waiting = list(app.routes)
    while waiting:
        route = waiting.pop()
        if isinstance(route, APIRoute):
            found[route.path] = sorted(route.methods)[0]
        inner = getattr(route, "routes", None) or getattr(
            getattr(route, "original_router", None), "routes", []
        )
        waiting += inner
    return found


def test_every_route_asks_for_the_key_but_the_probes(keyed):
    routes = routes_of(keyed.app)
    assert {"/generate", "/v1/completions", "/v1/models", "/metrics", "/docs", "/openapi.json"} <= set(routes)
    for path, method in routes.items():
        answer = keyed.client.request(method, path.replace("{model:path}", "x"))
        expected = 200 if path in ("/livez", "/readyz", "/health") else 401
        assert answer.status_code == expected, path
        if expected == 401:
            first = "Basic" if method == "GET" else "Bearer"  # browsers look at the first scheme only
            assert answer.headers["www-authenticate"].startswith(first)
            assert answer.json()["error"]["type"] == "authentication_error"


@pytest.mark.parametrize(
    ("authorization", "status"),
    [
        ("Bearer first-key", 200),
        ("bearer second-key", 200),
        ("Basic " + base64.b64encode(b"anybody:first-key").decode(), 200),
        ("Bearer first-key2", 401),
        ("Bearer First-Key", 401),
        ("Bearer first-ke", 401),
        ("Bearer", 401),
        ("first-key", 401),
        ("Basic first-key", 401),
        ("Basic " + base64.b64encode(b"first-key").decode(), 401),
        ("Bearer first-key\nsecond-key".replace("\n", " "), 401),
        ("Bearer \xe9\xe9", 401),
    ],
)
def test_only_the_keys_of_the_file_open(keyed, authorization, status):
    headers = {"Authorization": authorization.encode("latin-1")}
    assert keyed.client.get("/v1/models", headers=headers).status_code == status


def test_the_log_says_which_client_and_which_key_and_never_the_key(keyed, caplog):
    with caplog.at_level(logging.INFO, "gpt2core.serve"):
        for key in ("second-key", "wrong-key"):
            keyed.client.get("/v1/models", headers={"Authorization": f"Bearer {key}"})
        until(lambda: len(caplog.records) == 2)
    lines = [json.loads(logs.JsonLines().format(record)) for record in caplog.records]
    assert [(line["client"], line["key"]) for line in lines] == [("127.0.0.1", 2), ("127.0.0.1", None)]
    assert "-key" not in json.dumps(lines)


def test_the_key_is_asked_for_before_the_body_is_read(keyed):
    answer = raw(keyed.port, post_bytes(b"", length=100_000))
    assert status_of(answer) == 401


@pytest.mark.parametrize("text", ["", "\n \n", "two words\n", "caf\u00e9\n"])
def test_a_key_file_without_good_keys_is_refused(tmp_path, text):
    (tmp_path / "keys").write_text(text)
    with pytest.raises(RequestError, match="key"):
        _ = Settings(api_key_file=tmp_path / "keys").api_keys


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "example.org"])
def test_without_a_key_no_other_machine_is_served(host):
    with pytest.raises(RequestError, match="--api-key-file"):
        Settings(host=host).check_exposure()
    Settings(host=host, insecure_no_auth=True).check_exposure()
    Settings(host=host, api_key="k").check_exposure()


def test_on_this_machine_no_key_is_needed():
    for host in ("127.0.0.1", "127.5.0.1", "::1", "localhost"):
        Settings(host=host).check_exposure()


# Settings


def test_settings_come_from_the_environment(monkeypatch):
    monkeypatch.setenv("GPT2CORE_MAX_BATCH", "5")
    monkeypatch.setenv("GPT2CORE_ALLOWED_HOSTS", "a.example, b.example")
    monkeypatch.setenv("GPT2CORE_API_KEY", "k")
    monkeypatch.setenv("GPT2CORE_BACKEND", "")
    settings = Settings(max_queue=64)
    assert (settings.max_batch, settings.allowed_hosts) == (5, ("a.example", "b.example"))
    assert settings.backend == "auto"
    assert settings.api_keys == (b"k",)
    assert "k" not in repr(settings.api_key)


def test_settings_under_which_the_largest_request_cannot_run_are_refused():
    with pytest.raises(ValueError, match="raise max_queue or lower max_prompts"):
        Settings(max_batch=8, max_queue=8, max_prompts=17)


def test_a_small_queue_lowers_how_many_texts_one_request_may_ask_for():
    with serving(Fake().load, max_batch=8, max_queue=0) as server:
        assert server.generate(["a"] * 8, max_new_tokens=1).status_code == 200
        refused = server.generate(["a"] * 9, max_new_tokens=1)
        assert refused.status_code == 422
        assert "9 texts; this server holds at most 8" in refused.json()["error"]["message"]


def test_the_name_of_a_folder_says_nothing_of_the_machine(tmp_path):
    assert Settings(model=str(tmp_path)).name == tmp_path.name
    assert Settings(model="org/name").name == "org/name"
    assert Settings(served_name="x").name == "x"
