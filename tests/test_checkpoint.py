"""Checkpoints in folders: what is read equals what transformers reads, and every fault is named at once."""

import itertools
import json
import math
import mmap
import os
import subprocess
import sys
import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoint_files import (
    TINY,
    bfloat16,
    file_bytes,
    layout,
    random_tensors,
    write_checkpoint,
    write_config,
    write_tensors,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GPT2Config, GPT2LMHeadModel

from gpt2core.checkpoint import open as checkpoint
from gpt2core.checkpoint.open import (
    Checkpoint,
    Source,
    open_checkpoint,
    read_config,
    read_weights,
    resolve,
    save_checkpoint,
)
from gpt2core.config import ModelConfig
from gpt2core.errors import CheckpointError, RequestError, UnsupportedCheckpointError
from gpt2core.reference import reference_logits
from gpt2core.weights import Weights, expected_shapes, weights_from_tensors

IDS = [3, 1, 4, 1, 5, 9, 2, 6]
# Float32 arithmetic of transformers against the float64 reference, largest seen over these tests: 7e-7.
TOLERANCE = {"rtol": 0, "atol": 5e-6}


def transformers_logits(folder, **options):
    model = GPT2LMHeadModel.from_pretrained(
        folder, attn_implementation="eager", dtype=torch.float32, **options
    )
    with torch.inference_mode():
        return model.eval()(torch.tensor([IDS])).logits[0].numpy()


def assert_equals_transformers(folder):
    np.testing.assert_allclose(
        reference_logits(open_checkpoint(folder).weights, IDS), transformers_logits(folder), **TOLERANCE
    )


def faults_of(folder):
    with pytest.raises(CheckpointError) as error:
        open_checkpoint(folder)
    message = str(error.value)
    assert message.isascii()
    assert message.isprintable()
    return message


def base_of(array):
    while isinstance(array, np.ndarray) and array.base is not None:
        array = array.base
    return array.obj if isinstance(array, memoryview) else array


# ---- reading what is sound


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


# ---- faults


def test_all_faults_of_a_file_are_listed_at_once_in_its_own_spelling(tmp_path):
    tensors = random_tensors()
    del tensors["transformer.h.0.ln_1.bias"]
    tensors["transformer.h.1.attn.c_attn.weight"] = np.zeros((36, 12), np.float32)
    tensors["transformer.h.0.mlp.c_fc.bias"] = np.zeros(48, np.int64)
    tensors["transformer.wte.weight"] = tensors["transformer.wte.weight"].copy()
    tensors["transformer.wte.weight"][3, 4] = np.nan
    tensors["transformer.wte.weight"][4] = np.inf
    tensors["scores.weight"] = np.zeros((2, 12), np.float32)
    tensors["transformer.lm_head.weight"] = np.zeros((23, 12), np.float32)
    tensors["evil\x1b[31m\n"] = np.zeros(1, np.float32)
    write_checkpoint(tmp_path, tensors)
    message = faults_of(tmp_path)
    assert message.startswith(f"{tmp_path}/model.safetensors has 7 faults: ")
    for part in (
        "tensor transformer.h.0.ln_1.bias of shape [12] is missing",
        "tensor transformer.h.1.attn.c_attn.weight has shape [36, 12], expected [12, 36]",
        "tensor transformer.h.0.mlp.c_fc.bias has dtype I64, expected F32, F16, BF16 or F64",
        "tensor transformer.wte.weight holds 13 of 276 numbers that are not finite in float32",
        "tensor scores.weight is surplus, config.json has no place for it",
        "tensor transformer.lm_head.weight is surplus",
        'tensor "evil\\u001b[31m\\n" is surplus',
    ):
        assert part in message


def test_many_faults_are_counted_and_twenty_are_shown(tmp_path):
    surplus = {f"x{i}": np.zeros(1, np.float32) for i in range(29)}
    write_checkpoint(tmp_path, random_tensors() | surplus)
    message = faults_of(tmp_path)
    assert "model.safetensors has 29 faults: " in message
    assert message.count(" is surplus") == 20
    assert message.endswith("; and 9 more")


@pytest.mark.parametrize("name", expected_shapes(TINY))
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_nan_in_any_tensor_is_found_and_named(name, dtype, tmp_path):
    tensors = random_tensors()
    tensors["transformer." + name].flat[-1] = [np.nan, np.inf, -np.inf][len(name) % 3]
    convert = {"float32": np.asarray, "float16": lambda a: a.astype(np.float16), "bfloat16": bfloat16}[dtype]
    write_checkpoint(tmp_path, {n: convert(a) for n, a in tensors.items()})
    assert f"has a fault: tensor transformer.{name} holds 1 of " in faults_of(tmp_path)


@pytest.mark.parametrize("name", expected_shapes(TINY))
def test_any_tensor_missing_misshapen_mistyped_or_twice_is_named(name, tmp_path):
    for prefix in ("transformer.", ""):
        whole = random_tensors(prefix=prefix)
        full = prefix + name
        shape = list(whole[full].shape)
        for change, fault in (
            ({full: None}, f"tensor {full} of shape {shape} is missing"),
            (
                {full: whole[full][..., :-1]},
                f"tensor {full} has shape {[*shape[:-1], shape[-1] - 1]}, expected {shape}",
            ),
            ({full: whole[full][None]}, f"tensor {full} has shape {[1, *shape]}, expected {shape}"),
            ({full: whole[full].astype(np.uint8)}, f"tensor {full} has dtype U8, expected"),
            ({"transformer." + name: whole[full], name: whole[full]}, f"{name} stands twice, also as "),
        ):
            tensors = {n: a for n, a in (whole | change).items() if a is not None}
            write_checkpoint(tmp_path, tensors)
            message = faults_of(tmp_path)
            assert message.startswith(f"{tmp_path}/model.safetensors has a fault: ")
            assert fault in message


def test_file_cut_at_every_tensor_boundary_has_one_fault_that_counts_the_tensors_that_are_cut(tmp_path):
    tensors = random_tensors()
    write_checkpoint(tmp_path, tensors)
    path = tmp_path / "model.safetensors"
    whole = path.read_bytes()
    _, data = layout(tensors)
    for kept, _ in enumerate(tensors):
        length = len(whole) - len(data) + sum(a.nbytes for a in list(tensors.values())[:kept])
        for cut in (length, length + 1):
            path.write_bytes(whole[:cut])
            message = faults_of(tmp_path)
            count = len(tensors) - kept
            what = "the file" if count > 1 else f"tensor {list(tensors)[kept]}"
            assert message.startswith(f"{path} has a fault: {what} is truncated: ")
            assert count == 1 or f"so {count} of {len(tensors)} tensors are cut off" in message
            assert "missing" not in message


def test_separate_head_that_is_missing_or_misshapen_is_a_fault(tmp_path):
    config = replace(TINY, tie_word_embeddings=False)
    tensors = random_tensors(config)
    head = tensors.pop("lm_head.weight")
    write_checkpoint(tmp_path, tensors, config)
    assert "tensor lm_head.weight of shape [23, 12] is missing" in faults_of(tmp_path)
    write_checkpoint(tmp_path, {**tensors, "lm_head.weight": head[:20]}, config)
    assert "tensor lm_head.weight has shape [20, 12], expected [23, 12]" in faults_of(tmp_path)
    write_checkpoint(tmp_path, {**tensors, "lm_head.weight": head[:20]}, TINY)
    assert "tensor lm_head.weight has shape [20, 12], expected [23, 12]" in faults_of(tmp_path)
    del tensors["transformer.wte.weight"]
    write_checkpoint(tmp_path, tensors, TINY)
    assert "tensor transformer.wte.weight of shape [23, 12] is missing" in faults_of(tmp_path)


@pytest.mark.parametrize(
    ("fields", "fault"),
    [
        ({"n_layer": 2**31 - 1}, "has a fault: config.json says 2147483647 layers, the file has 2"),
        ({"n_layer": 3}, "has a fault: config.json says 3 layers, the file has 2"),
        ({"n_layer": 1}, "has a fault: config.json says 1 layers, the file has 2"),
        (
            {"vocab_size": 2**31 - 1},
            "tensor transformer.wte.weight has shape [23, 12], expected [2147483647, 12]",
        ),
        (
            {"n_positions": 2**31 - 1},
            "tensor transformer.wpe.weight has shape [8, 12], expected [2147483647, 12]",
        ),
        ({"n_embd": 3 * 2**29}, "tensor transformer.wpe.weight has shape [8, 12], expected [8, 1610612736]"),
        (
            {"n_inner": 2**31 - 1},
            "tensor transformer.h.0.mlp.c_fc.bias has shape [48], expected [2147483647]",
        ),
    ],
    ids=str,
)
def test_config_that_lies_about_a_size_is_found_by_shapes_and_allocates_nothing(fields, fault, tmp_path):
    write_checkpoint(tmp_path, random_tensors(), **fields)
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError) as error:
            open_checkpoint(tmp_path)
        assert tracemalloc.get_traced_memory()[1] < 2_000_000
    finally:
        tracemalloc.stop()
    assert fault in str(error.value)


def test_config_faults_name_the_file(tmp_path):
    tmp_path.joinpath("model.safetensors").write_bytes(file_bytes({}))
    assert faults_of(tmp_path) == f"{tmp_path}/config.json does not exist"
    config = tmp_path / "config.json"
    for text, reason in (
        ("{}x", "is not strict JSON: Extra data"),
        ('{"n_head": 5}', ": n_embd 768 is not a multiple"),
    ):
        config.write_text(text)
        assert faults_of(tmp_path).startswith(f"{config}{reason if reason[0] == ':' else ' ' + reason}")
    config.write_text('{"model_type": "llama"}')
    with pytest.raises(UnsupportedCheckpointError, match=f'{config}: model_type is "llama"'):
        open_checkpoint(tmp_path)
    config.unlink()
    config.mkdir()
    assert faults_of(tmp_path) == f"{config} is not a file"


@pytest.mark.parametrize("name", ["pytorch_model.bin", "weights.pt", "model.ckpt", "x.pth"])
def test_pickled_weights_are_refused_with_the_remedy_and_not_read(name, tmp_path):
    write_config(tmp_path)
    (tmp_path / name).write_bytes(b"cposix\nsystem\n(S'exit 1'\ntR.")
    with pytest.raises(UnsupportedCheckpointError) as error:
        open_checkpoint(tmp_path)
    assert str(error.value) == (
        f"{tmp_path} holds pickled weights ({name}), which can run code when they are read; "
        f"run `gpt2core convert {tmp_path}` once to make model.safetensors of them"
    )


def test_folder_without_weights_says_what_is_missing(tmp_path):
    write_config(tmp_path)
    (tmp_path / "training_args.bin").write_bytes(b"x")  # no weights
    (tmp_path / "optimizer.pt").write_bytes(b"x")
    want = f"{tmp_path} holds no weights: neither model.safetensors nor model.safetensors.index.json"
    assert faults_of(tmp_path) == want
    with pytest.raises(CheckpointError, match="gone cannot be read: No such file"):
        read_weights(tmp_path / "gone", TINY)


mutations = st.sampled_from(["drop", "rename", "reshape", "retype", "nan", "truncate", "copy"])


@given(st.lists(st.tuples(mutations, st.integers(0, 27)), min_size=1, max_size=5), st.integers(0, 2**32))
@settings(max_examples=60, deadline=None)
def test_any_mixture_of_faults_names_every_tensor_it_touched(tmp_path_factory, changes, seed):
    folder = tmp_path_factory.mktemp("mixture")
    tensors = random_tensors(seed=seed)
    names = list(tensors)
    touched, last = {}, None
    for change, i in changes:
        name = names[i]
        if name in touched:
            continue
        touched[name] = change
        array = tensors[name]
        if change == "drop":
            del tensors[name]
        elif change == "rename":
            tensors["x." + name] = tensors.pop(name)
        elif change == "reshape":
            tensors[name] = array.reshape(-1, 1, 1)
        elif change == "retype":
            tensors[name] = array.astype(np.int64)
        elif change == "nan":
            array.flat[0] = np.nan
        elif change == "copy":
            tensors[name.removeprefix("transformer.")] = array
        else:
            last = name
    if last:
        tensors[last] = tensors.pop(last)  # behind all others, where the cut is
    write_checkpoint(folder, tensors)
    if last:
        path = folder / "model.safetensors"
        os.truncate(path, path.stat().st_size - 1)
    message = faults_of(folder)
    for name, change in touched.items():
        assert name in message or (change == "truncate" and name != last)


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


# ---- saving


def tiny_weights(config=TINY, seed=0):
    return weights_from_tensors(config, random_tensors(config, seed=seed, prefix=""))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("tied", [True, False])
def test_saved_checkpoint_is_read_back_and_by_transformers_with_equal_logits(dtype, tied, tmp_path):
    config = replace(
        TINY, tie_word_embeddings=tied, n_inner=7, eos_token_ids=(1, 2), activation_function="gelu"
    )
    weights = tiny_weights(config)
    save_checkpoint(tmp_path / "new" / "model", weights, dtype=dtype)
    folder = tmp_path / "new" / "model"
    assert sorted(os.listdir(folder)) == ["config.json", "model.safetensors"]
    opened = open_checkpoint(folder)
    assert opened.config == config
    torch_type = getattr(torch, dtype)
    for (name, got), (_, want) in zip(opened.weights.named(), weights.named(), strict=True):
        rounded = torch.from_numpy(want.copy()).to(torch_type).float().numpy()
        np.testing.assert_array_equal(got, rounded, err_msg=name)
    assert_equals_transformers(folder)
    assert GPT2LMHeadModel.from_pretrained(folder).dtype == torch_type


def test_bfloat16_rounds_to_the_nearest_even_like_torch(tmp_path):
    rng = np.random.default_rng(5)
    values = rng.integers(0, 2**32, 23 * 12, dtype=np.uint32).view(np.float32)
    values[~np.isfinite(values) | (np.abs(values) > 3.3e38)] = 1.0
    values[:4] = np.array([0x3F808000, 0x3F818000, 0x7F7F7FFF, 0x80000001], np.uint32).view(np.float32)
    weights = replace_wte(tiny_weights(), values.reshape(23, 12))
    save_checkpoint(tmp_path, weights, dtype="bfloat16")
    want = torch.from_numpy(values.copy()).to(torch.bfloat16).float().numpy()
    np.testing.assert_array_equal(open_checkpoint(tmp_path).weights.wte.reshape(-1), want)


def replace_wte(weights, wte):
    return Weights(weights.config, wte, weights.wpe, weights.blocks, weights.ln_f, wte)


@pytest.mark.parametrize(
    ("dtype", "largest", "too_large"),
    [
        ("float16", 65519.996, 65520.0),
        ("bfloat16", 3.39e38, np.float32(3.3961776e38)),
        ("float32", 3.4e38, np.inf),
        ("float32", -3.4e38, np.nan),
    ],
)
def test_number_beyond_the_dtype_is_refused_before_anything_is_written(dtype, largest, too_large, tmp_path):
    for sign in (1, -1):
        wte = np.full((23, 12), sign * largest, np.float32)
        save_checkpoint(tmp_path / "fits", replace_wte(tiny_weights(), wte), dtype=dtype)
        assert np.isfinite(open_checkpoint(tmp_path / "fits").weights.wte).all()
        wte[22, 11] = sign * too_large
        with pytest.raises(CheckpointError) as error:
            save_checkpoint(tmp_path / "not", replace_wte(tiny_weights(), wte), dtype=dtype)
        assert f"{dtype} cannot hold these weights: wte.weight reaches " in str(error.value)
        assert "; save them as float32" in str(error.value)
        assert not (tmp_path / "not").exists()


def test_saving_over_the_folder_that_the_weights_are_mapped_from_keeps_them(tmp_path):
    save_checkpoint(tmp_path, tiny_weights(seed=1))
    mapped = open_checkpoint(tmp_path).weights
    before = mapped.wte.copy()
    save_checkpoint(tmp_path, mapped, dtype="float16")
    save_checkpoint(tmp_path, tiny_weights(seed=2))
    np.testing.assert_array_equal(mapped.wte, before)
    np.testing.assert_array_equal(open_checkpoint(tmp_path).weights.wte, tiny_weights(seed=2).wte)


def test_failed_save_leaves_the_old_checkpoint_whole(tmp_path, monkeypatch):
    save_checkpoint(tmp_path, tiny_weights(seed=1))

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(
        CheckpointError, match=r"model\.safetensors cannot be written: No space left on device"
    ):
        save_checkpoint(tmp_path, tiny_weights(seed=2))
    assert sorted(os.listdir(tmp_path)) == ["config.json", "model.safetensors"]
    np.testing.assert_array_equal(open_checkpoint(tmp_path).weights.wte, tiny_weights(seed=1).wte)


def test_saving_asks_for_a_float_type_and_a_folder(tmp_path):
    with pytest.raises(RequestError, match='dtype is "int8", expected one of float32, float16, bfloat16'):
        save_checkpoint(tmp_path, tiny_weights(), dtype="int8")
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="file cannot be made: File exists"):
        save_checkpoint(tmp_path / "file", tiny_weights())


# ---- memory

MEASURE = """
import sys, psutil, gpt2core.checkpoint.open as c
import numpy as np
np.isfinite(np.ones(1 << 17, np.float32)).all()  # NumPy's own buffers
process = psutil.Process()
before = process.memory_info().rss
opened = c.open_checkpoint(sys.argv[1])
print(process.memory_info().rss - before, opened.weights.nbytes)
"""


@pytest.mark.parametrize(("dtype", "limit"), [("float32", 1.1), ("float16", 1.65)])
def test_loading_raises_resident_memory_by_no_more_than_the_bytes_touched(dtype, limit, tmp_path):
    config = ModelConfig(vocab_size=20000, n_positions=256, n_embd=384, n_layer=4, n_head=6)
    rng = np.random.default_rng(0)
    tensors = {n: rng.standard_normal(s, np.float32) for n, s in expected_shapes(config).items()}
    save_checkpoint(tmp_path, weights_from_tensors(config, tensors), dtype=dtype)
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path)],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    risen, nbytes = map(int, done.stdout.split())
    assert nbytes == 4 * config.parameters
    assert nbytes > 50_000_000
    assert risen <= limit * nbytes  # float16: the file's half and the float32 copy
    assert risen > 0.9 * nbytes  # the whole file was checked
    assert math.isfinite(risen)
