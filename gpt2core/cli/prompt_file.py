"""Files of prompts: one a line, as text or as JSON."""

import json
from pathlib import Path
from typing import Any

from gpt2core.cli.console import read_text
from gpt2core.errors import RequestError

Given = str | list[int]
"""A prompt: a text, or token ids."""


def read_prompt_file(path: Path) -> list[Given]:
    """The prompts of a file, without empty lines.

    A line of a file whose name ends with `.jsonl` is a JSON string, a list of token ids, or an object whose
    "prompt" is either; a line of any other file is a prompt itself.

    Raises:
        RequestError: it cannot be read, is not UTF-8, holds no prompt or a line that is none.
    """
    try:
        with path.open("rb") as stream:
            text = read_text(stream, str(path))
    except OSError as error:
        raise RequestError(f"--prompts names {path}, which cannot be read: {error.strerror}") from error
    # Only the line feed ends a line: a form feed or a "\u2028" may stand in a text.
    lines = [(i, line.removesuffix("\r")) for i, line in enumerate(text.split("\n"), 1)]
    lines = [(i, line) for i, line in lines if line.strip()]
    if not lines:
        raise RequestError(f"{path} holds no prompt; write one a line")
    if path.suffix != ".jsonl":
        return [line for _, line in lines]
    return [_from_json(line, f"{path}, line {i}") for i, line in lines]


def _from_json(line: str, where: str) -> Given:
    try:
        value: Any = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"{where} is not JSON: {error}") from error
    if isinstance(value, dict):
        if "prompt" not in value:
            names = ", ".join(map(repr, list(value)[:5])) or "nothing"
            raise RequestError(f"{where} has no 'prompt', but {names}")
        value = value["prompt"]
    ids = isinstance(value, list) and all(type(one) is int for one in value)
    if not (isinstance(value, str) or (ids and value)):
        raise RequestError(f"{where} is {line:.60}; give a text, or a list of token ids")
    prompt: Given = value
    return prompt
