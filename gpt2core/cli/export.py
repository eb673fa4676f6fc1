"""`gpt2core export`: a model as standalone ONNX, for programs without gpt2core."""

from pathlib import Path

import click

from gpt2core.cli.command import Command
from gpt2core.cli.console import checkpoint_options, find, model_option, options, write
from gpt2core.cli.progress import Status


@click.command(
    cls=Command,
    short_help="Write a model as standalone ONNX.",
    examples=(
        "gpt2core export story-model",
        "gpt2core export gpt2-onnx --model openai-community/gpt2 --form portable",
    ),
)
@click.argument("folder", type=click.Path(path_type=Path))
@options(model_option, *checkpoint_options)
@click.option(
    "--form",
    type=click.Choice(["fast", "portable"]),
    default="fast",
    show_default=True,
    help="ONNX Runtime's own operators, or only those of the ONNX standard.",
)
@click.option(
    "--precision",
    type=click.Choice(["auto", "float32"]),
    default="auto",
    show_default=True,
    help="float32 also writes what the numbers of a quantized model stand for; auto refuses it.",
)
@click.option("--force", is_flag=True, help="Replace an earlier export.")
def export(
    folder: Path, model: str, revision: str | None, offline: bool, form: str, precision: str, force: bool
) -> None:
    """Write the model to FOLDER as ONNX, with its tokenizer and a script that runs it without gpt2core.

    FOLDER appears only after the model was checked: valid ONNX, and the reference's logits. Needs the extra
    `onnx`.
    """
    from gpt2core.backends.export import export_onnx

    found = find(model, revision=revision, offline=offline)
    with Status(f"exporting {model}"):
        path = export_onnx(found, folder, form=form, precision=precision, force=force)
    write(f"{path}\n")
