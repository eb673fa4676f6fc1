"""`gpt2core score`: how well a model predicts a text, or many."""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gpt2core.cli.command import Command
from gpt2core.cli.console import (
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
from gpt2core.cli.progress import Status

if TYPE_CHECKING:
    from gpt2core.model import GPT2, Score

FORMATS = ("auto", "text", "lines", "jsonl", "csv", "tsv", "parquet")
choice_options = (
    click.option(
        "--allow-special", is_flag=True, help="Read <|endoftext|> in the text as the special token."
    ),
    click.option("--bos", is_flag=True, help="Begin each text after the end-of-text token; scores token 1."),
    click.option("--end", is_flag=True, help="Score the end-of-text token after each text too."),
    click.option("--leading-space", is_flag=True, help="Begin each text with a space, as words within one."),
    click.option("--stride", type=click.IntRange(min=1), help="Tokens that each window of a long text adds."),
    click.option("--context", type=click.IntRange(min=1), help="Most tokens that are read at a time."),
)


@click.command(
    cls=Command,
    short_help="Measure how well a model predicts texts.",
    examples=("gpt2core score story.txt", 'echo "Once upon a time" | gpt2core score - --by token'),
)
@click.argument(
    "files",
    metavar="FILE...",
    nargs=-1,
    required=True,
    type=click.Path(exists=True, dir_okay=False, allow_dash=True, path_type=Path),
)
@options(*model_options, *choice_options)
@click.option(
    "--format",
    "format_",
    type=click.Choice(FORMATS),
    default="auto",
    show_default=True,
    help="text: FILE is one text; lines: each line is; auto: by the file's name.",
)
@click.option("--field", default="text", show_default=True, metavar="NAME", help="The field of the text.")
@click.option("--id", "id_field", metavar="NAME", help="A field that is copied to the column `id`.")
@click.option(
    "--by", type=click.Choice(["token", "word", "text", "region"]), help="What a row of the result is."
)
@click.option("--regions", metavar="NAME", help="The field with [[start, end], ...], for --by region.")
@click.option("--corrected", is_flag=True, help="Count a word's space with the word before it.")
@click.option("--base", type=click.Choice(["2", "e"]), default="2", show_default=True, help="Of surprisals.")
@click.option("--top", type=click.IntRange(0, 1000), default=0, help="Name the K likeliest tokens.")
@click.option("--entropy", is_flag=True, help="Add the entropy of each prediction.")
@click.option("--output", type=click.Path(path_type=Path), help="A .jsonl, .csv, .tsv or .parquet file.")
@click.option("--resume", is_flag=True, help="Go on with an --output that was not finished.")
@click.option("--page", type=click.Path(path_type=Path), help="Write an HTML page colored by surprisal.")
@click.option("--per-token", is_flag=True, help="Also print every token with its log probability.")
@json_option
def score(
    files: tuple[Path, ...],
    *,
    model: str,
    revision: str | None,
    offline: bool,
    per_token: bool,
    as_json: bool,
    **given: Any,
) -> None:
    """Measure how well a model predicts the text in FILE, or in stdin with `-`: UTF-8, of any length.

    Of one plain text a summary is printed. Otherwise, or with --by or --output, the result is a table with
    one row for each text, word, token or region, as JSON lines on stdout or in --output.

    Without --bos the first token is not predicted, and not counted. A text longer than the model's context
    is read in windows that overlap by half unless --stride says otherwise. docs/scoring.md has the
    definitions.
    """
    from gpt2core.cli.score_corpus import CorpusRequest, score_corpus
    from gpt2core.scoring.corpus import format_of

    choices = {name: given.pop(name) for name in ("allow_special", "leading_space", "stride", "context")}
    choices |= {name: "eos" if given.pop(name) else None for name in ("bos", "end")}
    engine = {name: given.pop(name) for name in ("backend", "precision", "device", "threads")}
    where = {"revision": revision, "offline": offline}
    corpus = CorpusRequest(files=files, model=model, where=where, engine=engine, choices=choices, **given)
    format = format_of(str(files[0])) if corpus.format_ == "auto" else corpus.format_
    if corpus.by is not None or corpus.output is not None or len(files) > 1 or format != "text":
        if per_token or as_json:
            raise click.UsageError("--per-token and --json are for the summary of one text; use --by token")
        score_corpus(corpus)
        return
    for name in ("regions", "id_field", "resume", "corrected"):
        if getattr(corpus, name):
            raise click.UsageError(f"--{name.removesuffix('_field')} needs --by or --output")
    _summarize(corpus, per_token=per_token, as_json=as_json)


def _summarize(corpus: Any, *, per_token: bool, as_json: bool) -> None:
    file = corpus.files[0]
    if str(file) == "-":
        text = read_stdin()
    else:
        with file.open("rb") as stream:
            text = read_text(stream, str(file))
    with load(corpus.model, **corpus.where, **corpus.engine) as loaded:
        with Status(f"scoring {file}") as status:
            result = loaded.score(
                text,
                top=corpus.top,
                entropy=corpus.entropy or corpus.page is not None,
                on_progress=lambda done, total: status.update(
                    f"scoring {file}: {done} of {total} tokens", done, total
                ),
                **corpus.choices,
            )
        if corpus.page is not None:
            from gpt2core.cli.score_corpus import write_page

            write_page(corpus, loaded, [(str(file), result)], 0)
        document = _to_document(result) | {"model": corpus.model, "backend": loaded.backend.name}
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
    """Without a token before it the first one has no logprob."""
    logprobs = [*[None] * result.first, *map(float, result.logprobs)]
    return [
        {"id": token_id, "text": loaded.tokenizer.token_text(token_id), "logprob": logprob}
        for token_id, logprob in zip(result.token_ids, logprobs, strict=True)
    ]


def _format(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
