"""GGUF both ways; the package gguf's own reader and writer are the reference."""

import dataclasses
import sys

import gguf
import numpy as np
import pytest
import tokenizer_folders
from click.testing import CliRunner
from test_save_pretrained import arrays, assert_same_arrays

from gpt2core.checkpoint.gguf import convert_from_gguf, convert_to_gguf, read_gguf, write_gguf
from gpt2core.checkpoint.open import open_checkpoint
from gpt2core.cli import program
from gpt2core.errors import (
    BackendUnavailableError,
    CheckpointError,
    CheckpointWarning,
    RequestError,
    UnsupportedCheckpointError,
)
from gpt2core.model import GPT2
from gpt2core.testing import random_checkpoint
from gpt2core.tokenizer.tokenizer import Tokenizer

TEXTS = ["the cat sat on the théâtre 日本語 😀", "  \n\n a b<tab>x'll 12", "<|endoftext|>x", ""]


@pytest.fixture
def folder(tmp_path):
    """A checkpoint with a tokenizer of bytes, merges, `<|endoftext|>` = 300 and one added token."""
    made = random_checkpoint(tmp_path / "model", vocab_size=304, n_embd=64, eos_token_ids=(300,))
    inner = tokenizer_folders.small_byte_level(added=["<tab>"])
    return tokenizer_folders.save(inner, made, chat_template="{{ messages }}")


def fields_of(path):
    return {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items()}


def tensors_of(path):
    return {t.name: gguf.quants.dequantize(t.data, t.tensor_type) for t in gguf.GGUFReader(path).tensors}


@pytest.mark.parametrize("fields", [{}, {"tie_word_embeddings": False, "n_inner": 96}])
def test_float32_goes_there_and_back_in_bits_with_config_and_tokenizer(folder, tmp_path, fields):
    if fields:
        random_checkpoint(tmp_path / "other", vocab_size=304, n_embd=64, eos_token_ids=(300,), **fields)
        for name in ("config.json", "model.safetensors"):
            (folder / name).write_bytes((tmp_path / "other" / name).read_bytes())
    path = convert_to_gguf(folder, tmp_path / "model.gguf")
    convert_from_gguf(path, tmp_path / "back")
    assert_same_arrays(arrays(tmp_path / "back"), arrays(folder))
    assert open_checkpoint(tmp_path / "back").config == open_checkpoint(folder).config
    want, got = Tokenizer.from_folder(folder), Tokenizer.from_folder(tmp_path / "back")
    for text in TEXTS:
        for special in (False, True):
            ids = want.encode(text, allow_special=special)
            assert got.encode(text, allow_special=special) == ids
            assert got.decode(ids) == want.decode(ids)
    assert (got.special_ids, got.chat_template) == (want.special_ids, "{{ messages }}")
    assert got.special_tokens["eos_token"] == "<|endoftext|>"


def test_the_file_says_what_llama_cpp_reads(folder, tmp_path):
    path = convert_to_gguf(folder, tmp_path / "model.gguf")
    fields, tensors, want = fields_of(path), tensors_of(path), arrays(folder)
    assert fields["general.architecture"] == "gpt2"
    assert (fields["gpt2.block_count"], fields["gpt2.context_length"]) == (3, 96)
    assert fields["gpt2.embedding_length"] == 64
    assert (fields["gpt2.feed_forward_length"], fields["gpt2.attention.head_count"]) == (256, 4)
    assert fields["gpt2.attention.layer_norm_epsilon"] == pytest.approx(1e-5)
    assert (fields["tokenizer.ggml.model"], fields["tokenizer.ggml.pre"]) == ("gpt2", "gpt-2")
    last = ["<|endoftext|>", "<tab>", "[PAD302]", "[PAD303]"]
    assert fields["tokenizer.ggml.tokens"][299:] == [Tokenizer.from_folder(folder).content(299), *last]
    assert fields["tokenizer.ggml.token_type"][299:] == [1, 3, 4, 5, 5]
    assert fields["tokenizer.ggml.eos_token_id"] == 300
    np.testing.assert_array_equal(tensors["token_embd.weight"], want["wte.weight"])
    np.testing.assert_array_equal(tensors["blk.1.ffn_up.weight"], want["h.1.mlp.c_fc.weight"].T)  # (O, I)
    np.testing.assert_array_equal(tensors["blk.2.attn_qkv.bias"], want["h.2.attn.c_attn.bias"])
    assert "output.weight" not in tensors  # tied: llama.cpp takes the embedding


@pytest.mark.parametrize("kind", ["f16", "q8_0"])
def test_matrices_are_stored_in_the_type_that_is_asked_for(folder, tmp_path, kind):
    path = convert_to_gguf(folder, tmp_path / "model.gguf", kind=kind)
    types = {t.name: t.tensor_type.name.lower() for t in gguf.GGUFReader(path).tensors}
    assert {types[name] for name in ("token_embd.weight", "blk.0.attn_output.weight")} == {kind}
    small = ("position_embd.weight", "output_norm.bias", "blk.0.attn_norm.weight")
    assert {types[name] for name in small} == {"f32"}
    want = arrays(folder)
    convert_from_gguf(path, tmp_path / "back")
    got = arrays(tmp_path / "back")
    number = gguf.GGMLQuantizationType[kind.upper()]
    for name, array in want.items():
        rounded = array
        if array.ndim == 2 and name != "wpe.weight":
            turned = array if name == "wte.weight" else array.T
            stored = gguf.quants.quantize(np.ascontiguousarray(turned), number)
            rounded = gguf.quants.dequantize(stored, number)
            rounded = rounded if name == "wte.weight" else rounded.T
        np.testing.assert_array_equal(got[name], rounded, err_msg=name)
    assert fields_of(path)["general.file_type"] == {"f16": 1, "q8_0": 7}[kind]


def test_a_matrix_that_has_no_blocks_of_32_is_float16(tmp_path):
    path = tmp_path / "model.gguf"
    write_gguf(path, open_checkpoint(random_checkpoint(tmp_path / "m", n_embd=40)).stored, None, kind="q8_0")
    types = {t.name: t.tensor_type.name for t in gguf.GGUFReader(path).tensors}
    assert types["blk.0.ffn_up.weight"] == "F16"  # 40 inputs
    assert types["blk.0.ffn_down.weight"] == "Q8_0"  # 160


@pytest.mark.parametrize("name", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "BF16"])
def test_other_types_are_dequantized_on_reading(folder, tmp_path, name):
    number = gguf.GGMLQuantizationType[name]
    path, other = convert_to_gguf(folder, tmp_path / "model.gguf"), tmp_path / "other.gguf"
    out = gguf.GGUFWriter(other, "gpt2")
    for key, value in fields_of(path).items():
        if key.startswith("gpt2."):
            (out.add_float32 if isinstance(value, float) else out.add_uint32)(key, value)
    for key, array in tensors_of(path).items():
        if array.ndim == 2 and key != "position_embd.weight":
            out.add_tensor(key, gguf.quants.quantize(array, number), raw_dtype=number)
        else:
            out.add_tensor(key, array)
    for step in (out.write_header_to_file, out.write_kv_data_to_file, out.write_tensors_to_file, out.close):
        step()
    weights, tokenizer = read_gguf(other)
    assert tokenizer is None  # the file has none
    np.testing.assert_array_equal(weights.wte, tensors_of(other)["token_embd.weight"])
    np.testing.assert_array_equal(weights.blocks[1].c_fc.weight, tensors_of(other)["blk.1.ffn_up.weight"].T)


def test_a_quantized_model_is_written_as_what_its_numbers_stand_for(folder, tmp_path):
    with GPT2.from_pretrained(folder, precision="int8", backend="numpy") as model:
        model.save_pretrained(tmp_path / "int8")
    path = convert_to_gguf(tmp_path / "int8", tmp_path / "model.gguf")
    want = open_checkpoint(tmp_path / "int8").weights
    np.testing.assert_array_equal(read_gguf(path)[0].blocks[0].c_attn.weight, want.blocks[0].c_attn.weight)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"activation_function": "relu"}, 'activation_function = "relu"'),
        ({"activation_function": "gelu"}, 'activation_function = "gelu"'),
        ({"scale_attn_weights": False}, "scale_attn_weights = false"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx = true"),
    ],
)
def test_what_gguf_cannot_say_is_refused_by_name(tmp_path, fields, message):
    folder = random_checkpoint(tmp_path / "model", **fields)
    with pytest.raises(UnsupportedCheckpointError, match=f"would compute other numbers: .*{message}"):
        convert_to_gguf(folder, tmp_path / "model.gguf")
    assert not (tmp_path / "model.gguf").exists()


@pytest.mark.parametrize(
    ("prefix_space", "why"),
    [
        (True, "is not GPT-2's byte-level BPE"),
        (False, "has no merges, which llama.cpp needs"),
    ],
)
def test_a_tokenizer_that_gguf_cannot_hold_is_left_out_with_a_warning(folder, tmp_path, prefix_space, why):
    if prefix_space:
        inner = tokenizer_folders.small_byte_level(prefix_space=True)
        tokenizer_folders.save(inner, folder, add_prefix_space=True)
    else:
        folder = random_checkpoint(tmp_path / "bytes")
    with pytest.warns(
        CheckpointWarning, match=f"the tokenizer {why}, so the GGUF file is written without it"
    ):
        path = convert_to_gguf(folder, tmp_path / "model.gguf")
    assert fields_of(path)["tokenizer.ggml.model"] == "no_vocab"
    assert read_gguf(path)[1] is None


def test_a_broken_file_and_another_architecture_are_named(folder, tmp_path):
    path = convert_to_gguf(folder, tmp_path / "model.gguf")
    data = path.read_bytes()
    for broken in (b"", b"GGUF", data[:5000], data[: len(data) // 2], b"x" * 4000):
        path.write_bytes(broken)
        with pytest.raises(CheckpointError, match="is no GGUF file, or broken"):
            read_gguf(path)
    kind = b"general.architecture\x08\0\0\0\x04\0\0\0\0\0\0\0"  # a string of 4 bytes
    path.write_bytes(data.replace(kind + b"gpt2", kind + b"bert"))
    with pytest.raises(UnsupportedCheckpointError, match='its architecture is "bert"; gpt2core runs'):
        read_gguf(path)
    path.write_bytes(data.replace(b"gpt2.block_count", b"gpt2.block_xount"))
    with pytest.raises(CheckpointError, match=r"model.gguf lacks gpt2.block_count"):
        read_gguf(path)
    path.write_bytes(data.replace(b"blk.1.ffn_up.bias", b"blk.1.ffn_uq.bias"))
    with pytest.raises(CheckpointError, match=r"h.1.mlp.c_fc.bias .* is missing; .*blk.1.ffn_uq.bias"):
        read_gguf(path)
    with pytest.raises(CheckpointError, match="does not exist"):
        read_gguf(tmp_path / "no.gguf")
    with pytest.raises(RequestError, match='the type "q3" is not written; use f32, f16, q8_0'):
        convert_to_gguf(folder, tmp_path / "x.gguf", kind="q3")


def test_numbers_that_float16_cannot_hold_are_refused(folder, tmp_path):
    checkpoint = open_checkpoint(folder)
    large = checkpoint.stored.wte.copy()
    large[0, 0] = 70000
    weights = dataclasses.replace(checkpoint.stored, wte=large, lm_head=large)
    with pytest.raises(CheckpointError, match=r"float16 cannot hold token_embd.weight; write f32"):
        write_gguf(tmp_path / "x.gguf", weights, None, kind="f16")
    assert not (tmp_path / "x.gguf").exists()


def test_the_command_converts_both_ways_and_overwrites_only_if_told(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def run(*words, code=0):
        done = CliRunner().invoke(program, ["convert", *map(str, words)])
        assert bool(done.exit_code) == bool(code), done.output
        return done

    assert run("model", "--to", "gguf", "--offline").stdout == "model.gguf\n"
    assert run("model.gguf", "-o", "back").stdout == "back/model.safetensors\n"
    assert_same_arrays(arrays(tmp_path / "back"), arrays(folder))
    assert "model.gguf exists" in str(run("model", "--to", "gguf", code=1).exception)
    assert "back already holds" in str(run("model.gguf", "-o", "back", code=1).exception)
    run("model", "--to", "gguf", "--type", "q8_0", "-o", "model.gguf", "--force")
    run("model.gguf", "-o", "back", "--force")
    assert not np.array_equal(arrays(tmp_path / "back")["wte.weight"], arrays(folder)["wte.weight"])


def test_a_folder_with_a_gguf_file_alone_and_the_file_itself_name_the_command(folder, tmp_path):
    path = convert_to_gguf(folder, folder / "model.gguf")
    (folder / "model.safetensors").unlink()
    message = f"a file of llama.cpp; run `gpt2core convert {path}` and name the folder"
    for model in (folder, path):
        with pytest.raises(UnsupportedCheckpointError, match=message):
            open_checkpoint(model)


def test_without_the_package_the_error_names_the_extra(folder, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(BackendUnavailableError, match=r"pip install 'gpt2core\[gguf\]'"):
        convert_to_gguf(folder, tmp_path / "model.gguf")
    with pytest.raises(BackendUnavailableError, match=r"pip install 'gpt2core\[gguf\]'"):
        read_gguf(tmp_path / "model.gguf")
