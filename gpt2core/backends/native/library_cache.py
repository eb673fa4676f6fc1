"""Where libraries are built and kept, and how one is loaded that nobody else can have written.

Loading a library runs code from its file. Between a look at a name and the use of that name somebody who may
write to the folder, or to one above it, can put another file there. So every folder on the way must be
beyond others' reach, as sshd asks of the folders that hold keys, and what is loaded is the opened file that
was looked at, not its name.
"""

import contextlib
import ctypes
import hashlib
import itertools
import os
import pathlib
import stat
import sys
import time
from collections.abc import Iterator
from typing import Final

from gpt2core._files import is_ours_alone

DIGEST_NBYTES: Final = 32
_MAX_FILES: Final = 32
_ABANDONED_S: Final = 3600.0  # a build takes seconds, and its compiler is ended after two minutes
_DESCRIPTORS: Final = "/proc/self/fd/"

_C: Final = ctypes.CDLL(None if os.name == "posix" else "ucrtbase")  # fegetenv and fesetenv
_loads: Final = itertools.count()


def find_folder(folder: pathlib.Path, *, make: bool) -> pathlib.Path | None:
    """`folder` with its links resolved, where only this user can put files into it; else None.

    Args:
        folder: of the libraries.
        make: make it where it is missing, and the folders above it, for this user alone.
    """
    try:
        if make:
            _make_private(folder)
        found = pathlib.Path(os.path.realpath(folder, strict=True))
        return found if is_ours_alone(found) and all(map(_is_beyond_others, found.parents)) else None
    except OSError:
        return None


@contextlib.contextmanager
def new_scratch(folder: pathlib.Path | None) -> Iterator[pathlib.Path]:
    """A new folder of this user alone, inside `folder` or, without one, the system's temporary folder.

    Raises:
        OSError: it cannot be made, or others could exchange it.
    """
    import shutil  # these cost milliseconds, which only those who build should wait for
    import tempfile

    parent = folder or pathlib.Path(os.path.realpath(tempfile.gettempdir()))
    if folder is None and not all(map(_is_beyond_others, (parent, *parent.parents))):
        raise OSError(f"others could exchange what lies in the temporary folder {parent}")
    made = tempfile.mkdtemp(prefix="." if folder else "gpt2core-native-", dir=parent)
    try:
        yield pathlib.Path(made)
    finally:  # no TemporaryDirectory: its finaliser would also run when a forked child ends
        shutil.rmtree(made, ignore_errors=True)


def sign(path: pathlib.Path) -> None:
    """Append the file's digest, behind the end that loaders read, and let no other user write to it.

    Raises:
        OSError: the disk is full, ...
    """
    path.chmod(0o600)  # compilers give what the umask lets them, perhaps to a group
    with path.open("ab") as file:
        file.write(hashlib.sha256(path.read_bytes()).digest())


def load(name: str) -> ctypes.CDLL:
    """Load a library and keep the thread's floating-point environment.

    gcc links code into what it builds with `-funsafe-math-optimizations` that makes the thread which loads it
    flush subnormal numbers to zero: NumPy's results would change too, though the library is refused.

    Raises:
        OSError: it is no library, or must not be executed.
    """
    environment = ctypes.create_string_buffer(256)  # fenv_t has 32 bytes or fewer
    _C.fegetenv(environment)
    try:
        return ctypes.CDLL(name)
    finally:
        _C.fesetenv(environment)


def load_kept(folder: pathlib.Path, name: str) -> ctypes.CDLL | None:
    """The library `name` of `folder`; None where it is missing, damaged, not ours alone or is no library."""
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        opened = os.open(folder, flags | os.O_DIRECTORY)
        try:
            if not _is_private(os.fstat(opened)):
                return None
            file = os.fdopen(os.open(name, flags | os.O_NONBLOCK, dir_fd=opened), "rb")
        finally:
            os.close(opened)
        with file:
            status = os.fstat(file.fileno())
            if not (stat.S_ISREG(status.st_mode) and _is_private(status)):
                return None
            content = file.read()
            # A file that was cut short would not fail to load, but end the process.
            if hashlib.sha256(content[:-DIGEST_NBYTES]).digest() != content[-DIGEST_NBYTES:]:
                return None
            return load(_name_of(file.fileno()) or str(folder / name))
    except OSError:
        return None


def _name_of(descriptor: int) -> str | None:
    """A name for the loader of what is open as `descriptor`; None where the system has none.

    Loaders take a name that they know for the library that they know, and numbers of descriptors are used
    again; so no name is given twice.
    """
    if sys.platform != "linux" or not os.path.exists(f"{_DESCRIPTORS}{descriptor}"):
        return None
    return _DESCRIPTORS + "./" * next(_loads) + str(descriptor)


def prune(folder: pathlib.Path) -> None:
    """Remove the oldest libraries of many, and the folders of builds that were killed.

    Raises:
        OSError: one of them cannot be removed.
    """
    import shutil

    paths = list(folder.iterdir())
    by_age = sorted((path for path in paths if path.suffix == ".so"), key=_changed_s)
    for path in by_age[:-_MAX_FILES]:
        path.unlink(missing_ok=True)  # those who have loaded it keep it
    for path in paths:
        if path.name.startswith(".") and path.is_dir() and time.time() - _changed_s(path) > _ABANDONED_S:
            shutil.rmtree(path, ignore_errors=True)


def _changed_s(path: pathlib.Path) -> float:
    return path.stat().st_mtime


def _make_private(folder: pathlib.Path) -> None:
    """Make a folder and all that are missing above it, which `mkdir(parents=True)` leaves to the umask."""
    for path in (*reversed(folder.parents), folder):
        if not path.exists():
            path.mkdir(mode=0o700, exist_ok=True)


def _is_private(status: os.stat_result) -> bool:
    return status.st_uid == os.getuid() and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def _is_beyond_others(folder: pathlib.Path) -> bool:
    """Whether no other user but root can rename what this user has in `folder`."""
    status = os.stat(folder)
    shared = status.st_mode & (stat.S_IWGRP | stat.S_IWOTH) and not status.st_mode & stat.S_ISVTX
    return status.st_uid in (0, os.getuid()) and not shared
