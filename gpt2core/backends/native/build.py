"""The kernels as a shared library: compiled with the user's compiler, kept in the user's cache folder.

Without a folder that only this user can put files into, each process builds its own and keeps nothing.
"""

import contextlib
import ctypes
import errno
import hashlib
import os
import pathlib
import platform
import shlex
import signal
import sys
import threading
from typing import Final

from gpt2core._files import cache_folder
from gpt2core._machine import describe_processor
from gpt2core.backends._shared.c_compiler import compile_command, find_compiler, missing_compiler
from gpt2core.backends._shared.variants import FLAGS, KERNELS
from gpt2core.backends.native.library_cache import find_folder, load, load_kept, new_scratch, prune, sign
from gpt2core.errors import BackendUnavailableError

__all__ = ["find_compiler", "load_library"]

FLAGS_VARIABLE: Final = "GPT2CORE_CFLAGS"
"""The environment variable with further flags for the compiler; the last one wins."""
COMPILE_TIMEOUT_S: Final = 120.0
_FOR_THIS_PROCESSOR: Final = {
    "x86_64": "-march=native",
    "aarch64": "-mcpu=native",
    "arm64": "-mcpu=native",  # aarch64, as macOS calls it
}
_FOLDER_FAULTS: Final = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
_MOST_ERROR_LINES: Final = 12

_loaded: dict[pathlib.Path, ctypes.CDLL] = {}
_lock = threading.Lock()  # threads that want the same library wait for one build


def load_library(sources: pathlib.Path = KERNELS) -> ctypes.CDLL:
    """The library made of `gpt2.c` and its headers: of this process, else of the cache, else built now.

    Building takes seconds, reading the cache milliseconds. The environment variables GPT2CORE_CC (a compiler)
    and GPT2CORE_CFLAGS (further flags, such as "-mno-avx512f") are read with every call.

    Args:
        sources: the folder of `gpt2.c`; every `*.c` and `*.h` in it counts.

    Raises:
        BackendUnavailableError: no compiler, one that fails or takes longer than 120 s, flags that cannot be
            split, or a library that the system refuses to load.
    """
    compiler = find_compiler()
    if compiler is None or missing_compiler() is not None:
        raise BackendUnavailableError(f"the native backend {missing_compiler()} or use backend='onnx'")
    flags = _flags()
    path = cache_folder("native") / f"{_key(sources, compiler, flags)}.so"
    with _lock:
        if path not in _loaded:
            folder = find_folder(path.parent, make=False)
            kept = load_kept(folder, path.name) if folder is not None else None
            _loaded[path] = kept or _built(path, sources, [*compile_command(compiler), *flags])
        return _loaded[path]


def _flags() -> list[str]:
    text = os.environ.get(FLAGS_VARIABLE, "")
    try:
        further = shlex.split(text)
    except ValueError as error:
        raise BackendUnavailableError(
            f"{FLAGS_VARIABLE} is {text!r}, which cannot be split into flags ({error}); correct or unset it"
        ) from error
    native = _FOR_THIS_PROCESSOR.get(platform.machine())
    return [*FLAGS, *([native] if native else []), *further]


def _key(sources: pathlib.Path, compiler: str, flags: list[str]) -> str:
    """A digest of all that the library depends on; the compiler's version shows in its size and time."""
    status = os.stat(compiler)
    everything = (
        [(one.name, one.read_bytes()) for one in sorted(sources.iterdir()) if one.suffix in (".c", ".h")],
        (compiler, os.path.realpath(compiler), status.st_size, status.st_mtime_ns),
        flags,
        platform.machine(),
        describe_processor(),
    )
    return hashlib.sha256(repr(everything).encode()).hexdigest()[:32]


def _built(path: pathlib.Path, sources: pathlib.Path, command: list[str]) -> ctypes.CDLL:
    """The library, compiled in its folder and kept there; else in the temporary folder, and not kept."""
    _say(f"compiling the native backend for this processor with {command[0]}, which takes some seconds once")
    folder = find_folder(path.parent, make=True)
    if folder is not None:
        with contextlib.suppress(_UnfitFolderError):  # full, read-only, or its files must not be executed
            return _built_in(folder, path.name, sources, command)
    return _built_in(None, path.name, sources, command)


def _built_in(
    folder: pathlib.Path | None, name: str, sources: pathlib.Path, command: list[str]
) -> ctypes.CDLL:
    try:
        with new_scratch(folder) as scratch:
            made = scratch / name
            _compile([*command, "gpt2.c", "-o", str(made), "-lm"], sources, scratch)
            sign(made)
            library = load(str(made))
            if folder is not None:
                with contextlib.suppress(OSError):  # costs the next process a build, and this one nothing
                    os.replace(made, folder / name)
                    prune(folder)
        return library
    except OSError as error:
        raise _UnfitFolderError(
            f"the native backend cannot be built and loaded: {error}; let GPT2CORE_CACHE name a folder with "
            "room whose files may be executed, or use backend='onnx'"
        ) from error


def _say(text: str) -> None:
    if sys.stderr is not None:  # started without one, print would take stdout
        print(f"gpt2core: {text}", file=sys.stderr, flush=True)


class _UnfitFolderError(BackendUnavailableError):
    """The folder is at fault, so another one may do."""


def _compile(command: list[str], sources: pathlib.Path, scratch: pathlib.Path) -> None:
    import subprocess  # costs milliseconds, which only those who build should wait for

    try:
        compiler = subprocess.Popen(
            command,
            cwd=sources,
            env={**os.environ, "LC_ALL": "C", "TMPDIR": str(scratch), "ZIG_LOCAL_CACHE_DIR": str(scratch)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            process_group=0,  # a compiler starts others, which must end with it
        )
    except OSError as error:
        raise _failed(command[0], f"does not start ({error})") from error
    try:
        _, stderr = compiler.communicate(timeout=COMPILE_TIMEOUT_S)
    except BaseException as error:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(compiler.pid, signal.SIGKILL)
        compiler.communicate()
        if isinstance(error, subprocess.TimeoutExpired):
            raise _failed(command[0], f"took longer than {COMPILE_TIMEOUT_S:g} s") from error
        raise
    if compiler.returncode != 0:
        last = stderr.decode(errors="replace").splitlines()[-_MOST_ERROR_LINES:]
        fault = next((os.strerror(n) for n in _FOLDER_FAULTS if any(os.strerror(n) in s for s in last)), None)
        if fault is not None:
            raise OSError(f"{command[0]} said: {fault}, in {scratch.parent}")
        raise _failed(command[0], f"ended with exit code {compiler.returncode}", "\n".join(last))


def _failed(compiler: str, how: str, said: str = "") -> BackendUnavailableError:
    remedy = "use backend='onnx', or name another compiler with GPT2CORE_CC"
    message = f"the native backend could not be built: {compiler} {how}; {remedy}"
    return BackendUnavailableError(f"{message}\n{said}" if said else message)


def _renew_lock() -> None:
    """In a forked child, which lacks the thread that may have been building."""
    global _lock
    _lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_lock)
