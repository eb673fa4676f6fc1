"""The kernels as a shared library: compiled with the user's compiler, kept in the user's cache folder.

Loading a library runs code from its file. Therefore only a file of this user is loaded, from a folder of this
user that nobody else may write to; without such a folder each process builds its own and keeps nothing.
"""

import contextlib
import ctypes
import hashlib
import os
import pathlib
import platform
import shlex
import signal
import threading
from typing import TYPE_CHECKING, Final

from gpt2core._files import cache_folder, is_ours_alone
from gpt2core._machine import describe_processor
from gpt2core.backends._shared.c_compiler import find_compiler, missing_compiler
from gpt2core.errors import BackendUnavailableError

if TYPE_CHECKING:
    from tempfile import TemporaryDirectory

__all__ = ["find_compiler", "load_library"]

KERNELS: Final = pathlib.Path(__file__).parent / "kernels"
FLAGS_VARIABLE: Final = "GPT2CORE_CFLAGS"
"""The environment variable with further flags for the compiler; the last one wins."""
COMPILE_TIMEOUT_S: Final = 120.0
_FLAGS: Final = ("-O3", "-std=gnu11", "-fno-math-errno", "-fPIC", "-shared", "-pthread")
_FOR_THIS_PROCESSOR: Final = {
    "x86_64": "-march=native",
    "aarch64": "-mcpu=native",
    "arm64": "-mcpu=native",  # aarch64, as macOS calls it
}
_DIGEST_NBYTES: Final = 32
_MOST_FILES: Final = 32
_MOST_ERROR_LINES: Final = 12

_loaded: dict[pathlib.Path, ctypes.CDLL] = {}
_lock: Final = threading.Lock()  # threads that want the same library wait for one build


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
            _loaded[path] = _kept(path) or _built(path, sources, [compiler, *flags])
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
    return [*_FLAGS, *([native] if native else []), *further]


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


def _kept(path: pathlib.Path) -> ctypes.CDLL | None:
    """The library in the cache; None where it is missing, damaged, not ours alone or cannot be loaded."""
    try:
        if not (is_ours_alone(path.parent) and is_ours_alone(path)):
            return None
        content = path.read_bytes()
        # A file that was cut short would not fail to load, but end the process.
        if hashlib.sha256(content[:-_DIGEST_NBYTES]).digest() != content[-_DIGEST_NBYTES:]:
            return None
        return ctypes.CDLL(str(path))
    except OSError:
        return None


def _built(path: pathlib.Path, sources: pathlib.Path, command: list[str]) -> ctypes.CDLL:
    """The library, compiled; kept as `path` where that can be done safely."""
    with _scratch(path.parent) as scratch:
        made = pathlib.Path(scratch) / path.name
        _compile([*command, "gpt2.c", "-o", str(made), "-lm"], sources)
        try:
            made.chmod(0o600)  # compilers give what the umask lets them, perhaps to a group
            with made.open("ab") as file:
                file.write(hashlib.sha256(made.read_bytes()).digest())  # loaders do not look behind the end
            library = ctypes.CDLL(str(made))
        except OSError as error:
            raise BackendUnavailableError(
                f"the native backend was built, but cannot be loaded: {error}; let GPT2CORE_CACHE name a "
                "folder whose files may be executed, or use backend='onnx'"
            ) from error
        if made.parent.parent == path.parent:
            with contextlib.suppress(OSError):  # costs the next process a build, and this one nothing
                os.replace(made, path)
                _prune(path.parent)
    return library


def _scratch(folder: pathlib.Path) -> "TemporaryDirectory[str]":
    """A new folder of this user alone: inside `folder` where nobody else may write there, else elsewhere."""
    from tempfile import TemporaryDirectory  # costs milliseconds, which only those who build should wait for

    with contextlib.suppress(OSError):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if is_ours_alone(folder):
            return TemporaryDirectory(prefix=".", dir=folder, ignore_cleanup_errors=True)
    return TemporaryDirectory(prefix="gpt2core-native-", ignore_cleanup_errors=True)


def _compile(command: list[str], sources: pathlib.Path) -> None:
    import subprocess  # as above

    try:
        compiler = subprocess.Popen(
            command,
            cwd=sources,
            env={**os.environ, "LC_ALL": "C"},
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
        raise _failed(command[0], f"ended with exit code {compiler.returncode}", "\n".join(last))


def _failed(compiler: str, how: str, said: str = "") -> BackendUnavailableError:
    remedy = "use backend='onnx', or name another compiler with GPT2CORE_CC"
    said = f"; it said:\n{said}" if said else ""
    return BackendUnavailableError(f"the native backend could not be built: {compiler} {how}; {remedy}{said}")


def _prune(folder: pathlib.Path) -> None:
    files = [path for path in folder.iterdir() if path.suffix == ".so"]
    for path in sorted(files, key=lambda path: path.stat().st_mtime)[:-_MOST_FILES]:
        path.unlink(missing_ok=True)  # those who have loaded it keep it
