"""`gpt2core convert`: pickled weights to safetensors, once and on purpose."""

from pathlib import Path

import click

from gpt2core.cli.console import Status, write


@click.command(short_help="Turn pickled weights into model.safetensors.")
@click.argument("folder", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option(
    "--output",
    metavar="FOLDER",
    type=click.Path(file_okay=False, path_type=Path),
    help="Write there instead.",
)
@click.option("--force", is_flag=True, help="Overwrite files that exist.")
def convert(folder: Path, output: Path | None, force: bool) -> None:
    """Turn FOLDER's pickled weights (pytorch_model.bin) into model.safetensors beside them.

    Reading a pickle can run code that it contains. PyTorch reads it here with weights_only=True, which
    refuses everything but tensors; convert only files that you trust all the same. Needs the extra `torch`.
    """
    from gpt2core.checkpoint.open import convert_pickle

    with Status(f"converting {folder}"):
        path = convert_pickle(folder, output, force=force)
    write(f"{path}\n")
