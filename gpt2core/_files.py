"""Files: replaced as a whole, and the user's cache folder with the question whether it can be trusted."""

import contextlib
import os
import pathlib
import stat
from collections.abc import Iterator
from typing import BinaryIO


@contextlib.contextmanager
def replacing(path: pathlib.Path, *, private: bool = False) -> Iterator[BinaryIO]:
    """Write a file so that at every moment `path` is the complete old or the complete new one.

    It is written beside its place, synced and renamed. Where anything raises, `path` stays as it was.

    Args:
        path: in a folder that exists.
        private: only this user may read and write it, whatever the umask allows.

    Raises:
        OSError: the disk is full, the folder cannot be written to, ...
    """
    temporary = path.with_name(f".{path.name}.{os.urandom(4).hex()}.tmp")
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
    mode = 0o600 if private else 0o666
    try:
        # By an opener, so that `file.name` is a path that others can open.
        with open(temporary, "wb", opener=lambda name, _: os.open(name, flags, mode)) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def sync_folder(folder: pathlib.Path) -> None:
    """Make renames in a folder last beyond a power failure.

    Raises:
        OSError: the folder cannot be opened or synced.
    """
    if os.name != "posix":  # elsewhere a folder cannot be opened
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def cache_folder(part: str) -> pathlib.Path:
    """`$GPT2CORE_CACHE/part`, or `gpt2core/part` in `$XDG_CACHE_HOME` or in `~/.cache`."""
    own = os.environ.get("GPT2CORE_CACHE")
    if own:
        return pathlib.Path(own).expanduser() / part
    root = os.environ.get("XDG_CACHE_HOME")
    return (pathlib.Path(root) if root else pathlib.Path.home() / ".cache") / "gpt2core" / part


def is_ours_alone(path: pathlib.Path) -> bool:
    """Whether this user owns `path` and nobody else may write to it; False where systems do not tell.

    Raises:
        OSError: there is no such file or folder.
    """
    if not hasattr(os, "getuid"):
        return False
    status = os.stat(path)
    return status.st_uid == os.getuid() and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
