"""The output folder: files that survive a kill, what a measurement depends on, and what may be resumed.

A whole file is replaced at once. The log grows by one synced line per write; what a kill leaves of a last
line is dropped.
"""

import errno
import hashlib
import io
import json
import os
import platform
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Final, NamedTuple, Self

import numpy as np

from gpt2core import __version__
from gpt2core._files import replacing, sync_folder
from gpt2core._json import listed, parse_json_object, read_json_object, shown
from gpt2core._machine import count_cores, name_processor
from gpt2core.bench.errors import BenchmarkError
from gpt2core.errors import CheckpointError

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

MAX_JSON_NBYTES: Final = 64 * 2**20
SAMPLE_NBYTES: Final = 2**20
PACKAGES: Final = (
    *("numpy", "tokenizers", "torch", "jax", "jaxlib", "flax", "onnxruntime", "onnx", "transformers"),
    *("ctranslate2", "llama-cpp-python", "openvino", "openvino-genai", "optimum", "optimum-onnx"),
)
"""The distributions whose versions may change a figure."""

CPU_TIMES: Final = Path("/proc/stat")
_LEFT_OVER: Final = re.compile(
    r"\.(environment|settings|runs|benchmark_results|analysis|components|report|gpt2_\w+)\.\w+\.[0-9a-f]{8}\.tmp"
)
"""What a kill leaves of a file that was being written."""


# -------------------------------------------------------------------------------------------------
# Files


@contextmanager
def _reporting(what: object, verb: str, remedy: str = "") -> Iterator[None]:
    """Let an error of the system name what could not be read, written or made."""
    try:
        yield
    except OSError as error:
        raise BenchmarkError(f"{what} cannot be {verb}: {error.strerror or error}{remedy}") from error


def write_atomically(path: Path, data: bytes) -> None:
    """Replace a file: at every moment `path` is the complete old or the complete new one.

    Raises:
        BenchmarkError: the disk is full, the folder cannot be written to, ...; `path` is as it was.
    """
    with _reporting(path, "written"), replacing(path) as file:
        file.write(data)


def write_json(path: Path, document: Mapping[str, Any]) -> None:
    """`write_atomically` of one JSON object, indented."""
    write_atomically(path, encode_json(document, indent=2))


def write_array(path: Path, array: np.ndarray[Any, Any]) -> None:
    """`write_atomically` of a NumPy array that needs no pickle."""
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    write_atomically(path, buffer.getvalue())


def read_json(path: Path) -> dict[str, Any]:
    """Read one strict JSON object.

    Raises:
        BenchmarkError: it is missing, unreadable or no such thing.
    """
    try:
        return read_json_object(path, max_nbytes=MAX_JSON_NBYTES)
    except CheckpointError as error:
        raise BenchmarkError(str(error)) from error


def encode_json(document: Mapping[str, Any], *, indent: int | None = None) -> bytes:
    """Strict JSON in UTF-8 that ends with a line break; a lone surrogate stays an escape."""
    text = json.dumps(document, allow_nan=False, ensure_ascii=False, indent=indent)
    return text.encode("utf-8", "backslashreplace") + b"\n"


def read_log(path: Path) -> list[dict[str, Any]]:
    """The lines of a log, as `read_numbered_log` reads them, without their numbers."""
    return [line for _, line in read_numbered_log(path)]


def read_numbered_log(path: Path) -> list[tuple[int, dict[str, Any]]]:
    """The lines of a log and their numbers, from 1 on; none if there is no such file.

    A last line that was not finished is left out, and so are blank ones.

    Raises:
        BenchmarkError: it cannot be read, or a finished line is no JSON object.
    """
    if not path.exists():
        return []
    with _reporting(path, "read"):
        data = path.read_bytes()
    lines = data.split(b"\n")[:-1]  # what follows the last line break is torn, or nothing
    try:
        return [(i, parse_json_object(s, f"{path}, line {i}")) for i, s in enumerate(lines, 1) if s.strip()]
    except CheckpointError as error:
        raise BenchmarkError(str(error)) from error


class Log:
    """A file to which whole lines are appended; opening it cuts off a torn last line."""

    def __init__(self, path: Path) -> None:
        self._path = path
        with _reporting(path, "written"):
            self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
            os.ftruncate(self._descriptor, path.read_bytes().rfind(b"\n") + 1)
            os.fsync(self._descriptor)
            sync_folder(path.parent)

    def append(self, record: Mapping[str, Any]) -> None:
        """Add one line and sync it.

        Raises:
            BenchmarkError: the disk is full, ...; the file is as it was.
        """
        remedy = "; what was measured before is safe: make room and go on with --resume"
        view, start = memoryview(encode_json(record)), os.lseek(self._descriptor, 0, os.SEEK_END)
        with _reporting(self._path, "written", remedy):
            try:
                while view:
                    written = os.write(self._descriptor, view)  # may be less than asked for
                    if written <= 0:
                        raise OSError(errno.EIO, "the system wrote nothing")
                    view = view[written:]
                os.fsync(self._descriptor)
            except BaseException:
                os.ftruncate(self._descriptor, start)
                raise

    def close(self) -> None:
        """Close the file."""
        os.close(self._descriptor)


# -------------------------------------------------------------------------------------------------
# The machine, the versions, and other work


def fingerprint() -> dict[str, Any]:
    """The machine and the versions as one JSON object; `id` is a hash of the rest."""
    facts = {
        "machine": {
            "cpu": name_processor(),
            "cores": count_cores(),
            "memory_nbytes": _memory_nbytes(),
            "system": f"{platform.system()} {platform.release()}",
            "architecture": platform.machine(),
        },
        "python": platform.python_version(),
        "gpt2core": __version__,
        "packages": {name: found for name in PACKAGES if (found := _version(name)) is not None},
    }
    canonical = json.dumps(facts, sort_keys=True, separators=(",", ":")).encode()
    return {"id": hashlib.sha256(canonical).hexdigest()[:16], **facts}


def differences(there: Mapping[str, Any], here: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Each entry in which two nested JSON objects differ, as `name: VALUE there, VALUE here`."""
    found = []
    for name in dict.fromkeys([*there, *here]):
        old, new = there.get(name), here.get(name)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            found += differences(old, new, f"{prefix}{name}.")
        elif old != new:
            texts = ["none" if value is None else shown(value) for value in (old, new)]
            found.append(f"{prefix}{name}: {texts[0]} there, {texts[1]} here")
    return found


class OtherWork(NamedTuple):
    """What was done beside a measurement; None where the system does not tell."""

    others_cores: float | None = None  # that other processes than this one and its children kept busy
    steal_share: float | None = None  # of the processors' time, what the hypervisor gave to other machines


class OtherWorkWatch:
    """Watches, from when it is made, what else the machine does. Ticks of 10 ms: one moment says little."""

    def __init__(self) -> None:
        self._begin = _cpu_times()

    def read(self) -> OtherWork:
        """What was done since; children count once they have ended."""
        if self._begin is None or (now := _cpu_times()) is None:
            return OtherWork()
        wall_s, own_s, busy_s, steal_s, all_s = (b - a for a, b in zip(self._begin, now, strict=True))
        if all_s <= 0 or wall_s <= 0:
            return OtherWork()
        return OtherWork(others_cores=(busy_s - own_s) / wall_s, steal_share=steal_s / all_s)


def _cpu_times() -> tuple[float, ...] | None:
    """Seconds: of the clock, of this process and its children, of all processes, stolen, in all."""
    try:
        first = CPU_TIMES.read_text(encoding="ascii").split("\n", 1)[0].split()
        tick_s = 1 / os.sysconf("SC_CLK_TCK")
        user, nice, system, idle, waiting, irq, softirq, steal = (tick_s * int(part) for part in first[1:9])
    except (OSError, ValueError, AttributeError):
        return None
    busy = user + nice + system + irq + softirq
    return time.monotonic(), sum(os.times()[:4]), busy, steal, busy + idle + waiting + steal


def model_id(folder: Path) -> str:
    """A hash that tells checkpoints apart: configuration, tokenizer, and a sample of each weight file.

    The sample is the file's size and a MiB each of its head (with all names and shapes), middle and end; to
    read everything would take longer than many a benchmark.
    """
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.json")) + sorted(folder.glob("*.safetensors")):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as file:
            for start in (0, size // 2, max(0, size - SAMPLE_NBYTES)):
                file.seek(start)
                digest.update(file.read(SAMPLE_NBYTES))
    return digest.hexdigest()[:16]


def _memory_nbytes() -> int | None:
    with suppress(AttributeError, ValueError, OSError):  # Windows has no sysconf, others not all names
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return None


def _version(package: str) -> str | None:
    with suppress(PackageNotFoundError):
        return version(package)
    return None


# -------------------------------------------------------------------------------------------------
# The folder


def check_folder(path: Path, environment: Mapping[str, Any], *, resume: bool, force: bool) -> None:
    """Refuse a folder that may not be written to, before anything expensive is done. Writes nothing.

    Raises:
        BenchmarkError: it holds files and neither `resume` nor `force` is given, or what it holds cannot be
            resumed here.
    """
    with _reporting(f"output folder {path}", "read"):
        names = {entry.name for entry in path.iterdir()} if path.exists() else set()
    if not names or force:
        return
    if not resume:
        raise BenchmarkError(
            f"output folder {path} is not empty; go on with its benchmark with --resume, replace that with "
            "--force, or give another --output"
        )
    if SETTINGS in names:
        found = differences(read_json(path / ENVIRONMENT), environment)
        found = [line for line in found if not line.startswith("id:")]
        _refuse(path, found, "another machine or other versions")
    elif not all(name == ENVIRONMENT or _LEFT_OVER.fullmatch(name) for name in names):
        raise BenchmarkError(f"output folder {path} holds no benchmark to resume; give another --output")


class ResultsFolder:
    """An output folder that this process writes to; use it as a context.

    Args:
        path: is made if it does not exist.
        settings: what `settings.json` must say to be resumed, apart from `MAY_DIFFER` and more of `MAY_GROW`.
        environment: from `fingerprint`; must be the same to resume.
        resume: keep the lines that are there, as `records`. An empty folder is begun.
        force: remove an earlier benchmark; other files stay.

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
        self.path, self.environment, self.records = path, environment, list[dict[str, Any]]()
        with _reporting(f"output folder {path}", "made"):
            path.mkdir(parents=True, exist_ok=True)
        self._unlock = _lock(path)
        try:
            check_folder(path, environment, resume=resume, force=force)
            for file in path.glob(".*.tmp"):
                if _LEFT_OVER.fullmatch(file.name):
                    file.unlink()
            if resume and (path / SETTINGS).exists():
                self._check_settings(settings)
                self.records = read_log(path / RUNS)
            else:
                for pattern in (RUNS, *DERIVED):  # first: no older run may stand below newer settings
                    for file in path.glob(pattern):
                        file.unlink()
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


def _refuse(path: Path, found: Sequence[str], what: str) -> None:
    if found:
        of = f"the benchmark in {path} is of {what} ({listed(found, 5)})"
        raise BenchmarkError(f"{of}; give another --output, or --force")


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
