"""Strict JSON from files and requests that are not trusted; how their contents may appear in a message."""

import json
import os
from collections import Counter
from collections.abc import Sequence
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
    check_no_pointer(path, text)
    return parse_json_object(text, str(path))


def check_no_pointer(path: Path, head: bytes) -> None:
    """Refuse a file that begins with `head` where that is what Git LFS leaves in the place of a file.

    Raises:
        CheckpointError: it is a pointer; says how to get the file.
    """
    if head.startswith(b"version https://git-lfs"):
        raise CheckpointError(f"{path} is a Git LFS pointer, not the file; run `git lfs pull` in its folder")


def parse_json_object(text: str | bytes, name: str) -> dict[str, Any]:
    """Parse strict JSON whose top is an object.

    Raises:
        CheckpointError: `loads_strict` refuses `text` (of the file `name`), or it holds something else.
    """
    try:
        value = loads_strict(text)
    except JSONFault as fault:
        raise CheckpointError(f"{name} is not strict JSON: {fault}") from fault
    if not isinstance(value, dict):
        raise CheckpointError(f"{name} holds {shown(value)}, expected a JSON object")
    return value


class JSONFault(ValueError):
    """Why a text is not strict JSON.

    Attributes:
        summary: the same without quoting the text, as in "the body ...": for those who may not repeat it.
    """

    def __init__(self, message: str, summary: str) -> None:
        super().__init__(message)
        self.summary = summary


def loads_strict(text: str | bytes, *, max_depth: int | None = None) -> object:
    """Parse strict JSON: UTF-8 without a byte order mark, no key twice, every number a finite float.

    Args:
        text: one JSON value.
        max_depth: how many levels may nest below the top; None: as deep as Python's own parser goes.

    Raises:
        JSONFault: a `ValueError` that says what is not strict about it.
    """
    too_deep = "nests too deep" if max_depth is None else f"nests deeper than {max_depth} levels"
    try:
        value: object = json.loads(
            text if isinstance(text, str) else str(text, "utf-8"),
            object_pairs_hook=_unique_keys,
            parse_constant=_refuse_constant,
            parse_float=_finite_float,
        )
    except JSONFault:
        raise
    except RecursionError as error:
        raise JSONFault(str(error), too_deep) from error
    except UnicodeDecodeError as error:
        raise JSONFault(str(error), "is not UTF-8") from error
    except ValueError as error:  # a syntax error, or an integer of thousands of digits
        raise JSONFault(str(error), "is not JSON, or begins with a byte order mark") from error
    if max_depth is not None and _depth(value, max_depth) > max_depth:
        raise JSONFault(f"it {too_deep}", too_deep)
    return value


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        key, _ = Counter(key for key, _ in pairs).most_common(1)[0]
        raise JSONFault(f"key {shown(key)} stands twice", "has a key twice in one object")
    return result


def _refuse_constant(name: str) -> None:
    raise JSONFault(f"{name} is not a JSON number", "holds NaN or Infinity, which JSON does not have")


def _finite_float(text: str) -> float:
    value = float(text)
    if value in (float("inf"), float("-inf")):
        summary = "holds a number that is too large for a float"
        raise JSONFault(f"the number {text:.40} is too large for a float", summary)
    return value


def _depth(value: object, most: int) -> int:
    """How deep `value` nests; it stops counting beyond `most`."""
    level, depth = [value], 0
    while level and depth <= most:
        level = [child for parent in level for child in _children(parent)]
        depth += bool(level)
    return depth


def _children(value: object) -> list[object]:
    found = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [child for child in found if isinstance(child, dict | list)]


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
