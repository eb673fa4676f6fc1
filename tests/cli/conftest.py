"""A small checkpoint, and the command line run in this process."""

import io
import sys

import pytest
from commands import Result

# gpt2core is imported by the fixtures: this file may be read before shape checks are in place.


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    from gpt2core.testing import random_checkpoint

    return str(random_checkpoint(tmp_path_factory.mktemp("tiny")))


@pytest.fixture(scope="module")
def model(folder):
    from gpt2core import GPT2

    with GPT2.from_pretrained(folder) as loaded:
        yield loaded


class TerminalInput(io.TextIOWrapper):
    def isatty(self):
        return True


@pytest.fixture
def run(capfd, monkeypatch):
    """Run a command in this process, with bytes on stdin."""
    from gpt2core.cli import main

    def run(*args: str, stdin: bytes = b"", terminal: bool = False) -> Result:
        stream = (TerminalInput if terminal else io.TextIOWrapper)(io.BytesIO(stdin))
        monkeypatch.setattr(sys, "stdin", stream)
        code = main(args)
        return Result(code, *capfd.readouterr())

    return run
