"""Strict JSON from files that are not trusted, and how their contents may appear in an error message."""

import json
import os
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from gpt2core.errors import CheckpointError


def read_json_object(path: Path, *, max_nbytes: int = 4 * 2**20) -> dict[str, Any]:
    """Read a file of strict JSON whose top is an object.

    Raises:
        CheckpointError: there is no such file, it is larger than `max_nbytes`, or `parse_json_object`
            refuses it.
    """
    try:
        if not path.is_file():  # also keeps a pipe or a device from being opened
            raise CheckpointError(f"{path} {'is not a file' if path.exists() else 'does not exist'}")
        with path.open("rb") as file:
            text = file.read(min(os.fstat(file.fileno()).st_size, max_nbytes) + 1)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    if len(text) > max_nbytes:
        raise CheckpointError(
            f"{path} is larger than {max_nbytes} bytes, the limit for its kind; is it the right file?"
        )
    return parse_json_object(text, str(path))


def parse_json_object(text: str | bytes, name: str) -> dict[str, Any]:
    """Parse strict JSON whose top is an object.

    Raises:
        CheckpointError: `text` (of the file `name`) is not UTF-8 or begins with a byte order mark, is not
            JSON, nests too deep, holds a number that is no finite float, or has a key twice.
    """
    try:
        value = json.loads(
            text if isinstance(text, str) else str(text, "utf-8"),
            object_pairs_hook=_unique_keys,
            parse_constant=_refuse_constant,
            parse_float=_finite_float,
        )
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{name} is not strict JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{name} holds {shown(value)}, expected a JSON object")
    return value


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        key, _ = Counter(key for key, _ in pairs).most_common(1)[0]
        raise ValueError(f"key {shown(key)} stands twice")
    return result


def _refuse_constant(name: str) -> Callable[[], None]:
    raise ValueError(f"{name} is not a JSON number")


def _finite_float(text: str) -> float:
    value = float(text)
    if value in (float("inf"), float("-inf")):
        raise ValueError(f"the number {text:.40} is too large for a float")
    return value


def shown(value: object) -> str:
    """A value from a file, as an error message may print it: one short line of ASCII."""
    text = ""
    try:
        for part in json.JSONEncoder(default=str).iterencode(value):  # only as far as it is shown
            text += part
            if len(text) > 60:
                return text[:57] + "..."
    except ValueError:  # an integer of thousands of digits
        return f"a {type(value).__name__} too large to show"
    return text


def shown_name(name: str) -> str:
    """A name from a file, as an error message may print it: bare where it is plain, else quoted."""
    plain = len(name) <= 120 and name.isascii() and name.isprintable() and " " not in name
    return name if plain and name else shown(name)


def listed(faults: Sequence[str], most: int = 20) -> str:
    """Faults as one line, at most `most` of them and how many more there are."""
    rest = [f"and {len(faults) - most} more"] if len(faults) > most else []
    return "; ".join([*faults[:most], *rest])
