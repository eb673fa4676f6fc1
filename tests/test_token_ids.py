"""Token ids as NumPy arrays and as tensors, wherever ids are taken."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from test_against_transformers import BACKENDS

from gpt2core.errors import RequestError
from gpt2core.model import GPT2
from gpt2core.testing import random_checkpoint

IDS = [5, 200, 7, 0, 31]
FORMS = {
    "int64 array": lambda ids: np.array(ids),
    "uint16 array": lambda ids: np.array(ids, np.uint16),
    "int64 tensor": torch.tensor,
    "int32 tensor": lambda ids: torch.tensor(ids, dtype=torch.int32),
    "jax array": jnp.array,
    "view": lambda ids: torch.tensor([[i, -1] for i in ids])[:, 0],
    "list of NumPy numbers": lambda ids: list(np.array(ids)),
    "list of tensors": lambda ids: list(torch.tensor(ids)),
    "tuple": tuple,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return random_checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def model(folder):
    with GPT2.from_pretrained(folder, backend="numpy") as loaded:
        yield loaded


@pytest.mark.parametrize("form", FORMS)
def test_each_form_of_token_ids_gives_what_a_list_gives(model, form):
    given = FORMS[form](IDS)
    options = {"max_new_tokens": 4, "seed": 1, "temperature": 1.0}
    want = model.generate(IDS, **options)
    assert model.generate(given, **options).token_ids == want.token_ids
    assert [piece.token_id for piece in model.stream(given, **options)] == want.token_ids
    assert model.generate([given, [1, 2]], **options)[0].token_ids == want.token_ids
    np.testing.assert_array_equal(model.logits(given), model.logits(IDS))
    np.testing.assert_array_equal(model.score(given).logprobs, model.score(IDS).logprobs)
    np.testing.assert_array_equal(model.embed(given), model.embed(IDS))
    np.testing.assert_array_equal(model.embed([given])[0], model.embed(IDS))
    assert model.tokenizer.decode(given) == model.tokenizer.decode(IDS)


@pytest.mark.parametrize("make", [np.array, torch.tensor, jnp.array])
def test_a_matrix_is_a_batch_of_its_rows(model, make):
    rows = [[1, 2, 3], [4, 5, 6]]
    got = model.generate(make(rows), max_new_tokens=3)
    assert [g.token_ids for g in got] == [g.token_ids for g in model.generate(rows, max_new_tokens=3)]
    assert model.embed(make(rows)).shape == (2, 32)
    assert len(model.generate(make(rows[:1]), max_new_tokens=1)) == 1  # as of a list of one


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("make", [np.array, torch.tensor])
def test_every_backend_traces_tensors(folder, backend, make):
    with GPT2.from_pretrained(folder, backend=backend) as loaded:
        want, got = loaded.backend.trace(IDS), loaded.backend.trace(make(IDS))
        np.testing.assert_array_equal(got.logits, want.logits)
        np.testing.assert_array_equal(
            loaded.backend.hidden_states(make(IDS)), loaded.backend.hidden_states(IDS)
        )
        with pytest.raises(RequestError, match=r"prompt holds 1.5 at place 0; .* whole numbers"):
            loaded.backend.trace(make([1.5, 2.0]))


CALLS = {
    "generate": lambda model, ids: model.generate(ids, max_new_tokens=1),
    "stream": lambda model, ids: model.stream(ids, max_new_tokens=1),
    "logits": lambda model, ids: model.logits(ids),
    "score": lambda model, ids: model.score(ids),
    "embed": lambda model, ids: model.embed(ids),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("make", [np.array, torch.tensor, list])
@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([1.0, 2.0], "prompt holds 1.0 at place 0; this model's token ids are whole numbers from 0 to 256"),
        ([3, -1], "prompt holds -1 at place 1"),
        ([3, 257], "prompt holds 257 at place 1"),
        ([True, False], "prompt holds True at place 0"),
    ],
)
def test_what_is_no_token_id_is_refused_by_value_and_place(model, call, make, ids, message):
    with pytest.raises(RequestError, match=message):
        CALLS[call](model, make(ids))


@pytest.mark.parametrize("value", [np.bool_(True), torch.tensor(True), np.float32(2), torch.tensor(2.0)])
def test_a_number_of_a_wrong_kind_in_a_list_is_refused(model, value):
    with pytest.raises(RequestError, match=r"prompt holds .* at place 1"):
        model.generate([1, value], max_new_tokens=1)


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("make", [np.zeros, torch.zeros])
def test_an_empty_array_and_one_of_a_wrong_shape_are_refused(model, call, make):
    with pytest.raises(RequestError, match="prompt is empty"):
        CALLS[call](model, make(0))
    with pytest.raises(RequestError, match=r"prompt is an array of shape \(2, 3, 4\)"):
        CALLS[call](model, make((2, 3, 4)))
    with pytest.raises(RequestError, match=r"prompt is an array of shape \(\)"):
        CALLS[call](model, make(()))


def test_one_sequence_of_a_batch_is_asked_for_where_there_is_no_batch(model):
    with pytest.raises(RequestError, match=r"shape \(1, 5\); token ids of one text have the shape \(T,\)"):
        model.logits(torch.tensor([IDS]))


def test_a_tokenizers_whole_result_is_refused_with_the_part_to_take(model):
    with pytest.raises(
        RequestError, match=r"token ids \(the tokenizer's result holds them as \['input_ids'\]"
    ):
        model.generate({"input_ids": [[1, 2]], "attention_mask": [[1, 1]]}, max_new_tokens=1)
