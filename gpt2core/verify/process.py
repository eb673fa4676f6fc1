"""Running one backend's worker, and saying how it died if it did."""

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gpt2core._machine import describe_exit


@contextmanager
def finished(job: dict[str, Any], *, timeout_s: float) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Run a worker; the folder with what it wrote, and its result, for as long as the context lasts.

    Whatever happens to the process, there is a result: its "errors" tell of a crash or a timeout.
    """
    with tempfile.TemporaryDirectory(prefix="gpt2core-verify-") as name:
        folder = Path(name)
        (folder / "job.json").write_text(json.dumps(job))
        with (folder / "output").open("wb") as output:
            died = _run([sys.executable, "-m", "gpt2core.verify.worker", name], output, timeout_s)
        try:
            result: dict[str, Any] = json.loads((folder / "result.json").read_text())
        except (OSError, ValueError):
            said = (folder / "output").read_text(errors="replace").strip().splitlines()
            result = {"errors": [f"{died}; it said: {said[-1]}" if said else died]}
        yield folder, result


def _run(command: list[str], output: Any, timeout_s: float) -> str:
    try:
        code = subprocess.run(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, timeout=timeout_s
        ).returncode
    except subprocess.TimeoutExpired:
        return f"its process was stopped after {timeout_s:g} s; allow it more time"
    return describe_exit(code)
