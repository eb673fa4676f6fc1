"""Runs the classic benchmark in child processes and kills them; used by test_bench_classic as a program.

Forked from one parent that has imported everything, since a fresh interpreter for each of dozens of runs
would take longer than all of them.
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

from gpt2core import GPT2
from gpt2core.bench import ClassicSettings, run_classic


def start(settings: ClassicSettings, folder: Path) -> int:
    """Begin or resume in a child process, and return its id."""
    child = os.fork()
    if child == 0:
        try:
            run_classic(settings, output=folder, resume=True, report=False)
        except BaseException as error:
            print(repr(error), file=sys.stderr)
            os._exit(1)
        os._exit(0)
    return child


def kill_after(child: int, log: Path, lines: int, delay_s: float) -> bool:
    """Kill once the log has so many lines and a moment has passed; whether that came before the end."""
    while not os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT):
        if not lines or (log.exists() and log.read_bytes().count(b"\n") >= lines):
            time.sleep(delay_s)
            os.kill(child, signal.SIGKILL)
            break
        time.sleep(0.0005)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.waitstatus_to_exitcode(status) == 0, status
    return os.WIFSIGNALED(status)


def main(model: str, root: Path, points: int) -> None:
    """For each of `points` folders: kill at a random moment, resume, kill again, resume to the end."""
    settings = ClassicSettings(model=model, backend="numpy", prompts=("One", "Two!"), lengths=(8, 12), runs=2)
    chance, killed = random.Random(0), []
    GPT2.from_pretrained(model, backend="numpy").close()  # imported once, before the first fork
    cells = len(settings.trials())
    for point in range(points):
        folder = root / str(point)
        first = chance.randrange(cells)
        for lines in (first, chance.randrange(first, cells)):
            delay_s = chance.uniform(
                0, 0.03 if lines == 0 else 0.004
            )  # the beginning takes longer than a cell
            killed.append(kill_after(start(settings, folder), folder / "runs.jsonl", lines, delay_s))
        _, status = os.waitpid(start(settings, folder), 0)
        assert status == 0, status
    print(json.dumps(killed))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
