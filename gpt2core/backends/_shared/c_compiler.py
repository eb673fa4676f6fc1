"""Which C compiler this machine has; looked up, never run, so that the registry can ask."""

import os
import platform
import sys
from importlib.util import find_spec
from typing import Final

VARIABLE: Final = "GPT2CORE_CC"
"""The environment variable that names a compiler: a program's name or path."""
_PROGRAMS: Final = ("cc", "gcc", "clang")
_ZIG: Final = "zig"


def find_compiler() -> str | None:
    """The path of the C compiler; None: there is none.

    It is what GPT2CORE_CC names, else the first of cc, gcc and clang, else the zig of the package ziglang.
    """
    import shutil  # costs milliseconds, which those who need no compiler should not wait for

    named = os.environ.get(VARIABLE)
    found = map(shutil.which, (named,) if named else _PROGRAMS)
    path = next((path for path in found if path is not None), None)
    return find_zig() if path is None and named in (None, "", _ZIG) else path


def compile_command(compiler: str) -> list[str]:
    """What to run for a compiler that `find_compiler` found."""
    is_zig = os.path.splitext(os.path.basename(compiler))[0] == _ZIG
    return [compiler, "cc", "-fno-sanitize=all"] if is_zig else [compiler]


def find_zig() -> str | None:
    """The program inside the package ziglang, which the extra `native` installs."""
    spec = find_spec("ziglang")
    for folder in (spec and spec.submodule_search_locations) or ():
        program = os.path.join(folder, _ZIG + (".exe" if os.name == "nt" else ""))
        if os.access(program, os.X_OK):
            return program
    return None


def missing_compiler() -> str | None:
    """Why nothing can be compiled here, with the remedy, as in "the backend ..."; None where it can be."""
    if os.name != "posix":
        return f"needs a POSIX system such as Linux or macOS, not {sys.platform!r}; run it on one"
    if sys.maxsize < 2**32:
        return f"needs 64 bits, and this Python for {platform.machine()} has 32; install one of 64"
    if sys.byteorder != "little":
        return f"needs a little-endian processor, and {platform.machine()} is none; run it on another"
    if find_compiler() is not None:
        return None
    named = os.environ.get(VARIABLE)
    if named:
        return f"needs a C compiler, and {VARIABLE} names {named!r}, which is not found; correct or unset it"
    return (
        "needs a C compiler (gcc or clang), and none was found; install one (Debian: apt install gcc; "
        "anywhere: pip install 'gpt2core[native]')"
    )
