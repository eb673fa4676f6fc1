"""Exported ONNX models, run by plain onnxruntime and the script that lies beside them."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

from gpt2core import GPT2, export_onnx
from gpt2core.backends.export import FORMS
from gpt2core.backends.onnx import export, run_exported
from gpt2core.checkpoint.open import open_checkpoint
from gpt2core.cli import main
from gpt2core.errors import BackendError, CheckpointError, RequestError
from gpt2core.reference import reference_logits
from gpt2core.testing import VARIANTS, random_checkpoint
from gpt2core.testing.conformance import TOLERANCE
from gpt2core.testing.random_model import random_config, random_weights

OURS = ["config.json", "generate.py", "model.onnx", "model.onnx.data", "tokenizer.json"]


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def checkpoint(tmp_path):
    return random_checkpoint(tmp_path / "checkpoint")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_gives_the_references_logits_in_prefill_and_decode(form, variant, tmp_path):
    weights = random_weights(random_config(**VARIANTS[variant]))
    export.write_model(weights, tmp_path, form=form)
    onnx.checker.check_model(str(tmp_path / "model.onnx"), full_check=True)
    tokens = np.random.default_rng(1).integers(0, weights.config.vocab_size, 24).tolist()
    model = run_exported.Model(tmp_path)
    got = [
        model.step(tokens[:15], every=True),
        model.step(tokens[15:20], every=True),
        *(model.step([token]) for token in tokens[20:]),
    ]
    want = reference_logits(weights, tokens)
    np.testing.assert_allclose(np.concatenate(got), want, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_portable_form_has_only_standard_operators(variant, tmp_path):
    export.write_model(random_weights(random_config(**VARIANTS[variant])), tmp_path, form="portable")
    model = onnx.load(tmp_path / "model.onnx", load_external_data=False)
    assert {node.domain for node in model.graph.node} == {""}
    assert [(opset.domain, opset.version) for opset in model.opset_import] == [("", 21)]


def test_the_portable_form_computes_the_same_in_onnxs_own_evaluator(tmp_path):
    from onnx.reference import ReferenceEvaluator

    weights = random_weights(random_config())
    export.write_model(weights, tmp_path, form="portable")
    session = ReferenceEvaluator(str(tmp_path / "model.onnx"))
    empty = np.zeros((1, 4, 0, 8), np.float32)
    past = {f"past_{kind}_{i}": empty for i in range(3) for kind in ("key", "value")}
    first = {"input_ids": np.array([[5, 6, 7]]), "logits_at": np.array([2])}
    logits, *present = session.run(None, first | past)
    past = dict(zip(past, present, strict=True))
    (after, *_) = session.run(None, {"input_ids": np.array([[8]]), "logits_at": np.array([0])} | past)
    want = reference_logits(weights, [5, 6, 7, 8])[2:]
    np.testing.assert_allclose(np.concatenate([logits, after]), want, rtol=0, atol=TOLERANCE)


def test_rows_of_the_fast_form_decode_from_lengths_of_their_own(tmp_path):
    weights = random_weights(random_config())
    export.write_model(weights, tmp_path, form="fast")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    zeros = np.zeros((2, 4, 8, 8), np.float32)
    past = {f"past_{kind}_{i}": zeros for i in range(3) for kind in ("key", "value")}
    prompts = {  # the second is padded on the right
        "input_ids": np.array([[1, 2, 3, 4], [5, 6, 6, 6]]),
        "past_length": np.array([0, 0]),
        "logits_at": np.array([3, 5]),
    }
    first, *present = session.run(None, prompts | past)
    past = dict(zip(past, present, strict=True))
    ones = {
        "input_ids": np.array([[9], [8]]), "past_length": np.array([4, 2]), "logits_at": np.array([0, 1])
    }  # fmt: skip
    second, *_ = session.run(None, ones | past)
    histories = ([1, 2, 3, 4], [5, 6], [1, 2, 3, 4, 9], [5, 6, 8])
    want = [reference_logits(weights, history)[-1] for history in histories]
    np.testing.assert_allclose(np.concatenate([first, second]), want, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("form", FORMS)
def test_a_tied_head_is_stored_once(form, tmp_path):
    weights = random_weights(random_config())
    export.write_model(weights, tmp_path, form=form)
    model = onnx.load(tmp_path / "model.onnx", load_external_data=False)
    stored = {t.name: {e.key: e.value for e in t.external_data} for t in model.graph.initializer}
    located = {name: where for name, where in stored.items() if where}
    assert set(located) == {name for name, _ in weights.named()}
    assert sum(int(where["length"]) for where in located.values()) == weights.nbytes
    assert {where["location"] for where in located.values()} == {"model.onnx.data"}


@pytest.mark.parametrize("form", FORMS)
def test_the_script_beside_the_demo_writes_what_gpt2core_writes(form, tmp_path):
    folder = export_onnx("demo", tmp_path / "out", form=form)
    assert folder == tmp_path / "out"
    command = [sys.executable, folder / "generate.py", "Once upon a time", "12"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=True)
    with GPT2.from_pretrained("demo", backend="numpy") as model:
        want = model.generate("Once upon a time", max_new_tokens=12, temperature=0)
    assert result.stdout == f"Once upon a time{want.text}\n"


def test_the_script_stops_where_the_context_ends(tmp_path, capsys, monkeypatch):
    folder = export_onnx(random_checkpoint(tmp_path / "c", n_positions=6), tmp_path / "out")
    monkeypatch.setattr(run_exported, "__file__", str(folder / "generate.py"))
    run_exported.main("abcd", 50)
    with GPT2.from_pretrained(tmp_path / "c", backend="numpy") as model:
        want = model.generate("abcd", max_new_tokens=2, temperature=0)
    assert capsys.readouterr().out == f"abcd{want.text}\n"


def test_the_script_needs_nothing_of_gpt2core():
    source = Path(run_exported.__file__).read_text()
    assert "import gpt2core" not in source
    assert "from gpt2core" not in source


def test_an_existing_folder_is_kept_unless_forced(checkpoint, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    export_onnx(checkpoint, out)  # empty: nothing to lose
    assert names(out) == OURS
    before = (out / "model.onnx").read_bytes()
    with pytest.raises(CheckpointError, match=r"out is not empty; .* force=True to replace it"):
        export_onnx(checkpoint, out, form="portable")
    assert (out / "model.onnx").read_bytes() == before
    export_onnx(checkpoint, out, form="portable", force=True)
    assert (out / "model.onnx").read_bytes() != before
    assert names(tmp_path) == ["checkpoint", "out"]


def test_what_no_export_wrote_is_never_replaced(checkpoint, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "diary.txt").write_text("mine")
    with pytest.raises(CheckpointError, match=r"holds 'diary.txt', which is no part of an export"):
        export_onnx(checkpoint, out, force=True)
    with pytest.raises(CheckpointError, match="is a file; name a folder"):
        export_onnx(checkpoint, out / "diary.txt", force=True)
    assert names(out) == ["diary.txt"]


def test_an_export_that_computes_something_else_leaves_nothing(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "reference_logits", lambda *a: reference_logits(*a) + 1)
    with pytest.raises(BackendError, match=r"logits differ from the reference by 1.*, allowed is 0\.0"):
        export_onnx(checkpoint, tmp_path / "out")
    assert names(tmp_path) == ["checkpoint"]


def test_an_export_that_does_not_run_is_a_backend_error(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "cache_values", lambda *a: [])
    with pytest.raises(BackendError, match="the exported model does not run"):
        export_onnx(checkpoint, tmp_path / "out")
    assert names(tmp_path) == ["checkpoint"]


def test_a_folder_that_cannot_be_made_is_a_typed_error(checkpoint, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="out cannot be written: "):
        export_onnx(checkpoint, tmp_path / "file" / "out")


def test_an_unknown_form_is_refused(checkpoint, tmp_path):
    with pytest.raises(RequestError, match="form is 'quick'; use 'fast' or 'portable'"):
        export_onnx(checkpoint, tmp_path / "out", form="quick")


def test_a_tokenizer_in_the_old_form_is_written_in_the_new_one_too(checkpoint, tmp_path):
    vocab = json.loads((checkpoint / "tokenizer.json").read_text())["model"]["vocab"]
    (checkpoint / "tokenizer.json").unlink()
    (checkpoint / "vocab.json").write_text(json.dumps(vocab))
    (checkpoint / "merges.txt").write_text("#version: 0.2\n")
    out = export_onnx(checkpoint, tmp_path / "out")
    assert names(out) == sorted([*OURS, "vocab.json", "merges.txt"])


def test_the_command_says_where_and_refuses_in_one_line(checkpoint, tmp_path, capsys):
    out = tmp_path / "out"
    arguments = ["export", str(out), "--model", str(checkpoint), "--form", "portable"]
    assert main(arguments) == 0
    assert capsys.readouterr().out == f"{out}\n"
    assert main(arguments) == 1
    refusal = f"{out} is not empty; name another folder, or pass --force to replace it"
    assert capsys.readouterr().err == f"gpt2core: error: {refusal}\n"
    assert main([*arguments, "--force"]) == 0


def test_the_snippet_of_the_documentation_runs_beside_an_export(tmp_path):
    page = (Path(__file__).parent.parent / "docs/onnx.md").read_text()
    (snippet,) = (
        part for part in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "import Model" in part
    )
    export_onnx("demo", tmp_path / "story-model", form="portable")
    (tmp_path / "snippet.py").write_text(snippet + "print(model.length)\n")
    command = [sys.executable, "snippet.py"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=True)
    vocabulary = open_checkpoint("demo").config.vocab_size
    assert result.stdout == f"(1, {vocabulary})\n13\n"
