"""Broken checkpoints: every fault is named at once, and nothing is allocated for what a header claims."""

import os
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
from checkpoint_files import (
    TINY,
    bfloat16,
    file_bytes,
    layout,
    random_tensors,
    write_checkpoint,
    write_config,
)
from checkpoint_oracle import faults_of
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt2core.checkpoint.open import (
    open_checkpoint,
    read_weights,
)
from gpt2core.errors import CheckpointError, UnsupportedCheckpointError
from gpt2core.weights import expected_shapes


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
