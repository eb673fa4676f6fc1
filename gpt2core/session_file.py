"""Sessions as files: safetensors with the tokens, their keys and values, and what they belong to.

The tensors are `token_ids` (T,) and, where they were to be had, `positions` (L, 2, H, T - 1, K): of all
tokens but the last, which is read anew for its logits. The header's metadata says of which model, backend,
precision and bits they are, and has a digest of all of it: a damaged file is refused.
"""

# T tokens, L layers, H heads, K head width

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import numpy as np

from gpt2core._json import shown
from gpt2core.checkpoint.safetensors import SafetensorsFile, TensorData, replacing, write_safetensors
from gpt2core.errors import CheckpointError

FORMAT: Final = "gpt2core session"
VERSION: Final = "1"
_DTYPES: Final = {"float32": "F32", "uint16": "BF16"}


def write_session(
    path: Path, facts: Mapping[str, str], token_ids: list[int], positions: np.ndarray | None
) -> None:
    """Write a session; what `path` held stays until the new file is whole.

    Args:
        path: in a folder that exists.
        facts: what the positions belong to, each under its name.
        token_ids: T.
        positions: (L, 2, H, T - 1, K) float32, or uint16 for bfloat16; None: they are computed again.

    Raises:
        CheckpointError: the file cannot be written.
    """
    arrays = {} if positions is None else {"positions": np.ascontiguousarray(positions)}
    arrays["token_ids"] = np.array(token_ids, "<i4")
    metadata = {"format": FORMAT, "format_version": VERSION, **facts}
    metadata["digest"] = _digest(metadata, arrays)
    with replacing(path) as file:
        tensors = {
            name: TensorData(_DTYPES.get(array.dtype.name, "I32"), array.shape, lambda array=array: array)  # type: ignore[misc]
            for name, array in arrays.items()
        }
        write_safetensors(file, tensors, metadata)


def read_session(path: Path, facts: Mapping[str, str]) -> tuple[list[int], np.ndarray | None]:
    """The tokens and positions of a session.

    Raises:
        CheckpointError: the file cannot be read, is no session, is damaged, or belongs to something else than
            `facts`, by name.
    """
    file = SafetensorsFile(path)
    metadata = file.metadata
    if not isinstance(metadata, dict) or metadata.get("format") != FORMAT:
        raise CheckpointError(
            f"{path} is no session of gpt2core, or it is damaged; save one with session.save"
        )
    if metadata.get("format_version") != VERSION:
        raise CheckpointError(
            f"{path} is a session of the format version {shown(metadata.get('format_version'))}; this "
            f"gpt2core reads {VERSION}; save it anew"
        )
    names = set(file.entries)
    if file.faults or not {"token_ids"} <= names <= {"token_ids", "positions"}:
        why = file.faults[0] if file.faults else f"it holds {', '.join(sorted(names)) or 'nothing'}"
        raise CheckpointError(f"{path} is damaged: {why}; save the session anew")
    arrays = {name: file.stored(name) for name in names if file.entries[name].dtype in ("F32", "BF16", "I32")}
    given = metadata.pop("digest", None)
    if arrays.keys() != names or given != _digest(metadata, arrays):
        raise CheckpointError(
            f"{path} is damaged: its digest is not that of what it holds; save the session anew"
        )
    for name, own in facts.items():
        if metadata.get(name) != own:
            raise CheckpointError(
                f"{path} is a session of the {name.replace('_', ' ')} {shown(metadata.get(name))}, and this "
                f"model's is {shown(own)}; load it with the model that saved it, or save it anew"
            )
    token_ids, positions = arrays["token_ids"], arrays.get("positions")
    if token_ids.ndim != 1 or (positions is not None and positions.shape[3:4] != (len(token_ids) - 1,)):
        raise CheckpointError(f"{path} holds positions of other tokens than its own; save the session anew")
    return token_ids.tolist(), positions


def _digest(metadata: Mapping[str, object], arrays: Mapping[str, np.ndarray]) -> str:
    digest = hashlib.blake2b(json.dumps(metadata, sort_keys=True).encode(), digest_size=16)
    for name, array in sorted(arrays.items()):
        digest.update(f"{name} {array.dtype.name} {array.shape} ".encode())
        digest.update(np.ascontiguousarray(array).data.cast("B"))
    return digest.hexdigest()
