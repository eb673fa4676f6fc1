"""The user's cache folder: where it is, and whether what lies there can be trusted."""

import os
import pathlib
import stat


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
