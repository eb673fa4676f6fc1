"""`gpt2core score`, `info`, `backends` and `convert`: what they print and refuse."""

import dataclasses
import json
import math
from pathlib import Path

import pytest
from commands import PROMPT, strict_json

from gpt2core import GPT2, ModelConfig
from gpt2core.checkpoint import open as checkpoint
from gpt2core.cli import console
from gpt2core.testing import random_checkpoint

TEXT = "It was the best of times, it was the worst of times. " * 5  # more than the tiny model's context


@pytest.mark.parametrize("text", ["Once upon a time", TEXT], ids=["short", "longer than the context"])
def test_score_prints_what_the_library_computes(run, folder, model, tmp_path, text):
    file = tmp_path / "text.txt"
    file.write_text(text)
    want = model.score(text)
    result = run("score", str(file), "--model", folder, "--json")
    assert (result.code, result.err) == (0, "")
    assert strict_json(result.out) == {
        "tokens": len(text),
        "perplexity": pytest.approx(want.perplexity),
        "bits_per_byte": pytest.approx(want.bits_per_byte),
        "mean_logprob": pytest.approx(-math.log(want.perplexity)),
        "model": folder,
        "backend": "numpy",
    }
    shown = dict(line.rsplit(None, 1) for line in run("score", str(file), "--model", folder).out.splitlines())
    assert shown == {
        "tokens": str(len(text)),
        "perplexity": f"{want.perplexity:.4f}",
        "bits per byte": f"{want.bits_per_byte:.4f}",
        "mean logprob": f"{-math.log(want.perplexity):.4f}",
    }


def test_score_lists_tokens_on_request(run, folder, model):
    want = model.score("Öl!")
    document = strict_json(
        run("score", "-", "--model", folder, "--json", "--per-token", stdin="Öl!".encode()).out
    )
    assert [t["id"] for t in document["per_token"]] == want.token_ids
    assert [t["text"] for t in document["per_token"]] == ["\ufffd", "\ufffd", "l", "!"]
    assert document["per_token"][0]["logprob"] is None
    assert [t["logprob"] for t in document["per_token"][1:]] == pytest.approx(list(want.logprobs))
    lines = run("score", "-", "--model", folder, "--per-token", stdin="Öl!".encode()).out.splitlines()
    assert lines[4].split() == ["id", "logprob", "token"]
    assert lines[7].split() == [str(want.token_ids[2]), f"{want.logprobs[1]:.4f}", "'l'"]


def test_score_shows_progress_on_a_terminal(run, folder, monkeypatch, tmp_path):
    shown = []
    monkeypatch.setattr(console.Status, "update", lambda self, text, *_: shown.append(text))
    file = tmp_path / "text.txt"
    file.write_text(TEXT)
    assert run("score", str(file), "--model", folder).err == ""
    assert shown[-1] == f"scoring {file}: {len(TEXT)} of {len(TEXT)} tokens"
    assert len(shown) > 2


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("missing", None, "does not exist"),
        (".", None, "is a directory"),
        ("latin1", b"caf\xe9", "latin1 is not UTF-8: byte 0xe9 at offset 3"),
        ("short", b"x", "a score needs at least 2"),
        ("empty", b"", "empty"),
    ],
)
def test_score_refuses_what_cannot_be_scored(run, folder, tmp_path, file, content, message):
    if content is not None:
        (tmp_path / file).write_bytes(content)
    result = run("score", str(tmp_path / file), "--model", folder)
    assert result.code == 2
    assert message in result.error()


# info, backends, convert


def test_info_json_describes_the_checkpoint(run, folder, model):
    document = strict_json(run("info", folder, "--json").out)
    config = model.config
    assert document == {
        "model": folder,
        "folder": folder,
        "base": folder,
        "adapter": None,
        "unread_fields": {},
        "precision": "float32",
        "group_size": None,
        "backends": ["numpy", "native", "torch", "jax", "onnx"],
        "config": json.loads(json.dumps(dataclasses.asdict(config))),
        "parameters": config.parameters,
        "float32_nbytes": 4 * config.parameters,
        "cache_nbytes_per_sequence": config.cache_nbytes(1, config.n_positions),
        "tokenizer": {"vocab_size": 257, "special_ids": [0]},
        "files": {path.name: path.stat().st_size for path in Path(folder).iterdir()},
    }


def test_info_prints_what_a_person_asks(run, tmp_path):
    folder = str(random_checkpoint(tmp_path, tie_word_embeddings=False, n_inner=48, eos_token_ids=(0, 7)))
    result = run("info", folder)
    assert (result.code, result.err) == (0, "")
    lines = {line[:33].strip(): line[33:].strip() for line in result.out.splitlines()}
    assert lines["tied head"] == "no"
    assert lines["n_inner"] == "48"
    assert lines["eos_token_ids"] == "0, 7"
    assert lines["scale_attn_weights"] == "yes"
    assert lines["KV cache"] == "73.7 kB per sequence of 96 tokens, float32"
    assert lines["model.safetensors"].endswith("kB")


def test_backends_lists_engines_and_what_auto_takes(run, folder, monkeypatch):
    monkeypatch.setattr(checkpoint, "DEMO", Path(folder))
    monkeypatch.delenv("GPT2CORE_BACKEND", raising=False)
    document = strict_json(run("backends", "--json").out)
    found = {one["name"]: one for one in document["backends"]}
    assert found["numpy"]["available"]
    assert found["torch"]["available"]
    assert document["auto"]["demo"]["backend"] == "numpy"
    assert document["auto"]["openai-community/gpt2"]["backend"] == "native"
    assert all(choice["why"] for choice in document["auto"].values())
    text = run("backends").out
    assert f"torch    {found['torch']['version']}" in text
    assert "openai-community/gpt2  native" in text


def test_backends_tells_the_remedy_for_what_is_missing(run, folder, monkeypatch):
    monkeypatch.setattr(checkpoint, "DEMO", Path(folder))
    monkeypatch.setenv("GPT2CORE_CC", "no-such-compiler")
    monkeypatch.setattr("gpt2core.backends.find_spec", lambda name: object() if name == "numpy" else None)
    result = run("backends")
    assert "pip install 'gpt2core[torch]'" in result.out
    assert "native   -        needs a C compiler, and GPT2CORE_CC names 'no-such-compiler'" in result.out
    assert "openai-community/gpt2  numpy" in result.out


def test_backends_works_without_the_demo_model(run, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "DEMO", tmp_path / "nowhere")
    monkeypatch.delenv("GPT2CORE_BACKEND", raising=False)
    assert list(strict_json(run("backends", "--json").out)["auto"]) == ["openai-community/gpt2"]
    assert "openai-community/gpt2  native" in run("backends").out


def test_an_unknown_backend_in_the_environment_is_one_line_and_exits_4(run, folder, monkeypatch):
    monkeypatch.setenv("GPT2CORE_BACKEND", "frobnicate")
    result = run("generate", PROMPT, "--model", folder)
    assert result.code == 1
    assert "GPT2CORE_BACKEND names 'frobnicate'" in result.error()


def test_backends_lists_engines_though_the_environment_names_none_and_says_so_in_one_line(
    run, folder, monkeypatch
):
    monkeypatch.setattr(checkpoint, "DEMO", Path(folder))
    monkeypatch.setenv("GPT2CORE_BACKEND", "frob\nnicate")
    result = run("backends")
    assert (result.code, result.err) == (0, "")
    lines = result.out.splitlines()
    assert [line.split()[0] for line in lines[:6]] == ["backend", "numpy", "native", "torch", "jax", "onnx"]
    [line] = [line for line in lines if "GPT2CORE_BACKEND" in line]
    assert line == lines[-1]
    assert line.startswith(
        r"auto has no choice: GPT2CORE_BACKEND names 'frob\nnicate', which does not exist;"
    )
    assert line.endswith("unset the variable")
    document = strict_json(run("backends", "--json").out)
    assert {one["name"] for one in document["backends"]} >= {"numpy", "native", "torch", "jax", "onnx"}
    assert set(document["auto"]) == {"demo", "openai-community/gpt2"}
    for choice in document["auto"].values():
        assert choice["backend"] is None
        assert "GPT2CORE_BACKEND names" in choice["why"]


def test_convert_writes_safetensors_that_generate_the_same(run, folder, tmp_path):
    import torch

    with GPT2.from_pretrained(folder) as model:
        want = model.generate(PROMPT, max_new_tokens=8).text
        tensors = {
            name: torch.from_numpy(array.copy())
            for name, array in checkpoint.open_checkpoint(folder).weights.named()
        }
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / name).write_bytes((Path(folder) / name).read_bytes())
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    assert run("convert", str(tmp_path)) == (0, f"{tmp_path}/model.safetensors\n", "")
    with GPT2.from_pretrained(tmp_path) as model:
        assert model.generate(PROMPT, max_new_tokens=8).text == want
    again = run("convert", str(tmp_path))
    assert again.code == 1
    assert "--force" in again.error()
    assert run("convert", str(tmp_path), "--force").code == 0
    elsewhere = tmp_path / "new"
    assert run("convert", str(tmp_path), "--output", str(elsewhere)).out == f"{elsewhere}/model.safetensors\n"


def test_convert_refuses_a_folder_without_pickles(run, folder, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(ModelConfig().to_dict()))
    result = run("convert", str(tmp_path))
    assert result.code == 1
    assert "no pickled weights" in result.error()
    assert "does not exist" in run("convert", str(tmp_path / "missing")).error()
