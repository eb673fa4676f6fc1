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
    precision: str = "auto",
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
        precision: "auto" for that of the model, which must be float32, or "float32" to write what the numbers
            of a quantized one stand for.
        revision: branch, tag or commit of a model on the hub.
        local_files_only: never use the network.

    Returns:
        The folder's absolute path.

    Raises:
        RequestError: another form or precision; or the model is quantized, and `precision` is "auto".
        CheckpointError: the model cannot be read, or the folder not be written or replaced.
        BackendUnavailableError: onnx or onnxruntime is missing.
        BackendError: what was written does not run or computes something else; it was removed.
    """
    if form not in FORMS:
        raise RequestError(f"form is {in_short(form)}; use {' or '.join(map(repr, FORMS))}")
    if precision not in ("auto", "float32"):
        raise RequestError(f"precision is {in_short(precision)}; ONNX is exported in 'float32' only")
    load_factory("onnx")  # says what is missing
    writer = importlib.import_module("gpt2core.backends.onnx.export")
    checkpoint = open_checkpoint(model, revision=revision, local_files_only=local_files_only)
    if precision == "auto" and checkpoint.stored.precision != "float32":
        raise RequestError(
            f"the model is in {checkpoint.stored.precision}, and ONNX is exported in float32 only; pass "
            "precision='float32' to write the numbers that its own stand for, or export the float model that "
            "it was made of"
        )
    written: Path = writer.write_export(checkpoint, Path(folder), form=form, force=force)
    return written
