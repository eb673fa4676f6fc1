"""`gpt2core convert`: pickled weights and GGUF files to safetensors, once and on purpose; models to GGUF."""

import sys
from pathlib import Path

import click

from gpt2core.cli.command import Command
from gpt2core.cli.console import checkpoint_options, find, options, write
from gpt2core.cli.progress import Status


@click.command(
    cls=Command,
    short_help="Turn pickled weights or GGUF into model.safetensors, or a model into GGUF.",
    examples=(
        "gpt2core convert FOLDER",
        "gpt2core convert owner/name",
        "gpt2core convert out --output nanogpt",
        "gpt2core convert demo --to gguf --output demo.gguf",
    ),
)
@click.argument("model")
@options(*checkpoint_options)
@click.option("-o", "--output", metavar="PATH", type=click.Path(path_type=Path), help="Write there instead.")
@click.option(
    "--to",
    "form",
    type=click.Choice(["safetensors", "gguf"]),
    default="safetensors",
    show_default=True,
    help="What to write; gguf is llama.cpp's.",
)
@click.option(
    "--type",
    "kind",
    type=click.Choice(["f32", "f16", "q8_0"]),
    default="f32",
    show_default=True,
    help="With --to gguf: of the matrices' numbers.",
)
@click.option("--force", is_flag=True, help="Overwrite files that exist.")
def convert(
    model: str,
    revision: str | None,
    offline: bool,
    output: Path | None,
    form: str,
    kind: str,
    force: bool,
) -> None:
    """Turn MODEL's pickled weights (pytorch_model.bin) into model.safetensors beside them.

    MODEL is a folder or an id on the hub; the latter is written to a folder of its name here. A nanoGPT's
    ckpt.pt is converted with its configuration.

    A GGUF file (llama.cpp's) of architecture gpt2 becomes a folder of its name, or of --output, with its
    tokenizer. With --to gguf a MODEL that can be loaded is written as such a file. Needs the extra `gguf`.

    Reading a pickle can run code that it contains. PyTorch reads it here with weights_only=True, which
    refuses everything but tensors; convert only files that you trust all the same. Needs the extra `torch`.
    """
    from gpt2core.checkpoint.gguf import convert_from_gguf, convert_to_gguf
    from gpt2core.checkpoint.hub import Source, download_pickles, is_hub_id
    from gpt2core.checkpoint.open import convert_pickle
    from gpt2core.errors import CheckpointError

    folder = Path(model).expanduser()
    if form == "gguf":
        found = find(model, revision=revision, offline=offline)
        with Status(f"converting {model}"):
            path = convert_to_gguf(found, output or Path(f"{Path(model).name}.gguf"), kind=kind, force=force)
        write(f"{path}\n")
        return
    if folder.suffix == ".gguf":
        with Status(f"converting {model}"):
            path = convert_from_gguf(folder, output or Path(folder.stem), force=force)
        write(f"{path}\n")
        return
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
