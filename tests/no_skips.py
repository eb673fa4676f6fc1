"""A pytest plugin: under CI=true or GPT2CORE_NO_SKIPS=1 a skip fails the run unless hardware is its reason.

A test that this machine could run but did not is a test that nobody runs.
"""

import os
import re
from typing import Any

import pytest

HARDWARE = re.compile(r"(?:Skipped: )?(?:needs a|no) CUDA device")
"""The whole reason of a skip that is excused; one that only mentions CUDA is not."""


def _applies() -> bool:
    return os.environ.get("CI") == "true" or os.environ.get("GPT2CORE_NO_SKIPS") == "1"


class NoSkips:
    """Collects unexcused skips; under xdist the controller receives the workers' reports."""

    def __init__(self) -> None:
        self.unexcused: list[str] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        expected = getattr(report, "wasxfail", None)
        if expected is None:
            self._note(report)
        elif report.skipped and "XFailed" in str(report.longrepr):  # pytest.xfail() ends a test like a skip
            self.unexcused.append(f"{report.nodeid}: pytest.xfail: {expected.removeprefix('reason: ')}")

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        self._note(report)

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if self.unexcused and session.exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        if self.unexcused:
            terminalreporter.section("skips that no missing hardware excuses", red=True)
            for line in self.unexcused:
                terminalreporter.line(line)

    def _note(self, report: pytest.TestReport | pytest.CollectReport) -> None:
        if report.skipped:
            reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
            if not HARDWARE.fullmatch(reason):
                self.unexcused.append(f"{report.nodeid}: {reason}")


def pytest_configure(config: pytest.Config) -> None:
    if _applies():
        config.pluginmanager.register(NoSkips(), "gpt2core-no-skips")
