"""GPT2.from_transformers: a model in memory, with transformers' own logits and token ids as the reference."""

import json
import warnings

import numpy as np
import pytest
import tokenizer_folders
import torch
from test_against_transformers import BACKENDS
from tokenizers import Tokenizer as Inner
from transformers import (
    AutoTokenizer,
    GPT2Config,
    GPT2DoubleHeadsModel,
    GPT2LMHeadModel,
    GPT2Model,
    LlamaConfig,
    LlamaForCausalLM,
)

from gpt2core.checkpoint.in_memory import read_transformers
from gpt2core.checkpoint.open import open_checkpoint
from gpt2core.errors import CheckpointError, CheckpointWarning, RequestError, UnsupportedCheckpointError
from gpt2core.model import GPT2
from gpt2core.testing import VARIANTS, random_checkpoint
from gpt2core.testing.conformance import TOLERANCE

SIZES = {"vocab_size": 301, "n_positions": 64, "n_embd": 32, "n_layer": 3, "n_head": 4}
IDS = np.random.default_rng(1).integers(0, 301, 40).tolist()


def make(kind=GPT2LMHeadModel, *, seed=0, **fields):
    torch.manual_seed(seed)
    end = {"bos_token_id": 300, "eos_token_id": 300}
    config = GPT2Config(**{**SIZES, **end, "initializer_range": 0.3, **fields})
    return kind._from_config(config, attn_implementation="eager").eval()


@torch.inference_mode()
def eager_logits(model, ids=IDS):
    return model(torch.tensor([ids])).logits[0].float().numpy()


@pytest.mark.parametrize("backend", BACKENDS)
def test_logits_are_those_of_the_object_on_every_backend(backend):
    hf_model = make()
    with GPT2.from_transformers(hf_model, None, backend=backend) as model:
        np.testing.assert_allclose(model.logits(IDS), eager_logits(hf_model), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_are_those_of_the_object_in_every_variant(variant):
    fields = {name: value for name, value in VARIANTS[variant].items() if name != "n_embd"}
    fields = fields if "n_embd" not in VARIANTS[variant] else {"n_embd": 35, "n_head": 5}
    hf_model = make(**fields)
    with GPT2.from_transformers(hf_model, None, backend="numpy") as model:
        np.testing.assert_allclose(model.logits(IDS), eager_logits(hf_model), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("precision", ["int8", "int4", "bfloat16"])
@pytest.mark.parametrize("backend", ["numpy", "native"])
def test_each_precision_computes_what_the_saved_folder_does(tmp_path, backend, precision):
    hf_model = make()
    hf_model.save_pretrained(tmp_path)
    options = {"backend": backend, "precision": precision}
    with GPT2.from_transformers(hf_model, None, **options) as model:
        with pytest.warns(CheckpointWarning, match="only token ids"):
            saved = GPT2.from_pretrained(tmp_path, **options)
        np.testing.assert_array_equal(model.logits(IDS), saved.logits(IDS))
        assert model.precision == precision
        saved.close()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_become_float32_as_from_a_file(tmp_path, dtype):
    hf_model = make().to(dtype)
    hf_model.save_pretrained(tmp_path)
    want = dict(open_checkpoint(tmp_path).weights.named())
    got = dict(read_transformers(hf_model).named())
    assert got.keys() == want.keys()
    for name, array in want.items():
        np.testing.assert_array_equal(got[name], array)
        assert got[name].dtype == np.float32


def test_training_the_object_further_does_not_change_the_model():
    hf_model = make()
    for backend in BACKENDS:
        with GPT2.from_transformers(hf_model, None, backend=backend) as model:
            before = model.logits(IDS)
            with torch.no_grad():
                for parameter in hf_model.parameters():
                    parameter.mul_(1.5)
            np.testing.assert_array_equal(model.logits(IDS), before)


def test_a_tied_head_is_copied_once_and_a_separate_one_is_kept():
    tied = read_transformers(make())
    assert tied.lm_head is tied.wte
    hf_model = make(tie_word_embeddings=False)
    separate = read_transformers(hf_model)
    np.testing.assert_array_equal(separate.lm_head, hf_model.lm_head.weight.detach().numpy())
    assert not np.array_equal(separate.lm_head, separate.wte)
    assert not separate.wte.flags.writeable


def test_relatives_wrapped_and_compiled_models_are_read():
    hf_model = make()
    want = read_transformers(hf_model)
    bare = make(GPT2Model)
    bare.load_state_dict(hf_model.transformer.state_dict())
    double = make(GPT2DoubleHeadsModel, num_labels=1)
    double.transformer.load_state_dict(hf_model.transformer.state_dict())
    with pytest.warns(CheckpointWarning, match="left out: multiple_choice_head"):
        heads = read_transformers(double)
    compiled = torch.compile(hf_model, backend="eager")
    wrapped = (bare, compiled, torch.nn.DataParallel(hf_model))
    others = [heads, *map(read_transformers, wrapped)]
    for other in others:
        for (name, array), (_, expected) in zip(other.named(), want.named(), strict=True):
            np.testing.assert_array_equal(array, expected, err_msg=name)


def test_the_generation_config_names_the_end_of_text():
    hf_model = make()
    hf_model.generation_config.eos_token_id = [5, 9]
    assert read_transformers(hf_model).config.eos_token_ids == (5, 9)
    hf_model.generation_config.eos_token_id = "x"
    with pytest.raises(CheckpointError, match=r'^hf_model.generation_config: eos_token_id is "x"'):
        read_transformers(hf_model)


def llama():
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    return LlamaForCausalLM(LlamaConfig(vocab_size=9, **sizes))


def with_adapter():
    from peft import LoraConfig, get_peft_model

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft's, of Conv1D
        return get_peft_model(make(), LoraConfig(target_modules=["c_attn"]))


def infinite():
    hf_model = make()
    hf_model.transformer.wpe.weight.data[0, 0] = torch.inf
    return hf_model


@pytest.mark.parametrize(
    ("given", "kind", "message"),
    [
        (lambda: "gpt2", RequestError, "^hf_model is 'gpt2'; expected a model of transformers"),
        (lambda: torch.nn.Linear(2, 2), RequestError, "expected a model of transformers"),
        (with_adapter, RequestError, r"a model of peft; pass what its merge_and_unload\(\) gives"),
        (llama, UnsupportedCheckpointError, '^hf_model.config: model_type is "llama"'),
        (lambda: make(add_cross_attention=True), UnsupportedCheckpointError, "add_cross_attention = true"),
        (lambda: make().to("meta"), CheckpointError, 'has no numbers, it is on device "meta"'),
        (infinite, CheckpointError, r"hf_model has a fault: tensor transformer.wpe.weight holds 1 of"),
    ],
)
def test_what_is_no_sound_gpt2_is_refused_by_name(given, kind, message):
    with pytest.raises(kind, match=message):
        GPT2.from_transformers(given(), None)


def test_an_unknown_field_of_the_config_is_warned_of_or_refused():
    hf_model = make(frobnicate=3)
    with pytest.warns(CheckpointWarning, match="frobnicate = 3"):
        GPT2.from_transformers(hf_model, None).close()
    with pytest.raises(UnsupportedCheckpointError, match=r"hf_model.config asks for .* frobnicate = 3"):
        GPT2.from_transformers(hf_model, None, strict=True)


TEXTS = ["the cat sat on the théâtre", " 日本語 😀\n\n  in", "<|endoftext|>x", ""]


@pytest.mark.parametrize("prefix", [False, True])
def test_a_fast_tokenizer_gives_the_ids_of_its_saved_files(tmp_path, prefix):
    tokenizer_folders.save(
        tokenizer_folders.small_byte_level(added=["<tab>"], prefix_space=prefix),
        tmp_path,
        pad_token="<tab>",
        add_prefix_space=prefix,
        chat_template="{{ messages }}",
    )
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    hf_tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    want = tokenizer_folders.Tokenizer.from_folder(tmp_path)
    with GPT2.from_transformers(make(), hf_tokenizer, backend="numpy") as model:
        for text in TEXTS:
            ids = model.tokenizer.encode(text, allow_special=True)
            assert ids == want.encode(text, allow_special=True) == hf_tokenizer.encode(text), text
            assert model.tokenizer.decode(ids) == want.decode(ids)
        assert model.tokenizer.special_ids == want.special_ids
        assert model.tokenizer.special_tokens["pad_token"] == "<tab>"
        assert model.tokenizer.chat_template == "{{ messages }}"
        assert model.generate("the cat", max_new_tokens=3).prompt_tokens == len(want.encode("the cat"))
    assert hf_tokenizer.encode("<|endoftext|>") == [300]  # the object is as it was


def test_other_tokenizers_in_memory_are_taken_and_the_rest_is_refused():
    inner = tokenizer_folders.small_byte_level()
    ours = tokenizer_folders.small_tokenizer()
    with GPT2.from_transformers(make(), inner, backend="numpy") as model:
        assert model.tokenizer.encode("the cat") == Inner.encode(inner, "the cat").ids
    with GPT2.from_transformers(make(), ours, backend="numpy") as model:
        assert model.tokenizer is ours
    with pytest.raises(RequestError, match=r"^tokenizer is a str; expected a fast tokenizer of transformers"):
        GPT2.from_transformers(make(), "gpt2")


def test_without_a_tokenizer_token_ids_work_and_a_text_says_what_is_missing(tmp_path):
    folder = random_checkpoint(tmp_path)
    with GPT2.from_pretrained(folder, backend="numpy") as model:
        want = model.generate([1, 2, 3], max_new_tokens=5)
    (folder / "tokenizer.json").unlink()
    with pytest.warns(CheckpointWarning, match="only token ids can be used, no text: .* has no tokenizer"):
        model = GPT2.from_pretrained(folder, backend="numpy")
    with model:
        got = model.generate([1, 2, 3], max_new_tokens=5)
        assert (got.text, got.token_ids) == ("", want.token_ids)
        assert [piece.token_id for piece in model.stream([1, 2, 3], max_new_tokens=5)] == want.token_ids
        assert model.score([1, 2, 3]).bits_per_byte is None
        assert model.embed([1, 2]).shape == (32,)
        missing = "this model has no tokenizer: .*tokenizer.json is missing.*give token ids instead of text"
        for call in (model.generate, model.stream, model.embed, model.score):
            with pytest.raises(RequestError, match=missing):
                call("a text")
        with pytest.raises(RequestError, match=missing):
            _ = model.tokenizer
