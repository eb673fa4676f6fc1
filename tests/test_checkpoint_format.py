"""What is written is byte for byte what the first version wrote: folders of any version can be read."""

import hashlib
import json
import math
from dataclasses import replace

import numpy as np
import pytest
from checkpoint_files import TINY

from gpt2core import open_checkpoint
from gpt2core.checkpoint.open import save_checkpoint
from gpt2core.encodings import BFloat16, Int4, Int8
from gpt2core.errors import CheckpointError, RequestError
from gpt2core.weights import expected_shapes, weights_from_tensors

# Of model.safetensors and config.json, with a tied and with a separate head, as the first version wrote them.
DIGESTS = {
    "float32": ("19f458e9c096678c a60e4629ece003a2", "732ae762ac3e628d 3cf50c9b412dba6b"),
    "float16": ("9c127311a17d8e3c 0f07f8e898574007", "4cf8059440c808d5 7ece2b410f407a59"),
    "bfloat16": ("9addd89821fa60ec a2ece7f56debe92a", "01a423310ded16d0 4bca30975b71f635"),
    "rounded to int8": ("4caad9d2ed27932f fc5fc30da6925556", "ed7a70edf782273d 1c20545af36626b2"),
    "rounded to int4": ("7c853e519ad1ae3e f149d524ced240ec", "d6f64699d3c700a0 a859794880a59642"),
    "rounded to bfloat16": ("a03ecf67228eb197 7c3001508e26d8eb", "ba90a3fce425b880 6f5633a0009b51c8"),
}


def numbers(*shape, dtype=np.float32):
    return (np.arange(math.prod(shape)) % 101).astype(dtype).reshape(shape)


def matrix(name, shape, precision):
    """The same numbers whatever the machine: what is written depends on nothing else."""
    inputs, *outputs = shape
    if precision == "float32" or not outputs or name == "wpe.weight":
        return numbers(*shape)
    if precision == "bfloat16":
        return BFloat16(numbers(*shape, dtype=np.uint16))
    if name in ("wte.weight", "lm_head.weight"):
        return Int8(numbers(*shape, dtype=np.int8), numbers(inputs, 1))
    if precision == "int8":
        return Int8(numbers(*shape, dtype=np.int8), numbers(*outputs))
    groups = -(-inputs // 32)
    packed, zero = (numbers(*outputs, n, dtype=np.uint8) for n in (groups * 16, -(-groups // 2)))
    return Int4(packed, numbers(*outputs, groups), zero, inputs)


def weights_of(precision, *, tied=True):
    config = replace(TINY, tie_word_embeddings=tied)
    tensors = {name: matrix(name, shape, precision) for name, shape in expected_shapes(config).items()}
    return weights_from_tensors(config, tensors, precision)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "separate"])
@pytest.mark.parametrize("written", DIGESTS)
def test_a_folder_is_written_byte_for_byte_as_ever_and_read_back(tmp_path, written, tied):
    rounded = written.startswith("rounded")
    weights = weights_of(written.split()[-1] if rounded else "float32", tied=tied)
    save_checkpoint(tmp_path, weights, dtype="float32" if rounded else written)
    files = (tmp_path / name for name in ("model.safetensors", "config.json"))
    digests = " ".join(hashlib.sha256(file.read_bytes()).hexdigest()[:16] for file in files)
    assert digests == DIGESTS[written][0 if tied else 1]
    stored = open_checkpoint(tmp_path).stored
    assert (stored.config, stored.precision) == (weights.config, weights.precision)
    for (name, got), (want_name, want) in zip(stored.named(), weights.named(), strict=True):
        assert (name, got.dtype, got.shape) == (want_name, want.dtype, want.shape)
        assert got.tobytes() == want.tobytes(), name


def test_rounded_weights_are_not_written_in_another_type(tmp_path):
    with pytest.raises(RequestError, match="int8 weights are written as they are, not as float16"):
        save_checkpoint(tmp_path / "new", weights_of("int8"), dtype="float16")
    assert not (tmp_path / "new").exists()


def test_a_rounded_folder_that_lies_about_its_blocks_is_refused_before_a_list_is_made_of_them(tmp_path):
    save_checkpoint(tmp_path, weights_of("int8"))
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"n_layer": 10**9}))
    with pytest.raises(CheckpointError, match=r"config\.json says 1000000000 layers, the file has 2"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("precision", ["int8", "int4", "bfloat16"])
def test_an_encoding_says_alike_in_rows_and_whole_what_it_stands_for(precision):
    weights = weights_of(precision)
    ids = np.array([[3, 1], [4, 1]])
    for encoded in (weights.wte, weights.blocks[0].c_fc.weight):
        whole = encoded.float32()
        assert (encoded.shape, encoded.nbytes) == (whole.shape, sum(a.nbytes for _, a in encoded.arrays()))
        assert whole.dtype == np.float32
        if encoded is weights.wte or precision != "int8":  # an int8 layer has no rows
            np.testing.assert_array_equal(encoded.rows(ids), whole[ids])
    np.testing.assert_array_equal(weights.wte.T.float32(), weights.wte.float32().T)
