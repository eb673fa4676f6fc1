"""Where the time goes, measured on a tiny model, and what is done with the answer."""

import json

import pytest
from click.testing import CliRunner

from gpt2core.bench import ClassicSettings, components, run_classic
from gpt2core.bench.components import METHOD, breakdown_tables, measure_components
from gpt2core.bench.report.analysis import measure_folder
from gpt2core.cli import main
from gpt2core.cli.bench import bench
from gpt2core.errors import RequestError
from gpt2core.testing import random_checkpoint

NAMES = ["attention", "MLP", "head", "rest of the pass", "sampling and engine", "tokenizer"]


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(components, "_LEAST_S", 0.0)
    monkeypatch.setattr(components, "_STEPS", 4)


@pytest.mark.usefixtures("quick")
def test_each_backend_has_a_time_for_each_component_and_phase(tmp_path):
    model = random_checkpoint(tmp_path / "model")
    told = []
    names = ["numpy", "onnx"]  # the others in benchmarks: they take seconds to compile
    measured = measure_components(
        model, backends=names, position=8, prefill_tokens=8, rounds=2, on_progress=told.append
    )
    assert told == names
    assert measured["skipped"] == {}
    assert [(line["backend"], line["phase"]) for line in measured["lines"]] == [
        (name, phase) for name in names for phase in ("decode", "prefill")
    ]
    assert all(list(line["seconds"]) == NAMES for line in measured["lines"])
    assert all(line["seconds"]["sampling and engine"]["mid"] > 0 for line in measured["lines"])
    assert measured["method"] == METHOD
    for line in measured["lines"]:
        assert line["total_s"] == pytest.approx(sum(max(s["mid"], 0) for s in line["seconds"].values()))


@pytest.mark.parametrize("cut", ["plain", "separate_head", "one_layer"])
@pytest.mark.usefixtures("quick")
def test_a_model_of_every_shape_can_be_cut(tmp_path, cut):
    fields = {"separate_head": {"tie_word_embeddings": False}, "one_layer": {"n_layer": 1}}.get(cut, {})
    model = random_checkpoint(tmp_path, **fields)
    measured = measure_components(model, backends=["numpy"], position=4, prefill_tokens=4, rounds=1)
    assert len(measured["lines"]) == 2


@pytest.mark.usefixtures("quick")
def test_a_quantized_folder_is_measured_in_its_own_precision(tmp_path):
    folder = random_checkpoint(tmp_path / "float32")
    assert main(["quantize", str(folder), str(tmp_path / "int8"), "--precision", "int8"]) == 0
    measured = measure_components(
        tmp_path / "int8", backends=["numpy"], position=4, prefill_tokens=4, rounds=1
    )
    assert {line["precision"] for line in measured["lines"]} == {"int8"}


def test_a_large_vocabulary_costs_head_and_a_wide_mlp_costs_mlp(tmp_path, monkeypatch):
    """Each part is made so large that it must take most of the time, whatever the machine does meanwhile.

    On ONNX Runtime: NumPy's functions check their shapes under pytest, which costs as much as small layers.
    """
    monkeypatch.setattr(components, "_STEPS", 4)
    shapes = {"head": {"vocab_size": 20000, "n_embd": 64}, "MLP": {"n_inner": 20000, "n_embd": 64}}
    for part, fields in shapes.items():
        model = random_checkpoint(tmp_path / part, **fields)
        measured = measure_components(
            model, backends=["onnx"], threads=1, position=4, prefill_tokens=4, rounds=5
        )
        decode = measured["lines"][0]["seconds"]
        passes = {name: decode[name]["mid"] for name in ("attention", "MLP", "head")}
        assert max(passes, key=passes.get) == part


def test_a_backend_that_is_not_there_is_listed_with_its_reason(tmp_path):
    measured = measure_components("demo", backends=["tensorflow"], rounds=1)
    assert measured["lines"] == []
    assert "there is no backend 'tensorflow'" in measured["skipped"]["tensorflow"]


@pytest.mark.parametrize("limit", ["position", "prefill_tokens"])
def test_more_tokens_than_the_context_are_refused(tmp_path, limit):
    model = random_checkpoint(tmp_path)
    with pytest.raises(RequestError, match=f"{limit} is 96; it must be at least 1 and below the context"):
        measure_components(model, **{limit: 96})


LINE = {
    "backend": "numpy", "phase": "prefill", "total_s": 0.003,
    "seconds": {"attention": {"low": 0.0, "mid": 0.001, "high": 0.002}, "MLP": {"mid": 2e-3}},
}  # fmt: skip


def test_the_table_shows_decoding_first_and_the_bars_hold_seconds():
    document = {"lines": [LINE, {**LINE, "phase": "decode"}], "method": "by cutting"}
    (shown,) = breakdown_tables(document)
    assert shown.columns == ("backend, phase", "attention", "MLP", "all")
    assert shown.rows[0] == ("numpy, decode (ms)", "1.00", "2.00", "3.00")
    assert "by cutting" in shown.text()


def test_a_broken_components_file_is_refused():
    with pytest.raises(RequestError, match=r"components.json is not what it should be"):
        breakdown_tables({"lines": [{"phase": "decode"}]})


@pytest.mark.usefixtures("quick")
def test_the_command_measures_the_benchmarks_own_model_and_backends_and_draws_them(tmp_path):
    model, folder = random_checkpoint(tmp_path / "model", n_positions=128), tmp_path / "out"
    settings = ClassicSettings(model=str(model), backend="numpy", prompts=("a b",), lengths=(6, 8), runs=1)
    run_classic(settings, output=folder, report=False)
    result = CliRunner().invoke(bench, ["analyse", str(folder), "--components"])
    assert result.exit_code == 0, result.output
    assert "Time by component" in result.output
    assert "numpy, decode" in result.output
    assert (folder / "gpt2_components.png").stat().st_size > 1000
    assert "Time by component" in (folder / "report.html").read_text()


def test_the_parts_of_a_server_cannot_be_seen(tmp_path):
    line = {"kind": "classic", "cell": [0, 8, 0], "prompt": "a", "length": 8, "run": 0, "status": "failed"}
    (tmp_path / "runs.jsonl").write_text(json.dumps(line) + "\n")
    (tmp_path / "settings.json").write_text(json.dumps({"kind": "classic", "url": "http://127.0.0.1:1"}))
    with pytest.raises(RequestError, match=r"of the server http://127\.0\.0\.1:1; its parts cannot be seen"):
        measure_folder(tmp_path)
