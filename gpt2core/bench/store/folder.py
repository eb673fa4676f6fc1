"""The output folder of a benchmark: begun, refused, replaced or resumed; held by one process at a time."""

import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Self

from gpt2core.bench.errors import BenchmarkError
from gpt2core.bench.store.environment import differences
from gpt2core.bench.store.files import Log, encode_json, read_json, read_log, write_atomically, write_json

ENVIRONMENT: Final = "environment.json"
SETTINGS: Final = "settings.json"
RUNS: Final = "runs.jsonl"
DERIVED: Final = (
    *("benchmark_results.npy", "benchmark_results.json", "analysis.json", "components.json"),
    *("report.html", "gpt2_*.png"),
)
"""What is made from the runs, as patterns; it does not outlive them."""

MAY_DIFFER: Final = ("timeout_s", "retries")
"""Settings that change no measured time: a run whose cells timed out may be resumed with a longer limit."""

MAY_GROW: Final = ("runs", "rounds")
"""Settings of which a resumed benchmark may have more: what was measured before stays."""

_LEFT_OVER: Final = re.compile(
    r"\.(environment|settings|runs|benchmark_results|analysis|components|report|gpt2_\w+)\.\w+\.[0-9a-f]{8}\.tmp"
)
"""What a kill leaves of a file that was being written."""


def check_folder(path: Path, environment: Mapping[str, Any], *, resume: bool, force: bool) -> None:
    """Refuse a folder that may not be written to, before anything expensive is done. Writes nothing.

    Raises:
        BenchmarkError: it holds files and neither `resume` nor `force` is given, or what it holds cannot be
            resumed here.
    """
    try:
        names = {entry.name for entry in path.iterdir()} if path.exists() else set()
    except OSError as error:
        raise BenchmarkError(f"output folder {path} cannot be read: {error.strerror}") from error
    if not names or force:
        return
    if not resume:
        raise BenchmarkError(
            f"output folder {path} is not empty; go on with its benchmark with --resume, replace that with "
            "--force, or give another --output"
        )
    if SETTINGS in names:
        found = differences(read_json(path / ENVIRONMENT), environment)
        _refuse(
            path, [line for line in found if not line.startswith("id:")], "another machine or other versions"
        )
    elif not all(name == ENVIRONMENT or _LEFT_OVER.fullmatch(name) for name in names):
        raise BenchmarkError(f"output folder {path} holds no benchmark to resume; give another --output")


class ResultsFolder:
    """An output folder that this process writes to; use it as a context.

    Args:
        path: is made if it does not exist.
        settings: what `settings.json` must say to be resumed, apart from `MAY_DIFFER` and more of `MAY_GROW`.
        environment: from `fingerprint`; must be the same to resume.
        resume: keep the lines that are there. An empty folder is begun.
        force: remove an earlier benchmark; other files stay.

    Attributes:
        records: the lines of runs.jsonl.

    Raises:
        BenchmarkError: as `check_folder`; or another process writes there; or a file cannot be written.
    """

    def __init__(
        self,
        path: Path,
        settings: Mapping[str, Any],
        environment: Mapping[str, Any],
        *,
        resume: bool = False,
        force: bool = False,
    ) -> None:
        self.path = path
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise BenchmarkError(f"output folder {path} cannot be made: {error.strerror}") from error
        self._unlock = _lock(path)
        try:
            check_folder(path, environment, resume=resume, force=force)
            self._remove(".*.tmp", only=_LEFT_OVER)
            if resume and (path / SETTINGS).exists():
                self._check_settings(settings)
                self.records = read_log(path / RUNS)
            else:
                for pattern in (RUNS, *DERIVED):  # first: no older run may stand below newer settings
                    self._remove(pattern)
                self.records = []
            write_json(path / ENVIRONMENT, environment)
            write_json(path / SETTINGS, settings)
            self._log = Log(path / RUNS)
        except BaseException:
            self._unlock()
            raise

    def append(self, record: Mapping[str, Any]) -> None:
        """Add one line to runs.jsonl; when this returns, it is on the disk."""
        self._log.append(record)
        self.records.append(dict(record))

    def keep(self, records: Sequence[dict[str, Any]]) -> None:
        """Replace runs.jsonl by these of its lines."""
        self._log.close()
        write_atomically(self.path / RUNS, b"".join(map(encode_json, records)))
        self._log = Log(self.path / RUNS)
        self.records = list(records)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._log.close()
        self._unlock()

    def _check_settings(self, settings: Mapping[str, Any]) -> None:
        there, here = dict(read_json(self.path / SETTINGS)), dict(settings)
        for name in (*MAY_DIFFER, *MAY_GROW):
            old, new = there.get(name), here.get(name)
            if name in MAY_DIFFER or (isinstance(old, int) and isinstance(new, int) and new > old):
                there.pop(name, None)
                here.pop(name, None)
        _refuse(self.path, differences(there, here), "other settings")

    def _remove(self, pattern: str, *, only: re.Pattern[str] | None = None) -> None:
        for file in self.path.glob(pattern):
            if only is None or only.fullmatch(file.name):
                file.unlink()


def _refuse(path: Path, found: Sequence[str], what: str) -> None:
    if found:
        shown = "; ".join([*found[:5], *([f"and {len(found) - 5} more"] if len(found) > 5 else [])])
        raise BenchmarkError(
            f"the benchmark in {path} is of {what} ({shown}); give another --output, or --force"
        )


def _lock(path: Path) -> Callable[[], None]:
    """Keep other processes from writing to a folder until the result is called, or this process ends."""
    if os.name != "posix":  # elsewhere a folder cannot be opened
        return lambda: None
    import fcntl

    descriptor = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(descriptor)
        raise BenchmarkError(
            f"another process writes to {path}; wait for it or give another --output"
        ) from error
    except OSError:  # a file system without locks
        os.close(descriptor)
        return lambda: None
    return lambda: os.close(descriptor)
