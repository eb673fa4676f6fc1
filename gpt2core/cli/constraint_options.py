"""What the text must match, as options."""

from pathlib import Path
from typing import Any

import click

from gpt2core.cli.console import read_text
from gpt2core.errors import RequestError

constraint_options = (
    click.option("--regex", metavar="REGEX", help="The whole text matches this regular expression."),
    click.option(
        "--json-schema",
        metavar="FILE|TEXT",
        help='The text is an instance of this JSON schema; \'{"type": "object"}\' is any object.',
    ),
    click.option(
        "--choice",
        metavar="TEXT",
        multiple=True,
        callback=lambda context, option, value: value or None,
        help="The text is one of these; repeatable.",
    ),
    click.option("--grammar", metavar="FILE", help="The text follows this grammar, of Lark or GBNF."),
)


def read_constraint(given: dict[str, Any]) -> dict[str, Any]:
    """The same options as fields of `SamplingParams`; files are read.

    Raises:
        RequestError: a file cannot be read, or is not UTF-8.
    """
    schema, grammar = given["json_schema"], given["grammar"]
    if schema is not None and not schema.lstrip().startswith("{"):
        schema = _read("--json-schema", schema)
    if grammar is not None:
        grammar = _read("--grammar", grammar)
    return {**given, "json_schema": schema, "grammar": grammar}


def _read(option: str, name: str) -> str:
    try:
        with Path(name).open("rb") as stream:
            return read_text(stream, name)
    except OSError as error:
        raise RequestError(f"{option} names {name}, which cannot be read: {error.strerror}") from error
