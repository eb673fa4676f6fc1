"""`gpt2core bench`: tables, JSON, one line for what is wrong, and exit codes."""

import fcntl
import json
import os
import pty
import select
import struct
import subprocess
import sys
import termios
import types
from pathlib import Path

import numpy as np
import pytest
from bench_faults import cells_of, failing, interrupt_at

from gpt2core.bench import ClassicSettings
from gpt2core.cli import main
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


# The command


def test_the_command_prints_a_table_and_where_the_report_is(run, tmp_path, reports):
    code, out, err = run(*SMALL, "--output", str(tmp_path / "out"))
    assert (code, err) == (0, "")
    lines = out.splitlines()
    headings = "prompt length mean 95 % interval tok/s first token failed"
    assert lines[1].split() == headings.split()
    assert [line.split("  ")[2] for line in lines[2:6]] == ["One", "One", "Two more", "Two more"]
    assert max(map(len, lines[:-1])) <= 100
    mean = np.load(tmp_path / "out" / "benchmark_results.npy").mean(axis=2)
    assert f"{mean[1, 0]:.3f} s" in lines[4]
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
    assert out.splitlines()[3].split("  ")[1:3] == ["2", "Two [31m or more words than a c…"]
    assert out.splitlines()[-1].endswith("runs.jsonl")
    settings = json.loads((tmp_path / "out" / "settings.json").read_text())
    assert settings["prompts"][0] == "One"
    assert len(settings["prompts"]) == 2


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "holds no prompt"),
        (b" \n\n", "holds no prompt"),
        (b"\xff", "is not UTF-8: byte 0xff at offset 0"),
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


def test_failures_are_told_and_the_exit_code_is_1(run, tmp_path, monkeypatch, reports):
    failing(monkeypatch, lambda cell, attempt: cell[:2] == (0, 12))
    args = (*SMALL, "--retries", "0", "--output")
    code, out, err = run(*args, str(tmp_path / "some"))
    assert code == 1
    assert err == "gpt2core: 2 of 8 generations failed: NumericalError: broken; --resume tries them again\n"
    assert out.splitlines()[2].split() == ["1", "One", "12", "-", "-", "-", "-", "2"]
    failing(monkeypatch, lambda cell, attempt: cell[1] == 12)
    code, out, err = run(*args, str(tmp_path / "half"), "--json", "--no-report")
    assert (code, json.loads(out)["failed"]) == (1, 4)
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


def test_a_line_with_the_remaining_time_is_drawn_on_a_terminal(folder, tmp_path):
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
    assert shown.endswith("\r\x1b[K")  # gone at the end


def test_analyse_prints_what_the_analysis_says(run, tmp_path, monkeypatch):
    class Analysis:
        def to_dict(self):
            return {"folder": "x"}

        def text(self):
            return "linear\n"

    asked = []
    module = types.ModuleType("gpt2core.bench.report.analysis")
    module.analyse = lambda folder: asked.append(folder) or Analysis()
    monkeypatch.setitem(sys.modules, "gpt2core.bench.report.analysis", module)
    assert run("analyse", str(tmp_path), model=None) == (0, "linear\n", "")
    assert run("analyse", str(tmp_path), "--json", model=None) == (0, '{"folder": "x"}\n', "")
    assert asked == [tmp_path, tmp_path]
