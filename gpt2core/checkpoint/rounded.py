"""Rounded weights that are kept: rounding to int4 takes a minute for GPT-2 small, reading the result none.

They lie in the folder `rounded` of the user's cache, one folder for each model and setting, named by a digest
of everything they depend on: the weights themselves, the configuration, the precision. Each ends with the
digests of its files. A folder appears as a whole, under its name at once, so that two processes may write the
same one; what is damaged, cut short or of another user is rounded anew. Where nothing can be kept, nothing
is.
"""

import contextlib
import hashlib
import json
import os
import shutil
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Final

import numpy as np

from gpt2core._files import cache_folder, is_ours_alone
from gpt2core._json import read_json_object
from gpt2core.checkpoint.folder import WEIGHTS, read_storage, read_weights
from gpt2core.checkpoint.open import save_checkpoint
from gpt2core.errors import CheckpointError, CheckpointWarning
from gpt2core.quantization import rounding
from gpt2core.weights import Weights

PART: Final = "rounded"
"""The folder of the user's cache."""
KEEP_FROM_S: Final = 1.0
"""What is rounded in less is not kept."""
MOST_KEPT: Final = 8
_DIGESTS: Final = "digests.json"
_FILES: Final = (WEIGHTS, "config.json")
_ABANDONED_S: Final = 3600.0  # nobody writes a model for so long


def round_or_read(
    weights: Weights, precision: str, *, on_progress: Callable[[int, int], None] | None = None
) -> Weights:
    """`gpt2core.quantization.rounding.quantize`, or what it gave for these weights before.

    Raises:
        RequestError, CheckpointError: as of `quantize`.
    """
    folder = cache_folder(PART) / _key(weights, precision)
    if (kept := _read(folder)) is not None:
        return replace(kept, config=weights.config)
    began_s = time.monotonic()
    rounded = rounding.quantize(weights, precision, on_progress=on_progress)
    if time.monotonic() - began_s < KEEP_FROM_S or not hasattr(os, "getuid"):  # whose would it be?
        return rounded
    try:
        _keep(folder, rounded)
    except (OSError, CheckpointError) as error:
        warnings.warn(
            f"the model in {precision} is not kept for the next time: {error}; make room, let GPT2CORE_CACHE "
            "name another folder, or write it to one of your own with `gpt2core quantize`",
            CheckpointWarning,
            stacklevel=2,
        )
        return rounded
    kept = _read(folder)  # mapped from the file, which leaves the memory to others
    return rounded if kept is None else replace(kept, config=weights.config)


def _key(weights: Weights, precision: str) -> str:
    """A digest of everything that the rounded weights depend on."""
    from concurrent.futures import ThreadPoolExecutor  # only those who round wait for it

    def digest(item: tuple[str, np.ndarray]) -> tuple[str, str]:
        name, array = item
        data = np.ascontiguousarray(array, "<f4")
        return f"{name} {array.shape}", hashlib.sha256(data.reshape(-1).view(np.uint8).data).hexdigest()

    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:  # hashing lets other threads run
        tensors = list(pool.map(digest, weights.named()))
    settings = (rounding.VERSION, precision, rounding.GROUP_SIZE)
    everything = json.dumps([settings, weights.config.to_dict(), tensors], sort_keys=True)
    return hashlib.sha256(everything.encode()).hexdigest()[:32]


def _read(folder: Path) -> Weights | None:
    """The weights of a folder that this module wrote; None where they are missing or not to be trusted."""
    try:
        if not is_ours_alone(folder):
            return None
        digests = read_json_object(folder / _DIGESTS)
        if digests != {name: _digest(folder / name) for name in _FILES}:
            return None
        config, storage = read_storage(folder)
        weights = read_weights(folder, config, storage)
        with contextlib.suppress(OSError):  # others may be let read a folder only
            os.utime(folder)  # what was used last is kept
    except (OSError, CheckpointError):
        return None
    return weights


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _keep(folder: Path, rounded: Weights) -> None:
    """Write the weights to `folder`, unless another process has done so meanwhile.

    Raises:
        OSError, CheckpointError: they cannot be written.
    """
    folder.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    scratch = folder.parent / f".{folder.name}.{os.urandom(4).hex()}"
    scratch.mkdir(mode=0o700)
    try:
        save_checkpoint(scratch, rounded)
        digests = {name: _digest(scratch / name) for name in _FILES}
        (scratch / _DIGESTS).write_text(json.dumps(digests))
        if folder.exists() and _read(folder) is None:
            _remove(folder)
        try:
            scratch.rename(folder)
        except OSError:
            if not folder.exists():
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    prune(folder.parent)


def prune(parent: Path) -> None:
    """Remove all but the folders used last, and what processes that were killed have left."""
    folders = [(path, path.stat().st_mtime) for path in parent.iterdir() if path.is_dir()]
    models = sorted((one for one in folders if not one[0].name.startswith(".")), key=lambda one: one[1])
    left = [one for one in folders if one[0].name.startswith(".") and time.time() - one[1] > _ABANDONED_S]
    for path, _ in (*models[:-MOST_KEPT], *left):
        _remove(path)


def _remove(folder: Path) -> None:
    """Take a folder away under its name at once; those who have mapped its files keep them."""
    gone = folder.parent / f".{folder.name}.{os.urandom(4).hex()}"
    try:
        folder.rename(gone)
    except FileNotFoundError:  # another process was faster
        return
    shutil.rmtree(gone, ignore_errors=True)
