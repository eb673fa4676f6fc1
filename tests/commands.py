"""Running the command line in tests: in a process of its own, and what it printed."""

import json
import os
import subprocess
import sys
from typing import NamedTuple

PROGRAM = [sys.executable, "-m", "gpt2core"]
PROMPT = "Once upon"


class Result(NamedTuple):
    code: int
    out: str
    err: str

    def error(self) -> str:
        """The one line of an error, after its prefix."""
        assert self.out == ""
        assert self.err.count("\n") == 1, self.err
        assert self.err.startswith("gpt2core: error: "), self.err
        return self.err.removeprefix("gpt2core: error: ").rstrip("\n")


def spawn(*args: str, **options) -> subprocess.CompletedProcess:
    environment = {k: v for k, v in os.environ.items() if k != "GPT2CORE_DEBUG"}
    environment |= options.pop("env", {})
    return subprocess.run([*PROGRAM, *args], env=environment, stdin=subprocess.DEVNULL, timeout=60, **options)


def strict_json(text: str):
    def refuse(name):
        raise AssertionError(f"{name} is no JSON")

    assert text.endswith("\n")
    assert text.count("\n") == 1
    return json.loads(text, parse_constant=refuse)
