"""`gpt2core quantize`: a model in fewer bits, once, so that it loads in milliseconds."""

import shutil
from pathlib import Path

import click

from gpt2core.cli.command import Command
from gpt2core.cli.console import (
    adapter_option,
    checkpoint_options,
    find,
    format_nbytes,
    options,
    write,
)
from gpt2core.cli.progress import Status


@click.command(
    cls=Command,
    short_help="Round a model's weights to fewer bits.",
    examples=(
        "gpt2core quantize demo demo-int8",
        "gpt2core quantize openai-community/gpt2 gpt2-int4 --precision int4 --group-size 64",
    ),
)
@click.argument("model")
@click.argument("folder", metavar="OUT", type=click.Path(file_okay=False, path_type=Path))
@options(*checkpoint_options, adapter_option)
@click.option(
    "--precision",
    type=click.Choice(["int8", "int4", "bfloat16"]),
    default="int8",
    show_default=True,
    help="Of the matrices; with int4 embedding and head are int8.",
)
@click.option(
    "--group-size",
    type=click.Choice(["32", "64", "128"]),
    default="128",
    show_default=True,
    help="int4: how many weights share a scale. Fewer is nearer to float32, more is smaller and faster.",
)
@click.option("--force", is_flag=True, help="Replace a model that is in OUT.")
def quantize(
    model: str,
    folder: Path,
    revision: str | None,
    offline: bool,
    adapter: str | None,
    precision: str,
    group_size: str,
    force: bool,
) -> None:
    """Round MODEL's matrices to fewer bits and write it to the folder OUT, its tokenizer too.

    OUT then is a model like any other: it is loaded by mapping its file, and runs in that precision.
    """
    from gpt2core.checkpoint.folder import SMALL_FILES, WEIGHTS
    from gpt2core.checkpoint.open import open_checkpoint, save_checkpoint
    from gpt2core.errors import CheckpointError, RequestError
    from gpt2core.quantization.rounding import quantize as rounded

    checkpoint = open_checkpoint(
        find(model, revision=revision, offline=offline), adapter=adapter, local_files_only=offline
    )
    if folder.exists() and folder.resolve() == checkpoint.folder.resolve():
        raise RequestError(f"OUT is the model's own folder {folder}; name another one")
    there = [name for name in (WEIGHTS, *SMALL_FILES) if (folder / name).exists()]
    if there and not force:
        raise CheckpointError(
            f"{folder} already holds {', '.join(there)}; name another folder, or pass --force"
        )
    what = f"rounding {model} to {precision}"
    with Status(what) as status:
        weights = rounded(
            checkpoint.stored,
            precision,
            group_size=int(group_size),
            on_progress=lambda done, all: status.update(what, done, all),
        )
        status.update(f"writing {folder}")
        save_checkpoint(folder, weights)
    for name in SMALL_FILES:
        if name != "config.json" and (checkpoint.tokenizer_folder / name).is_file():
            shutil.copyfile(checkpoint.tokenizer_folder / name, folder / name)
    before, after = checkpoint.stored.nbytes, weights.nbytes
    write(f"{folder}: {format_nbytes(after)}, {after / before:.2f} of float32's {format_nbytes(before)}\n")
