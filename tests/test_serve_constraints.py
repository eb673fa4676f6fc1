"""Constraints over HTTP: this library's names, OpenAI's and vLLM's; refusals quote nothing; no stalls."""

import json
import re
import sys
import threading

import fakes
import jsonschema
import openai
import pytest
from constraining import PERSON, SUM
from serving import Fake, serving, until

from gpt2core import GPT2
from gpt2core.constraints import compiler
from gpt2core.testing import random_checkpoint

ASKED = {
    "regex": "[a-f]{2,5}-[0-9]+x",
    "json_schema": PERSON,
    "choice": ["yes", 'no "really"'],
    "grammar": SUM,
}
SECRET = "xyzzy"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(random_checkpoint(tmp_path_factory.mktemp("tiny")))


@pytest.fixture(scope="module")
def model(folder):
    with GPT2.from_pretrained(folder) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def server(folder):
    with serving(model=folder, served_name="tiny", chat_template="plain") as running:
        yield running


@pytest.mark.parametrize("kind", ASKED)
def test_generate_has_the_text_of_the_library_streamed_too(server, model, kind):
    options = {kind: ASKED[kind], "temperature": 1.0, "seed": 5, "max_new_tokens": 70}
    want = model.generate("a", **options)
    answer = server.generate("a", **options)
    assert answer.status_code == 200, answer.text
    got = answer.json()["generations"][0]
    assert (got["text"], got["finish_reason"]) == (want.text, want.finish_reason)
    events = server.events("/generate", {"prompt": "a", **options})
    assert "".join(event["text"] for event in events[:-2]) == want.text


WAYS = {
    "response_format": (
        {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON}},
        "json_schema",
    ),
    "guided_json": (PERSON, "json_schema"),
    "guided_json as text": (json.dumps(PERSON), "json_schema"),
    "guided_regex": (ASKED["regex"], "regex"),
    "guided_choice": (ASKED["choice"], "choice"),
    "guided_grammar": (SUM, "grammar"),
    "structured_outputs json": ({"json": PERSON}, "json_schema"),
    "structured_outputs regex": ({"regex": ASKED["regex"]}, "regex"),
    "structured_outputs choice": ({"choice": ASKED["choice"]}, "choice"),
    "structured_outputs grammar": ({"grammar": SUM, "disable_any_whitespace": True}, "grammar"),
}


@pytest.mark.parametrize("way", WAYS)
def test_openais_routes_take_each_way_of_asking(server, model, way):
    value, kind = WAYS[way]
    options = {"temperature": 1.0, "seed": 6}
    want = model.generate("a", max_new_tokens=70, **options, **{kind: ASKED[kind]})
    body = {"prompt": "a", "max_tokens": 70, way.split()[0]: value, **options}
    answer = server.post("/v1/completions", body)
    assert answer.status_code == 200, answer.text
    choice = answer.json()["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == (want.text, want.finish_reason)
    del body["prompt"]
    chat = {"messages": [{"role": "user", "content": "a"}], "stop": [], **body}
    answer = server.post("/v1/chat/completions", chat)
    assert answer.status_code == 200, answer.text
    events = server.events("/v1/chat/completions", chat)
    text = answer.json()["choices"][0]["message"]["content"]
    parts = [event["choices"][0]["delta"].get("content", "") for event in events[:-1]]
    assert "".join(parts) == text
    if kind == "choice":
        assert text in ASKED["choice"]


@pytest.mark.parametrize(
    "way", [{"response_format": {"type": "json_object"}}, {"structured_outputs": {"json_object": True}}]
)
def test_a_json_object_is_one(server, way):
    body = {"prompt": "a", "max_tokens": 90, "temperature": 1.5, **way}
    choices = [
        server.post("/v1/completions", {**body, "seed": seed}).json()["choices"][0] for seed in range(12)
    ]
    whole = [choice["text"] for choice in choices if choice["finish_reason"] == "stop"]
    assert whole
    assert all(isinstance(json.loads(text), dict) for text in whole)
    assert all(choice["text"].startswith("{") for choice in choices)


def test_openais_client_asks_for_a_schema(server):
    schema = {"type": "array", "items": {"enum": [1, "two"]}, "minItems": 2, "maxItems": 4}
    asked = {"name": "numbers", "strict": True, "schema": schema}
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0, timeout=20) as client:
        answer = client.chat.completions.create(
            model="tiny",
            messages=[{"role": "user", "content": "a"}],
            max_tokens=60,
            response_format={"type": "json_schema", "json_schema": asked},
        )
    assert answer.choices[0].finish_reason == "stop"
    jsonschema.validate(json.loads(answer.choices[0].message.content), schema)


@pytest.mark.parametrize("kind", ["text", None])
def test_without_a_constraint_nothing_changes(server, kind):
    body = {"prompt": "a", "seed": 1, "guided_json": None, "guided_choice": None, "structured_outputs": None}
    body["response_format"] = None if kind is None else {"type": kind}
    plain = server.post("/v1/completions", {"prompt": "a", "seed": 1}).json()["choices"]
    assert server.post("/v1/completions", body).json()["choices"] == plain
    assert server.post("/v1/completions", {**body, "structured_outputs": {}}).json()["choices"] == plain


@pytest.mark.parametrize(
    ("options", "param", "message"),
    [
        ({"guided_regex": f"({SECRET}"}, None, "regex cannot be compiled: unclosed group; mend it"),
        ({"guided_json": {"type": SECRET}}, None, "json_schema cannot be compiled; mend it"),
        ({"guided_json": f'{{"{SECRET}": 1, "{SECRET}": 2}}'}, None, "not strict JSON: it has a key twice"),
        ({"guided_json": SECRET}, None, "json_schema is not strict JSON"),
        (
            {"guided_grammar": f"start: {SECRET}"},
            None,
            "grammar cannot be compiled at line 1, column 8; mend it",
        ),
        ({"guided_regex": 3}, "guided_regex", "guided_regex"),
        ({"guided_choice": []}, None, "choice has 0 entries"),
        ({"guided_choice": ["a", ""]}, "guided_choice", "guided_choice is empty"),
        ({"guided_regex": "a" * 9000}, "guided_regex", "has more than 8192 bytes, this server's limit"),
        ({"structured_outputs": {"json": {"a": "é" * 5000}}}, "structured_outputs", "more than 8192 bytes"),
        ({"structured_outputs": {"xml": SECRET}}, None, "has a field that is not known here"),
        (
            {"structured_outputs": {"regex": "a", "choice": ["a"]}},
            "structured_outputs",
            "more than one constraint",
        ),
        (
            {"guided_regex": "a", "response_format": {"type": "json_object"}},
            "guided_regex",
            "response_format and guided_regex ask for more than one constraint; leave all but one out",
        ),
        ({"response_format": {"type": "json_schema"}}, "response_format", "has json_schema with"),
        ({"response_format": {"type": "xml"}}, "response_format", "json_object, or json_schema"),
    ],
)
def test_a_bad_constraint_is_refused_by_name_and_never_repeated(options, param, message):
    with serving(Fake().load, max_constraint_nbytes=8192) as server:
        answer = server.post("/v1/completions", {"prompt": "a", **options})
        assert answer.status_code in (400, 422), answer.text
        error = answer.json()["error"]
        assert (error["param"], message in error["message"]) == (param, True), error
        assert SECRET not in answer.text
        assert server.idle()
        server.check_works()


def test_without_the_package_the_request_is_refused_with_the_extra_and_the_server_works_on(monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with serving(Fake().load) as server:
        answer = server.generate("a", regex="a")
        assert answer.status_code == 422
        assert "pip install 'gpt2core[guidance]'" in answer.json()["error"]["message"]
        server.check_works()
        assert server.idle()


def test_a_constraint_that_cannot_go_on_ends_its_own_request():
    with serving(Fake(logits_of=fakes.hashed).load) as server:
        options = {"regex": "xxxx", "no_repeat_ngram_size": 1}
        answer = server.generate("ab", **options)
        assert answer.status_code == 422, answer.text
        assert (
            "allows 1 tokens after 1 tokens, and all of them are banned" in answer.json()["error"]["message"]
        )
        events = server.events("/generate", {"prompt": "ab", **options})
        assert "banned" in events[-1]["error"]["message"]
        server.check_works()
        until(server.idle)


def test_compiling_holds_up_nobody_else(monkeypatch):
    entered, leave, compile_one = threading.Event(), threading.Event(), compiler._compile

    def slow(*args):
        entered.set()
        assert leave.wait(20)
        return compile_one(*args)

    monkeypatch.setattr(compiler, "_compile", slow)
    with serving(Fake().load) as server:
        answers = []
        thread = threading.Thread(target=lambda: answers.append(server.generate("a", regex="[a-c]{3}")))
        thread.start()
        assert entered.wait(20)
        assert server.client.get("/livez").status_code == 200
        server.check_works()
        leave.set()
        thread.join(20)
        assert re.fullmatch("[a-c]{3}", answers[0].json()["generated_text"])
