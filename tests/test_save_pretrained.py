"""GPT2.save_pretrained: folders that this library and transformers read back, bit by bit; and `repr`."""

import json

import fakes
import numpy as np
import pytest
import tokenizer_folders
import torch
from engines import TOKENIZER
from test_from_transformers import IDS, eager_logits, make
from transformers import AutoModelForCausalLM, AutoTokenizer

from gpt2core.checkpoint.open import open_checkpoint
from gpt2core.errors import CheckpointError, RequestError
from gpt2core.model import GPT2
from gpt2core.testing import random_checkpoint
from gpt2core.testing.conformance import TOLERANCE


def arrays(folder):
    return dict(open_checkpoint(folder).stored.named())


def assert_same_arrays(got, want):
    assert got.keys() == want.keys()
    for name, array in want.items():
        np.testing.assert_array_equal(got[name], array, err_msg=name)


@pytest.mark.parametrize("fields", [{}, {"tie_word_embeddings": False, "n_inner": 40}])
def test_a_saved_model_is_read_by_transformers_with_the_same_logits_and_token_ids(tmp_path, fields):
    hf_model = make(**fields)
    tokenizer = tokenizer_folders.small_tokenizer()
    with GPT2.from_transformers(hf_model, tokenizer) as model:
        model.save_pretrained(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", attn_implementation="eager").eval()
    assert type(again) is type(hf_model)
    np.testing.assert_array_equal(eager_logits(again), eager_logits(hf_model))
    hf_tokenizer = AutoTokenizer.from_pretrained(tmp_path / "saved")
    for text in ["the cat sat", "日本語 a b <tab>x", "\n\n <|endoftext|>"]:
        assert hf_tokenizer.encode(text) == tokenizer.encode(text, allow_special=True)
    assert hf_tokenizer.eos_token == "<|endoftext|>"
    with GPT2.from_pretrained(tmp_path / "saved", backend="numpy") as model:
        np.testing.assert_allclose(model.logits(IDS), eager_logits(hf_model), rtol=0, atol=TOLERANCE)
        assert model.tokenizer.special_ids == tokenizer.special_ids


def test_a_model_that_was_loaded_is_saved_as_it_was(tmp_path):
    folder = random_checkpoint(tmp_path / "model", eos_token_ids=(0, 5))
    with GPT2.from_pretrained(folder) as model:
        model.save_pretrained(tmp_path / "saved")
        model.save_pretrained(tmp_path / "saved")  # replaces what is its own
        text = model.generate("ab", max_new_tokens=5).text
    assert_same_arrays(arrays(tmp_path / "saved"), arrays(folder))
    with GPT2.from_pretrained(tmp_path / "saved") as again:
        assert again.config.eos_token_ids == (0, 5)
        assert again.generate("ab", max_new_tokens=5).text == text


@pytest.mark.parametrize("precision", ["int8", "int4", "bfloat16"])
@pytest.mark.parametrize("source", ["float32 folder", "quantized folder", "object"])
def test_a_quantized_model_is_saved_in_its_precision_and_reads_back_in_bits(tmp_path, precision, source):
    options = {"backend": "native", "precision": precision}
    if source == "object":
        model = GPT2.from_transformers(make(), tokenizer_folders.small_tokenizer(), **options)
    else:
        model = GPT2.from_pretrained(random_checkpoint(tmp_path / "model"), **options)
    if source == "quantized folder":
        model.save_pretrained(tmp_path / "first")
        model.close()
        model = GPT2.from_pretrained(tmp_path / "first", backend="native")
    ids = IDS if source == "object" else [1, 2, 3, 4]
    with model:
        model.save_pretrained(tmp_path / "saved")
        with GPT2.from_pretrained(tmp_path / "saved", backend="native") as again:
            assert again.precision == precision
            np.testing.assert_array_equal(again.logits(ids), model.logits(ids))
    if source == "quantized folder":
        assert_same_arrays(arrays(tmp_path / "saved"), arrays(tmp_path / "first"))


def test_chat_templates_and_named_tokens_are_saved(tmp_path):
    inner = tokenizer_folders.small_byte_level(added=["<pad>"])
    given = tokenizer_folders.save(inner, tmp_path / "a", pad_token="<pad>", chat_template="{{ m }}")
    tokenizer = tokenizer_folders.Tokenizer.from_folder(given)
    with GPT2.from_transformers(make(vocab_size=302), tokenizer) as model:
        model.save_pretrained(tmp_path / "b")
    again = tokenizer_folders.Tokenizer.from_folder(tmp_path / "b")
    assert again.special_tokens == tokenizer.special_tokens
    assert again.chat_template == "{{ m }}"
    assert again.special_ids == tokenizer.special_ids


def test_a_model_without_a_tokenizer_is_saved_without_one(tmp_path):
    with GPT2.from_transformers(make(), None) as model:
        model.save_pretrained(tmp_path / "saved")
    names = sorted(path.name for path in (tmp_path / "saved").iterdir())
    assert names == ["config.json", "model.safetensors"]


@pytest.mark.parametrize("name", ["adapter_config.json", "generation_config.json", "added_tokens.json"])
def test_files_that_would_be_read_beside_the_saved_ones_are_not_passed_over(tmp_path, name):
    (tmp_path / name).write_text(json.dumps({"eos_token_id": 3}))
    refused = pytest.raises(CheckpointError, match=f"holds {name}, which would be read together")
    with GPT2.from_transformers(make(), None) as model, refused:
        model.save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_model_made_of_a_backend_cannot_be_saved(tmp_path):
    refused = pytest.raises(RequestError, match="made of a backend, which does not give its weights back")
    with GPT2(fakes.FakeBackend(fakes.config(), fakes.endless), TOKENIZER) as model, refused:
        model.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_a_model_says_what_it_is(tmp_path):
    with GPT2.from_pretrained("demo", backend="numpy", precision="int8") as demo:
        assert repr(demo) == "<GPT2 demo: 5,918,720 parameters, int8, numpy>"
    assert repr(demo) == "<GPT2 demo: 5,918,720 parameters, int8, numpy, closed>"
    with GPT2.from_transformers(make(), None, backend="torch") as model:
        parameters = sum(p.numel() for p in make().parameters())
        assert repr(model) == f"<GPT2 GPT2LMHeadModel: {parameters:,} parameters, float32, torch>"
        assert torch.float32 == make().dtype
    with GPT2(fakes.FakeBackend(fakes.config(), fakes.endless), TOKENIZER) as model:
        assert repr(model) == f"<GPT2 {fakes.config().parameters:,} parameters, float32, fake>"
