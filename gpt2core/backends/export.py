"""Export to a file that other programs run: the door to what a backend's own package writes."""

import importlib
import os
from pathlib import Path
from typing import Final

from gpt2core.backends import load_factory
from gpt2core.checkpoint.open import open_checkpoint
from gpt2core.errors import RequestError, in_short

FORMS: Final = ("fast", "portable")


def export_onnx(
    model: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    *,
    form: str = "fast",
    force: bool = False,
    revision: str | None = None,
    local_files_only: bool = False,
) -> Path:
    """Write a model as standalone ONNX, with its tokenizer and config files and a script that runs it.

    The folder gets `model.onnx`, `model.onnx.data` and `generate.py`, which needs only onnxruntime, numpy and
    tokenizers. It appears as a whole, after ONNX's checker accepted the model and its logits agreed with the
    float64 reference.

    Args:
        model: "demo", a folder or a hub id.
        folder: made where it does not exist; must be empty without `force`.
        form: "fast" uses ONNX Runtime's own operators, which write keys and values in place; "portable" only
            those of the ONNX standard, for any runtime.
        force: replace an earlier export.
        revision: branch, tag or commit of a model on the hub.
        local_files_only: never use the network.

    Returns:
        The folder's absolute path.

    Raises:
        RequestError: another form.
        CheckpointError: the model cannot be read, or the folder not be written or replaced.
        BackendUnavailableError: onnx or onnxruntime is missing.
        BackendError: what was written does not run or computes something else; it was removed.
    """
    if form not in FORMS:
        raise RequestError(f"form is {in_short(form)}; use {' or '.join(map(repr, FORMS))}")
    load_factory("onnx")  # says what is missing
    writer = importlib.import_module("gpt2core.backends.onnx.export")
    checkpoint = open_checkpoint(model, revision=revision, local_files_only=local_files_only)
    written: Path = writer.write_export(checkpoint, Path(folder), form=form, force=force)
    return written
