"""`embed` and the capability `Embeds`, against transformers' `last_hidden_state`."""

import threading

import fakes
import numpy as np
import pytest
import torch
from transformers import AutoModel

from gpt2core import GPT2, ContextLengthError, Embeds, NumericalError, RequestError
from gpt2core.testing import random_checkpoint

TEXTS = ["Once", "The king said nothing at all.", "\u2603"]
BACKENDS = ["numpy", "native", "torch", "jax", "onnx"]


@pytest.fixture(scope="module", params=[False, True], ids=["tied", "untied"])
def folder(request, tmp_path_factory):
    return random_checkpoint(tmp_path_factory.mktemp("tiny"), tie_word_embeddings=not request.param)


def hidden_state(folder, ids):
    reference = AutoModel.from_pretrained(folder, attn_implementation="eager")
    with torch.inference_mode():
        return reference(torch.tensor([ids])).last_hidden_state[0].numpy()


@pytest.mark.parametrize("backend", BACKENDS)
def test_hidden_states_are_those_of_transformers(folder, backend):
    with GPT2.from_pretrained(folder, backend=backend) as model:
        assert isinstance(model.backend, Embeds)
        for text in TEXTS:
            ids = model.tokenizer.encode(text)
            got = model.backend.hidden_states(ids)
            assert got.dtype == np.float32
            np.testing.assert_allclose(got, hidden_state(folder, ids), atol=2e-5, rtol=0)
        with pytest.raises(RequestError):
            model.backend.hidden_states([])
        with pytest.raises(RequestError):
            model.backend.hidden_states([0] * (model.config.n_positions + 1))


@pytest.mark.parametrize("precision", ["int8", "int4", "bfloat16"])
def test_native_s_hidden_states_give_its_logits_in_every_precision(folder, precision):
    with (
        GPT2.from_pretrained(folder, backend="native", precision=precision) as model,
        GPT2.from_pretrained(folder, backend="numpy", precision=precision) as numpy,
    ):
        ids = model.tokenizer.encode(TEXTS[1])
        want = numpy.backend.hidden_states(ids)
        np.testing.assert_allclose(model.backend.hidden_states(ids), want, atol=0.15, rtol=0)
        before = model.logits(ids)
        model.backend.hidden_states(ids)
        np.testing.assert_array_equal(model.logits(ids), before)


def test_an_embedding_is_the_mean_or_the_last_hidden_state(folder):
    with GPT2.from_pretrained(folder, backend="numpy") as model:
        states = [hidden_state(folder, model.tokenizer.encode(text)) for text in TEXTS]
        mean, last = model.embed(TEXTS), model.embed(TEXTS, pooling="last")
        np.testing.assert_allclose(mean, [state.mean(0) for state in states], atol=2e-5, rtol=0)
        np.testing.assert_allclose(last, [state[-1] for state in states], atol=2e-5, rtol=0)
        np.testing.assert_array_equal(model.embed(TEXTS[1]), mean[1])
        np.testing.assert_array_equal(model.embed(model.tokenizer.encode(TEXTS[1])), mean[1])
        normal = model.embed(TEXTS, normalize=True)
        np.testing.assert_allclose(np.linalg.norm(normal, axis=1), 1, atol=1e-6)
        np.testing.assert_allclose(normal * np.linalg.norm(mean, axis=1)[:, None], mean, atol=1e-5)


def test_what_cannot_be_embedded_is_refused(folder):
    with GPT2.from_pretrained(folder, backend="numpy") as model:
        with pytest.raises(RequestError, match="'mean' or 'last'"):
            model.embed("a", pooling="max")
        with pytest.raises(RequestError, match="prompt is empty"):
            model.embed("")
        with pytest.raises(ContextLengthError):
            model.embed("a" * 97)
        assert model.embed([]).shape == (0, model.config.n_embd)
    with pytest.raises(RequestError, match="closed"):
        model.embed("a")


def test_a_backend_without_hidden_states_says_so():
    with (
        GPT2(fakes.FakeBackend(fakes.config()), fakes.byte_tokenizer()) as model,
        pytest.raises(RequestError, match="capability Embeds"),
    ):
        model.embed("a")


class Embedding(fakes.FakeBackend):
    def hidden_states(self, token_ids):
        state = np.zeros((len(token_ids), self.config.n_embd), np.float32)
        return state / 0 if token_ids == [*b"nan"] else state


@pytest.mark.filterwarnings("ignore:invalid value")
def test_hidden_states_that_are_not_finite_are_an_error():
    with (
        GPT2(Embedding(fakes.config()), fakes.byte_tokenizer()) as model,
        pytest.raises(NumericalError, match="not finite"),
    ):
        model.embed("nan")


def test_embeddings_are_computed_between_the_steps_of_what_runs():
    model = GPT2(Embedding(fakes.config(1024), fakes.endless), fakes.byte_tokenizer())
    stop = threading.Event()

    def keep_busy():
        while not stop.is_set():
            model.generate("a", max_new_tokens=200)

    busy = threading.Thread(target=keep_busy)
    busy.start()
    try:
        for _ in range(20):
            assert model.embed(["a", "b"]).shape == (2, 4)
    finally:
        stop.set()
        busy.join(20)
    assert not busy.is_alive()
    model.close()
