"""Models from the hub, played by a local server: cache, revisions, tokens, offline mode, ways to fail."""

import io
import json
import os
import subprocess
import sys
import time
from dataclasses import replace

import huggingface_hub
import numpy as np
import pytest
import torch
from checkpoint_files import TINY, file_bytes, layout, random_tensors
from fake_hub import FakeHub, Repository
from huggingface_hub import constants

from gpt2core.checkpoint import hub
from gpt2core.checkpoint.open import Source, open_checkpoint, resolve
from gpt2core.cli import main
from gpt2core.errors import CheckpointError, UnsupportedCheckpointError


def model_files(seed=0, **extra):
    tensors = random_tensors(seed=seed)
    return {
        "config.json": json.dumps(TINY.to_dict()).encode(),
        "generation_config.json": b'{"eos_token_id": 5}',
        "tokenizer.json": b"{}",
        "model.safetensors": file_bytes(*layout(tensors)),
        **extra,
    }


def weights_of(seed):
    return random_tensors(seed=seed)["transformer.wte.weight"]


@pytest.fixture
def server(monkeypatch, tmp_path):
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    with FakeHub({"owner/tiny": Repository({"main": model_files(0)})}) as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "AGENT_HARNESSES_PATH", str(tmp_path / "agents.json"), raising=False)
        monkeypatch.delenv("HF_TOKEN", raising=False)
        yield server
    huggingface_hub.close_session()


def refusal(model="owner/tiny", kind=CheckpointError, **options):
    with pytest.raises(kind) as error:
        open_checkpoint(model, **options)
    message = str(error.value)
    assert message.isprintable()  # one line, no traceback
    return message


def test_first_load_downloads_and_the_second_needs_no_server(server):
    opened = open_checkpoint("owner/tiny", progress=False)
    np.testing.assert_array_equal(opened.weights.wte, weights_of(0))
    assert opened.source == "owner/tiny"
    assert opened.config == replace(TINY, eos_token_ids=(5,))
    assert (opened.folder / "tokenizer.json").is_file()
    asked = len(server.requests)
    again = open_checkpoint("owner/tiny")
    assert len(server.requests) == asked  # local files first
    server.stop()
    again = open_checkpoint("owner/tiny", local_files_only=True)
    assert again.folder == opened.folder
    np.testing.assert_array_equal(again.weights.wte, weights_of(0))


def test_only_the_files_that_are_needed_are_downloaded(server):
    unwanted = (
        "pytorch_model.bin", "tf_model.h5", "flax_model.msgpack", "rust_model.ot", "README.md", "model.onnx",
        "onnx/model.onnx", "onnx/config.json", "model.fp16.safetensors", "model-x-of-y.safetensors",
        "training_args.bin", "old/model.safetensors", "model-00001-of-00002.safetensors.bak", "64.tflite",
    )  # fmt: skip
    wanted = (
        "vocab.json", "merges.txt", "special_tokens_map.json", "tokenizer_config.json",
        "added_tokens.json", "model.safetensors.index.json", "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    )  # fmt: skip
    # Contents differ, since files that are equal are fetched once.
    files = model_files(0) | {name: name.encode() for name in wanted}
    everything = files | {name: name.encode() for name in unwanted}
    server.repositories["owner/tiny"] = Repository({"main": everything})
    open_checkpoint("owner/tiny")
    assert server.fetched() == sorted(files)


def test_revisions_are_pinned_and_kept_apart(server):
    server.repositories["owner/tiny"] = Repository(
        {"main": model_files(0), "v1": model_files(1), "v2": model_files(2)}
    )
    commit = server.repositories["owner/tiny"].commit("v2")
    for revision, seed in ((None, 0), ("v1", 1), (commit, 2), ("v1", 1), ("main", 0)):
        opened = open_checkpoint("owner/tiny", revision=revision)
        np.testing.assert_array_equal(opened.weights.wte, weights_of(seed))
    server.stop()
    for revision, seed in (("v1", 1), (commit, 2), (None, 0)):
        np.testing.assert_array_equal(
            open_checkpoint("owner/tiny", revision=revision).weights.wte, weights_of(seed)
        )


def test_branch_that_moves_on_stays_what_was_downloaded_until_another_cache_is_asked(server, tmp_path):
    open_checkpoint("owner/tiny")
    server.repositories["owner/tiny"] = Repository({"main": model_files(3)})
    np.testing.assert_array_equal(open_checkpoint("owner/tiny").weights.wte, weights_of(0))
    opened = open_checkpoint("owner/tiny", cache_dir=tmp_path / "other")
    np.testing.assert_array_equal(opened.weights.wte, weights_of(3))
    assert opened.folder.is_relative_to(tmp_path / "other")


def test_sharded_model_is_downloaded_whole(server):
    tensors = random_tensors(seed=4)
    shards = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    weight_map = {name: shards[i % 2] for i, name in enumerate(tensors)}
    files = model_files()
    del files["model.safetensors"]
    files["model.safetensors.index.json"] = json.dumps({"weight_map": weight_map}).encode()
    for shard in shards:
        files[shard] = file_bytes(*layout({n: t for n, t in tensors.items() if weight_map[n] == shard}))
    server.repositories["owner/tiny"] = Repository({"main": files})
    np.testing.assert_array_equal(open_checkpoint("owner/tiny").weights.wte, weights_of(4))

    lost = {name: content for name, content in files.items() if name != shards[1]}
    server.repositories["owner/lost"] = Repository({"main": lost})
    message = refusal("owner/lost")
    assert message.startswith("owner/lost lacks model-00002-of-00002.safetensors; it has config.json; ")


def test_name_without_owner_is_a_model_too(server, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    server.repositories["tiny"] = Repository({"main": model_files(6)})
    np.testing.assert_array_equal(open_checkpoint("tiny").weights.wte, weights_of(6))
    os.mkdir("tiny")
    assert str(resolve(Source("tiny"))) == "tiny"  # a folder of that name wins


# ---- no network


def test_empty_cache_without_network_says_what_to_do(server, monkeypatch):
    message = refusal(local_files_only=True)
    assert message == (
        f"owner/tiny is not in the cache {constants.HF_HUB_CACHE} (missing: config.json; "
        "model.safetensors; tokenizer.json), and local_files_only=True forbids the network; allow it once, "
        "or name a folder that holds the model"
    )
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "and HF_HUB_OFFLINE forbids the network" in refusal()
    assert "owner/tiny at revision v9 is not in the cache" in refusal(revision="v9")
    assert server.requests == []


def test_server_that_is_down_is_named_with_the_reason(server):
    server.stop()
    message = refusal()
    assert message.startswith(f"owner/tiny is no folder here and could not be downloaded from {server.url} (")
    assert "refused" in message
    assert message.endswith("check the network and try again: whole files are kept")


def test_incomplete_cache_is_completed_or_its_gaps_are_named(server):
    folder = open_checkpoint("owner/tiny").folder
    (folder / "model.safetensors").unlink()
    message = refusal(local_files_only=True)
    assert "(missing: model.safetensors), and local_files_only=True forbids" in message
    np.testing.assert_array_equal(open_checkpoint("owner/tiny").weights.wte, weights_of(0))


def test_cached_model_without_a_tokenizer_opens_when_the_server_cannot_be_asked(server, monkeypatch):
    files = model_files(0)
    del files["tokenizer.json"]
    server.repositories["owner/tiny"] = Repository({"main": files})
    np.testing.assert_array_equal(open_checkpoint("owner/tiny").weights.wte, weights_of(0))
    server.repositories["owner/tiny"] = Repository({"other": {}})  # its branch is gone
    np.testing.assert_array_equal(open_checkpoint("owner/tiny").weights.wte, weights_of(0))
    server.stop()
    np.testing.assert_array_equal(open_checkpoint("owner/tiny").weights.wte, weights_of(0))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    np.testing.assert_array_equal(open_checkpoint("owner/tiny").weights.wte, weights_of(0))


def test_snapshot_of_another_program_that_fetched_single_files_is_completed(server):
    huggingface_hub.hf_hub_download("owner/tiny", "config.json")
    huggingface_hub.hf_hub_download("owner/tiny", "model.safetensors")
    opened = open_checkpoint("owner/tiny")
    assert (opened.folder / "tokenizer.json").is_file()


# ---- refusals of the hub


def test_model_that_does_not_exist_is_explained(server):
    message = refusal("owner/gone")
    assert message.startswith(
        f"owner/gone is no folder here, and {server.url} has no such model or hides it (status 404)"
    )
    assert "check the spelling, or if it is private, pass a token" in message


def test_revision_that_does_not_exist_is_explained(server):
    message = refusal(revision="v9")
    assert (
        message
        == f"{server.url} has no owner/tiny at revision v9; give a branch, tag or commit that owner/tiny has"
    )


def test_gated_model_wants_terms_and_token_and_the_token_is_sent(server, monkeypatch):
    server.repositories["owner/gated"] = Repository({"main": model_files(7)}, gate="hf_secret")
    message = refusal("owner/gated")
    assert message.startswith(
        f"owner/gated is gated: accept its terms at {server.url}/owner/gated, then pass a token"
    )
    assert "hf_wrong" not in refusal("owner/gated", token="hf_wrong")
    server.requests.clear()
    np.testing.assert_array_equal(
        open_checkpoint("owner/gated", token="hf_secret").weights.wte, weights_of(7)
    )
    sent = {headers.get("Authorization", headers.get("authorization")) for _, _, headers in server.requests}
    assert sent == {"Bearer hf_secret"}


@pytest.mark.parametrize("status", [401, 403])
def test_denied_access_asks_for_a_token(status, server):
    server.status = status
    message = refusal()
    assert f"(status {status}); " in message
    assert "pass a token (token=..., HF_TOKEN, or `hf auth login`)" in message


def test_broken_server_is_a_typed_error(server, monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # huggingface_hub tries again after seconds
    server.status = 500
    message = refusal()
    assert f"could not be downloaded from {server.url} (" in message
    assert "500" in message


def test_model_that_has_only_pickles_is_refused_with_the_remedy(server):
    files = model_files()
    del files["model.safetensors"]
    server.repositories["owner/old"] = Repository(
        {"main": {**files, "pytorch_model.bin": b"cposix\nsystem\n"}}
    )
    message = refusal("owner/old", UnsupportedCheckpointError)
    assert message == (
        "owner/old has only pickled weights (pytorch_model.bin), which can run code when they are read; if "
        "you trust them, run `gpt2core convert owner/old` and name the folder that it makes"
    )
    assert "pytorch_model.bin" not in server.fetched()


def pickled_files():
    content = io.BytesIO()
    torch.save({name: torch.from_numpy(array) for name, array in random_tensors().items()}, content)
    files = model_files()
    del files["model.safetensors"]
    return {**files, "pytorch_model.bin": content.getvalue()}


def test_pickle_in_the_cache_is_named_at_once_even_where_the_hub_cannot_be_reached(server, monkeypatch):
    server.repositories["owner/old"] = Repository({"main": pickled_files()})
    huggingface_hub.snapshot_download("owner/old")
    asked = len(server.requests)
    want = refusal("owner/old", UnsupportedCheckpointError)
    assert len(server.requests) == asked + 1
    server.stop()
    monkeypatch.setattr(time, "sleep", lambda _: pytest.fail("it waits to try again"))
    assert refusal("owner/old", UnsupportedCheckpointError) == want
    assert refusal("owner/old", UnsupportedCheckpointError, local_files_only=True) == want
    assert "`gpt2core convert owner/old`" in want


def test_weights_that_the_hub_gained_since_the_pickle_was_cached_are_downloaded(server):
    server.repositories["owner/old"] = Repository({"main": pickled_files()})
    huggingface_hub.snapshot_download("owner/old")
    server.repositories["owner/old"] = Repository({"main": model_files(3)})
    np.testing.assert_array_equal(open_checkpoint("owner/old").weights.wte, weights_of(3))


def test_convert_takes_a_hub_id_and_writes_a_folder_of_its_name(server, tmp_path, monkeypatch, capsys):
    server.repositories["owner/old"] = Repository({"main": pickled_files()})
    monkeypatch.chdir(tmp_path)
    assert main(["convert", "owner/old"]) == 0
    assert capsys.readouterr().out == "old/model.safetensors\n"
    np.testing.assert_array_equal(open_checkpoint("./old").weights.wte, weights_of(0))
    assert main(["convert", "owner/none"]) == 1
    assert "no such model" in capsys.readouterr().err


def test_repository_that_is_no_model_says_what_it_has(server, monkeypatch):
    server.repositories["owner/text"] = Repository({"main": {"README.md": b"x", "config.json": b"{}"}})
    assert refusal("owner/text") == (
        "owner/text lacks model.safetensors; tokenizer.json; it has README.md; config.json"
    )

    def broken(*args, **options):
        raise ConnectionError("gone")

    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", broken)
    message = refusal("owner/text")
    assert message.startswith(
        "owner/text lacks model.safetensors; tokenizer.json (what it has was downloaded to "
    )


# ---- interruptions


def test_transfer_that_keeps_being_cut_is_an_error_and_a_later_try_succeeds(server, monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    server.cuts = {"model.safetensors": [0] * 100}
    message = refusal()
    assert f"owner/tiny is no folder here and could not be downloaded from {server.url} (" in message
    assert message.endswith("check the network and try again: whole files are kept")
    assert "(missing: model.safetensors)" in refusal(local_files_only=True)
    server.cuts = {}
    server.requests.clear()
    np.testing.assert_array_equal(open_checkpoint("owner/tiny").weights.wte, weights_of(0))
    assert "config.json" not in server.fetched()  # what was whole is not fetched again


def test_transfer_that_is_cut_now_and_then_is_resumed(server, monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    server.cuts = {"model.safetensors": [5000, 100, 0]}
    np.testing.assert_array_equal(open_checkpoint("owner/tiny").weights.wte, weights_of(0))
    assert server.fetched().count("model.safetensors") == 4


# ---- the environment, in a process of its own

SCRIPT = """
import sys
from gpt2core.checkpoint.open import open_checkpoint
from gpt2core.errors import CheckpointError
try:
    print(open_checkpoint("owner/tiny", progress=sys.argv[1] == "progress").weights.wte.sum().item())
except CheckpointError as error:
    print("refused:", error)
"""


def test_environment_of_huggingface_hub_holds_and_progress_goes_to_stderr(server, tmp_path):
    server.repositories["owner/tiny"].gate = "hf_env"
    environment = {
        "PATH": os.environ["PATH"],
        "PYTHONPATH": os.pathsep.join(sys.path),
        "HF_ENDPOINT": server.url,
        "HF_HOME": str(tmp_path / "home"),
        "HF_TOKEN": "hf_env",
    }

    def run(progress="", **more):
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT, progress],
            capture_output=True,
            text=True,
            env=environment | more,
            check=True,
        )
        return done.stdout, done.stderr

    total = f"{weights_of(0).sum().item()}\n"
    out, err = run(HF_HUB_OFFLINE="1")
    assert out.startswith("refused: owner/tiny is not in the cache")
    assert "HF_HUB_OFFLINE forbids the network" in out
    assert server.requests == []
    assert run(HF_TOKEN="hf_wrong")[0].startswith("refused: owner/tiny is gated: ")
    out, err = run("progress")
    assert out == total
    assert "config.json" in err or "Fetching" in err
    assert (tmp_path / "home" / "hub" / "models--owner--tiny").is_dir()
    out, err = run(HF_HOME=str(tmp_path / "quiet"))
    assert out == total
    assert "Fetching" not in err
    assert "%" not in err
    server.stop()
    assert run(HF_HUB_OFFLINE="1") == (total, "")
    assert run() == (total, "")


@pytest.mark.parametrize(
    ("text", "valid"),
    [
        ("gpt2", True), ("openai-community/gpt2", True), ("a/b.c_d-e", True), ("x" * 96, True), ("_/_", True),
        ("", False), ("a/b/c", False), ("/a", False), ("a/", False), ("a--b", False), ("a..b", False),
        ("x" * 97, False), (".a", False), ("a-", False), ("a.git", False), ("a b", False), ("é", False),
    ],
)  # fmt: skip
def test_form_of_a_hub_id_is_that_of_huggingface_hub(text, valid):
    assert hub.is_hub_id(text) == valid
    if text != "":
        try:
            huggingface_hub.utils.validate_repo_id(text)
        except huggingface_hub.errors.HFValidationError:
            accepted = False
        else:
            accepted = True
        assert accepted == valid
