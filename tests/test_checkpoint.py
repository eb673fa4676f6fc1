"""Checkpoints in folders: what is read equals what transformers reads; shards; how a model is found."""

import itertools
import json
import mmap
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoint_files import (
    TINY,
    bfloat16,
    random_tensors,
    write_checkpoint,
    write_config,
    write_tensors,
)
from checkpoint_oracle import assert_equals_transformers, faults_of
from transformers import GPT2Config, GPT2LMHeadModel

from gpt2core.checkpoint import open as checkpoint
from gpt2core.checkpoint.open import (
    Checkpoint,
    Source,
    open_checkpoint,
    read_config,
    resolve,
)
from gpt2core.errors import CheckpointError
from gpt2core.weights import expected_shapes


def base_of(array):
    while isinstance(array, np.ndarray) and array.base is not None:
        array = array.base
    return array.obj if isinstance(array, memoryview) else array


def test_checkpoint_holds_the_files_numbers_as_read_only_views_of_the_mapped_file(tmp_path):
    tensors = random_tensors()
    write_checkpoint(tmp_path, tensors)
    opened = open_checkpoint(str(tmp_path))
    assert isinstance(opened, Checkpoint)
    assert (opened.source, opened.folder) == (str(tmp_path), tmp_path)
    assert opened.config is opened.weights.config
    assert opened.config == TINY
    assert opened.weights.lm_head is opened.weights.wte
    named = dict(opened.weights.named())
    assert named.keys() == expected_shapes(TINY).keys()
    maps = set()
    for name, array in named.items():
        np.testing.assert_array_equal(array, tensors["transformer." + name])
        assert array.dtype == np.float32
        assert not array.flags.writeable
        assert isinstance(base_of(array), mmap.mmap)
        maps.add(id(base_of(array)))
    assert len(maps) == 1
    assert opened.weights.nbytes == 4 * TINY.parameters


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"activation_function": "relu", "layer_norm_epsilon": 1e-2, "n_inner": 7},
        {
            "scale_attn_weights": False,
            "scale_attn_by_inverse_layer_idx": True,
            "reorder_and_upcast_attn": True,
        },
        {"tie_word_embeddings": False},
    ],
    ids=str,
)
def test_checkpoint_that_transformers_saved_gives_its_logits(fields, tmp_path):
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=23, n_positions=8, n_embd=12, n_layer=2, n_head=3, **fields)
    config._attn_implementation = "eager"
    model = GPT2LMHeadModel(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 0, 0.4)
    model.generation_config.eos_token_id = [5, 6]
    model.save_pretrained(tmp_path)
    assert open_checkpoint(tmp_path).config.eos_token_ids == (5, 6)
    assert_equals_transformers(tmp_path)


@pytest.mark.parametrize("prefix", ["transformer.", ""])
@pytest.mark.parametrize("tied", [True, False])
def test_names_with_and_without_prefix_are_the_same_model(prefix, tied, tmp_path):
    config = replace(TINY, tie_word_embeddings=tied)
    tensors = random_tensors(config, prefix=prefix)
    write_checkpoint(tmp_path, tensors, config)
    weights = open_checkpoint(tmp_path).weights
    assert (weights.lm_head is weights.wte) == tied
    assert weights.config == config
    np.testing.assert_array_equal(weights.blocks[1].c_fc.weight, tensors[prefix + "h.1.mlp.c_fc.weight"])
    assert_equals_transformers(tmp_path)


def test_tied_model_with_an_equal_head_in_the_file_is_tied_as_in_transformers(tmp_path):
    tensors = random_tensors()
    tensors["lm_head.weight"] = tensors["transformer.wte.weight"].copy()
    write_checkpoint(tmp_path, tensors)
    weights = open_checkpoint(tmp_path).weights
    assert weights.lm_head is weights.wte
    assert weights.config.tie_word_embeddings is True
    assert_equals_transformers(tmp_path)


def test_tied_model_with_another_head_in_the_file_uses_that_head_as_transformers_does(tmp_path):
    tensors = random_tensors()
    tensors["lm_head.weight"] = tensors["transformer.wte.weight"].copy()
    tensors["lm_head.weight"][22, 11] += 1
    write_checkpoint(tmp_path, tensors)
    opened = open_checkpoint(tmp_path)
    assert opened.config.tie_word_embeddings is False
    assert opened.config == opened.weights.config
    np.testing.assert_array_equal(opened.weights.lm_head, tensors["lm_head.weight"])
    np.testing.assert_array_equal(opened.weights.wte, tensors["transformer.wte.weight"])
    assert_equals_transformers(tmp_path)


def test_tied_model_whose_file_holds_only_the_head_embeds_with_it_as_transformers_does(tmp_path):
    tensors = random_tensors()
    tensors["lm_head.weight"] = tensors.pop("transformer.wte.weight")
    write_checkpoint(tmp_path, tensors)
    opened = open_checkpoint(tmp_path)
    assert opened.weights.lm_head is opened.weights.wte
    assert opened.config.tie_word_embeddings is True
    np.testing.assert_array_equal(opened.weights.wte, tensors["lm_head.weight"])
    assert_equals_transformers(tmp_path)


def test_causal_masks_of_any_dtype_are_ignored(tmp_path):
    tensors = random_tensors()
    want = dict(tensors)
    tensors["transformer.h.0.attn.bias"] = np.tril(np.ones((1, 1, 8, 8), np.bool_))
    tensors["transformer.h.1.attn.bias"] = np.tril(np.ones((1, 1, 8, 8), np.uint8))
    tensors["transformer.h.0.attn.masked_bias"] = np.array(-1e4, np.float32)
    tensors["h.1.attn.masked_bias"] = np.array(np.nan, np.float32)
    write_checkpoint(tmp_path, tensors)
    for name, array in open_checkpoint(tmp_path).weights.named():
        np.testing.assert_array_equal(array, want["transformer." + name])
    assert_equals_transformers(tmp_path)


@pytest.mark.parametrize("kind", ["float16", "bfloat16", "float64", "mixed"])
def test_other_float_types_are_read_as_float32(kind, tmp_path):
    convert = {
        "float16": lambda a: a.astype(np.float16),
        "bfloat16": bfloat16,
        "float64": lambda a: a.astype(np.float64),
    }
    tensors, want = random_tensors(), {}
    for name, choose in zip(tensors, itertools.cycle(convert), strict=False):
        stored = convert[choose if kind == "mixed" else kind](tensors[name])
        tensors[name] = stored
        want[name] = (
            (stored.astype(np.uint32) << 16).view(np.float32) if stored.dtype == np.uint16 else stored
        )
    write_checkpoint(tmp_path, tensors)
    for name, array in open_checkpoint(tmp_path).weights.named():
        assert array.dtype == np.float32
        assert not array.flags.writeable
        np.testing.assert_array_equal(array, want["transformer." + name].astype(np.float32))
    assert_equals_transformers(tmp_path)


def test_end_tokens_of_generation_config_win(tmp_path):
    write_config(tmp_path, replace(TINY, eos_token_ids=(4,)))
    assert read_config(tmp_path).eos_token_ids == (4,)
    generation = tmp_path / "generation_config.json"
    for text, want in (
        ('{"eos_token_id": 7}', (7,)),
        ('{"eos_token_id": [7, 8]}', (7, 8)),
        ('{"eos_token_id": null}', (4,)),
        ('{"bos_token_id": 9}', (4,)),
        ('{"eos_token_id": [7, 50256]}', (7,)),
    ):
        generation.write_text(text)
        assert read_config(tmp_path).eos_token_ids == want, text
    for text, fault in (
        ('{"eos_token_id": "x"}', 'eos_token_id is "x"'),
        ('{"eos_token_id": true}', "eos_token_id is true"),
        ("[]", "expected a JSON object"),
        ("{", "is not strict JSON"),
    ):
        generation.write_text(text)
        with pytest.raises(CheckpointError) as error:
            read_config(tmp_path)
        assert fault in str(error.value)
        assert str(error.value).startswith(str(generation))


# ---- shards


def write_shards(
    folder, tensors, names=("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
):
    folder.mkdir(exist_ok=True)
    write_config(folder)
    weight_map = {name: names[i % 2] for i, name in enumerate(tensors)}
    for shard in names:
        write_tensors(folder / shard, {n: a for n, a in tensors.items() if weight_map[n] == shard})
    write_index(folder, weight_map)
    return weight_map


def write_index(folder, weight_map):
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map})
    )


def test_shards_are_read_as_one_checkpoint(tmp_path):
    tensors = random_tensors()
    write_shards(tmp_path, tensors)
    for name, array in open_checkpoint(tmp_path).weights.named():
        np.testing.assert_array_equal(array, tensors["transformer." + name])
        assert isinstance(base_of(array), mmap.mmap)
    assert_equals_transformers(tmp_path)


def test_shards_that_transformers_wrote_are_read(tmp_path):
    model = GPT2LMHeadModel(GPT2Config(vocab_size=23, n_positions=8, n_embd=12, n_layer=2, n_head=3))
    model.save_pretrained(tmp_path, max_shard_size="6KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    assert_equals_transformers(tmp_path)


def test_every_fault_of_shards_is_named_with_its_file(tmp_path):
    tensors = random_tensors()
    tensors["transformer.ln_f.bias"] = tensors["transformer.ln_f.bias"][:5]
    weight_map = write_shards(tmp_path, tensors)
    first, second = sorted(set(weight_map.values()))
    moved = next(name for name in weight_map if weight_map[name] == first and "ln_f" not in name)
    weight_map[moved] = second
    weight_map["ghost"] = "model-00003-of-00003.safetensors"
    write_index(tmp_path, weight_map)
    message = faults_of(tmp_path)
    assert message.startswith(f"{tmp_path}/model.safetensors.index.json has 4 faults: ")
    shard = weight_map["transformer.ln_f.bias"]
    for part in (
        f"{tmp_path}/model-00003-of-00003.safetensors does not exist (it should hold tensors ghost)",
        f"tensor {moved} is not in {second}",
        f"tensor {moved} of {first} is not so indexed",
        f"{shard}: tensor transformer.ln_f.bias has shape [5], expected [12]",
    ):
        assert part in message


@pytest.mark.parametrize(
    "shard",
    [
        "../x.safetensors",
        "/etc/passwd",
        "a/b.safetensors",
        "..",
        "a\\b.safetensors",
        "x.bin",
        "",
        5,
        None,
        ["x"],
        "\0",
    ],
    ids=repr,
)
def test_shard_outside_the_folder_or_of_another_kind_is_refused(shard, tmp_path):
    folder = tmp_path / "model"
    weight_map = write_shards(folder, random_tensors())
    write_tensors(tmp_path / "x.safetensors", {"transformer.ln_f.bias": np.zeros(12, np.float32)})
    write_index(folder, {**weight_map, "transformer.ln_f.bias": shard})
    message = faults_of(folder)
    shown = json.dumps(shard if isinstance(shard, str) else json.dumps(shard))
    assert (
        f"the index names {shown} for tensors transformer.ln_f.bias, which is no plain file name" in message
    )


@pytest.mark.parametrize(
    "text", ["{}", '{"weight_map": []}', '{"weight_map": {}}', '{"weight_map": 3}', "x", "[]"]
)
def test_index_without_a_map_is_refused(text, tmp_path):
    write_config(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(text)
    assert "model.safetensors.index.json" in faults_of(tmp_path)


def test_broken_shard_is_named(tmp_path):
    tensors = random_tensors()
    write_shards(tmp_path, tensors)
    (tmp_path / "model-00001-of-00002.safetensors").write_bytes(b"1234")
    message = faults_of(tmp_path)
    assert (
        f"{tmp_path}/model-00001-of-00002.safetensors has 4 bytes; a safetensors file has at least 8"
        in message
    )
    assert "tensor transformer.wte.weight of shape [23, 12] is missing" in message


# ---- finding


def test_demo_is_the_bundled_folder_and_its_absence_is_explained(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "DEMO", tmp_path / "demo")
    with pytest.raises(
        CheckpointError, match=f"the demo model is not in {tmp_path}/demo; install gpt2core again"
    ):
        resolve(Source("demo"))
    write_checkpoint(tmp_path / "demo", random_tensors())
    assert resolve(Source("demo")) == tmp_path / "demo"
    assert open_checkpoint("demo").source == "demo"
    monkeypatch.chdir(tmp_path)
    assert resolve(Source("./demo")) == resolve(Source(Path("demo"))) == Path("demo")
    with pytest.raises(
        CheckpointError, match="demo is a local folder, which has no revision 'v1'; leave it out"
    ):
        resolve(Source("demo", revision="v1"))


def test_folder_is_found_by_string_path_and_home(tmp_path, monkeypatch):
    (tmp_path / "my model").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for model in ("my model", "~/my model", "./my model", Path("my model"), tmp_path / "my model"):
        assert os.path.samefile(resolve(Source(model)), tmp_path / "my model")
    with pytest.raises(CheckpointError, match="my model is a local folder, which has no revision 'main'"):
        resolve(Source("my model", revision="main"))


@pytest.mark.parametrize(
    "model",
    [
        "",
        "/no/such/folder",
        "a/b/c",
        "./gone",
        "name with space",
        "-x/y",
        "a--b/c",
        "a/..",
        "x.git",
        "ä/b",
        "a" * 97,
        "x" * 5000,
        "a\0b",
        "a/b/",
        "\ud800",
        "C:\\models\\x",
    ],
    ids=lambda model: ascii(model)[:20],
)
def test_string_that_is_neither_folder_nor_hub_id_says_what_was_tried(model):
    with pytest.raises(
        CheckpointError, match=r"is not an existing folder, and no hub id .*; check the path"
    ) as error:
        resolve(Source(model))
    assert str(error.value).isascii()


def test_path_object_never_means_the_hub(tmp_path):
    with pytest.raises(CheckpointError, match='"gone" is not an existing folder; check the path'):
        resolve(Source(Path("gone")))
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="file is a file; name the folder that holds it"):
        resolve(Source(tmp_path / "file"))


@pytest.mark.parametrize("model", [None, 5, b"demo", ["demo"], True])
def test_model_of_another_type_is_refused(model):
    with pytest.raises(CheckpointError, match="expected 'demo', a folder or a hub id"):
        resolve(Source(model))
