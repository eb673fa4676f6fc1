"""Files that survive a full disk, a short write and a kill at any moment.

A whole file is written beside its place, synced and renamed, so that its name always shows the complete old
or the complete new one. The log grows by one synced line per write; what a kill leaves of a last line is
dropped.
"""

import errno
import io
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np

from gpt2core.bench.errors import BenchmarkError

TEMPORARY: Final = ".tmp"
MAX_JSON_NBYTES: Final = 64 * 2**20


def write_atomically(path: Path, data: bytes) -> None:
    """Replace a file: at every moment `path` is the complete old or the complete new one.

    Raises:
        BenchmarkError: the disk is full, the folder cannot be written to, ...; `path` is as it was.
    """
    temporary = path.with_name(f".{path.name}.{os.urandom(4).hex()}{TEMPORARY}")
    try:
        try:
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
            try:
                _write_all(descriptor, data)
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        sync_folder(path.parent)
    except OSError as error:
        raise BenchmarkError(f"{path} cannot be written: {error.strerror or error}") from error


def sync_folder(folder: Path) -> None:
    """Make renames in a folder last beyond a power failure."""
    if os.name != "posix":  # elsewhere a folder cannot be opened
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


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
        with path.open("rb") as file:
            data = file.read(MAX_JSON_NBYTES + 1)
    except OSError as error:
        raise BenchmarkError(f"{path} cannot be read: {error.strerror}") from error
    if len(data) > MAX_JSON_NBYTES:
        raise BenchmarkError(f"{path} has more than {MAX_JSON_NBYTES} bytes; is it the right file?")
    return decode_json(data, str(path))


def encode_json(document: Mapping[str, Any], *, indent: int | None = None) -> bytes:
    """Strict JSON in UTF-8 that ends with a line break; a lone surrogate stays an escape."""
    text = json.dumps(document, allow_nan=False, ensure_ascii=False, indent=indent)
    return text.encode("utf-8", "backslashreplace") + b"\n"


def decode_json(data: bytes, name: str) -> dict[str, Any]:
    """Parse what `encode_json` wrote, found in `name`.

    Raises:
        BenchmarkError: it is no strict JSON object.
    """
    try:
        document = json.loads(data.decode(), parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise BenchmarkError(f"{name} is not strict JSON: {error}") from error
    if not isinstance(document, dict):
        raise BenchmarkError(f"{name} holds no JSON object")
    return document


def read_log(path: Path) -> list[dict[str, Any]]:
    """The lines of a log, as `read_numbered_log` reads them, without their numbers."""
    return [line for _, line in read_numbered_log(path)]


def read_numbered_log(path: Path) -> list[tuple[int, dict[str, Any]]]:
    """The lines of a log and their numbers, from 1 on; none if there is no such file.

    A last line that was not finished is left out, and so are blank ones.

    Raises:
        BenchmarkError: it cannot be read, or a finished line is no JSON object.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return []
    except OSError as error:
        raise BenchmarkError(f"{path} cannot be read: {error.strerror}") from error
    lines = data.split(b"\n")[:-1]  # what follows the last line break is torn, or nothing
    return [(i, decode_json(line, f"{path}, line {i}")) for i, line in enumerate(lines, 1) if line.strip()]


class Log:
    """A file to which whole lines are appended; opening it cuts off a torn last line."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
            data = path.read_bytes()
            sound_nbytes = data.rfind(b"\n") + 1
            if sound_nbytes < len(data):
                os.ftruncate(self._descriptor, sound_nbytes)
            os.fsync(self._descriptor)
            sync_folder(path.parent)
        except OSError as error:
            raise BenchmarkError(f"{path} cannot be written: {error.strerror}") from error

    def append(self, record: Mapping[str, Any]) -> None:
        """Add one line and sync it.

        Raises:
            BenchmarkError: the disk is full, ...; the file is as it was.
        """
        data = encode_json(record)
        start = os.lseek(self._descriptor, 0, os.SEEK_END)
        try:
            _write_all(self._descriptor, data)
            os.fsync(self._descriptor)
        except BaseException as error:
            os.ftruncate(self._descriptor, start)
            if not isinstance(error, OSError):
                raise
            raise BenchmarkError(
                f"{self._path} cannot be written: {error.strerror or error}; "
                "what was measured before is safe: make room and go on with --resume"
            ) from error

    def close(self) -> None:
        """Close the file."""
        os.close(self._descriptor)


def _write_all(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        written = os.write(descriptor, view)  # may be less than asked for
        if written <= 0:
            raise OSError(errno.EIO, "the system wrote nothing")
        view = view[written:]


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")
