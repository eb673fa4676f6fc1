"""The classic benchmark: what is measured, in which order, what is recorded, resumed and printed."""

import fcntl
import itertools
import json
import os
import pty
import select
import shutil
import statistics
import struct
import subprocess
import sys
import termios
import types
from pathlib import Path

import numpy as np
import pytest

from gpt2core import GPT2, bench
from gpt2core.bench import BenchmarkError, ClassicSettings, classic, run_classic, targets
from gpt2core.bench.attempts import attempts
from gpt2core.bench.errors import ServerError
from gpt2core.bench.files import read_log
from gpt2core.bench.results import summarise
from gpt2core.bench.workload import DEFAULT_PROMPTS, WARM_UP, Cell
from gpt2core.cli import main
from gpt2core.errors import ContextLengthError, Gpt2CoreError, NumericalError, RequestError
from gpt2core.testing import random_checkpoint

PROMPTS, LENGTHS, RUNS = ("One", "Two more", "3"), (12, 20), 2
SCHEMA = {
    "kind": str, "cell": list, "prompt": str, "length": int, "run": int, "status": str, "error": None,
    "elapsed_s": float, "ttft_s": float, "token_times_s": list, "prompt_tokens": int,
    "completion_tokens": int, "finish_reason": str, "text": str, "attempts": int, "seed": int,
    "backend": str, "precision": str, "model": str, "url": None, "environment": str, "started_at": str,
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
    module = types.ModuleType("gpt2core.bench.report")
    module.write_report = asked.append
    monkeypatch.setitem(sys.modules, "gpt2core.bench.report", module)
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


SMALL = ("--prompt", "One", "--prompt", "Two more", "--lengths", "12,20", "--runs", "2", "--seed", "7")


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
    cells = settings.cells()
    assert [cell.run for cell in cells] == [-1] * 6 + [0] * 6 + [1] * 6
    rounds = [[cell[:2] for cell in cells[i : i + 6]] for i in (0, 6, 12)]
    assert sorted(rounds[0]) == sorted(rounds[1]) == sorted(rounds[2])
    assert len({tuple(one) for one in rounds}) > 1  # each in its own order
    assert cells == settings.cells()
    assert cells != ClassicSettings(prompts=PROMPTS, lengths=LENGTHS, runs=RUNS, seed=8).cells()
    assert Cell(0, 50, WARM_UP).is_warm_up
    assert not Cell(0, 50, 0).is_warm_up


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


# Failures


def failing(monkeypatch, fails, error: Exception | None = None):
    """Let the measurements fail for which `fails(cell, attempt)` holds; returns all attempts."""
    tried, real = [], targets.ModelTarget.measure

    def measure(self, cell):
        tried.append(cell)
        if fails(cell, tried.count(cell)):
            raise error or NumericalError("broken")
        return real(self, cell)

    monkeypatch.setattr(targets.ModelTarget, "measure", measure)
    return tried


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
    monkeypatch.setattr("gpt2core.bench.attempts.time.sleep", waits.append)
    settings = ClassicSettings(retries=4, backoff_s=1.0)
    errors = [
        OSError(),
        ServerError("busy", again=True, retry_after_s=9.0),
        OSError(),
        OSError(),
        OSError("x"),
    ]
    result, tries = attempts(settings, lambda: (_ for _ in ()).throw(errors.pop(0)))
    assert (str(result), tries) == ("x", 5)
    assert waits == [1.0, 9.0, 4.0, 8.0]
    errors = [ServerError("no", again=False)]
    assert attempts(settings, lambda: (_ for _ in ()).throw(errors.pop(0)))[1] == 1


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
        ({"seed": 2**63 - 2}, "with 3 runs at most"),
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
        "gpt2core.bench.extras.find_spec", lambda name: None if name == "matplotlib" else True
    )
    with pytest.raises(BenchmarkError, match=r"matplotlib is not installed.*gpt2core\[bench\]"):
        run_classic(settings, output=tmp_path / "out")
    run_classic(settings, output=tmp_path / "out", report=False)


# Resuming


def cells_of(path: Path) -> list[tuple[int, ...]]:
    return [tuple(record["cell"]) for record in read_log(path / "runs.jsonl")]


def interrupt_at(monkeypatch, number: int) -> None:
    """Interrupt the measurement of that number, as Ctrl-C would."""
    tried, real = [], targets.ModelTarget.measure

    def measure(self, cell):
        tried.append(cell)
        if len(tried) == number:
            raise KeyboardInterrupt
        return real(self, cell)

    monkeypatch.setattr(targets.ModelTarget, "measure", measure)


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
    assert cells_of(tmp_path) == settings.cells()
    measured = [cell for cell in tried if cell.run >= 0]
    assert measured == [cell for cell in settings.cells()[number - 1 :] if cell.run >= 0]
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
    assert sorted(cells_of(tmp_path)) == sorted(settings.cells())


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
        ({"runs": 3}, "runs: 2 there, 3 here"),
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
    want = sorted(ClassicSettings(prompts=("One", "Two!"), lengths=(8, 12), runs=2).cells())
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


# The command


def test_the_command_prints_a_table_and_where_the_report_is(run, tmp_path, reports):
    code, out, err = run(*SMALL, "--output", str(tmp_path / "out"))
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[0].split() == [
        "prompt",
        "length",
        "mean",
        "95",
        "%",
        "interval",
        "tokens/s",
        "first",
        "token",
        "failed",
    ]
    assert [line.split("  ")[0] for line in lines[1:5]] == ["One", "One", "Two more", "Two more"]
    mean = np.load(tmp_path / "out" / "benchmark_results.npy").mean(axis=2)
    assert f"{mean[1, 0]:.3f} s" in lines[3]
    assert lines[-1] == f"{tmp_path}/out/report.html"
    assert reports == [tmp_path / "out"]


def test_the_command_prints_one_json_document(run, tmp_path, reports):
    args = (*SMALL, "--output", str(tmp_path / "out"), "--json")
    code, out, err = run(*args)
    assert (code, err) == (0, "")
    document = json.loads(out)
    assert out.count("\n") == 1
    assert (document["cells"], document["failed"], document["resumed"]) == (8, 0, 0)
    assert [one["length"] for one in document["summary"]] == [12, 20, 12, 20]
    assert document["settings"]["lengths"] == [12, 20]
    assert "runs.jsonl" in document["files"]
    assert json.loads(run(*args, "--resume")[1])["resumed"] == 8


def test_prompts_come_from_a_file_and_long_ones_are_shortened_in_the_table(run, tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_bytes("\ufeffOne\r\n\r\n  \nTwo \x1b[31m or more words than a column of the table\n".encode())
    args = ("--prompts", str(file), "--lengths", "60", "--runs", "1", "--no-report", "--output")
    code, out, _ = run(*args, str(tmp_path / "out"))
    assert code == 0
    assert out.splitlines()[2].startswith("Two \\x1b[31m or more words th...  60 ")
    assert out.splitlines()[-1].endswith("runs.jsonl")
    settings = json.loads((tmp_path / "out" / "settings.json").read_text())
    assert settings["prompts"][0] == "One"
    assert len(settings["prompts"]) == 2


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "holds no prompt"),
        (b" \n\n", "holds no prompt"),
        (b"\xff", "is not UTF-8 at byte 0"),
        (None, "cannot be read: No such file"),
        (b"x" * (2**20 + 1), "has more than"),
    ],
)
def test_a_prompt_file_without_prompts_is_one_line(run, tmp_path, content, message):
    file = tmp_path / "prompts.txt"
    if content is not None:
        file.write_bytes(content)
    code, out, err = run("--prompts", str(file), "--output", str(tmp_path / "out"))
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert message in err


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (("--lengths", "50,x"), 2, "--lengths is '50,x'"),
        (("--prompt", "a", "--prompts", "x"), 2, "both given"),
        (("--resume", "--force"), 2, "contradict"),
        (("--runs", "0"), 2, "--runs"),
        (("--url", "http://127.0.0.1:1"), 2, "--backend has no effect on a server"),
        (("--backend", "frobnicate", "--lengths", "90", "--prompt", "a"), 1, "no backend 'frobnicate'"),
        (("frobnicate",), 2, "No such command 'frobnicate'"),
    ],
)
def test_bad_options_are_one_line(run, tmp_path, args, code, message):
    got, out, err = run(*("--output", str(tmp_path / "out")), *args)
    assert (got, out) == (code, "")
    assert err.count("\n") == 1
    assert message in err
    assert not (tmp_path / "out").exists()


def test_a_folder_with_results_is_refused_and_force_replaces_it(run, tmp_path):
    args = (*SMALL, "--no-report", "--output", str(tmp_path))
    assert run(*args)[0] == 0
    first = (tmp_path / "runs.jsonl").read_bytes()
    code, out, err = run(*args)
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert "is not empty" in err
    assert (tmp_path / "runs.jsonl").read_bytes() == first
    assert run(*args, "--force")[0] == 0
    assert (tmp_path / "runs.jsonl").read_bytes() != first
    assert len(cells_of(tmp_path)) == 12


def test_failures_are_told_and_only_when_all_fail_is_the_exit_code_1(run, tmp_path, monkeypatch, reports):
    failing(monkeypatch, lambda cell, attempt: cell[:2] == (0, 12))
    args = (*SMALL, "--retries", "0", "--output")
    code, out, err = run(*args, str(tmp_path / "some"))
    assert code == 0
    assert err == "gpt2core: 2 of 8 generations failed: NumericalError: broken; --resume tries them again\n"
    assert out.splitlines()[1].split() == ["One", "12", "-", "-", "-", "-", "2"]
    failing(monkeypatch, lambda cell, attempt: True)
    code, out, err = run(*args, str(tmp_path / "all"))
    assert code == 1
    assert "all 8 generations failed" in err
    assert reports == [tmp_path / "some"]  # of nothing there is nothing to draw
    assert np.isnan(np.load(tmp_path / "all" / "benchmark_results.npy")).all()


def test_an_interrupt_exits_130_and_tells_how_to_go_on(run, tmp_path, monkeypatch):
    interrupt_at(monkeypatch, 4)
    code, out, err = run(*SMALL, "--no-report", "--output", str(tmp_path / "out"))
    assert (code, out) == (130, "")
    assert err.split("\n", 1)[0] == "gpt2core: interrupted; go on with the same command and --resume"
    assert len(cells_of(tmp_path / "out")) == 3


def test_a_bar_with_the_remaining_time_is_drawn_on_a_terminal_only(folder, tmp_path):
    main_fd, terminal_fd = pty.openpty()
    fcntl.ioctl(terminal_fd, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    command = [sys.executable, "-m", "gpt2core", "bench", "--model", folder, "--backend", "numpy", *SMALL]
    command += ["--no-report", "--output", str(tmp_path)]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=terminal_fd, timeout=100)
    shown = b""
    while select.select([main_fd], [], [], 0)[0]:  # the terminal keeps what nobody has read yet
        shown += os.read(main_fd, 100_000)
    shown = shown.decode()
    os.close(terminal_fd)
    os.close(main_fd)
    assert done.returncode == 0
    assert "warm-up, 0 of 12" in shown
    assert " left" in shown
    assert shown.endswith("\r")  # gone at the end


def test_analyse_prints_what_the_analysis_says(run, tmp_path, monkeypatch):
    class Analysis:
        def to_dict(self):
            return {"folder": "x"}

        def text(self):
            return "linear\n"

    asked = []
    module = types.ModuleType("gpt2core.bench.analysis")
    module.analyse = lambda folder: asked.append(folder) or Analysis()
    monkeypatch.setitem(sys.modules, "gpt2core.bench.analysis", module)
    assert run("analyse", str(tmp_path), model=None) == (0, "linear\n", "")
    assert run("analyse", str(tmp_path), "--json", model=None) == (0, '{"folder": "x"}\n', "")
    assert asked == [tmp_path, tmp_path]


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
    found = summarise(settings.document(), [])
    assert {(one.runs, one.failed, one.mean_s, one.tokens_per_s) for one in found} == {(0, 0, None, None)}


def test_resume_and_force_contradict_each_other(settings, tmp_path):
    with pytest.raises(RequestError, match="contradict"):
        run_classic(settings, output=tmp_path, resume=True, force=True)
    assert classic.RUNS == "runs.jsonl"
