"""`/v1/embeddings`, `/tokenize` and `/detokenize`, by OpenAI's client and against the library."""

import base64
import threading

import numpy as np
import openai
import pytest
from fakes import byte_tokenizer
from serving import Fake, post_bytes, raw, serving, strict, until
from transformers import AutoTokenizer

from gpt2core import GPT2, BackendError, NumericalError
from gpt2core.testing import random_checkpoint

TEXTS = ["Once upon a time", "\u2603", "The king said nothing at all."]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(random_checkpoint(tmp_path_factory.mktemp("tiny")))


@pytest.fixture(scope="module")
def model(folder):
    with GPT2.from_pretrained(folder) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def server(folder):
    with serving(model=folder, served_name="tiny", max_inputs=100) as running:
        yield running


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="-", max_retries=0, timeout=20) as one:
        yield one


@pytest.mark.parametrize("encoding", [openai.NOT_GIVEN, "float"])  # unset: the client asks for base64
def test_the_client_gets_the_embeddings_of_the_library(client, model, encoding):
    answer = client.embeddings.create(model="tiny", input=TEXTS, encoding_format=encoding)
    assert [(item.object, item.index) for item in answer.data] == [("embedding", i) for i in range(3)]
    got = np.array([item.embedding for item in answer.data], np.float32)
    np.testing.assert_array_equal(got, model.embed(TEXTS, normalize=True))
    tokens = sum(len(model.tokenizer.encode(text)) for text in TEXTS)
    assert (answer.usage.prompt_tokens, answer.usage.total_tokens) == (tokens, tokens)
    assert (answer.object, answer.model) == ("list", "tiny")


def embed(server, given, **options):
    answer = server.post("/v1/embeddings", {"input": given, **options})
    assert answer.status_code == 200, answer.text
    return np.array([item["embedding"] for item in strict(answer.content)["data"]], np.float32)


def test_the_pooling_and_the_length_are_what_was_asked_for(server, model):
    plain = embed(server, TEXTS, normalize=False)
    np.testing.assert_array_equal(plain, model.embed(TEXTS))
    last = embed(server, TEXTS, normalize=False, pooling_type="LAST")
    np.testing.assert_array_equal(last, model.embed(TEXTS, pooling="last"))
    assert not np.array_equal(plain, last)


def test_token_ids_give_what_their_text_gives(server, model):
    ids = [model.tokenizer.encode(text) for text in TEXTS]
    np.testing.assert_array_equal(embed(server, ids), embed(server, TEXTS))
    np.testing.assert_array_equal(embed(server, ids[1]), embed(server, TEXTS[1]))


def test_base64_is_float32_in_little_endian_order(server, model):
    body = {"input": "Once", "encoding_format": "base64", "normalize": False}
    [item] = server.post("/v1/embeddings", body).json()["data"]
    numbers = np.frombuffer(base64.b64decode(item["embedding"], validate=True), "<f4")
    np.testing.assert_array_equal(numbers, model.embed("Once"))


@pytest.mark.parametrize(
    ("body", "param", "message"),
    [
        ({"input": "a", "dimensions": 8}, "dimensions", "is not supported; an embedding has as many numbers"),
        ({"input": ""}, "input", "input"),
        ({"input": []}, "input", "input"),
        ({"input": ["a", ""]}, "input", "input"),
        ({"input": [[]]}, "input", "input"),
        ({"input": ["a"] * 101}, "input", "101 inputs; at most 100"),
        ({"input": "a" * 97}, "input", "97 tokens"),
        ({"input": ["a", [3, 257]]}, "input", "input"),
        ({"input": [[3], [257]]}, None, "257"),
        ({"input": "a", "encoding_format": "int8"}, "encoding_format", "float"),
        ({"input": "a", "pooling_type": "CLS"}, "pooling_type", "LAST"),
        ({"inputs": "a"}, None, "did you mean 'input'"),
        ({}, "input", "is missing"),
    ],
)
def test_what_cannot_be_embedded_is_a_bad_request(server, body, param, message):
    answer = server.post("/v1/embeddings", body)
    error = answer.json()["error"]
    assert (answer.status_code, error["type"], error["param"]) == (400, "invalid_request_error", param)
    assert message in error["message"]


def test_an_unknown_model_is_not_found(server):
    bodies = {"/v1/embeddings": {"input": "a"}, "/tokenize": {"prompt": "a"}, "/detokenize": {"tokens": []}}
    for path, body in bodies.items():
        answer = server.post(path, {**body, "model": "other"})
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_found")


class Embedding(Fake):
    """A model whose embeddings a test can hold or break."""

    def __init__(self):
        super().__init__()
        self.open = threading.Event()
        self.open.set()
        self.error = None
        self.calls = 0
        self.backend.hidden_states = self._hidden_states

    def _hidden_states(self, token_ids):
        self.calls += 1
        assert self.open.wait(20)
        if self.error is not None:
            raise self.error
        return np.ones((len(token_ids), 4), np.float32)

    def load(self, settings):
        return GPT2(self.backend, byte_tokenizer(), max_batch=settings.max_batch)


def test_a_request_for_embeddings_holds_a_place_until_its_end():
    fake = Embedding()
    with serving(fake.load, max_batch=1, max_queue=0, max_prompts=1) as server:
        fake.open.clear()
        thread = threading.Thread(target=embed, args=(server, ["a", "b"]))
        thread.start()
        until(lambda: fake.calls == 1)
        for path, body in (
            ("/generate", {"prompt": "a"}),
            ("/v1/embeddings", {"input": "a"}),
            ("/tokenize", {"prompt": "a"}),
            ("/detokenize", {"tokens": [1]}),
        ):
            answer = server.post(path, body)
            assert (answer.status_code, answer.json()["error"]["code"]) == (429, "queue_full")
        fake.open.set()
        thread.join()
        until(server.idle)
        assert fake.calls == 2
        name = 'gpt2core_requests_total{method="POST",route="/v1/embeddings",status="200"}'
        assert server.metric(name) == 1
        assert server.metric("gpt2core_prompt_tokens_total") == 2


def test_texts_that_generate_are_encoded_while_an_embedding_waits():
    fake = Embedding()
    with serving(fake.load) as server:
        fake.open.clear()
        threads = [threading.Thread(target=embed, args=(server, "a")) for _ in range(4)]
        for thread in threads:
            thread.start()
        until(lambda: fake.calls == 1 and server.driver.requests == 4)
        assert server.post("/tokenize", {"prompt": "ab"}).json()["tokens"] == [97, 98]
        fake.open.set()
        for thread in threads:
            thread.join()


def test_when_the_deadline_passes_or_the_client_leaves_what_is_left_is_not_computed():
    fake = Embedding()
    with serving(fake.load, deadline_s=0.3) as server:
        fake.open.clear()
        answer = server.post("/v1/embeddings", {"input": ["a", "b", "c"]})
        assert (answer.status_code, answer.json()["error"]["code"]) == (504, "deadline_exceeded")
        assert (fake.calls, server.driver.requests) == (1, 0)
        fake.open.set()
        server.check_works()
        assert fake.calls == 1


def test_a_backend_that_fails_in_an_embedding_has_failed():
    fake = Embedding()
    with serving(fake.load) as server:
        fake.error = NumericalError("not finite")
        assert server.post("/v1/embeddings", {"input": "a"}).json()["error"]["code"] == "numerical_error"
        server.check_works()
        fake.error = MemoryError("no more")
        assert server.post("/v1/embeddings", {"input": "a"}).json()["error"]["code"] == "engine_failed"
        assert server.client.get("/livez").status_code == 503
        assert isinstance(server.driver.failure, BackendError)


# Tokens


def test_tokens_are_those_of_transformers_and_give_the_text_back(server, folder):
    reference = AutoTokenizer.from_pretrained(folder)
    for text in (*TEXTS, "", "a" * 500):
        answer = server.post("/tokenize", {"prompt": text, "return_token_strs": True}).json()
        ids = reference(text)["input_ids"]
        assert answer == {
            "count": len(ids),
            "max_model_len": 96,
            "tokens": ids,
            "token_strs": reference.convert_ids_to_tokens(ids),
        }
        assert server.post("/detokenize", {"tokens": ids}).json() == {"prompt": text}
    assert server.post("/tokenize", {"prompt": "a"}).json()["token_strs"] is None


def test_special_tokens_of_a_text_are_tokens_only_where_that_is_asked_for(server):
    counts = [
        server.post("/tokenize", {"prompt": "<|endoftext|>", "allow_special": special}).json()["count"]
        for special in (False, True)
    ]
    assert counts == [13, 1]


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {"prompt": ["a"]}, "prompt"),
        ("/tokenize", {}, "prompt"),
        ("/detokenize", {"tokens": [257]}, "tokens"),
        ("/detokenize", {"tokens": [-1]}, "tokens"),
        ("/detokenize", {"tokens": [True]}, "tokens"),
        ("/detokenize", {"tokens": "a"}, "tokens"),
    ],
)
def test_what_is_no_text_or_no_token_is_refused(server, path, body, param):
    answer = server.post(path, body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (422, param)


def test_a_long_text_is_tokenized_while_others_are_answered(server):
    for text in ("a" * 200_000, " " * 200_000, "word " * 40_000):
        assert server.post("/tokenize", {"prompt": text}).json()["count"] > 0
    too_long = post_bytes(b'{"prompt":"' + b"a" * 300_000 + b'"}', path="/tokenize")
    assert raw(server.port, too_long).startswith(b"HTTP/1.1 413")
