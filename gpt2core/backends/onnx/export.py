"""A standalone ONNX model: embeddings inside the graph, weights in one file beside it.

What is written stands in a hidden folder beside the target until it has passed ONNX's own checker and its
logits are the reference's; only then is that folder renamed.
"""

# R rows, S new tokens per row, N = R S, M wanted logits, D width, V vocabulary, P past positions

import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import numpy as np
import onnx
from onnx import TensorProto, helper

from gpt2core.backends.onnx import run_exported
from gpt2core.backends.onnx.graph import FLOAT, cache_values, external, finished, named_weights
from gpt2core.backends.onnx.nodes import Graph, Operators
from gpt2core.backends.onnx.operators import Fused, Standard
from gpt2core.checkpoint.folder import SMALL_FILES
from gpt2core.checkpoint.open import Checkpoint
from gpt2core.errors import BackendError, CheckpointError
from gpt2core.reference import reference_logits
from gpt2core.tokenizer.files import read_tokenizer
from gpt2core.weights import Weights

MODEL: Final = "model.onnx"
DATA: Final = "model.onnx.data"
SCRIPT: Final = "generate.py"
TOKENIZER: Final = "tokenizer.json"
_OURS: Final = frozenset({MODEL, DATA, SCRIPT, *SMALL_FILES})
_ALIGNMENT: Final = 4096  # bytes; whoever maps the file wants whole pages
_CHECKED_TOKENS, _CHECKED_DECODING = 16, 4
_TOLERANCE, _RELATIVE_TOLERANCE = 2e-4, 2e-5


def write_export(checkpoint: Checkpoint, folder: Path, *, form: str, force: bool) -> Path:
    """See `gpt2core.backends.export.export_onnx`; `form` is "fast" or "portable"."""
    folder = folder.absolute()
    _check_target(folder, force)
    scratch = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}")
    try:
        scratch.mkdir(parents=True)
        write_model(checkpoint.weights, scratch, form=form)
        for name in SMALL_FILES:
            if (checkpoint.tokenizer_folder / name).is_file():
                shutil.copyfile(checkpoint.tokenizer_folder / name, scratch / name)
        if not (scratch / TOKENIZER).exists() and (scratch / "vocab.json").exists():
            read_tokenizer(scratch).save(str(scratch / TOKENIZER))
        shutil.copyfile(run_exported.__file__, scratch / SCRIPT)
        check_export(checkpoint.weights, scratch)
        _put_in_place(scratch, folder)
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return folder


def _check_target(folder: Path, force: bool) -> None:
    if not folder.exists():
        return
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is a file; name a folder to export to")
    there = sorted(path.name for path in folder.iterdir())
    if there and not force:
        raise CheckpointError(f"{folder} is not empty; name another folder, or pass force=True to replace it")
    foreign = [name for name in there if name not in _OURS]
    if foreign:
        raise CheckpointError(
            f"{folder} holds {foreign[0]!r}, which is no part of an export, so it is not replaced; "
            "name another folder"
        )


def _put_in_place(scratch: Path, folder: Path) -> None:
    if folder.exists():
        old = scratch.with_name(f"{scratch.name}.old")
        folder.rename(old)
        scratch.rename(folder)
        shutil.rmtree(old)
    else:
        scratch.rename(folder)


def write_model(weights: Weights, folder: Path, *, form: str) -> None:
    """Write the graph and its weights, each array once: a tied head is the embedding itself."""
    g = Graph(weights.config)
    operators, embedded = _fast_start(g) if form == "fast" else _portable_start(g)
    head = "wte.weight" if weights.lm_head is weights.wte else "lm_head.weight"
    g.products.head(g, g.body(operators, embedded, "logits_at"), head)
    with (folder / DATA).open("xb") as file:
        tensors = []
        for name, array in named_weights(weights, operators.head_dim):
            file.seek(-(-file.tell() // _ALIGNMENT) * _ALIGNMENT)
            tensors.append(external(name, array, location=DATA, offset=file.tell(), length=4 * array.size))
            file.write(np.ascontiguousarray(array, "<f4").data)
        file.flush()
        os.fsync(file.fileno())
    config, value, ints = weights.config, helper.make_tensor_value_info, TensorProto.INT64
    fast = form == "fast"
    model = finished(
        g,
        [
            value("input_ids", ints, ["rows", "new"]),
            *([value("past_length", ints, ["rows"])] if fast else []),
            value("logits_at", ints, ["wanted"]),
            *cache_values(config, "past", "past", operators.head_dim),
        ],
        [
            value("logits", FLOAT, ["wanted", config.vocab_size]),
            *cache_values(config, "present", "past" if fast else "seen", operators.head_dim),
        ],
        tensors,
    )
    helper.set_model_props(model, {"form": form, "n_positions": str(config.n_positions)})
    (folder / MODEL).write_bytes(model.SerializeToString())


def _fast_start(g: Graph) -> tuple[Operators, str]:
    """The embedded tokens (R, S, D); each row goes on after its own `past_length` (R,)."""
    count = g.op("Shape", "input_ids", start=1, end=2)  # (1,)
    steps = g.op("Range", g.constant(0), g.op("Squeeze", count), g.constant(1))  # (S,)
    first = g.op("Unsqueeze", "past_length", g.constant([1]))  # (R, 1)
    embedded = _embedded(g, g.op("Add", first, steps))
    last = g.op("Sub", g.op("Add", "past_length", count), g.constant([1]))  # (R,)
    seen = g.op("Add", g.op("ReduceMax", last, keepdims=0), g.constant(1))  # ()
    seqlens_k, total = (g.op("Cast", x, to=TensorProto.INT32) for x in (last, seen))
    return Fused(g.config, seqlens_k=seqlens_k, total=total), embedded


def _portable_start(g: Graph) -> tuple[Operators, str]:
    """The embedded tokens (R, S, D); all rows go on after the past's length."""
    past = g.op("Squeeze", g.op("Shape", "past_key_0", start=2, end=3))  # ()
    count = g.op("Squeeze", g.op("Shape", "input_ids", start=1, end=2))  # ()
    positions = g.op("Range", past, g.op("Add", past, count), g.constant(1))  # (S,)
    seen = g.op("Range", g.constant(0), g.op("Add", past, count), g.constant(1))  # (P + S,)
    mask = g.op("LessOrEqual", seen, g.op("Unsqueeze", positions, g.constant([1])))  # (S, P + S)
    return Standard(g.config, mask=mask), _embedded(g, positions)


def _embedded(g: Graph, positions: str) -> str:
    return g.op("Add", g.op("Gather", "wte.weight", "input_ids"), g.op("Gather", "wpe.weight", positions))


def check_export(weights: Weights, folder: Path) -> None:
    """Hold the files to ONNX's checker, and a prompt and some decoding to the reference.

    Raises:
        BackendError: the model is not valid ONNX, does not run, or computes something else.
    """
    count = min(_CHECKED_TOKENS, weights.config.n_positions)
    tokens = np.random.default_rng(0).integers(0, weights.config.vocab_size, count).tolist()
    want = reference_logits(weights, tokens)
    try:
        onnx.checker.check_model(str(folder / MODEL), full_check=True)
        got = np.concatenate(list(_replayed(folder, tokens)))
    except Exception as error:  # neither package's exceptions share a base class of their own
        raise BackendError(f"the exported model does not run: {error}") from error
    allowed = _TOLERANCE + _RELATIVE_TOLERANCE * float(np.abs(want).max())
    worst = float(np.abs(got - want).max())
    if not worst <= allowed:
        raise BackendError(
            f"the exported model's logits differ from the reference by {worst:.3g}, allowed is {allowed:.3g}"
        )


def _replayed(folder: Path, tokens: list[int]) -> Iterator[np.ndarray]:
    model, prompt = run_exported.Model(folder), max(1, len(tokens) - _CHECKED_DECODING)
    yield model.step(tokens[:prompt], every=True)
    for token in tokens[prompt:]:
        yield model.step([token])
