"""`gpt2core pairs`: how often a model finds the good sentence of a minimal pair likelier."""

from pathlib import Path
from typing import Any, cast

import click

from gpt2core.cli.command import Command
from gpt2core.cli.console import (
    json_option,
    load,
    model_options,
    options,
    write_json,
    write_table,
)
from gpt2core.cli.progress import Status
from gpt2core.errors import RequestError

PHENOMENON = "linguistics_term"
"""BLiMP's field of the phenomenon."""


@click.command(
    cls=Command, short_help="Judge minimal pairs.", examples=("gpt2core pairs pairs.jsonl --model demo",)
)
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@options(*model_options)
@click.option(
    "--good", default="sentence_good", show_default=True, metavar="NAME", help="Field of the good sentence."
)
@click.option(
    "--bad", default="sentence_bad", show_default=True, metavar="NAME", help="Field of the bad sentence."
)
@click.option(
    "--phenomenon",
    metavar="NAME",
    help=f"Field to group by; by default {PHENOMENON}, BLiMP's, where there is one.",
)
@click.option("--no-bos", is_flag=True, help="Leave out the first token of each, instead of predicting it.")
@click.option("--mean", is_flag=True, help="Compare means over tokens instead of sums.")
@json_option
def pairs(
    file: Path,
    *,
    model: str,
    revision: str | None,
    offline: bool,
    good: str,
    bad: str,
    phenomenon: str | None,
    no_bos: bool,
    mean: bool,
    as_json: bool,
    **engine: Any,
) -> None:
    """Judge the minimal pairs in FILE: jsonl as BLiMP has it, csv, tsv or parquet.

    A pair is right where the good sentence has the greater log probability in all, beginning after the
    end-of-text token. Intervals are Wilson's, of 95 %.
    """
    from gpt2core.scoring.corpus import Fault, format_of, read_rows, text_of
    from gpt2core.scoring.pairs import sum_pairs

    format = format_of(str(file))
    if format == "text":
        raise RequestError(f"{file} has no columns by its name; rename it to .jsonl, .csv, .tsv or .parquet")
    names: list[str] = []
    texts: list[str] = []
    with file.open("rb") as stream:
        for row in read_rows(stream, str(file), format, good):
            if isinstance(row, Fault):
                raise RequestError(f"{row.file}, line {row.line}: {row.reason}; correct it")
            try:
                texts += text_of(row, good), text_of(row, bad)
            except RequestError as error:
                raise RequestError(f"{file}, line {row.line}: {error}; see --good and --bad") from None
            if phenomenon is not None and phenomenon not in row.fields:
                raise RequestError(f"{file}, line {row.line} has no field {phenomenon!r}; see --phenomenon")
            names.append(str(row.fields.get(phenomenon or PHENOMENON, "all")))
    if not texts:
        raise RequestError(f"{file} holds no pairs; give at least one row")
    with load(model, revision=revision, offline=offline, **engine) as loaded, Status("judging") as status:
        values = []
        for score in loaded.score_iter(texts, bos=None if no_bos else "eos"):
            values.append(float(score.logprobs.mean()) if mean else score.logprob)
            status.update(f"judging: {len(values) // 2} of {len(names)} pairs")
        backend = loaded.backend.name
    right = [better > worse for better, worse in zip(values[::2], values[1::2], strict=True)]
    rows = sum_pairs(list(zip(names, right, strict=True)))
    if len(rows) == 2 and rows[0].name == "all":
        rows = rows[:1]
    if as_json:
        shown = [
            {
                "name": row.name,
                "pairs": row.pairs,
                "correct": row.correct,
                "accuracy": row.accuracy,
                "low": row.low,
                "high": row.high,
            }
            for row in rows
        ]
        write_json(cast(dict[str, Any], {"model": model, "backend": backend, "phenomena": shown}))
        return
    write_table(
        [
            ("phenomenon", "pairs", "accuracy", "95 % interval"),
            *(
                (row.name, str(row.pairs), f"{row.accuracy:.4f}", f"{row.low:.4f} to {row.high:.4f}")
                for row in rows
            ),
        ]
    )
