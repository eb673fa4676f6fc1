"""`gpt2core score`: how well a model predicts a text."""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gpt2core.cli.console import (
    Status,
    finite,
    json_option,
    load,
    model_options,
    options,
    read_stdin,
    read_text,
    write_json,
    write_table,
)

if TYPE_CHECKING:
    from gpt2core.model import GPT2, Score


@click.command(short_help="Measure how well a model predicts a text.")
@click.argument("file", type=click.Path(exists=True, dir_okay=False, allow_dash=True, path_type=Path))
@options(*model_options)
@click.option("--allow-special", is_flag=True, help="Read <|endoftext|> in the text as the special token.")
@click.option("--per-token", is_flag=True, help="Also print every token with its log probability.")
@json_option
def score(
    file: Path,
    *,
    model: str,
    revision: str | None,
    offline: bool,
    allow_special: bool,
    per_token: bool,
    as_json: bool,
    **engine: Any,
) -> None:
    """Measure how well a model predicts the text in FILE, or in stdin with `-`: UTF-8, of any length.

    The first token is not predicted, and not counted. A text longer than the model's context is read in
    windows that overlap by half, so that every token is predicted from at least half a context.
    """
    if str(file) == "-":
        text = read_stdin()
    else:
        with file.open("rb") as stream:
            text = read_text(stream, str(file))
    with load(model, revision=revision, offline=offline, **engine) as loaded:
        with Status(f"scoring {file}") as status:
            result = loaded.score(
                text,
                allow_special=allow_special,
                on_progress=lambda done, total: status.update(f"scoring {file}: {done} of {total} tokens"),
            )
        document = _to_document(result) | {"model": model, "backend": loaded.backend.name}
        if as_json:
            write_json(document | ({"per_token": _per_token(loaded, result)} if per_token else {}))
            return
        write_table(
            [
                ("tokens", str(document["tokens"])),
                ("perplexity", _format(document["perplexity"])),
                ("bits per byte", _format(document["bits_per_byte"])),
                ("mean logprob", _format(document["mean_logprob"])),
            ]
        )
        if per_token:
            write_table(
                [
                    ("id", "logprob", "token"),
                    *(
                        (str(t["id"]), _format(t["logprob"]), ascii(t["text"]))
                        for t in _per_token(loaded, result)
                    ),
                ]
            )


def _to_document(result: "Score") -> dict[str, Any]:
    return {
        "tokens": len(result.token_ids),
        "perplexity": finite(result.perplexity),
        "bits_per_byte": finite(result.bits_per_byte),
        "mean_logprob": math.fsum(result.logprobs) / len(result.logprobs),
    }


def _per_token(loaded: "GPT2", result: "Score") -> list[dict[str, Any]]:
    """The first token has no logprob: nothing precedes it."""
    logprobs = [None, *map(float, result.logprobs)]
    return [
        {"id": token_id, "text": loaded.tokenizer.token_text(token_id), "logprob": logprob}
        for token_id, logprob in zip(result.token_ids, logprobs, strict=True)
    ]


def _format(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
