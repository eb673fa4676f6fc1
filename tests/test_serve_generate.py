"""`POST /generate` and the pages beside it: shapes, streams, seeds, logs and metrics."""

import concurrent.futures
import json
import logging

import pytest
from fakes import scripted
from prometheus_client.parser import text_string_to_metric_families as parse
from serving import Fake, events_of, serving, until

from gpt2core import GPT2, SamplingParams, __version__
from gpt2core.serve import logs
from gpt2core.testing import random_checkpoint

SAMPLED = {"max_new_tokens": 24, "temperature": 0.9}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(random_checkpoint(tmp_path_factory.mktemp("tiny")))


@pytest.fixture(scope="module")
def model(folder):
    with GPT2.from_pretrained(folder) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def server(folder):
    with serving(model=folder, chat_template="plain") as running:
        yield running


def test_one_prompt_gives_the_text_of_the_library(server, model):
    answer = server.generate("Once", max_length=20).json()
    expected = model.generate("Once", max_length=20)
    assert answer["generated_text"] == expected.text
    assert answer["generations"] == [
        {
            "text": expected.text,
            "finish_reason": expected.finish_reason,
            "prompt_tokens": 4,
            "completion_tokens": len(expected.token_ids),
            "index": 0,
            "choice": 0,
            "seed": answer["seed"],
        }
    ]
    assert answer["backend"] == "numpy"
    assert answer["model"] == server.settings.name
    assert answer["elapsed_s"] > 0
    n = len(expected.token_ids)
    assert answer["usage"] == {"prompt_tokens": 4, "completion_tokens": n, "total_tokens": 4 + n}


def test_several_prompts_run_as_one_batch(server, model):
    prompts = ["One", "Two and", "Three of them"]
    answer = server.generate(prompts, **SAMPLED, seed=5, n=2).json()
    expected = model.generate(prompts, **SAMPLED, seed=5, n=2)
    assert [one["text"] for one in answer["generations"]] == [one.text for one in expected]
    assert [(one["index"], one["choice"]) for one in answer["generations"]] == [
        (i, choice) for i in range(3) for choice in range(2)
    ]


def test_a_request_of_several_prompts_takes_as_many_steps_as_one_of_its_prompts():
    fake = Fake()
    with serving(fake.load) as server:
        before = len(fake.backend.batches)
        server.generate(["a", "b", "c", "d"], max_new_tokens=10)
        assert len(fake.backend.batches) - before == 10


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 1.3, "top_k": 40, "top_p": 0.9, "min_p": 0.01},
        {"temperature": 0.7, "repetition_penalty": 1.2, "no_repeat_ngram_size": 3},
        {"temperature": 1.0, "presence_penalty": 0.5, "frequency_penalty": -0.5, "logit_bias": {"65": 5.0}},
        {"temperature": 1.0, "stop": ["a", "ee"], "min_new_tokens": 2, "echo": True},
        {"temperature": 0.0},
    ],
)
@pytest.mark.parametrize("seed", [0, 2**63 - 1])
def test_streamed_and_not_streamed_and_the_library_give_the_same_bytes(server, model, options, seed):
    body = {"prompt": "Once upon", "max_new_tokens": 30, "seed": seed, **options}
    whole = server.post("/generate", body).json()
    *pieces, last, done = server.events("/generate", body)
    joined = "".join(piece["text"] for piece in pieces)
    library = dict(options)
    if "logit_bias" in library:
        library["logit_bias"] = {65: 5.0}
    expected = model.generate("Once upon", max_new_tokens=30, seed=seed, **library)
    assert joined.encode() == whole["generated_text"].encode() == expected.text.encode()
    assert last["generations"] == whole["generations"]
    assert (last["seed"], done) == (seed, "[DONE]")
    assert [piece["finish_reason"] for piece in pieces] == [None] * (len(pieces) - 1) + [
        expected.finish_reason
    ]


def test_a_stream_reports_the_probabilities_that_the_library_reports(server, model):
    *pieces, last, _ = server.events(
        "/generate", {"prompt": "Once", "max_new_tokens": 5, "logprobs": 2, "echo": True}
    )
    expected = model.generate("Once", max_new_tokens=5, logprobs=2, echo=True).logprobs
    prompt = pieces[0].pop("prompt_logprobs")
    assert pieces[0]["token_id"] is pieces[0]["logprob"] is None
    shown = [*prompt, *pieces[1:]]
    assert [one["logprob"] for one in shown] == [entry.logprob for entry in expected]
    assert [[(t["token_id"], t["logprob"]) for t in one["top_logprobs"]] for one in shown] == [
        list(entry.top) for entry in expected
    ]
    assert [one["token"] for one in shown] == [
        model.tokenizer.token_text(entry.token_id) for entry in expected
    ]
    assert [one["logprob"] for one in last["generations"][0]["logprobs"]] == [e.logprob for e in expected]


def test_the_reported_seed_gives_the_text_again(server):
    first = server.generate(["One", "Two"], **SAMPLED).json()
    seeds = [one["seed"] for one in first["generations"]]
    assert first["seed"] == seeds[0] != seeds[1]
    for text, prompt, seed in zip(first["generations"], ["One", "Two"], seeds, strict=True):
        assert server.generate(prompt, **SAMPLED, seed=seed).json()["generated_text"] == text["text"]


def test_a_seed_gives_its_text_whoever_else_is_in_the_batch_or_leaves_it(server, model):
    def ask(seed):
        if seed % 5 == 4:  # a neighbour that goes away midway
            with server.client.stream(
                "POST", "/generate", json={"prompt": "gone", "max_new_tokens": 80, "stream": True}
            ) as stream:
                next(stream.iter_raw())
            return None
        return server.generate(f"Prompt {seed}", **SAMPLED, seed=seed).json()["generated_text"]

    with concurrent.futures.ThreadPoolExecutor(12) as pool:
        texts = list(pool.map(ask, range(40)))
    for seed, text in enumerate(texts):
        if text is not None:
            assert text == model.generate(f"Prompt {seed}", **SAMPLED, seed=seed).text
    until(server.idle)


def test_a_split_character_is_never_sent_in_halves():
    snowman = "☃".encode()
    fake = Fake(logits_of=scripted({b"s": [*snowman, *snowman]}))
    with serving(fake.load) as server:
        *pieces, _, _ = server.events("/generate", {"prompt": "s", "max_new_tokens": 6})
    assert [piece["text"] for piece in pieces] == ["", "", "☃", "", "", "☃"]


def test_special_tokens_in_a_prompt_are_text_unless_it_is_asked_otherwise(server):
    text = "<|endoftext|>"
    assert server.generate(text, max_new_tokens=1).json()["usage"]["prompt_tokens"] == len(text)
    allowed = server.generate(text, max_new_tokens=1, allow_special=True).json()
    assert allowed["usage"]["prompt_tokens"] == 1


def test_with_speculation_a_stream_has_the_same_pieces_in_fewer_steps():
    repeating = scripted({b"abab": b"ab" * 30})
    body = {"prompt": "abab", "max_new_tokens": 40}
    answers, steps = [], []
    for speculation in ("off", "prompt_lookup"):
        fake = Fake(logits_of=repeating)
        with serving(fake.load, speculation=speculation) as server:
            before = len(fake.backend.batches)
            *pieces, _, _ = server.events("/generate", body)
            steps.append(len(fake.backend.batches) - before)
            assert server.metric("gpt2core_batch_rows_sum") == steps[-1]  # rows, not tokens
            answers.append([piece["text"] for piece in pieces])
    assert answers[0] == answers[1] == [*"ab" * 20]
    assert steps[0] == 40
    assert steps[1] < 12


def test_a_stream_is_sent_piece_by_piece_while_the_engine_works():
    fake = Fake()
    with serving(fake.load) as server:
        fake.delay_s = 0.01
        body = {"prompt": "ab", "max_new_tokens": 60, "stream": True}
        with server.client.stream("POST", "/generate", json=body) as response:
            chunks = response.iter_raw()
            data = next(chunks)
            fake.gate.clear()
            assert b"[DONE]" not in data
            fake.gate.set()
            data += b"".join(chunks)
    assert events_of(data)[-1] == "[DONE]"


# Metrics, logs, documents


def test_metrics_count_requests_tokens_and_the_queue():
    fake = Fake()
    with serving(fake.load, max_batch=2) as server:
        server.generate(["ab", "abc"], max_new_tokens=10)
        server.client.get("/no/such/path")
        assert server.metric("gpt2core_prompt_tokens_total") == 5
        assert server.metric("gpt2core_generated_tokens_total") == 20
        assert server.metric('gpt2core_requests_total{method="POST",route="/generate",status="200"}') == 1
        assert server.metric('gpt2core_requests_total{method="GET",route="none",status="404"}') == 1
        assert server.metric("gpt2core_batch_rows_sum") == 20
        assert server.metric('gpt2core_time_to_first_token_seconds_count{route="/generate"}') == 1
        assert server.metric('gpt2core_time_per_token_seconds_count{route="/generate"}') == 2
        assert server.metric("gpt2core_cache_use") == 0
        fake.gate.clear()
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            asked = pool.submit(server.generate, ["abcdefgh"] * 5, max_new_tokens=2)
            until(lambda: server.driver.engine.waiting == 3)
            assert server.metric("gpt2core_queue_depth") == 3
            assert server.metric("gpt2core_requests_running") == 1
            fake.gate.set()
            assert asked.result().status_code == 200
        assert server.metric("gpt2core_queue_depth") == 0


def test_metrics_are_histograms_per_route_and_probes_are_not_among_completions():
    fake = Fake()
    with serving(fake.load, served_name="org/name") as server:
        for _ in range(5):
            server.client.get("/livez")
        server.generate(["ab", "abc"], max_new_tokens=4)
        body = {"model": "org/name", "prompt": "a", "max_tokens": 1}
        assert server.post("/v1/completions", body).status_code == 200
        for name in ("request", "queue", "time_to_first_token"):
            assert server.metric(f'gpt2core_{name}_seconds_count{{route="/generate"}}') == 1
            assert server.metric(f'gpt2core_{name}_seconds_count{{route="/v1/completions"}}') == 1
        assert server.metric('gpt2core_request_seconds_count{route="/livez"}') == 5
        assert server.metric('gpt2core_inter_token_seconds_count{route="/generate"}') == 2 * 3
        assert server.metric('gpt2core_inter_token_seconds_count{route="/v1/completions"}') == 0
        assert server.metric("process_resident_memory_bytes") > 0


def test_metrics_say_what_answers_and_are_readable_by_prometheus_own_parser():
    with serving(Fake().load, served_name="org/name") as server:
        server.check_works()
        families = {family.name: family for family in parse(server.client.get("/metrics").text)}
    [sample] = families["gpt2core_server_info"].samples
    labels = {"model": "org/name", "backend": "fake", "precision": "auto", "version": __version__}
    assert (sample.labels, sample.value) == (labels, 1)
    for name in ("request", "queue", "time_to_first_token", "time_per_token", "inter_token"):
        family = families[f"gpt2core_{name}_seconds"]
        assert family.type == "histogram"
        assert "/generate" in {sample.labels["route"] for sample in family.samples}
    assert all(family.documentation for family in families.values())


def test_a_gap_between_tokens_is_measured_where_it_is():
    fake = Fake()
    with serving(fake.load) as server:
        steps = iter([0, 0, 0.3])

        def delay(*_):
            fake.delay_s = next(steps, 0)

        fake.after = delay
        server.generate("ab", max_new_tokens=10)
        bucket = 'gpt2core_inter_token_seconds_bucket{{le="{}",route="/generate"}}'
        assert server.metric(bucket.format("+Inf")) == 9
        assert server.metric(bucket.format("0.25")) <= 8


def test_paths_of_clients_do_not_become_labels(server):
    for i in range(20):
        server.client.get(f"/secret-{i}")
        server.client.request("PROPFIND", "/generate")
    text = server.client.get("/metrics").text
    assert "secret" not in text
    assert "PROPFIND" not in text
    assert 'method="other"' in text


def test_two_apps_do_not_share_metrics(server):
    server.check_works()
    with serving(Fake().load) as other:
        assert other.metric("gpt2core_prompt_tokens_total") == 0


def test_a_request_is_one_line_of_json_without_any_text_of_it(server, caplog):
    with caplog.at_level(logging.INFO, "gpt2core.serve"):
        server.generate("a secret", max_new_tokens=3)
        until(lambda: len(caplog.records) == 1)  # it is written after the answer
        server.post("/generate", {"prompt": "a secret", "secret": 1})
        until(lambda: len(caplog.records) == 2)
    lines = [json.loads(logs.JsonLines().format(record)) for record in caplog.records]
    assert (lines[0]["event"], lines[0]["route"], lines[0]["status"]) == ("request", "/generate", 200)
    assert (lines[0]["prompt_tokens"], lines[0]["completion_tokens"]) == (8, 3)
    assert lines[1]["status"] == 422
    assert "secret" not in json.dumps(lines)


def test_a_request_id_is_taken_from_the_client_or_made(server):
    given = server.client.get("/livez", headers={"X-Request-ID": "abc-1"})
    assert given.headers["x-request-id"] == "abc-1"
    made = server.client.get("/livez", headers={"X-Request-ID": "not an id"}).headers["x-request-id"]
    assert len(made) == 32
    assert made != server.client.get("/livez").headers["x-request-id"]


def test_the_description_has_examples_that_work_and_this_servers_limits(server):
    document = server.client.get("/openapi.json").json()
    schemas = document["components"]["schemas"]
    assert schemas["GenerateRequest"]["properties"]["n"]["maximum"] == server.settings.max_n
    assert schemas["GenerateRequest"]["additionalProperties"] is False
    ran = 0
    for path, methods in document["paths"].items():
        for route in methods.values():
            content = route.get("requestBody", {}).get("content", {}).get("application/json", {})
            for example in content.get("examples", {}).values():
                body = dict(example["value"])
                if "model" in body:
                    body["model"] = server.settings.name
                assert server.post(path, body).status_code == 200
                ran += 1
    assert ran == 11


def test_the_docs_page_needs_nothing_from_elsewhere_and_no_script(server):
    page = server.client.get("/docs")
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    assert "POST /v1/completions" in page.text
    assert "http://" not in page.text
    assert "https://" not in page.text
    assert "<script" not in page.text
    assert server.client.get("/docs/style.css").headers["content-type"].startswith("text/css")


def test_the_fields_of_generate_are_those_of_the_library():
    from gpt2core.serve.schemas import GenerateRequest

    own = {"prompt", "stream", "allow_special"}
    beams = {"num_beams", "length_penalty", "early_stopping", "num_return_sequences"}  # not over HTTP
    assert set(GenerateRequest.model_fields) - own == set(SamplingParams.__dataclass_fields__) - beams
