"""What takes long says so: a line on a terminal, lines now and then on a pipe, both with the time left."""

import io
import re
import subprocess
import sys
import time

import pytest

from gpt2core.bench import Progress
from gpt2core.cli import progress
from gpt2core.cli.progress import Status, clock
from gpt2core.testing import random_checkpoint


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def at_once(monkeypatch):
    for name in ("TERMINAL_DELAY_S", "PIPE_DELAY_S", "PIPE_INTERVAL_S"):
        monkeypatch.setattr(progress, name, 0.0)


def wait_for(stream: io.StringIO, text: str) -> None:
    deadline = time.monotonic() + 20
    while text not in stream.getvalue():
        assert time.monotonic() < deadline, stream.getvalue()
        time.sleep(0.001)


def test_a_line_on_a_terminal_follows_updates_tells_the_time_left_and_vanishes(monkeypatch, at_once):
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    with Status("loading") as status:
        wait_for(terminal, "\r\x1b[Kloading; 0:00 so far")
        status._begun_s -= 30
        status.update("rounding", 3, 4)
    lines = terminal.getvalue().split("\r\x1b[K")
    assert "rounding; 75% done, 0:30 so far, 0:10 left" in lines
    assert lines[-1] == ""


@pytest.mark.parametrize("stream", [Terminal, io.StringIO])
def test_what_is_quick_leaves_no_trace(monkeypatch, stream):
    monkeypatch.setattr(sys, "stderr", shown := stream())
    with Status("loading") as status:
        status.update("half", 1, 2)
    assert shown.getvalue() == ""


def test_lines_on_a_pipe_have_no_control_characters_and_come_now_and_then(monkeypatch):
    monkeypatch.setattr(progress, "PIPE_DELAY_S", 0.0)
    monkeypatch.setattr(sys, "stderr", pipe := io.StringIO())
    with Status("rounding", quiet=True) as status:
        for i in range(1, 5):
            status.update("rounding", i, 4)
    assert pipe.getvalue() == "gpt2core: rounding; 25% done, 0:00 so far, 0:00 left\n"


def test_what_begins_quietly_is_told_on_a_pipe_from_its_first_update_on(monkeypatch, at_once):
    monkeypatch.setattr(sys, "stderr", pipe := io.StringIO())
    with Status("loading", quiet=True) as status:
        time.sleep(0.2)
        assert pipe.getvalue() == ""
        status.update("compiling")
        wait_for(pipe, "gpt2core: compiling; ")
    monkeypatch.setattr(sys, "stderr", pipe := io.StringIO())
    with Status("exporting"):
        wait_for(pipe, "gpt2core: exporting; 0:00 so far\n")


def test_a_run_that_measures_itself_is_shown_with_its_own_estimate(monkeypatch, at_once):
    monkeypatch.setattr(sys, "stderr", pipe := io.StringIO())
    with Status("starting", quiet=True) as status:
        status.show(Progress("round 2", 1, 4, elapsed_s=1200.0))
        status.show(Progress("", 4, 4, elapsed_s=4800.0))
    assert "gpt2core: round 2; 25% done, 0:00 so far, 1:00:00 left\n" in pipe.getvalue()
    assert pipe.getvalue().endswith("gpt2core: done; 100% done, 0:00 so far, 0:00 left\n")


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0:00"), (65, "1:05"), (3665, "1:01:05")])
def test_clock(seconds, text):
    assert clock(seconds) == text


# In processes


AT_ONCE = """
import sys
from gpt2core.cli import main, progress
progress.PIPE_DELAY_S = progress.PIPE_INTERVAL_S = 0.0
sys.exit(main())
"""


def lines_of(*args, **environment):
    import os

    done = subprocess.run(
        [sys.executable, "-c", AT_ONCE, *args],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stderr.splitlines()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(random_checkpoint(tmp_path_factory.mktemp("tiny")))


def shares(lines, what):
    found = [re.search(rf"{what}.*; (\d+)% done, .* so far, \d+:\d\d left$", line) for line in lines]
    return [int(match[1]) for match in found if match]


def test_quantize_and_rounding_on_loading_tell_how_far_they_are(folder, tmp_path):
    lines = lines_of("quantize", folder, str(tmp_path / "out"), "--precision", "int4")
    done = shares(lines, "rounding ")
    assert len(done) > 5
    assert done == sorted(done)
    assert done[-1] == 100
    again = ("generate", "x", "--model", folder, "--precision", "int8", "--max-new-tokens", "1")
    assert shares(lines_of(*again), "rounding the weights to int8")[-1] == 100


def test_the_first_build_of_the_native_backend_says_that_it_compiles(folder, tmp_path):
    args = ("generate", "x", "--model", folder, "--backend", "native", "--max-new-tokens", "1")
    environment = {"GPT2CORE_CACHE": str(tmp_path), "GPT2CORE_CFLAGS": "-O0"}
    lines = lines_of(*args, **environment)
    assert lines[0].startswith("gpt2core: compiling the native backend, once; 0:0")


def test_verify_tells_each_engine_and_the_time_left(folder):
    lines = lines_of("verify", folder, "--backends", "numpy,native", "--seeds", "1", "--tokens", "2")
    assert any(line.startswith("gpt2core: computing the reference; 0% done") for line in lines)
    assert shares(lines, "running numpy")
    assert shares(lines, "running native") > shares(lines, "running numpy")
