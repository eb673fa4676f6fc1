"""Checkpoints as people have them: what is left out is named, and what a folder is instead is said."""

import json
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from transformers import GPT2DoubleHeadsModel

from gpt2core.checkpoint.open import open_checkpoint
from gpt2core.errors import CheckpointError, CheckpointWarning, UnsupportedCheckpointError
from gpt2core.reference import reference_logits
from gpt2core.testing import random_checkpoint
from gpt2core.tokenizer.tokenizer import Tokenizer


def with_fields(folder, **fields):
    """A sound small checkpoint with `fields` added to its config.json."""
    random_checkpoint(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | fields))
    return folder


# ---- fields that GPT-2 does not read


def test_unread_field_warns_when_the_checkpoint_is_opened_and_is_refused_if_strict(tmp_path):
    folder = with_fields(tmp_path, author="someone")
    with pytest.warns(CheckpointWarning, match='author = "someone"') as caught:
        open_checkpoint(folder)
    assert len(caught) == 1
    with pytest.raises(UnsupportedCheckpointError, match=r'author = "someone" \(unknown field\)'):
        open_checkpoint(folder, strict=True)


def run(*arguments):
    """The command line in a process of its own: stdout, stderr and the exit code."""
    done = subprocess.run([sys.executable, "-m", "gpt2core", *arguments], capture_output=True, text=True)
    return done.stdout, done.stderr, done.returncode


def test_command_line_warns_of_unread_fields_in_one_line_and_refuses_them_if_strict(tmp_path):
    folder = str(with_fields(tmp_path, author="someone"))
    out, err, code = run("info", folder)
    assert (code, err.count("\n")) == (0, 1)
    assert '  author = "someone"\n' in out
    assert err.startswith("gpt2core: warning: config.json has fields that GPT-2 does not read")
    out, err, code = run("info", folder, "--json")
    assert json.loads(out)["unread_fields"] == {"author": "someone"}
    out, err, code = run("generate", "x", "--model", folder, "--strict", "--backend", "numpy")
    assert (out, code) == ("", 1)
    assert "unknown field" in err


# ---- names of tensors


def rewrite(folder, change):
    """Change the tensors of a folder's model.safetensors by name."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def refusal(folder):
    with pytest.raises(CheckpointError) as error:
        open_checkpoint(folder)
    return str(error.value)


@pytest.mark.parametrize(
    "name",
    ["multiple_choice_head.summary.weight", "v_head.summary.bias", "score.weight", "classifier.dense.weight"],
)
def test_head_that_is_not_the_language_models_is_left_out_with_a_warning(name, tmp_path):
    want = dict(open_checkpoint(random_checkpoint(tmp_path)).weights.named())
    rewrite(tmp_path, lambda tensors: tensors.update({name: np.ones((2, 32), np.float32)}))
    with pytest.warns(CheckpointWarning, match=f"are left out: {re.escape(name)}"):
        got = dict(open_checkpoint(tmp_path).weights.named())
    assert got.keys() == want.keys()
    assert all(np.array_equal(got[name], want[name]) for name in want)


def test_double_heads_model_of_transformers_is_its_language_model(tmp_path):
    random_checkpoint(tmp_path / "plain")
    model = GPT2DoubleHeadsModel.from_pretrained(tmp_path / "plain").eval()
    model.save_pretrained(tmp_path / "double")
    with pytest.warns(CheckpointWarning, match="multiple_choice_head"):
        opened = open_checkpoint(tmp_path / "double")
    with torch.inference_mode():
        want = model(torch.tensor([[1, 2, 3]])).logits[0].numpy()
    np.testing.assert_allclose(reference_logits(opened.weights, [1, 2, 3]), want, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "prefix", ["module.", "_orig_mod.", "model.", "base_model.model.", "module._orig_mod."]
)
def test_prefix_of_all_names_is_taken_off_and_named(prefix, tmp_path):
    want = dict(open_checkpoint(random_checkpoint(tmp_path)).weights.named())

    def wrap(tensors):
        for name in list(tensors):
            tensors[prefix + name] = tensors.pop(name)

    rewrite(tmp_path, wrap)
    with pytest.warns(CheckpointWarning, match=f'begin with "{re.escape(prefix)}", which is taken off'):
        got = dict(open_checkpoint(tmp_path).weights.named())
    assert all(np.array_equal(got[name], want[name]) for name in want)
    rewrite(tmp_path, lambda tensors: tensors.pop(prefix + "transformer.ln_f.bias"))
    with pytest.warns(CheckpointWarning, match="taken off"):
        assert f"tensor {prefix}transformer.ln_f.bias of shape [32] is missing" in refusal(tmp_path)


def test_folder_without_a_language_model_says_what_it_holds(tmp_path):
    random_checkpoint(tmp_path, tie_word_embeddings=False)
    rewrite(tmp_path, lambda tensors: tensors.pop("lm_head.weight"))
    assert "lm_head.weight of shape [257, 32] is missing (it is a GPT-2 without its language" in refusal(
        tmp_path
    )

    def replace(tensors):
        tensors.clear()
        tensors["score.weight"] = np.ones((2, 32), np.float32)

    rewrite(tmp_path, replace)
    assert refusal(tmp_path).endswith("it holds no GPT-2 language model, its tensors are score.weight")


# ---- errors


@pytest.mark.parametrize(("says", "holds"), [(7, 6), (6, 7), (2**31 - 1, 2)])
def test_number_of_layers_that_is_not_the_files_is_one_fault(says, holds, tmp_path):
    random_checkpoint(tmp_path, n_layer=holds)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"n_layer": says}))
    assert refusal(tmp_path).endswith(f"has a fault: config.json says {says} layers, the file has {holds}")


def test_truncated_file_is_one_fault(tmp_path):
    file = random_checkpoint(tmp_path) / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 3])
    message = refusal(tmp_path)
    assert f"has a fault: the file is truncated: it has {len(whole) // 3} bytes and its header" in message
    assert f"promises {len(whole)}, so " in message
    assert message.endswith("tensors are cut off; download or convert it again")


def test_folder_without_a_model_says_what_it_is(tmp_path):
    assert refusal(tmp_path).endswith("config.json does not exist: the folder is empty")
    for step in (90, 500, 100):
        random_checkpoint(tmp_path / f"checkpoint-{step}")
    (tmp_path / "runs").mkdir()
    assert refusal(tmp_path).endswith(f"the last is checkpoint-500: name {tmp_path / 'checkpoint-500'}")


@pytest.mark.parametrize("name", ["dmeo", "Demo", "demo2"])
def test_misspelt_demo_is_recognized(name):
    with pytest.raises(CheckpointError, match="did you mean demo, the bundled model"):
        open_checkpoint(name, local_files_only=True)


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("https://huggingface.co/someone/gpt2-x", "someone/gpt2-x is not in the cache"),
        ("https://huggingface.co/someone/gpt2-x/", "someone/gpt2-x is not in the cache"),
        ("huggingface.co/gpt2-x?library=transformers", "gpt2-x is not in the cache"),
        ("https://hf.co/someone/gpt2-x/tree/v2", "someone/gpt2-x at revision v2 is not in the cache"),
        ("https://huggingface.co/someone/gpt2-x/blob/main/config.json", "gpt2-x at revision main is not in"),
    ],
)
def test_address_of_the_hubs_page_is_the_repository(url, said):
    with pytest.raises(CheckpointError, match=said):
        open_checkpoint(url, local_files_only=True)
    with pytest.raises(CheckpointError, match="is not an existing folder, and no hub id"):
        open_checkpoint("https://example.com/someone/gpt2-x", local_files_only=True)


@pytest.mark.parametrize(
    "name", ["config.json", "model.safetensors", "tokenizer.json", "generation_config.json"]
)
def test_git_lfs_pointer_in_the_place_of_any_file_is_recognized(name, tmp_path):
    (random_checkpoint(tmp_path) / name).write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:0\n"
    )
    with pytest.raises(
        CheckpointError, match=f"{name} is a Git LFS pointer, not the file; run `git lfs pull`"
    ):
        Tokenizer.from_folder(open_checkpoint(tmp_path).tokenizer_folder)
