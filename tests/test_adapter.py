"""LoRA adapters: merged as peft merges them, wherever they lie; what is not LoRA is refused by name."""

import json
import warnings

import numpy as np
import peft
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from gpt2core import GPT2
from gpt2core.checkpoint.open import open_checkpoint
from gpt2core.cli import main
from gpt2core.errors import CheckpointError, CheckpointWarning, UnsupportedCheckpointError
from gpt2core.quantization.rounding import dequantize, quantize
from gpt2core.reference import reference_logits
from gpt2core.testing import random_checkpoint

IDS = [3, 1, 4, 1, 5, 9, 2, 6]
TOLERANCE = {"rtol": 0, "atol": 1e-5}
LAYERS = ["c_attn", "c_proj", "c_fc"]
FORMS = {
    "attention": {"target_modules": ["c_attn"]},
    "all layers, fan_in_fan_out": {"target_modules": LAYERS, "fan_in_fan_out": True},
    "rsLoRA": {"target_modules": LAYERS, "use_rslora": True, "r": 5, "lora_alpha": 3},
    "patterns": {
        "target_modules": LAYERS, "r": 4, "lora_alpha": 6,
        "rank_pattern": {"c_fc": 2, r"h\.1\.attn\.c_attn": 3}, "alpha_pattern": {"mlp.c_proj": 9},
    },
    "biases of its layers": {"target_modules": ["c_attn"], "bias": "lora_only"},
    "all biases": {"target_modules": ["c_attn"], "bias": "all"},
    "lora_bias": {"target_modules": LAYERS, "lora_bias": True},
    "saved head": {"target_modules": ["c_attn"], "modules_to_save": ["lm_head"]},
    "saved embedding and norm": {"target_modules": ["c_attn"], "modules_to_save": ["wte", "ln_f"]},
    "DoRA": {"target_modules": LAYERS, "use_dora": True},
    "head": {"target_modules": ["c_attn", "lm_head"]},
    "embeddings": {"target_modules": ["c_attn", "wte", "wpe"]},
}  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return random_checkpoint(tmp_path_factory.mktemp("base"), n_layer=2)


def train(base, folder, form, *, seed=0):
    """Save an adapter with random numbers of this form, and what peft's merged model makes of IDS."""
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft's, of fan_in_fan_out and of embeddings that are saved
        model = GPT2LMHeadModel.from_pretrained(base)
        model = peft.get_peft_model(model, peft.LoraConfig(**{"r": 3, "lora_alpha": 7, **form}))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter += 0.2 * torch.randn_like(parameter)
        model.save_pretrained(folder)
        # From the file again, as a user loads it.
        model = peft.PeftModel.from_pretrained(GPT2LMHeadModel.from_pretrained(base), folder)
        merged = model.merge_and_unload().eval()
    with torch.inference_mode():
        return merged(torch.tensor([IDS])).logits[0].numpy()


@pytest.mark.parametrize("form", FORMS)
def test_adapter_is_merged_as_peft_merges_it(form, base, tmp_path):
    want = train(base, tmp_path, FORMS[form])
    opened = open_checkpoint(base, adapter=tmp_path)
    np.testing.assert_allclose(reference_logits(opened.weights, IDS), want, **TOLERANCE)
    plain = reference_logits(open_checkpoint(base).weights, IDS)
    assert np.abs(plain - want).max() > 0.05


@pytest.mark.parametrize("precision", ["float32", "int8"])
def test_adapter_alone_names_its_base_and_is_a_model_like_any_other(precision, base, tmp_path):
    want = train(base, tmp_path, FORMS["attention"])
    with GPT2.from_pretrained(tmp_path, backend="numpy", precision=precision) as model:
        got = model.logits(IDS)
        assert model.tokenizer.decode(model.tokenizer.encode("word")) == "word"  # the base's
    if precision == "int8":
        want = reference_logits(dequantize(quantize(open_checkpoint(tmp_path).stored, "int8")), IDS)
    np.testing.assert_allclose(got, want, **TOLERANCE)


def test_adapter_beside_its_base_is_merged_with_a_warning(base, tmp_path):
    random_checkpoint(tmp_path, n_layer=2)
    want = train(base, tmp_path / "adapter", FORMS["attention"])
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / "adapter" / name).rename(tmp_path / name)
    with pytest.warns(
        CheckpointWarning, match=r"holds an adapter beside the model.*move adapter_config.json"
    ):
        opened = open_checkpoint(tmp_path)
    np.testing.assert_allclose(reference_logits(opened.weights, IDS), want, **TOLERANCE)


def test_commands_take_an_adapter(base, tmp_path, capsys):
    train(base, tmp_path / "adapter", FORMS["attention"])
    said = {}
    for name, arguments in {
        "option": ["--model", str(base), "--adapter", str(tmp_path / "adapter")],
        "folder": ["--model", str(tmp_path / "adapter")],
        "without": ["--model", str(base)],
    }.items():
        greedy = ["--temperature", "0", "--max-new-tokens", "12", "--backend", "numpy", "--offline"]
        assert main(["generate", "a word", *arguments, *greedy]) == 0
        said[name] = capsys.readouterr().out
    assert said["option"] == said["folder"] != said["without"]
    rounding = ["quantize", str(base), str(tmp_path / "out"), "--adapter", str(tmp_path / "adapter")]
    assert main([*rounding, "--precision", "bfloat16"]) == 0
    merged = open_checkpoint(tmp_path / "adapter").weights.blocks[0].c_attn.weight
    rounded = open_checkpoint(tmp_path / "out").weights.blocks[0].c_attn.weight
    np.testing.assert_allclose(rounded, merged, rtol=2**-8, atol=1e-6)
    capsys.readouterr()
    assert main(["info", str(tmp_path / "adapter")]) == 0
    assert f"adapter of                         {base}" in capsys.readouterr().out


def test_vocabulary_that_the_adapter_enlarged_is_the_models(base, tmp_path):
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = GPT2LMHeadModel.from_pretrained(base)
        model.resize_token_embeddings(260)
        form = {"target_modules": ["c_attn"], "r": 3, "init_lora_weights": False}
        model = peft.get_peft_model(model, peft.LoraConfig(**form))
        model.save_pretrained(tmp_path)
        with torch.inference_mode():
            want = model.merge_and_unload().eval()(torch.tensor([IDS])).logits[0].numpy()
    opened = open_checkpoint(tmp_path)
    assert opened.config.vocab_size == 260
    np.testing.assert_allclose(reference_logits(opened.weights, IDS), want, **TOLERANCE)


def test_trained_classifier_beside_the_adapter_is_left_out_with_a_warning(base, tmp_path):
    want = train(base, tmp_path, FORMS["attention"])
    from safetensors.numpy import load_file, save_file

    tensors = load_file(tmp_path / "adapter_model.safetensors")
    tensors["base_model.model.score.weight"] = np.ones((2, 32), np.float32)
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.warns(CheckpointWarning, match="left out: base_model.model.score.weight"):
        opened = open_checkpoint(tmp_path)
    np.testing.assert_allclose(reference_logits(opened.weights, IDS), want, **TOLERANCE)


def changed(folder, **fields):
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


@pytest.mark.parametrize(
    ("config", "name"),
    [
        (peft.IA3Config(target_modules=["c_attn"], feedforward_modules=[], fan_in_fan_out=True), "IA3"),
        (peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3), "PROMPT_TUNING"),
        (peft.LoKrConfig(target_modules=["lm_head"], r=2), "LOKR"),
    ],
    ids=str,
)
def test_adapter_that_is_not_lora_is_refused_by_name(config, name, base, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft.get_peft_model(GPT2LMHeadModel.from_pretrained(base), config).save_pretrained(tmp_path)
    for arguments in ((tmp_path, {}), (base, {"adapter": tmp_path})):
        with pytest.raises(
            UnsupportedCheckpointError, match=f'peft_type is "{name}"; gpt2core merges "LORA"'
        ):
            open_checkpoint(arguments[0], **arguments[1])


@pytest.mark.parametrize(
    "field",
    [
        {"init_lora_weights": "pissa"},
        {"layer_replication": [[0, 2]]},
        {"trainable_token_indices": [1]},
        {"some_future_field": True},
    ],
    ids=str,
)
def test_form_of_lora_that_is_not_implemented_is_refused_by_name(field, base, tmp_path):
    train(base, tmp_path, FORMS["attention"])
    changed(tmp_path, **field)
    [name] = field
    with pytest.raises(
        UnsupportedCheckpointError, match=f"does not implement: {name} = .*; merge it with peft"
    ):
        open_checkpoint(tmp_path)


def test_all_that_does_not_fit_the_model_is_listed_at_once(base, tmp_path):
    config = GPT2Config(vocab_size=257, n_positions=96, n_embd=24, n_layer=3, n_head=4)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "other")
    train(tmp_path / "other", tmp_path / "adapter", {"target_modules": ["c_attn"]})
    with pytest.raises(CheckpointError) as error:
        open_checkpoint(base, adapter=tmp_path / "adapter")
    assert "module h.0.attn.c_attn has matrices [3, 24] and [72, 3], expected [3, 32] and [96, 3]" in str(
        error.value
    )
    assert "module h.2.attn.c_attn is none of a GPT-2" in str(error.value)


def test_base_that_is_not_there_or_not_named_says_how_to_name_it(base, tmp_path):
    train(base, tmp_path, FORMS["attention"])
    changed(tmp_path, base_model_name_or_path="/content/my-gpt2")
    with pytest.raises(CheckpointError, match=r'adapter for "/content/my-gpt2".*--model BASE --adapter'):
        open_checkpoint(tmp_path)
    changed(tmp_path, base_model_name_or_path=None)
    with pytest.raises(CheckpointError, match="names no base; name the base as the model"):
        open_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match="is no adapter: it holds no adapter_config"):
        open_checkpoint(base, adapter=base)
