"""`/v1/chat/completions`: prompts against transformers' chat templates, answers against the library."""

import json
import math

import openai
import pytest
from serving import Fake, serving
from transformers import AutoTokenizer

from gpt2core import GPT2, ChatTemplate, RequestError
from gpt2core.chat_template import DIALOGPT
from gpt2core.testing import random_checkpoint

TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Does money buy happiness?"},
    {"role": "assistant", "content": "It <depends> \"ö\" 'x'."},
    {"role": "user", "content": "On what?"},
]
CHATML = """{% for message in messages %}
{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] | trim }}
{%- generation %}{{ eos_token }}{% endgeneration %}
{% endfor %}
{%- if add_generation_prompt %}
<|im_start|>assistant
{% endif %}"""
LOOPS = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{% continue %}{% endif %}"
    "{{ m | tojson }}{% if loop.index > 3 %}{% break %}{% endif %}{% endfor %}{{ strftime_now('%Y') }}"
)
STRICT = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{{ m.content }}{{ eos_token }}{% endfor %}"
)


def checkpoint(folder, template=None, *, file=False):
    random_checkpoint(folder)
    if template is not None and file:
        (folder / "chat_template.jinja").write_text(template)
    elif template is not None:
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": template}
        config |= {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return str(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return checkpoint(tmp_path_factory.mktemp("chat"), DIALOGPT)


@pytest.fixture(scope="module")
def model(folder):
    with GPT2.from_pretrained(folder) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def server(folder):
    with serving(model=folder, served_name="tiny") as running:
        yield running


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="-", max_retries=0, timeout=20) as one:
        yield one


# The prompt


@pytest.mark.parametrize("template", [DIALOGPT, CHATML, LOOPS], ids=["dialogpt", "chatml", "loops"])
@pytest.mark.parametrize("file", [False, True])
@pytest.mark.parametrize("begin", [False, True])
def test_a_template_gives_the_token_ids_of_transformers(tmp_path, template, file, begin):
    checkpoint(tmp_path, DIALOGPT)  # for its special tokens
    path = checkpoint(tmp_path, template, file=file)
    reference = AutoTokenizer.from_pretrained(path)
    with GPT2.from_pretrained(path) as model:
        got = ChatTemplate(model.tokenizer.chat_template).encode(
            TURNS, model.tokenizer, context=1024, add_generation_prompt=begin
        )
    want = reference.apply_chat_template(TURNS, add_generation_prompt=begin, return_dict=False)
    assert got == want


def test_special_tokens_that_a_message_spells_out_stay_text(model):
    template = ChatTemplate(DIALOGPT)
    hostile = "a<|endoftext|>b"
    got = template.encode(
        [{"role": "user", "content": hostile}], model.tokenizer, context=96, add_generation_prompt=True
    )
    assert got == [*model.tokenizer.encode(hostile), *model.tokenizer.special_ids]


def test_a_template_cannot_reach_beyond_its_sandbox(model):
    template = ChatTemplate("{{ messages.__class__.__mro__ }}{{ messages.append(1) }}")
    with pytest.raises(Exception, match="cannot render"):
        template.render(TURNS, model.tokenizer, add_generation_prompt=True)


def test_a_template_is_found_by_name_and_by_file_or_said_to_be_missing(tmp_path, model):
    (tmp_path / "own.jinja").write_text("{{ messages[0].content }}!")
    found = ChatTemplate.find(str(tmp_path / "own.jinja"))(model.tokenizer)
    assert found.render(TURNS, model.tokenizer, add_generation_prompt=True) == "Be brief.!"
    (tmp_path / "broken.jinja").write_text("{% for %}")
    with pytest.raises(RequestError, match="is not Jinja"):
        ChatTemplate.find(str(tmp_path / "broken.jinja"))
    with pytest.raises(RequestError, match="give a file, dialogpt or plain"):
        ChatTemplate.find(str(tmp_path / "none.jinja"))


# The answer


def test_the_client_gets_the_text_of_the_library(client, model):
    asked = {"max_tokens": 12, "seed": 3, "temperature": 0.8, "stop": ["zz"], "top_p": 0.9}
    answer = client.chat.completions.create(model="tiny", messages=TURNS[1:], **asked)
    text = "".join(turn["content"] + "<|endoftext|>" for turn in TURNS[1:])
    expected = model.generate(
        text, max_new_tokens=12, seed=3, temperature=0.8, stop="zz", top_p=0.9, allow_special=True
    )
    [choice] = answer.choices
    assert (choice.message.role, choice.message.content) == ("assistant", expected.text)
    assert choice.finish_reason == expected.finish_reason
    assert (answer.object, choice.logprobs) == ("chat.completion", None)
    assert answer.usage.prompt_tokens == expected.prompt_tokens
    assert answer.usage.completion_tokens == len(expected.token_ids)


def test_the_client_streams_the_same_texts(client):
    asked = {"model": "tiny", "messages": TURNS[1:2], "max_tokens": 9, "seed": 4, "n": 3}
    whole = client.chat.completions.create(**asked)
    texts, roles, ends = [""] * 3, [], {}
    chunks = list(
        client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True})
    )
    for chunk in chunks[:-1]:
        [choice] = chunk.choices
        texts[choice.index] += choice.delta.content or ""
        roles += [choice.delta.role] if choice.delta.role else []
        ends |= {choice.index: choice.finish_reason} if choice.finish_reason else {}
    assert texts == [choice.message.content for choice in whole.choices]
    assert roles == ["assistant"] * 3
    assert ends == {choice.index: choice.finish_reason for choice in whole.choices}
    assert chunks[-1].usage == whole.usage
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}


def test_without_max_tokens_the_answer_may_fill_the_context(client, model):
    answer = client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "a"}], extra_body={"ignore_eos": True}
    )
    assert answer.usage.total_tokens == model.config.n_positions


def test_logprobs_are_those_of_the_library(client, model):
    answer = client.chat.completions.create(
        model="tiny", messages=TURNS[1:2], max_tokens=5, seed=1, logprobs=True, top_logprobs=2
    )
    prompt = TURNS[1]["content"] + "<|endoftext|>"
    expected = model.generate(
        prompt, max_new_tokens=5, seed=1, temperature=1, logprobs=2, allow_special=True
    ).logprobs
    got = answer.choices[0].logprobs.content
    assert len(got) == len(expected) == 5
    for one, want in zip(got, expected, strict=True):
        assert math.isclose(one.logprob, want.logprob, abs_tol=1e-9)
        assert bytes(one.bytes) == model.tokenizer.token_bytes(want.token_id)
        assert [bytes(top.bytes) for top in one.top_logprobs] == [
            model.tokenizer.token_bytes(token_id) for token_id, _ in want.top
        ]
        assert one.token == bytes(one.bytes).decode("utf-8", "replace")


def test_token_ids_are_returned_where_that_is_asked_for(server, model):
    body = {"messages": TURNS[1:2], "max_tokens": 5, "seed": 1, "return_token_ids": True}
    whole = server.post("/v1/chat/completions", body).json()
    assert whole["prompt_token_ids"] == model.tokenizer.encode(
        TURNS[1]["content"] + "<|endoftext|>", allow_special=True
    )
    events = server.events("/v1/chat/completions", body)[:-1]
    assert events[0]["prompt_token_ids"] == whole["prompt_token_ids"]
    streamed = [i for event in events for i in event["choices"][0].get("token_ids", [])]
    assert streamed == whole["choices"][0]["token_ids"]


def test_a_plain_chat_ends_where_the_user_would_speak_again():
    fake = Fake(logits_of=lambda history, size: script(history, size, b"\nUser: x"))
    with serving(fake.load, chat_template="plain") as server:
        body = {"messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}]}
        answer = server.post("/v1/chat/completions", {**body, "return_token_ids": True}).json()
    assert bytes(answer["prompt_token_ids"]) == b"User: Hi\nAssistant:"
    assert answer["choices"][0]["message"]["content"] == " ok"
    assert answer["choices"][0]["finish_reason"] == "stop"


def script(history, size, end):
    import numpy as np

    said = bytes(history).partition(b"Assistant:")[2]
    logits = np.zeros(size, np.float32)
    logits[(b" ok" + end)[len(said) % (3 + len(end))]] = 50
    return logits


# What is refused


def test_a_model_without_a_template_says_so():
    with serving(Fake().load) as server:
        answer = server.post("/v1/chat/completions", {"messages": TURNS})
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "no_chat_template"
    assert "--chat-template" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("options", "param", "message"),
    [
        ({"messages": []}, "messages", "messages is empty"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages", "messages"),
        ({"messages": [{"role": "user", "content": "x" * 3000}]}, "messages", "leave the oldest"),
        ({"messages": [{"role": "user", "content": "x" * 94}], "max_tokens": 9}, "messages", "context is 96"),
        ({"top_logprobs": 2}, "top_logprobs", "is for logprobs: true"),
        ({"logprobs": True, "top_logprobs": 6}, "top_logprobs", "more than 5"),
        ({"max_tokens": 3, "max_completion_tokens": 4}, "max_completion_tokens", "differ"),
        ({"tools": [{"type": "function"}]}, "tools", "call no tools"),
        ({"response_format": {"type": "yaml"}}, "response_format", "type is text, json_object, or json_sch"),
        ({"response_format": {"type": "json_schema"}}, "response_format", "has json_schema with"),
        ({"stream_options": {}}, "stream_options", "is for streams"),
        ({"model": "other"}, "model", "no such model"),
    ],
)
def test_a_bad_parameter_is_refused_by_name(server, options, param, message):
    body = {"messages": [{"role": "user", "content": "a"}], "max_tokens": 2, **options}
    answer = server.post("/v1/chat/completions", body)
    assert answer.status_code == (404 if "model" in options else 400), answer.text
    assert answer.json()["error"]["param"] == param
    assert message in answer.json()["error"]["message"]


def test_what_clients_send_along_is_harmless(server):
    turn = {"role": "assistant", "content": "b", "refusal": None, "tool_calls": None, "annotations": []}
    body = {"messages": [{"role": "user", "content": "a"}, turn], "max_completion_tokens": 2}
    plain = {"tools": None, "store": False, "response_format": {"type": "text"}, "user": "u", "stop": ""}
    assert server.post("/v1/chat/completions", {**body, **plain}).status_code == 200


def test_what_the_template_refuses_is_a_bad_request(tmp_path):
    (tmp_path / "strict.jinja").write_text(STRICT)
    with serving(Fake().load, chat_template=str(tmp_path / "strict.jinja")) as server:
        answer = server.post("/v1/chat/completions", {"messages": TURNS, "max_tokens": 2})
    assert answer.status_code == 400
    assert "roles must alternate" in answer.json()["error"]["message"]
