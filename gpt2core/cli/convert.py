"""`gpt2core convert`: pickled weights to safetensors, once and on purpose."""

import sys
from pathlib import Path

import click

from gpt2core.cli.console import Status, checkpoint_options, options, write


@click.command(short_help="Turn pickled weights into model.safetensors.")
@click.argument("model")
@options(*checkpoint_options)
@click.option(
    "--output",
    metavar="FOLDER",
    type=click.Path(file_okay=False, path_type=Path),
    help="Write there instead.",
)
@click.option("--force", is_flag=True, help="Overwrite files that exist.")
def convert(model: str, revision: str | None, offline: bool, output: Path | None, force: bool) -> None:
    """Turn MODEL's pickled weights (pytorch_model.bin) into model.safetensors beside them.

    MODEL is a folder or an id on the hub; the latter is written to a folder of its name here. A nanoGPT's
    ckpt.pt is converted with its configuration.

    Reading a pickle can run code that it contains. PyTorch reads it here with weights_only=True, which
    refuses everything but tensors; convert only files that you trust all the same. Needs the extra `torch`.
    """
    from gpt2core.checkpoint.hub import Source, download_pickles, is_hub_id
    from gpt2core.checkpoint.open import convert_pickle
    from gpt2core.errors import CheckpointError

    folder = Path(model).expanduser()
    if not folder.is_dir():
        if folder.exists():
            raise CheckpointError(f"{model} is a file; name the folder that holds it")
        if not is_hub_id(model):
            raise CheckpointError(
                f"{model} does not exist, and is no hub id (name or owner/name); check the path"
            )
        folder = download_pickles(
            Source(model, revision, local_files_only=offline), progress=sys.stderr.isatty()
        )
        output = output or Path(model.rpartition("/")[2])
    with Status(f"converting {model}"):
        path = convert_pickle(folder, output, force=force)
    write(f"{path}\n")
