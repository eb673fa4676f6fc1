"""`overflow` over HTTP: the texts of the library, and what was left out, as a header, streamed or not."""

import openai
import pytest
from serving import serving

from gpt2core import GPT2
from gpt2core.chat_template import DIALOGPT, ChatTemplate
from gpt2core.testing import random_checkpoint

LONG = "Once upon a time there lived a king. " * 8  # 296 tokens of one byte; the context is 96
ROUTES = ("/generate", "/v1/completions", "/v1/chat/completions")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(random_checkpoint(tmp_path_factory.mktemp("tiny")))


@pytest.fixture(scope="module")
def model(folder):
    with GPT2.from_pretrained(folder) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def server(folder):
    with serving(
        model=folder, served_name="tiny", chat_template="dialogpt", allowed_origins=("https://a.example",)
    ) as one:
        yield one


def body(route, prompt, new_tokens, **options):
    if route == "/generate":
        return {"prompt": prompt, "max_new_tokens": new_tokens, **options}
    options |= {"model": "tiny", "max_tokens": new_tokens}
    if route == "/v1/completions":
        return {"prompt": prompt, **options}
    return {"messages": [{"role": "user", "content": prompt}], **options}


def want_of(model, route, prompt, new_tokens, **options):
    if route == "/generate":
        return model.generate(prompt, max_new_tokens=new_tokens, **options)
    options = {"temperature": 1.0, **options}
    if route != "/v1/completions":
        prompt = ChatTemplate(DIALOGPT).encode(
            [{"role": "user", "content": prompt}], model.tokenizer, context=None, add_generation_prompt=True
        )
    return model.generate(prompt, max_new_tokens=new_tokens, **options)


def text_of(route, answer):
    if route == "/generate":
        return answer["generations"][0]["text"]
    [choice] = answer["choices"]
    return choice["text"] if route == "/v1/completions" else choice["message"]["content"]


@pytest.mark.parametrize("overflow", ["truncate", "slide"])
@pytest.mark.parametrize("route", ROUTES)
def test_a_long_prompt_gets_the_librarys_text_and_the_count_of_what_was_left_out(
    server, model, route, overflow
):
    options = {"seed": 3, "overflow": overflow}
    want = want_of(model, route, LONG, 20, **options)
    answer = server.post(route, body(route, LONG, 20, **options))
    assert answer.status_code == 200, answer.text
    assert text_of(route, answer.json()) == want.text
    assert want.truncated_tokens > 200
    assert answer.headers["x-truncated-tokens"] == str(want.truncated_tokens)
    usage = answer.json()["usage"]
    assert usage["prompt_tokens"] == want.prompt_tokens
    assert usage["total_tokens"] == want.prompt_tokens + len(want.token_ids)
    if route == "/generate":
        [generation] = answer.json()["generations"]
        assert (generation["truncated_tokens"], generation["prompt_tokens"]) == (
            want.truncated_tokens,
            want.prompt_tokens,
        )


@pytest.mark.parametrize("route", ROUTES)
def test_a_stream_says_so_in_its_headers_before_the_first_event(server, model, route):
    options = {"seed": 3, "overflow": "truncate"}
    want = want_of(model, route, LONG, 20, **options)
    with server.client.stream("POST", route, json=body(route, LONG, 20, stream=True, **options)) as answer:
        assert answer.headers["x-truncated-tokens"] == str(want.truncated_tokens)
        assert answer.read().endswith(b"data: [DONE]\n\n")


@pytest.mark.parametrize("route", ROUTES)
def test_a_text_slides_beyond_the_context(server, model, route):
    options = {"seed": 4, "ignore_eos": True, "overflow": "slide"}
    want = want_of(model, route, "Once", 300, **options)
    answer = server.post(route, body(route, "Once", 300, **options))
    assert answer.status_code == 200, answer.text
    assert text_of(route, answer.json()) == want.text
    assert answer.json()["usage"]["completion_tokens"] == 300
    assert answer.headers["x-truncated-tokens"] == "0"


def test_an_answer_that_slides_is_as_long_as_the_context_unless_something_else_is_asked_for(server):
    asked = {"messages": [{"role": "user", "content": LONG}], "ignore_eos": True}
    answer = server.post("/v1/chat/completions", asked | {"overflow": "slide"})
    assert answer.json()["usage"]["completion_tokens"] == 96
    answer = server.post("/v1/chat/completions", asked | {"overflow": "truncate"})
    assert answer.json()["usage"] == {"prompt_tokens": 48, "completion_tokens": 48, "total_tokens": 96}


@pytest.mark.parametrize("route", ROUTES)
def test_without_it_a_long_prompt_is_refused_and_no_header_is_sent(server, route):
    answer = server.post(route, body(route, LONG, 20))
    assert answer.status_code in (400, 422)
    assert "this model's context is 96" in answer.json()["error"]["message"]
    answer = server.post(route, body(route, "Once", 3))
    assert "x-truncated-tokens" not in answer.headers
    if route == "/generate":
        assert "truncated_tokens" not in answer.json()["generations"][0]


@pytest.mark.parametrize("route", ROUTES)
def test_an_unknown_overflow_and_one_without_room_are_refused(server, route):
    answer = server.post(route, body(route, LONG, 5, overflow="wrap"))
    assert answer.status_code in (400, 422)
    assert answer.json()["error"]["param"] == "overflow"
    answer = server.post(route, body(route, LONG, 96, overflow="truncate"))
    assert answer.status_code in (400, 422)
    assert "keeps at least one token" in answer.json()["error"]["message"]


def test_the_client_sends_it_as_an_extra(server, model):
    want = model.generate(LONG, max_new_tokens=9, seed=1, temperature=1, overflow="truncate")
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="-", max_retries=0, timeout=20) as client:
        raw = client.completions.with_raw_response.create(
            model="tiny", prompt=LONG, max_tokens=9, seed=1, extra_body={"overflow": "truncate"}
        )
    assert raw.headers["x-truncated-tokens"] == str(want.truncated_tokens)
    assert raw.parse().choices[0].text == want.text


def test_a_page_of_another_origin_may_read_the_header(server):
    answer = server.client.post(
        "/generate",
        json={"prompt": LONG, "max_new_tokens": 2, "overflow": "truncate"},
        headers={"Origin": "https://a.example"},
    )
    assert "X-Truncated-Tokens" in answer.headers["access-control-expose-headers"]


def test_prompt_tokens_in_the_metrics_are_those_that_were_read(server):
    before = server.metric("gpt2core_prompt_tokens_total")
    answer = server.generate(LONG, max_new_tokens=2, overflow="slide").json()
    assert server.metric("gpt2core_prompt_tokens_total") - before == answer["usage"]["prompt_tokens"] < 97
