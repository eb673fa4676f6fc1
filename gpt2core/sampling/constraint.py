"""What a text may be told to match, as fields of `SamplingParams`: checked here, compiled elsewhere."""

import json
from collections.abc import Mapping, Sequence
from typing import Any, Final, Literal

from gpt2core._json import JSONFault, loads_strict
from gpt2core.errors import InvalidSamplingError, in_short

Kind = Literal["regex", "json_schema", "choice", "grammar"]
KINDS: Final[tuple[Kind, ...]] = ("regex", "json_schema", "choice", "grammar")

MAX_CHARACTERS: Final = 2**14
"""Of a regex or a grammar: what a compiler may recurse into."""
MAX_SCHEMA_CHARACTERS: Final = 2**16
MAX_SCHEMA_DEPTH: Final = 64
MAX_CHOICES: Final = 1024
MAX_CHOICES_CHARACTERS: Final = 2**16
"""Of all choices together."""


def check_constraint(given: Mapping[Kind, object]) -> dict[Kind, Any]:
    """The fields in the form in which they are kept: hashable, and None where nothing is asked for.

    Raises:
        InvalidSamplingError: a field of the wrong type or size, or more than one of them.
    """
    asked = [kind for kind in KINDS if given[kind] is not None]
    if len(asked) > 1:
        raise InvalidSamplingError(
            f"{' and '.join(asked)} are both given; a text follows one constraint, leave one of them out"
        )
    checks = {"regex": _text, "json_schema": _schema, "choice": _choices, "grammar": _text}
    return {kind: None if given[kind] is None else checks[kind](kind, given[kind]) for kind in KINDS}


def _text(name: str, value: object, most: int = MAX_CHARACTERS) -> str:
    if not isinstance(value, str):
        raise InvalidSamplingError(f"{name} is {in_short(value)}; it must be a string")
    if not 1 <= len(value) <= most:
        raise InvalidSamplingError(f"{name} has {len(value)} characters; it must have 1 to {most}")
    if "\0" in value or any("\ud800" <= character <= "\udfff" for character in value):
        raise InvalidSamplingError(f"{name} holds NUL or a lone surrogate, which no text contains; remove it")
    return value


def _schema(name: str, value: object) -> str:
    """As JSON, its keys in their order: properties are written in it."""
    if isinstance(value, Mapping):
        try:
            value = json.dumps(dict(value), ensure_ascii=False, allow_nan=False)
        except (TypeError, ValueError, RecursionError) as error:
            raise InvalidSamplingError(f"{name} cannot be written as JSON: {error}") from error
    if not isinstance(value, str):
        raise InvalidSamplingError(f"{name} is {in_short(value)}; it must be a dict, or JSON as a string")
    text = _text(name, value, MAX_SCHEMA_CHARACTERS)
    try:
        schema = loads_strict(text, max_depth=MAX_SCHEMA_DEPTH)
    except JSONFault as fault:
        raise InvalidSamplingError(f"{name} is not strict JSON: it {fault.summary}") from fault
    if not isinstance(schema, dict):
        raise InvalidSamplingError(f"{name} holds no JSON object; it must be one, as {{}}")
    return json.dumps(schema, ensure_ascii=False)


def _choices(name: str, value: object) -> tuple[str, ...]:
    if not isinstance(value, Sequence) or isinstance(value, str | bytes | bytearray | memoryview):
        raise InvalidSamplingError(f"{name} is {in_short(value)}; it must be a list of strings")
    if not 1 <= len(value) <= MAX_CHOICES:
        raise InvalidSamplingError(f"{name} has {len(value)} entries; it must have 1 to {MAX_CHOICES}")
    choices = tuple(_text(f"{name}[{i}]", text, MAX_CHOICES_CHARACTERS) for i, text in enumerate(value))
    if (characters := sum(map(len, choices))) > MAX_CHOICES_CHARACTERS:
        raise InvalidSamplingError(
            f"{name} has {characters} characters in all; at most {MAX_CHOICES_CHARACTERS} are allowed"
        )
    return choices
