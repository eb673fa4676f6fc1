"""Compiled steps kept on disk, so that a second process need not compile.

JAX has a cache of its own, but it is switched on for the whole process; a library should not do that.
Here each compiled step is one file under the user's cache folder.

Loading an executable runs code from its file (JAX unpickles it, and it holds machine code). Therefore only
files of this user are read, from a folder of this user that nobody else may write to; without such a folder
nothing is kept.
"""

import contextlib
import hashlib
import os
import pathlib
import platform
import sys
from collections.abc import Sequence
from functools import cache
from importlib.metadata import version
from typing import Any, Final

import flax
import jax
from jax.experimental import serialize_executable
from jax.stages import Compiled

from gpt2core._files import is_ours_alone, replacing
from gpt2core._machine import count_cores, describe_processor

_DIGEST_NBYTES: Final = 32
_MOST_FILES: Final = 256
_SOURCES: Final = ("module.py", "step.py")  # what decides which code is compiled


def executable_key(devices: Sequence[jax.Device], *parts: object) -> str:
    """The name of a compiled step: a digest of all that its code depends on.

    That is the source of the step, the versions of Python, JAX, jaxlib and Flax, XLA's flags, the devices,
    the processor's instructions, and `parts`.
    """
    everything = (
        _source(),
        sys.version,
        jax.__version__,
        version("jaxlib"),
        flax.__version__,
        os.environ.get("XLA_FLAGS", ""),
        [(d.platform, d.device_kind, d.id, d.client.platform_version) for d in devices],
        (platform.machine(), describe_processor(), count_cores()),
        *parts,
    )
    return hashlib.sha256(repr(everything).encode()).hexdigest()


def load(folder: pathlib.Path, key: str, in_tree: Any, out_tree: Any, devices: Sequence[Any]) -> Any:
    """The executable `key`, or None where it is missing, damaged, somebody else's or not loadable here."""
    try:
        if not is_ours_alone(folder) or not is_ours_alone(folder / key):
            return None
        content = (folder / key).read_bytes()
    except OSError:
        return None
    digest, payload = content[:_DIGEST_NBYTES], content[_DIGEST_NBYTES:]
    if hashlib.sha256(payload).digest() != digest:
        return None
    try:
        return serialize_executable.deserialize_and_load(
            payload, in_tree, out_tree, backend=devices[0].client, execution_devices=devices
        )
    except Exception:  # whatever a stale file makes XLA raise, compiling anew is the answer
        return None


def save(folder: pathlib.Path, key: str, compiled: Compiled) -> bool:
    """Write an executable; False where that is not possible, which costs the next process time only."""
    try:
        payload, _, _ = serialize_executable.serialize(compiled)
    except Exception:  # not every platform can serialize
        return False
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not is_ours_alone(folder):
            return False
        with replacing(folder / key, private=True) as file:
            file.write(hashlib.sha256(payload).digest() + payload)
        _prune(folder)
    except OSError:
        return False
    return True


def _prune(folder: pathlib.Path) -> None:
    files = [path for path in folder.iterdir() if not path.name.startswith(".")]
    for path in sorted(files, key=lambda path: path.stat().st_mtime)[:-_MOST_FILES]:
        with contextlib.suppress(OSError):  # another process was faster
            path.unlink()


@cache
def _source() -> str:
    here = pathlib.Path(__file__).parent
    return hashlib.sha256(b"".join((here / name).read_bytes() for name in _SOURCES)).hexdigest()
