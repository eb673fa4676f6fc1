"""`/v1`: OpenAI's client and lm-evaluation-harness's requests, with numbers checked against the library."""

import math
import threading

import numpy as np
import openai
import pytest
from fakes import END, scripted
from serving import Fake, events_of, serving, until

from gpt2core import GPT2
from gpt2core.serve import events
from gpt2core.testing import random_checkpoint


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(random_checkpoint(tmp_path_factory.mktemp("tiny")))


@pytest.fixture(scope="module")
def model(folder):
    with GPT2.from_pretrained(folder) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def server(folder):
    with serving(model=folder, served_name="tiny", api_key="k1") as running:
        running.client.headers["Authorization"] = "Bearer k1"
        yield running


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="k1", max_retries=0, timeout=20) as one:
        yield one


def complete(server, prompt, **options):
    answer = server.post("/v1/completions", {"model": "tiny", "prompt": prompt, **options})
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_the_client_lists_the_model(client):
    assert [(one.id, one.object) for one in client.models.list()] == [("tiny", "model")]
    assert client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")


def test_the_client_gets_the_text_of_the_library(client, model):
    answer = client.completions.create(model="tiny", prompt="Once", max_tokens=12, seed=3, temperature=0.8)
    expected = model.generate("Once", max_new_tokens=12, seed=3, temperature=0.8)
    assert answer.choices[0].text == expected.text
    assert answer.choices[0].finish_reason == expected.finish_reason
    assert answer.choices[0].logprobs is None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (4, len(expected.token_ids))
    assert answer.object == "text_completion"


def test_without_max_tokens_there_are_16_and_the_temperature_is_1(client, model):
    answer = client.completions.create(model="tiny", prompt="Once", seed=3)
    assert answer.choices[0].text == model.generate("Once", max_new_tokens=16, seed=3, temperature=1).text


def test_the_client_streams_the_same_text_and_the_usage(client, model):
    asked = {"model": "tiny", "prompt": "Once", "max_tokens": 20, "seed": 9}
    chunks = list(client.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    expected = model.generate("Once", max_new_tokens=20, seed=9, temperature=1)
    assert "".join(c.text for chunk in chunks for c in chunk.choices) == expected.text
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == len(expected.token_ids)
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert chunks[-2].choices[0].finish_reason == expected.finish_reason
    assert len({chunk.id for chunk in chunks}) == 1


def test_choices_of_several_prompts_are_numbered_prompt_after_prompt(client, model):
    asked = {"model": "tiny", "prompt": ["One", "Two"], "n": 3, "max_tokens": 8, "seed": 1}
    whole = client.completions.create(**asked)
    expected = model.generate(["One", "Two"], n=3, max_new_tokens=8, seed=1, temperature=1)
    assert [(c.index, c.text) for c in whole.choices] == [(i, e.text) for i, e in enumerate(expected)]
    texts = [""] * 6
    for chunk in client.completions.create(**asked, stream=True):
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == [e.text for e in expected]


def test_stop_echo_bias_and_penalties_have_their_meaning(client, model):
    answer = client.completions.create(
        model="tiny",
        prompt="ab",
        max_tokens=30,
        seed=2,
        stop=["zz", "s"],
        echo=True,
        logit_bias={"101": 4},
        presence_penalty=0.5,
        frequency_penalty=0.25,
        top_p=0.95,
    )
    expected = model.generate(
        "ab",
        max_new_tokens=30,
        seed=2,
        stop=["zz", "s"],
        echo=True,
        logit_bias={101: 4},
        presence_penalty=0.5,
        frequency_penalty=0.25,
        top_p=0.95,
        temperature=1,
    )
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == (
        expected.text,
        expected.finish_reason,
    )


def test_token_ids_give_what_their_text_gives(server, model):
    ids = [model.tokenizer.encode(text) for text in ("Once", "Two and")]
    texts = complete(server, ["Once", "Two and"], seed=4)["choices"]
    assert complete(server, ids, seed=4)["choices"] == texts
    assert complete(server, ids[0], seed=4)["choices"] == texts[:1]


def test_best_of_returns_the_likeliest_per_token_of_the_choices(server, model):
    got = complete(server, ["Once", "Two"], n=2, best_of=4, max_tokens=6, seed=8)
    sampled = model.generate(["Once", "Two"], n=4, max_new_tokens=6, seed=8, temperature=1, logprobs=0)
    for i in range(2):
        ranked = sorted(
            sampled[4 * i : 4 * i + 4],
            key=lambda one: -np.mean([entry.logprob for entry in one.logprobs]),
        )
        assert [c["text"] for c in got["choices"][2 * i : 2 * i + 2]] == [one.text for one in ranked[:2]]
    assert all(choice["logprobs"] is None for choice in got["choices"])
    assert got["usage"]["completion_tokens"] == sum(len(one.token_ids) for one in sampled)


def test_best_of_prefers_a_long_likely_text_to_a_short_one_that_is_less_likely_per_token():
    def long_or_short(history, vocab_size):
        logits = np.full(vocab_size, -50, np.float32)
        if len(history) == 1:  # either is drawn in about half of the choices
            logits[[ord("l"), ord("s")]] = 0.1, 0
        elif history[1] == ord("s"):
            logits[[END, ord("t")]] = 2, 0
        else:
            logits[[ord("o"), ord("p")]] = 2.5, 0
        return logits

    fake = Fake(logits_of=long_or_short)
    with serving(fake.load, served_name="tiny", max_n=8) as server:
        body = {"model": "tiny", "prompt": "a", "max_tokens": 30, "seed": 3, "logprobs": 0}
        every = server.post("/v1/completions", {**body, "n": 8, "best_of": 8}).json()["choices"]
        [best] = server.post("/v1/completions", {**body, "n": 1, "best_of": 8}).json()["choices"]
    by_mean = max(every, key=lambda choice: np.mean(choice["logprobs"]["token_logprobs"]))
    by_sum = max(every, key=lambda choice: sum(choice["logprobs"]["token_logprobs"]))
    assert best["text"] == by_mean["text"] != by_sum["text"]


# What other servers' clients send


def test_64_prompts_are_answered_in_one_request(client, model):
    prompts = [f"{i}" for i in range(64)]
    answer = client.completions.create(model="tiny", prompt=prompts, max_tokens=3, temperature=0)
    assert [c.text for c in answer.choices] == [one.text for one in model.generate(prompts, max_new_tokens=3)]


def test_the_sampling_options_of_vllm_have_the_meaning_of_the_library_s(client, model):
    extra = {"top_k": 7, "min_p": 0.02, "repetition_penalty": 1.2, "min_tokens": 5}
    answer = client.completions.create(
        model="tiny", prompt="Once", max_tokens=20, seed=3, extra_body=extra | {"stop_token_ids": [101, 115]}
    )
    expected = model.generate(
        "Once",
        **{"max_new_tokens": 20, "seed": 3, "temperature": 1, "top_k": 7, "min_p": 0.02},
        **{"repetition_penalty": 1.2, "min_new_tokens": 5, "stop_token_ids": [101, 115]},
    )
    assert answer.choices[0].text == expected.text
    everything = client.completions.create(model="tiny", prompt="Once", seed=3, extra_body={"top_k": -1})
    assert everything.choices[0].text == client.completions.create(
        model="tiny", prompt="Once", seed=3
    ).choices[0].text  # fmt: skip


def test_a_stop_token_ends_the_text_and_ignore_eos_goes_on():
    ended = Fake(logits_of=scripted({(97,): (98, 99, END, 100)}))
    with serving(ended.load, served_name="tiny") as server:
        body = {"model": "tiny", "prompt": "a", "max_tokens": 5, "temperature": 0}
        plain = server.post("/v1/completions", body).json()["choices"][0]
        stopped = server.post("/v1/completions", {**body, "stop_token_ids": [99]}).json()["choices"][0]
        ignoring = server.post("/v1/completions", {**body, "max_tokens": 4, "ignore_eos": True}).json()
    assert (plain["text"], plain["finish_reason"]) == ("bc", "stop")
    assert (stopped["text"], stopped["finish_reason"]) == ("b", "stop")
    assert ignoring["choices"][0]["text"] == "bcd"
    assert ignoring["choices"][0]["finish_reason"] == "length"


def test_special_tokens_in_a_prompt_are_tokens_only_where_that_is_asked_for(server):
    usage = [
        complete(server, "<|endoftext|>", max_tokens=1, allow_special=special)["usage"]["prompt_tokens"]
        for special in (False, True)
    ]
    assert usage == [13, 1]


def test_token_ids_are_returned_whole_and_streamed(server, model):
    asked = {"model": "tiny", "prompt": "Once", "max_tokens": 9, "seed": 5, "return_token_ids": True}
    expected = model.generate("Once", max_new_tokens=9, seed=5, temperature=1)
    [choice] = complete(server, **{name: value for name, value in asked.items() if name != "model"})[
        "choices"
    ]
    assert choice["prompt_token_ids"] == model.tokenizer.encode("Once")
    assert choice["token_ids"] == expected.token_ids
    events = [event["choices"][0] for event in server.events("/v1/completions", asked)[:-1]]
    assert events[0]["prompt_token_ids"] == choice["prompt_token_ids"]
    assert all(event["prompt_token_ids"] is None for event in events[1:])
    assert [token_id for event in events for token_id in event["token_ids"]] == expected.token_ids


def test_usage_is_told_with_every_event_where_that_is_asked_for(server):
    options = {"include_usage": True, "continuous_usage_stats": True, "include_obfuscation": False}
    asked = {"model": "tiny", "prompt": "Once", "max_tokens": 5, "seed": 5, "stream_options": options}
    counts = [event["usage"]["completion_tokens"] for event in server.events("/v1/completions", asked)[:-1]]
    assert counts == sorted(counts)
    assert counts[-1] == 5


def test_empty_options_are_harmless(server):
    plain = complete(server, "Once", seed=3)["choices"]
    options = {"suffix": "", "stop": "", "model": None, "user": "", "logit_bias": {}, "stop_token_ids": None}
    assert server.post("/v1/completions", {"prompt": "Once", "seed": 3, **options}).json()["choices"] == plain
    assert server.post("/v1/completions", {"prompt": "Once", "seed": 3}).json()["choices"] == plain


# lm-evaluation-harness, `local-completions`: what its requests are and how it reads the answers


def loglikelihood(choice, context_tokens):
    """As its `parse_logprobs` does; the last token is the one that it had to ask for."""
    lists = choice["logprobs"]
    total = sum(lists["token_logprobs"][context_tokens:-1])
    greedy = all(
        token == max(top.keys(), key=lambda each: top[each])
        for token, top in zip(
            lists["tokens"][context_tokens:-1], lists["top_logprobs"][context_tokens:-1], strict=True
        )
    )
    return total, greedy


def test_loglikelihoods_are_those_of_score(server, model):
    context, continuations = "Once upon a ", ["time", "\u00e9t\u00e9 \u2603", "q"]
    first = model.tokenizer.encode(context)
    prompts = [first + model.tokenizer.encode(text) for text in continuations]
    answer = complete(
        server, prompts, temperature=0, max_tokens=1, logprobs=1, seed=1234, echo=True
    )  # its payload
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2]
    for choice, prompt in zip(answer["choices"], prompts, strict=True):
        got, greedy = loglikelihood(choice, len(first))
        scores = model.score(prompt).logprobs[len(first) - 1 :]
        assert got == pytest.approx(math.fsum(scores), abs=1e-5)
        best = model.logits(prompt)[len(first) - 1 : -1].argmax(-1)
        assert greedy == (best.tolist() == prompt[len(first) :])


def test_a_greedy_continuation_is_seen_as_greedy(server, model):
    prompt = model.tokenizer.encode("Once upon")
    tokens = model.generate(prompt, max_new_tokens=6).token_ids
    choice = complete(
        server, [[*prompt, *tokens]], temperature=0, max_tokens=1, logprobs=1, echo=True
    )["choices"][0]  # fmt: skip
    assert loglikelihood(choice, len(prompt))[1]


def test_echo_without_new_tokens_scores_the_prompt_and_nothing_else(server, model):
    text = "Once upon a time"
    choice = complete(server, text, max_tokens=0, logprobs=0, echo=True)["choices"][0]
    lists = choice["logprobs"]
    assert (choice["text"], choice["finish_reason"]) == (text, "length")
    assert lists["token_logprobs"][0] is lists["top_logprobs"][0] is None
    np.testing.assert_allclose(lists["token_logprobs"][1:], model.score(text).logprobs, atol=1e-6)
    assert "".join(lists["tokens"]) == text
    assert lists["text_offset"] == list(range(len(text)))


def test_generation_requests_of_the_harness_work(server, model):
    answer = complete(server, ["Once"], max_tokens=12, temperature=0, stop=["\n\n", "Q:"], seed=1234)
    assert answer["choices"][0]["text"] == model.generate("Once", max_new_tokens=12, stop=["\n\n", "Q:"]).text


def test_tokens_that_are_no_characters_have_different_spellings(server):
    lists = complete(server, "\u2603", max_tokens=0, logprobs=1, echo=True)["choices"][0]["logprobs"]
    assert lists["tokens"] == ["bytes:\\xe2", "bytes:\\x98", "bytes:\\x83"]
    assert lists["text_offset"] == [0, 0, 0]


def test_streamed_logprobs_join_to_those_of_the_whole_answer(server):
    asked = {"model": "tiny", "prompt": "Once", "max_tokens": 8, "seed": 5, "logprobs": 3, "echo": True}
    whole = server.post("/v1/completions", asked).json()["choices"][0]["logprobs"]
    joined = {name: [] for name in whole}
    for event in server.events("/v1/completions", asked)[:-1]:
        for name, values in event["choices"][0]["logprobs"].items():
            joined[name] += values
    assert joined == whole


# What is refused


@pytest.mark.parametrize(
    ("options", "param", "message"),
    [
        ({"suffix": "x"}, "suffix", "suffix is not supported"),
        ({"n": 2, "best_of": 1}, "best_of", "best_of is 1, less than n, 2"),
        ({"best_of": 2, "stream": True}, "best_of", "cannot be streamed"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "is for streams"),
        (
            {"max_tokens": 93},
            "prompt",
            "4 tokens and max_tokens is 93, 97 in all; this model's context is 96",
        ),
        ({"max_tokens": -1}, "max_tokens", "max_tokens is too small"),
        ({"logprobs": 6}, "logprobs", "logprobs is more than 5"),
        ({"n": 5}, "n", "n is more than 4"),
        ({"prompt": [[1], [257]]}, None, "257"),
        ({"prompt": [[]]}, "prompt", "prompt"),
        ({"prompt": []}, "prompt", "prompt"),
        ({"prompt": ["a"] * 65}, "prompt", "65 prompts; at most 64"),
        ({"prompt": ["a"] * 40, "n": 4}, "prompt", "160 texts; this server holds at most 96"),
        ({"stop_token_ids": [257]}, None, "stop_token_ids names token 257"),
        ({"min_tokens": 17}, None, "min_tokens 17 is more than max_tokens 16"),
        ({"logit_bias": {"257": 1}}, None, "257"),
        ({"logit_bias": {"a": 1}}, "logit_bias", "logit_bias is not valid"),
        ({"top_kk": 3}, None, "did you mean 'top_k'"),
    ],
)
def test_a_bad_parameter_is_a_bad_request(client, options, param, message):
    asked = {"model": "tiny", "prompt": "Once", **options}
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(
            model=asked.pop("model"), prompt=asked.pop("prompt"), extra_body=asked or None
        )
    error = caught.value.response.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param
    assert message in error["message"]


def test_an_unknown_model_and_a_wrong_key_have_their_own_errors(server, client):
    with pytest.raises(openai.NotFoundError) as caught:
        client.completions.create(model="gpt-4", prompt="a")
    assert caught.value.code == "model_not_found"
    with (
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="wrong", max_retries=0) as other,
        pytest.raises(openai.AuthenticationError),
    ):
        other.models.list()


@pytest.mark.parametrize("queued", [False, True])
@pytest.mark.parametrize("chat", [False, True])
def test_the_client_reads_a_stream_with_comments_in_its_long_waits(monkeypatch, chat, queued):
    fake, sent = Fake(), []

    async def send(write, data, inner=events._send):
        sent.append(data)
        if sent.count(b": ping\n\n") == 3:
            fake.gate.set()
        await inner(write, data)

    monkeypatch.setattr(events, "_send", send)
    with (
        serving(fake.load, model="demo", ping_s=0.05, chat_template="plain", max_batch=1) as server,
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="-", max_retries=0) as client,
    ):
        fake.gate.clear()
        if queued:  # behind another, which needs no comments
            other = threading.Thread(target=server.generate, kwargs={"max_new_tokens": 30})
            other.start()
            until(lambda: server.driver.requests == 1)
        asked = {"model": "demo", "max_tokens": 8, "seed": 3, "temperature": 0.5}
        if chat:
            asked["messages"] = [{"role": "user", "content": "ab"}]
            stream = client.chat.completions.create(**asked, stream=True)
            parts = [chunk.choices[0].delta.content for chunk in stream]
            whole = client.chat.completions.create(**asked).choices[0].message.content
        else:
            stream = client.completions.create(**asked, prompt="ab", stream=True)
            parts = [chunk.choices[0].text for chunk in stream]
            whole = client.completions.create(**asked, prompt="ab").choices[0].text
        assert "".join(part or "" for part in parts) == whole
        assert len(whole) > 0
    assert sent.count(b": ping\n\n") >= 3
    assert sent[:3] == [b": ping\n\n"] * 3 or chat


def test_a_stream_that_never_waits_has_no_comments(server):
    body = {"prompt": "Once", "max_tokens": 20, "stream": True}
    assert b":" not in {line[:1] for line in server.post("/v1/completions", body).content.split(b"\n")}


def test_the_client_raises_when_a_stream_fails():
    fake = Fake()
    with serving(fake.load, model="demo") as server:

        def poison(batch, logits):
            if batch.starts[0] > 5:
                logits[:] = np.nan

        fake.after = poison
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key="-", max_retries=0) as client:
            stream = client.completions.create(model="demo", prompt="ab", max_tokens=20, stream=True)
            with pytest.raises(openai.APIError, match="not finite"):
                list(stream)
        body = {"model": "demo", "prompt": "ab", "max_tokens": 20, "stream": True}
        events = events_of(server.post("/v1/completions", body).content)
        assert events[-1]["error"]["type"] == "numerical_error"
