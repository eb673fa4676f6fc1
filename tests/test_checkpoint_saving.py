"""Saving a checkpoint, and the memory that loading one takes."""

import math
import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from checkpoint_files import (
    TINY,
    random_tensors,
)
from checkpoint_oracle import assert_equals_transformers
from transformers import GPT2LMHeadModel

from gpt2core.checkpoint.open import (
    open_checkpoint,
    save_checkpoint,
)
from gpt2core.config import ModelConfig
from gpt2core.errors import CheckpointError, RequestError
from gpt2core.weights import Weights, expected_shapes, weights_from_tensors


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
