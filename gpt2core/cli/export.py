"""`gpt2core export`: a model as standalone ONNX, for programs without gpt2core."""

from pathlib import Path

import click

from gpt2core.cli.console import Status, checkpoint_options, find, model_option, options, write


@click.command(short_help="Write a model as standalone ONNX.")
@click.argument("folder", type=click.Path(path_type=Path))
@options(model_option, *checkpoint_options)
@click.option(
    "--form",
    type=click.Choice(["fast", "portable"]),
    default="fast",
    show_default=True,
    help="ONNX Runtime's own operators, or only those of the ONNX standard.",
)
@click.option("--force", is_flag=True, help="Replace an earlier export.")
def export(folder: Path, model: str, revision: str | None, offline: bool, form: str, force: bool) -> None:
    """Write the model to FOLDER as ONNX, with its tokenizer and a script that runs it without gpt2core.

    FOLDER appears only after the model was checked: valid ONNX, and the reference's logits. Needs the extra
    `onnx`.
    """
    from gpt2core.backends.export import export_onnx

    found = find(model, revision=revision, offline=offline)
    with Status(f"exporting {model}"):
        path = export_onnx(found, folder, form=form, force=force)
    write(f"{path}\n")
