"""The classic benchmark: what is measured, in which order, what is recorded, and what is refused."""

import inspect
import itertools
import json
import statistics
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
from bench_faults import failing

from gpt2core import GPT2, bench
from gpt2core.bench import BenchmarkError, ClassicSettings, run_classic
from gpt2core.bench.compare.plan import Comparison
from gpt2core.bench.compare.recommend import recommend
from gpt2core.bench.errors import ServerError
from gpt2core.bench.store import read_log
from gpt2core.bench.sweep import model_target as targets
from gpt2core.bench.sweep.model_target import measure_with_retries
from gpt2core.bench.sweep.summary import summarize
from gpt2core.bench.sweep.workload import DEFAULT_PROMPTS, WARM_UP, Trial
from gpt2core.cli import main
from gpt2core.cli.bench import bench as bench_command
from gpt2core.errors import ContextLengthError, Gpt2CoreError, RequestError
from gpt2core.testing import random_checkpoint

PROMPTS, LENGTHS, RUNS = ("One", "Two more", "3"), (12, 20), 2
SCHEMA = {
    "kind": str, "cell": list, "prompt": str, "length": int, "run": int, "status": str, "error": None,
    "elapsed_s": float, "ttft_s": float, "token_times_s": list, "prompt_tokens": int,
    "completion_tokens": int, "finish_reason": str, "text": str, "attempts": int, "seed": int,
    "backend": str, "precision": str, "model": str, "url": None, "environment": str, "started_at": str,
    "others_cores": (float, type(None)), "steal_share": (float, type(None)),
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(random_checkpoint(tmp_path_factory.mktemp("tiny")))


@pytest.fixture
def settings(folder):
    return ClassicSettings(
        model=folder, backend="numpy", prompts=PROMPTS, lengths=LENGTHS, runs=RUNS, seed=7, backoff_s=0.0
    )


@pytest.fixture
def reports(monkeypatch):
    """The folders that a report was asked for, instead of reports."""
    asked: list[Path] = []
    module = types.ModuleType("gpt2core.bench.report.page")
    module.write_report = asked.append
    monkeypatch.setitem(sys.modules, "gpt2core.bench.report.page", module)
    return asked


@pytest.fixture
def run(capfd, monkeypatch, folder):
    """Run `gpt2core bench` on the tiny model in this process."""

    def run(*args: str, model: str | None = folder) -> tuple[int, str, str]:
        given = ("--model", model, "--backend", "numpy") if model else ()
        code = main(["bench", *given, *args])
        out, err = capfd.readouterr()
        return code, out, err

    return run


# What is measured


def test_every_cell_is_recorded_once_as_the_schema_says(settings, tmp_path, reports):
    result = run_classic(settings, output=tmp_path / "out")
    records = read_log(tmp_path / "out" / "runs.jsonl")
    assert records == result.records
    cells = [tuple(record["cell"]) for record in records]
    assert sorted(cells) == sorted((p, n, r) for p in range(3) for n in LENGTHS for r in (-1, 0, 1))
    for record in records:
        wrong = {k: v for k, v in record.items() if not isinstance(v, SCHEMA[k] or type(None))}
        assert wrong == {}
        assert {*record} == {*SCHEMA}
        prompt, length, number = record["cell"]
        assert (record["prompt"], record["length"], record["run"]) == (PROMPTS[prompt], length, number)
        assert record["prompt_tokens"] == len(PROMPTS[prompt])  # one token per byte
        assert record["prompt_tokens"] + record["completion_tokens"] == length
        times_s = record["token_times_s"]
        assert len(times_s) == record["completion_tokens"]
        assert times_s == sorted(times_s)
        assert 0 < record["ttft_s"] == times_s[0] <= times_s[-1] <= record["elapsed_s"]
        assert (record["status"], record["attempts"], record["finish_reason"]) == ("ok", 1, "length")
        assert record["environment"] == result.environment["id"]
        assert record["started_at"].endswith("+00:00")
    assert reports == [tmp_path / "out"]


def test_the_texts_are_those_of_the_seeds_and_an_end_token_does_not_shorten_them(settings, tmp_path, folder):
    records = run_classic(settings, output=tmp_path / "out", report=False).records
    with GPT2.from_pretrained(folder, backend="numpy") as model:
        for record in records:
            assert record["seed"] == 7 + max(record["run"], 0)
            want = model.generate(
                record["prompt"],
                max_length=record["length"],
                min_new_tokens=record["completion_tokens"],
                temperature=0.8,
                seed=record["seed"],
            )
            assert record["text"] == want.text


def test_runs_are_interleaved_and_begin_with_the_warm_up(settings):
    cells = settings.trials()
    assert [cell.run for cell in cells] == [-1] * 6 + [0] * 6 + [1] * 6
    rounds = [[cell[:2] for cell in cells[i : i + 6]] for i in (0, 6, 12)]
    assert sorted(rounds[0]) == sorted(rounds[1]) == sorted(rounds[2])
    assert len({tuple(one) for one in rounds}) > 1  # each in its own order
    assert cells == settings.trials()
    assert cells != ClassicSettings(prompts=PROMPTS, lengths=LENGTHS, runs=RUNS, seed=8).trials()
    assert Trial(0, 50, WARM_UP).is_warm_up
    assert not Trial(0, 50, 0).is_warm_up


def test_the_default_prompts_are_varied_and_fit_the_shortest_length():
    assert len(DEFAULT_PROMPTS) >= 5
    assert {"Once upon a time", "In a galaxy far, far away"} <= {*DEFAULT_PROMPTS}
    with GPT2.from_pretrained("demo") as model:
        counts = [len(model.tokenizer.encode(prompt)) for prompt in DEFAULT_PROMPTS]
    assert len(set(counts)) >= 4
    assert max(counts) < 45


def test_the_array_holds_the_recorded_times_and_the_axes_name_it(settings, tmp_path):
    result = run_classic(settings, output=tmp_path, report=False)
    times_s = np.load(tmp_path / "benchmark_results.npy", allow_pickle=False)
    assert (times_s.dtype, times_s.shape) == (np.float64, (3, 2, 2))
    for record in result.records:
        prompt, length, number = record["cell"]
        if number >= 0:
            assert times_s[prompt, LENGTHS.index(length), number] == record["elapsed_s"]
    axes = json.loads((tmp_path / "benchmark_results.json").read_text())
    assert [(axis["name"], axis["values"]) for axis in axes["axes"]] == [
        ("prompt", list(PROMPTS)), ("length", list(LENGTHS)), ("run", [0, 1]),
    ]  # fmt: skip
    assert axes["shape"] == list(times_s.shape)
    assert (axes["unit"], axes["array"]) == ("s", "benchmark_results.npy")


def test_the_settings_say_what_was_run(settings, tmp_path, folder):
    run_classic(settings, output=tmp_path, report=False)
    found = json.loads((tmp_path / "settings.json").read_text())
    assert found == {
        "kind": "classic", "model": folder, "model_id": targets.model_id(Path(folder)), "backend": "numpy",
        "precision": "float32", "device": "cpu", "threads": None, "revision": None, "url": None,
        "exact_length": True, "prompts": list(PROMPTS), "lengths": list(LENGTHS), "runs": RUNS, "seed": 7,
        "temperature": 0.8, "timeout_s": 300.0, "retries": 2,
    }  # fmt: skip


def test_the_id_of_a_model_changes_with_its_weights(tmp_path):
    ids = [
        targets.model_id(random_checkpoint(tmp_path / str(i), seed=seed)) for i, seed in enumerate((0, 0, 1))
    ]
    assert ids[0] == ids[1] != ids[2]


def test_summaries_are_means_over_the_measured_runs(settings, tmp_path):
    result = run_classic(settings, output=tmp_path, report=False)
    assert [(s.prompt_index, s.length) for s in result.summaries] == [
        (i, n) for i in range(3) for n in LENGTHS
    ]
    one = result.summaries[3]
    mine = [r for r in result.records if r["cell"][:2] == [1, 20] and r["run"] >= 0]
    times_s = [r["elapsed_s"] for r in mine]
    assert one.mean_s == pytest.approx(statistics.mean(times_s))
    assert one.low_s < one.mean_s < one.high_s
    assert one.tokens_per_s == pytest.approx(2 * 12 / sum(times_s))
    assert one.ttft_s == pytest.approx(statistics.mean(r["ttft_s"] for r in mine))
    assert (one.runs, one.failed, one.ended_early) == (2, 0, 0)


def test_the_precision_is_that_of_the_checkpoint_and_every_door_has_that_default(folder, tmp_path):
    rounded = tmp_path / "int8"
    assert main(["quantize", folder, str(rounded), "--precision", "int8"]) == 0
    settings = ClassicSettings(model=str(rounded), backend="numpy", prompts=("a",), lengths=(4,), runs=1)
    result = run_classic(settings, output=tmp_path / "out", report=False)
    assert result.settings["precision"] == "int8"
    assert {record["precision"] for record in result.records} == {"int8"}
    defaults = {
        "settings": ClassicSettings().precision,
        "comparison": Comparison(backends=("numpy",)).precisions[0],
        "recommend": inspect.signature(recommend).parameters["precisions"].default[0],
        "from_pretrained": inspect.signature(GPT2.from_pretrained).parameters["precision"].default,
    }
    for name, command in {"bench": bench_command, **bench_command.commands}.items():
        for option in command.params:
            if option.name == "precision":
                defaults[f"{name} --precision"] = option.default
    assert set(defaults.values()) == {"auto"}
    assert len(defaults) == 7


def test_options_before_a_subcommand_are_refused(run):
    code, out, err = run("analyse", "x", model=None)
    assert code == 2
    assert "does not exist" in err
    code, out, err = run("analyse", "x")
    assert (code, out) == (2, "")
    assert "--model has no effect before analyse" in err


# Failures


def test_a_cell_that_fails_at_first_is_tried_again(settings, tmp_path, monkeypatch):
    failing(monkeypatch, lambda cell, attempt: cell == (1, 12, 0) and attempt <= 2)
    result = run_classic(settings, output=tmp_path, report=False)
    assert {tuple(r["cell"]): r["attempts"] for r in result.records if r["attempts"] > 1} == {(1, 12, 0): 3}
    assert result.failures == []


def test_cells_that_keep_failing_are_recorded_and_the_others_go_on(settings, tmp_path, monkeypatch):
    tried = failing(monkeypatch, lambda cell, attempt: cell[:2] == (1, 12), MemoryError("no\nroom"))
    result = run_classic(settings, output=tmp_path, report=False)
    bad = [record for record in read_log(tmp_path / "runs.jsonl") if record["status"] == "failed"]
    assert [record["cell"] for record in bad] == [[1, 12, -1], [1, 12, 0], [1, 12, 1]]
    for record in bad:
        assert {*record} == {*SCHEMA}
        assert (record["error"], record["attempts"]) == ("MemoryError: no room", 3)
        measured = ("elapsed_s", "ttft_s", "token_times_s", "prompt_tokens", "text", "finish_reason")
        assert [record[name] for name in measured] == [None] * 6
    assert tried.count((1, 12, 0)) == 3
    assert not result.failed
    np.testing.assert_array_equal(np.isnan(result.times_s).all(axis=2), [[0, 0], [1, 0], [0, 0]])
    assert np.isnan(result.times_s).sum() == 2
    assert (result.summaries[2].failed, result.summaries[2].mean_s) == (2, None)
    assert result.to_dict()["errors"] == ["MemoryError: no room"]


def test_a_request_that_is_wrong_is_not_repeated(settings, tmp_path, monkeypatch):
    tried = failing(monkeypatch, lambda cell, attempt: cell.run == 0, RequestError("wrong"))
    run_classic(settings, output=tmp_path, report=False)
    assert tried.count((0, 12, 0)) == 1


def test_the_limit_of_time_is_looked_at_after_each_token(settings, tmp_path, monkeypatch):
    clock = types.SimpleNamespace(perf_counter=map(float, itertools.count()).__next__)
    monkeypatch.setattr(targets, "time", clock)
    slow = ClassicSettings(
        **{name: getattr(settings, name) for name in ("model", "backend", "prompts", "backoff_s")},
        lengths=(12, 40),
        runs=1,
        retries=0,
        timeout_s=15.0,
    )
    result = run_classic(slow, output=tmp_path, report=False)
    assert [r["length"] for r in result.failures] == [40, 40, 40]
    assert {r["error"] for r in result.failures} == {"TimeoutError: not done after 15 s, 16 tokens"}


def test_waits_double_and_a_servers_wish_comes_first(monkeypatch):
    waits: list[float] = []
    monkeypatch.setattr("gpt2core.bench.sweep.model_target.time.sleep", waits.append)
    settings = ClassicSettings(retries=4, backoff_s=1.0)
    errors = [
        OSError(),
        ServerError("busy", again=True, retry_after_s=9.0),
        OSError(),
        OSError(),
        OSError("x"),
    ]
    result, tries = measure_with_retries(settings, lambda: (_ for _ in ()).throw(errors.pop(0)))
    assert (str(result), tries) == ("x", 5)
    assert waits == [1.0, 9.0, 4.0, 8.0]
    errors = [ServerError("no", again=False)]
    assert measure_with_retries(settings, lambda: (_ for _ in ()).throw(errors.pop(0)))[1] == 1


# Bad input


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompts": ()}, "there are 0 prompts"),
        ({"prompts": ("a", "")}, "prompt 1 is empty"),
        ({"prompts": ("a", "b", "a")}, "prompts 0 and 2 are the same"),
        ({"prompts": ("\ud800",)}, "lone surrogate"),
        ({"lengths": ()}, "there are no lengths"),
        ({"lengths": (1,)}, "length 1 is not possible"),
        ({"lengths": (50, 60, 50)}, "give each length once"),
        ({"runs": 0}, "runs is 0"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": 2**63 - 2}, "with 5 runs at most"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"timeout_s": float("inf")}, "timeout_s is inf"),
        ({"timeout_s": 0.0}, "timeout_s is 0.0"),
        ({"retries": -1}, "retries is -1"),
        ({"backoff_s": float("nan")}, "backoff_s is nan"),
        ({"api_key": "a\nb"}, "api_key has characters"),
    ],
)
def test_settings_out_of_range_are_refused_when_made(change, message):
    with pytest.raises(RequestError, match=message):
        ClassicSettings(**change)


def test_a_length_that_does_not_fit_is_refused_before_anything_is_written(folder, tmp_path):
    for change, error, message in (
        ({"lengths": (50, 97)}, ContextLengthError, "length 97 exceeds this model's context of 96"),
        (
            {"prompts": ("a", "b" * 50)},
            RequestError,
            "prompt 1 has 50 tokens; total length 50 leaves it no new",
        ),
        ({"backend": "frobnicate"}, Gpt2CoreError, "there is no backend 'frobnicate'"),
        ({"model": str(tmp_path / "none")}, Gpt2CoreError, "is not an existing folder"),
    ):
        given = {"model": folder, "prompts": ("a",), "lengths": (50,)} | change
        with pytest.raises(error, match=message):
            run_classic(ClassicSettings(**given), output=tmp_path / "out", report=False)
        assert not (tmp_path / "out").exists()


def test_a_missing_package_is_told_before_the_run(settings, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "gpt2core.bench.errors.find_spec", lambda name: None if name == "matplotlib" else True
    )
    with pytest.raises(BenchmarkError, match=r"matplotlib is not installed.*gpt2core\[bench\]"):
        run_classic(settings, output=tmp_path / "out")
    run_classic(settings, output=tmp_path / "out", report=False)


# The package


def test_importing_the_package_loads_nothing_else_and_its_names_are_documented():
    code = "import sys; before = set(sys.modules); import gpt2core.bench; print(*(set(sys.modules) - before))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert {*done.stdout.split()} == {"gpt2core", "gpt2core.bench"}
    assert sorted(bench._MODULE_OF) == sorted(bench.__all__)
    for name in bench.__all__:
        assert getattr(bench, name).__doc__
    assert {*bench.__all__} <= {*dir(bench)}
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        bench.nothing  # noqa: B018


def test_summaries_of_no_lines_are_empty(settings):
    found = summarize(dict(enumerate(PROMPTS)), LENGTHS, [])
    assert {(one.runs, one.failed, one.mean_s, one.tokens_per_s) for one in found} == {(0, 0, None, None)}


def test_resume_and_force_contradict_each_other(settings, tmp_path):
    with pytest.raises(RequestError, match="contradict"):
        run_classic(settings, output=tmp_path, resume=True, force=True)
