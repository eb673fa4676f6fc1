"""The parts that the commands print with: sizes, strict numbers, the status line."""

import io
import math
import sys

import pytest

from gpt2core.cli import console


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [(0, "0 bytes"), (999, "999 bytes"), (1000, "1.0 kB"), (999_949, "999.9 kB"), (999_951, "1.0 MB"),
     (498_000_000, "498.0 MB"), (6_500_000_000, "6.5 GB"), (3 * 10**15, "3000.0 TB")],
)  # fmt: skip
def test_format_nbytes(nbytes, text):
    assert console.format_nbytes(nbytes) == text


@pytest.mark.parametrize(("value", "want"), [(1.5, 1.5), (None, None), (math.inf, None), (math.nan, None)])
def test_finite_keeps_json_strict(value, want):
    assert console.finite(value) == want


class Terminal(io.StringIO):
    def isatty(self):
        return True


def wait_for(terminal: io.StringIO, text: str) -> None:
    import time

    deadline = time.monotonic() + 20
    while text not in terminal.getvalue():
        assert time.monotonic() < deadline, terminal.getvalue()
        time.sleep(0.001)


def test_a_status_line_appears_after_its_delay_follows_updates_and_vanishes(monkeypatch):
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    monkeypatch.setattr(console, "STATUS_DELAY_S", 0.0)
    with console.Status("loading") as status:
        wait_for(terminal, "\r\x1b[Kloading")
        status.update("half")
    assert terminal.getvalue() == "\r\x1b[Kloading\r\x1b[Khalf\r\x1b[K"


def test_a_status_line_of_something_quick_is_never_drawn(monkeypatch):
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    with console.Status("loading") as status:
        status.update("half")
    status._show()  # the timer fires while the context ends
    assert terminal.getvalue() == ""


def test_a_status_line_is_only_for_terminals(monkeypatch):
    monkeypatch.setattr(sys, "stderr", pipe := io.StringIO())
    monkeypatch.setattr(console, "STATUS_DELAY_S", 0.0)
    with console.Status("loading") as status:
        assert not status._timer.is_alive()
    assert pipe.getvalue() == ""
