"""Pickled weights: converted number by number, and never able to run code."""

import collections
import json
import os
import pickle
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from checkpoint_files import TINY, random_tensors, write_config
from transformers import GPT2Config, GPT2LMHeadModel

from gpt2core.checkpoint.open import convert_pickle, open_checkpoint
from gpt2core.checkpoint.safetensors import SafetensorsFile
from gpt2core.errors import BackendUnavailableError, CheckpointError, UnsupportedCheckpointError
from gpt2core.reference import reference_logits


def torch_tensors(config=TINY, dtype=torch.float32, **options):
    return {n: torch.from_numpy(a.copy()).to(dtype) for n, a in random_tensors(config, **options).items()}


def write_pickle(folder, content, name="pytorch_model.bin", config=TINY, **options):
    folder.mkdir(parents=True, exist_ok=True)
    write_config(folder, config)
    torch.save(content, folder / name, **options)


def refusal(folder, *arguments, **options):
    with pytest.raises(CheckpointError) as error:
        convert_pickle(folder, *arguments, **options)
    assert not (folder / "model.safetensors").exists()
    assert not list(folder.glob(".*"))  # no temporary file is left
    return str(error.value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("zipped", [True, False])
def test_converted_file_holds_the_pickles_numbers_in_their_own_dtype(dtype, zipped, tmp_path):
    tensors = torch_tensors(dtype=dtype)
    write_pickle(tmp_path, tensors, _use_new_zipfile_serialization=zipped)
    path = convert_pickle(str(tmp_path))
    assert path == tmp_path / "model.safetensors"
    file = SafetensorsFile(path)
    want = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "float64": "F64"}[str(dtype)[6:]]
    assert {entry.dtype for entry in file.entries.values()} == {want}
    assert file.entries.keys() == tensors.keys()
    for name, array in open_checkpoint(tmp_path).weights.named():
        np.testing.assert_array_equal(array, tensors["transformer." + name].float().numpy())


def test_masks_and_a_tied_heads_copy_are_left_out_and_transposed_tensors_are_laid_out(tmp_path):
    tensors = torch_tensors()
    tensors["lm_head.weight"] = tensors["transformer.wte.weight"]
    tensors["transformer.h.0.attn.bias"] = torch.tril(torch.ones(1, 1, 8, 8, dtype=torch.bool))
    tensors["transformer.h.1.attn.masked_bias"] = torch.tensor(-1e4)
    weight = tensors["transformer.h.0.mlp.c_fc.weight"]
    tensors["transformer.h.0.mlp.c_fc.weight"] = weight.T.contiguous().T
    assert not tensors["transformer.h.0.mlp.c_fc.weight"].is_contiguous()
    write_pickle(tmp_path, collections.OrderedDict(tensors))
    entries = SafetensorsFile(convert_pickle(tmp_path)).entries
    assert entries.keys() == torch_tensors().keys()
    np.testing.assert_array_equal(open_checkpoint(tmp_path).weights.blocks[0].c_fc.weight, weight.numpy())


def test_head_that_differs_from_the_embedding_is_kept(tmp_path):
    tensors = torch_tensors()
    tensors["lm_head.weight"] = tensors["transformer.wte.weight"] + 1
    write_pickle(tmp_path / "differs", tensors)
    convert_pickle(tmp_path / "differs")
    assert open_checkpoint(tmp_path / "differs").config.tie_word_embeddings is False
    separate = replace(TINY, tie_word_embeddings=False)
    tensors["lm_head.weight"] = tensors["transformer.wte.weight"].clone()
    write_pickle(tmp_path / "separate", tensors, config=separate)
    convert_pickle(tmp_path / "separate")
    assert open_checkpoint(tmp_path / "separate").config == separate


def test_pickle_of_transformers_converts_to_what_transformers_reads(tmp_path):
    model = GPT2LMHeadModel(GPT2Config(vocab_size=23, n_positions=8, n_embd=12, n_layer=2, n_head=3)).eval()
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    convert_pickle(tmp_path)
    ids = torch.tensor([[1, 2, 3]])
    with torch.inference_mode():
        again = GPT2LMHeadModel.from_pretrained(tmp_path).eval()
        torch.testing.assert_close(again(ids).logits, model(ids).logits, rtol=0, atol=0)


def write_shards(folder, weight_map, tensors):
    folder.mkdir(exist_ok=True)
    write_config(folder)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    for shard in set(weight_map.values()):
        if isinstance(shard, str) and "/" not in shard:
            torch.save({n: t for n, t in tensors.items() if weight_map[n] == shard}, folder / shard)


def test_shards_become_one_file(tmp_path):
    tensors = torch_tensors()
    names = ("pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin")
    write_shards(tmp_path, {name: names[i % 2] for i, name in enumerate(tensors)}, tensors)
    convert_pickle(tmp_path)
    for name, array in open_checkpoint(tmp_path).weights.named():
        np.testing.assert_array_equal(array, tensors["transformer." + name].numpy())


def test_shards_that_disagree_with_their_index_are_refused(tmp_path):
    tensors = torch_tensors()
    weight_map = dict.fromkeys(tensors, "a.bin")
    for number, (change, fault) in enumerate(
        (
            ("../x.bin", 'index.json names "../x.bin", which is no plain file name; expected *.bin'),
            ("/etc/passwd", 'names "/etc/passwd"'),
            (None, "names"),
            ("a.safetensors", 'names "a.safetensors"'),
        )
    ):
        folder = tmp_path / str(number)
        write_shards(folder, weight_map | {"transformer.ln_f.bias": change}, tensors)
        assert fault in refusal(folder)
    folder = tmp_path / "lacks"
    write_shards(folder, weight_map, tensors)
    (folder / "a.bin").unlink()
    assert refusal(folder) == f"{folder} lacks a.bin, which pytorch_model.bin.index.json names"
    torch.save(tensors, folder / "a.bin")
    torch.save({"transformer.ln_f.bias": tensors["transformer.ln_f.bias"]}, folder / "b.bin")
    index = folder / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": weight_map | {"transformer.ln_f.bias": "b.bin"}}))
    assert refusal(folder) == f"{folder}/b.bin: tensor transformer.ln_f.bias is in another shard too"
    index.write_text('{"weight_map": []}')
    assert "weight_map is [], expected tensor names and their files" in refusal(folder)


@pytest.mark.parametrize("wrapper", ["state_dict", "model_state_dict", "model"])
def test_only_pickle_of_a_folder_is_found_by_any_name_and_inside_a_training_loops_file(wrapper, tmp_path):
    write_pickle(tmp_path, {"epoch": 3, wrapper: torch_tensors()}, "epoch3.pt")
    torch.save({"lr": 1.0}, tmp_path / "optimizer.pt")
    torch.save({}, tmp_path / "training_args.bin")
    convert_pickle(tmp_path)
    np.testing.assert_array_equal(
        open_checkpoint(tmp_path).weights.wte, random_tensors()["transformer.wte.weight"]
    )


def test_several_pickles_or_none_are_refused(tmp_path):
    write_config(tmp_path)
    assert refusal(tmp_path) == f"{tmp_path} holds no pickled weights"
    write_pickle(tmp_path, torch_tensors(), "a.pt")
    write_pickle(tmp_path, torch_tensors(), "b.bin")
    assert "several pickles (a.pt; b.bin); name the one to convert pytorch_model.bin" in refusal(tmp_path)


def test_every_fault_of_the_tensors_is_listed_and_nothing_is_written(tmp_path):
    tensors = torch_tensors()
    del tensors["transformer.ln_f.bias"]
    tensors["transformer.wpe.weight"][0, 0] = float("nan")
    tensors["transformer.h.0.ln_1.bias"] = torch.zeros(12, dtype=torch.int64)
    tensors["heads.weight"] = torch.zeros(3)
    write_pickle(tmp_path, tensors)
    message = refusal(tmp_path)
    assert message.startswith(f"{tmp_path}/pytorch_model.bin has 4 faults: ")
    for part in (
        "tensor transformer.ln_f.bias of shape [12] is missing",
        "tensor transformer.wpe.weight holds 1 of 96 numbers that are not finite",
        "tensor transformer.h.0.ln_1.bias has dtype I64",
        "tensor heads.weight is surplus",
    ):
        assert part in message


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("form", ["zip", "legacy", "protocol 2", "protocol 4", "nested"])
def test_pickle_that_would_run_code_is_refused_and_runs_nothing(form, tmp_path):
    ran = tmp_path / "ran"
    folder = tmp_path / "model"
    evil = {**torch_tensors(), "x": Evil(ran)}
    if form.startswith("protocol"):
        folder.mkdir()
        write_config(folder)
        (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Evil(ran), int(form[-1])))
    elif form == "nested":
        write_pickle(folder, {"state_dict": torch_tensors(), "hook": [Evil(ran)]})
    else:
        write_pickle(folder, evil, _use_new_zipfile_serialization=form == "zip")
    with pytest.raises(CheckpointError) as error:
        convert_pickle(folder)
    if form == "protocol 4":  # torch.save never writes it, torch.load(weights_only=True) does not read it
        assert "is no pickle of tensors, or damaged (UnpicklingError)" in str(error.value)
    else:
        assert isinstance(error.value, UnsupportedCheckpointError)
        assert "pytorch_model.bin is refused: beyond tensors it asks for posix.system" in str(error.value)
    assert "weights_only=False" not in str(error.value)  # torch's own advice
    assert not ran.exists()
    assert not (folder / "model.safetensors").exists()

    pickle.loads(pickle.dumps(Evil(ran)))  # the plant works where pickles are trusted
    assert ran.exists()


@pytest.mark.parametrize(
    "content",
    [b"", b"x", b"\x80\x04", b"PK\x03\x04" + bytes(50), b"cposix\n", b"}q\x00.", pickle.dumps({"a": 1})[:-3]],
    ids=repr,
)
def test_file_that_is_no_pickle_of_tensors_is_a_typed_error(content, tmp_path):
    write_config(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(content)
    assert str(tmp_path / "pytorch_model.bin") in refusal(tmp_path)


def test_pickle_cut_at_any_quarter_is_a_typed_error(tmp_path):
    for zipped in (True, False):
        write_pickle(tmp_path, torch_tensors(), _use_new_zipfile_serialization=zipped)
        whole = (tmp_path / "pytorch_model.bin").read_bytes()
        for part in range(1, 16):
            (tmp_path / "pytorch_model.bin").write_bytes(whole[: len(whole) * part // 16])
            assert "is no pickle of tensors, or damaged" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        ([1, 2], "holds a list, expected tensors by name (a state_dict)"),
        ({}, "holds a dict, expected tensors by name"),
        ({1: torch.zeros(1)}, "holds a dict, expected tensors by name"),
        (torch.zeros(3), "holds a Tensor, expected tensors by name"),
        ({"a": 3}, "pytorch_model.bin: a is a int, expected a tensor"),
        ({"a": {"b": torch.zeros(1)}}, "a is a dict, expected a tensor"),
        (
            {"a b": torch.zeros(2, dtype=torch.complex64)},
            'tensor "a b" is torch.strided complex64 on cpu, expected',
        ),
        (
            {"a": torch.zeros(2, 2).to_sparse()},
            "tensor a is torch.sparse_coo float32 on cpu, expected a plain tensor",
        ),
        (
            {"a": torch.empty(2, device="meta")},
            "tensor a is torch.strided float32 on meta, expected a plain tensor",
        ),
    ],
    ids=lambda value: str(value)[:40],
)
def test_pickle_of_something_else_says_what_it_holds(content, fault, tmp_path):
    write_pickle(tmp_path, content)
    assert fault in refusal(tmp_path)


def test_existing_files_are_kept_unless_forced(tmp_path):
    write_pickle(tmp_path, torch_tensors())
    (tmp_path / "model.safetensors").write_bytes(b"old")
    with pytest.raises(
        CheckpointError, match=f"{tmp_path} already holds model.safetensors; remove them, or pass force"
    ):
        convert_pickle(tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == b"old"
    convert_pickle(tmp_path, force=True)
    assert open_checkpoint(tmp_path).config == TINY


def test_another_output_folder_gets_config_and_tokenizer_too(tmp_path):
    source, target = tmp_path / "source", tmp_path / "out" / "target"
    write_pickle(source, torch_tensors())
    for name in ("vocab.json", "merges.txt", "tokenizer.json", "README.md"):
        (source / name).write_text(name)
    assert convert_pickle(source, target) == target / "model.safetensors"
    assert sorted(os.listdir(target)) == [
        "config.json", "merges.txt", "model.safetensors", "tokenizer.json", "vocab.json",
    ]  # fmt: skip
    assert (target / "merges.txt").read_text() == "merges.txt"
    assert not (source / "model.safetensors").exists()
    assert open_checkpoint(target).config == TINY
    with pytest.raises(
        CheckpointError, match=r"target already holds model\.safetensors, config\.json, tokenizer\.json"
    ):
        convert_pickle(source, target)
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="file/x cannot be made: Not a directory"):
        convert_pickle(source, tmp_path / "file" / "x")


def test_config_that_is_refused_stops_before_the_pickle_is_read(tmp_path):
    write_pickle(tmp_path, Evil(tmp_path / "ran"))
    write_config(tmp_path, TINY, model_type="llama")
    assert 'model_type is "llama"' in refusal(tmp_path)
    (tmp_path / "config.json").unlink()
    assert refusal(tmp_path) == f"{tmp_path}/config.json does not exist"


def test_missing_or_old_torch_is_explained_with_the_extra(tmp_path, monkeypatch):
    write_pickle(tmp_path, torch_tensors())
    with monkeypatch.context() as patch:
        patch.setattr(torch, "__version__", "2.5.1+cpu")
        with pytest.raises(
            BackendUnavailableError, match=r"PyTorch 2\.5\.1\+cpu is too old .* the least is 2\.10; install"
        ):
            convert_pickle(tmp_path)
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(BackendUnavailableError, match=r"needs PyTorch, .* pip install 'gpt2core\[torch\]'"):
        convert_pickle(tmp_path)


def test_neither_torch_nor_the_hub_is_imported_for_a_folder(tmp_path):
    write_pickle(tmp_path, torch_tensors())
    convert_pickle(tmp_path)
    script = (
        "import sys, gpt2core.checkpoint.open as c; c.open_checkpoint(sys.argv[1]); "
        "print([m for m in ('torch', 'huggingface_hub', 'transformers', 'safetensors', 'tokenizers') "
        "if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.stdout == "[]\n"


# ---- other training code's files


class NanoGPT(torch.nn.Module):
    """nanoGPT's model (https://github.com/karpathy/nanoGPT), by the names and shapes of its parameters."""

    def __init__(self, vocab_size, block_size, n_layer, n_head, n_embd, bias):
        super().__init__()
        self.n_head = n_head

        def norm():
            layer = torch.nn.LayerNorm(n_embd, bias=bias)
            torch.nn.init.normal_(layer.weight, 1, 0.1)
            return layer

        def linear(inputs, outputs):
            return torch.nn.Linear(inputs, outputs, bias=bias)

        def block():
            attn = {"c_attn": linear(n_embd, 3 * n_embd), "c_proj": linear(n_embd, n_embd)}
            mlp = {"c_fc": linear(n_embd, 4 * n_embd), "c_proj": linear(4 * n_embd, n_embd)}
            parts = {"ln_1": norm(), "attn": torch.nn.ModuleDict(attn), "ln_2": norm()}
            return torch.nn.ModuleDict({**parts, "mlp": torch.nn.ModuleDict(mlp)})

        self.transformer = torch.nn.ModuleDict(
            {
                "wte": torch.nn.Embedding(vocab_size, n_embd),
                "wpe": torch.nn.Embedding(block_size, n_embd),
                "h": torch.nn.ModuleList([block() for _ in range(n_layer)]),
                "ln_f": norm(),
            }
        )
        self.lm_head = torch.nn.Linear(n_embd, vocab_size, bias=False)
        self.lm_head.weight = self.transformer["wte"].weight

    def forward(self, ids):
        parts = self.transformer
        x = parts["wte"](ids) + parts["wpe"](torch.arange(len(ids)))  # (T, D)
        for block in parts["h"]:
            q, k, v = block["attn"]["c_attn"](block["ln_1"](x)).chunk(3, -1)
            q, k, v = (a.view(len(ids), self.n_head, -1).transpose(0, 1) for a in (q, k, v))
            y = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + block["attn"]["c_proj"](y.transpose(0, 1).reshape(x.shape))
            hidden = torch.nn.functional.gelu(block["mlp"]["c_fc"](block["ln_2"](x)))
            x = x + block["mlp"]["c_proj"](hidden)
        return self.lm_head(parts["ln_f"](x))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("compiled", [True, False])
def test_nanogpts_checkpoint_converts_to_the_same_model(bias, compiled, tmp_path):
    torch.manual_seed(0)
    sizes = {"vocab_size": 23, "block_size": 8, "n_layer": 2, "n_head": 3, "n_embd": 12, "bias": bias}
    model = NanoGPT(**sizes)
    held = {("_orig_mod." if compiled else "") + name: tensor for name, tensor in model.state_dict().items()}
    content = {"model": held, "model_args": {**sizes, "dropout": 0.0}, "iter_num": 5, "config": {"x": "y"}}
    torch.save({**content, "best_val_loss": torch.tensor(1.5), "optimizer": {}}, tmp_path / "ckpt.pt")
    convert_pickle(tmp_path)
    opened = open_checkpoint(tmp_path)
    ids = [3, 1, 4, 1, 5]
    with torch.inference_mode():
        want = model(torch.tensor(ids)).numpy()
    np.testing.assert_allclose(reference_logits(opened.weights, ids), want, rtol=0, atol=1e-5)
    assert (opened.config.eos_token_ids, opened.config.activation_function) == ((), "gelu")
    with pytest.raises(CheckpointError, match=r"already holds model\.safetensors"):
        convert_pickle(tmp_path)


def test_lightnings_checkpoint_converts_without_its_prefix(tmp_path):
    tensors = {f"model.{name}": tensor for name, tensor in torch_tensors().items()}
    tensors["model.transformer.h.0.attn.bias"] = torch.tril(torch.ones(1, 1, 8, 8, dtype=torch.bool))
    content = {"state_dict": tensors, "epoch": 3, "pytorch-lightning_version": "2.5", "loops": {"a": [1]}}
    write_pickle(tmp_path, content, "epoch=3.ckpt")
    convert_pickle(tmp_path)
    assert SafetensorsFile(tmp_path / "model.safetensors").entries.keys() == torch_tensors().keys()
    open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("tf_model.h5", "weights of TensorFlow; load them with transformers 4 (from_tf=True)"),
        ("flax_model.msgpack", "weights of Flax; load them with transformers 4 (from_flax=True)"),
        ("model.ckpt.index", "convert_gpt2_original_tf_checkpoint"),
        ("model.onnx", "take the checkpoint that it was exported from"),
        ("gpt2.Q8_0.gguf", "gpt2.Q8_0.gguf`"),
    ],
)
def test_other_formats_are_named_with_their_remedy(name, remedy, tmp_path):
    write_config(tmp_path)
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(UnsupportedCheckpointError) as error:
        open_checkpoint(tmp_path)
    assert f"{tmp_path} holds no model.safetensors but {name}, " in str(error.value)
    assert remedy in str(error.value)
