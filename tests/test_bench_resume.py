"""A classic benchmark that was interrupted, killed, or is to have more runs, goes on."""

import json
import os
import shutil
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
from bench_faults import cells_of, failing, interrupt_at

from gpt2core.bench import BenchmarkError, ClassicSettings, run_classic
from gpt2core.bench.store import read_log
from gpt2core.errors import RequestError
from gpt2core.testing import random_checkpoint

PROMPTS, LENGTHS, RUNS = ("One", "Two more", "3"), (12, 20), 2


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


# Resuming


@pytest.mark.parametrize("number", [1, 4, 8, 18])
def test_an_interrupted_run_is_resumed_without_repeating_a_cell(settings, tmp_path, monkeypatch, number):
    with monkeypatch.context() as patch:
        interrupt_at(patch, number)
        with pytest.raises(KeyboardInterrupt):
            run_classic(settings, output=tmp_path, report=False)
    before = read_log(tmp_path / "runs.jsonl")
    assert len(before) == number - 1
    tried = failing(monkeypatch, lambda cell, attempt: False)
    result = run_classic(settings, output=tmp_path, report=False, resume=True)
    assert read_log(tmp_path / "runs.jsonl")[: len(before)] == before
    assert cells_of(tmp_path) == settings.trials()
    measured = [cell for cell in tried if cell.run >= 0]
    assert measured == [cell for cell in settings.trials()[number - 1 :] if cell.run >= 0]
    assert result.resumed == max(0, number - 1 - 6)
    warm = {cell[:2] for cell in tried if cell.run < 0}  # a new process has cold caches
    assert {cell[:2] for cell in measured} <= warm


def test_a_finished_run_is_resumed_by_doing_nothing(settings, finished, monkeypatch):
    first = np.load(finished / "benchmark_results.npy")
    tried = failing(monkeypatch, lambda cell, attempt: True)
    again = run_classic(settings, output=finished, report=False, resume=True)
    assert tried == []
    assert again.resumed == 12
    np.testing.assert_array_equal(again.times_s, first)


def test_failed_cells_are_tried_again_on_resume(settings, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        failing(patch, lambda cell, attempt: cell[:2] == (1, 12) or cell.run == 1, RequestError("no"))
        assert len(run_classic(settings, output=tmp_path, report=False).failures) == 7
    tried = failing(monkeypatch, lambda cell, attempt: False)
    result = run_classic(settings, output=tmp_path, report=False, resume=True)
    assert sum(cell.run >= 0 for cell in tried) == 7
    assert result.failures == []
    assert sorted(cells_of(tmp_path)) == sorted(settings.trials())


def test_a_finished_run_may_be_resumed_with_more_runs(settings, finished, monkeypatch):
    first = np.load(finished / "benchmark_results.npy")
    tried = failing(monkeypatch, lambda cell, attempt: False)
    more = ClassicSettings(**{name: getattr(settings, name) for name in settings.__slots__} | {"runs": 4})
    result = run_classic(more, output=finished, report=False, resume=True)
    assert [cell.run for cell in tried if cell.run >= 0] == [2] * 6 + [3] * 6
    assert result.resumed == 12
    np.testing.assert_array_equal(result.times_s[:, :, :2], first)
    assert not np.isnan(result.times_s).any()
    assert json.loads((finished / "settings.json").read_text())["runs"] == 4


@pytest.fixture(scope="module")
def finished_once(folder, tmp_path_factory):
    path = tmp_path_factory.mktemp("finished") / "out"
    settings = ClassicSettings(
        model=folder, backend="numpy", prompts=PROMPTS, lengths=LENGTHS, runs=RUNS, seed=7
    )
    run_classic(settings, output=path, report=False)
    return path


@pytest.fixture
def finished(finished_once, tmp_path):
    """A copy of a folder that `settings` gave."""
    return shutil.copytree(finished_once, tmp_path / "out")


def test_resuming_with_other_settings_or_another_model_is_refused(settings, finished, tmp_path):
    other = random_checkpoint(tmp_path / "other", seed=1)
    for change, message in (
        ({"runs": 1}, "runs: 2 there, 1 here"),
        ({"seed": 8}, "seed: 7 there, 8 here"),
        ({"prompts": ("x",)}, "prompts: "),
        ({"model": str(other)}, "model_id: "),
        ({"temperature": 0.5}, "temperature: 0.8 there, 0.5 here"),
    ):
        given = {name: getattr(settings, name) for name in settings.__slots__} | change
        with pytest.raises(BenchmarkError, match="other settings.*" + message):
            run_classic(ClassicSettings(**given), output=finished, report=False, resume=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cell": [9, 12, 0]}, "is of another benchmark"),
        ({"environment": "0"}, "is of another benchmark"),
        ({"status": "perhaps"}, "is of another benchmark"),
        ({"run": 5}, "is of another benchmark"),
        ({"elapsed_s": None}, "is no line of this benchmark"),
        ({}, "repeats a cell"),
        ({"cell": [1]}, "is no line of this benchmark"),
        ({"cell": None}, "is no line of this benchmark"),
    ],
)
def test_lines_that_do_not_belong_are_refused_by_number(settings, finished, change, message):
    log = finished / "runs.jsonl"
    lines = log.read_bytes().splitlines(keepends=True)
    log.write_bytes(b"".join([*lines, json.dumps(json.loads(lines[0]) | change).encode() + b"\n"]))
    with pytest.raises(BenchmarkError, match=rf"runs\.jsonl, line 19 {message}"):
        run_classic(settings, output=finished, report=False, resume=True)


def test_runs_killed_at_20_random_points_twice_and_resumed_have_the_same_cells_none_twice(folder, tmp_path):
    points = 20
    command = [sys.executable, Path(__file__).with_name("bench_killer.py"), folder, tmp_path, str(points)]
    environment = os.environ | {"OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert (done.returncode, done.stderr) == (0, "")
    killed = json.loads(done.stdout)
    assert len(killed) == 2 * points
    assert sum(killed) >= points, "too few were killed before they had ended"
    want = sorted(ClassicSettings(prompts=("One", "Two!"), lengths=(8, 12), runs=2).trials())
    for point in range(points):
        assert sorted(cells_of(tmp_path / str(point))) == want
        names = {path.name for path in (tmp_path / str(point)).iterdir()}
        assert names == {
            *("environment.json", "settings.json", "runs.jsonl"),
            *("benchmark_results.npy", "benchmark_results.json"),
        }
        times_s = np.load(tmp_path / str(point) / "benchmark_results.npy", allow_pickle=False)
        assert times_s.shape == (2, 2, 2)
        assert not np.isnan(times_s).any()
