"""`gpt2core compress` and `gpt2core expand`: files in the bits that a model needs for them, and back."""

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import click

from gpt2core.cli.choices import precision_names
from gpt2core.cli.command import Command
from gpt2core.cli.console import checkpoint_options, format_nbytes, load, model_option, options
from gpt2core.cli.progress import Status

if TYPE_CHECKING:
    from gpt2core.model import GPT2

SUFFIX = ".g2c"
_arguments = (
    click.argument("file", type=click.Path(exists=True, dir_okay=False, allow_dash=True, path_type=Path)),
    click.option(
        "-o",
        "--output",
        metavar="FILE",
        type=click.Path(dir_okay=False, allow_dash=True, path_type=Path),
        help="Write there; - is stdout.",
    ),
    model_option,
    *checkpoint_options,
    click.option(
        "--precision",
        metavar="NAME",
        default="auto",
        show_default=True,
        shell_complete=precision_names,
        help="float32, bfloat16, int8 or int4; the same on both sides.",
    ),
    click.option("--threads", type=click.IntRange(min=1), help="CPU threads; by default the engine decides."),
    click.option("--force", is_flag=True, help="Overwrite a file that exists."),
)


@click.command(
    cls=Command,
    short_help="Compress a file by a model's predictions.",
    examples=("gpt2core compress story.txt", "cat story.txt | gpt2core compress - > story.g2c"),
)
@options(*_arguments)
@click.option(
    "--level",
    type=click.IntRange(1, 9),
    default=6,
    show_default=True,
    help="Higher is smaller; lower expands more parts side by side.",
)
def compress(file: Path, *, output: Path | None, force: bool, level: int, **model: Any) -> None:
    """Compress FILE, or stdin with `-`, to FILE.g2c. It may hold any bytes; text becomes the smallest.

    `gpt2core expand` needs the same model in the same precision. It may run on another machine: the bits of
    the native backend, on which this command runs, are the same on every processor.
    """
    from gpt2core.codec import compress_stream

    if output is None:
        output = Path("-") if str(file) == "-" else file.with_name(file.name + SUFFIX)
    progress = _Progress(f"compressing {file}", None if str(file) == "-" else file.stat().st_size)
    with _load(**model) as loaded, _streams(file, output, force=force) as (source, sink), progress.status:
        nbytes = compress_stream(source, sink, loaded, level=level, progress=progress)
    print(f"{output}: {format_nbytes(nbytes)} of {format_nbytes(progress.nbytes)}", file=sys.stderr)


@click.command(
    cls=Command,
    short_help="Expand what compress made.",
    examples=("gpt2core expand story.txt.g2c", "gpt2core expand - < story.g2c > story.txt"),
)
@options(*_arguments)
@click.option("--salvage", is_flag=True, help="Leave damaged segments out, name them, and end with 1.")
def expand(file: Path, *, output: Path | None, force: bool, salvage: bool, **model: Any) -> None:
    """Expand FILE, or stdin with `-`, which `gpt2core compress` made, to its name without .g2c.

    A damaged file is an error that names the segment; then no file is written.
    """
    from gpt2core.codec import CodecError, expand_stream

    if output is None:
        if str(file) != "-" and file.suffix != SUFFIX:
            raise click.UsageError(f"{file} does not end in {SUFFIX}; name the result with --output")
        output = Path("-") if str(file) == "-" else file.with_suffix("")
    progress = _Progress(f"expanding {file}")
    with _load(**model) as loaded, _streams(file, output, force=force) as (source, sink), progress.status:
        losses = expand_stream(source, sink, loaded, salvage=salvage, progress=progress)
    for loss in losses:
        print(f"gpt2core: lost: {loss}", file=sys.stderr)
    if losses:
        raise CodecError(f"{output} holds {progress.nbytes} bytes, and {len(losses)} parts are lost")


class _Progress:
    """Shows how many bytes are done, and remembers them."""

    def __init__(self, text: str, all_nbytes: int | None = None) -> None:
        self.nbytes = 0
        self._all_nbytes = all_nbytes
        self.status = Status(text)
        self._text = text

    def __call__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        self.status.update(f"{self._text}: {format_nbytes(nbytes)}", nbytes, self._all_nbytes)


def _load(**model: Any) -> "GPT2":
    return load(**model, backend="native", device="cpu")


@contextlib.contextmanager
def _streams(file: Path, output: Path, *, force: bool) -> Iterator[tuple[BinaryIO, BinaryIO]]:
    """What to read and what to write; a file is replaced at the end, and only if nothing was raised."""
    from gpt2core._files import replacing

    with contextlib.ExitStack() as stack:
        source: BinaryIO = sys.stdin.buffer if str(file) == "-" else stack.enter_context(file.open("rb"))
        if str(output) == "-":
            yield source, sys.stdout.buffer
            sys.stdout.buffer.flush()
            return
        if output.exists() and not force:
            raise click.UsageError(f"{output} exists; name another file with --output, or pass --force")
        yield source, stack.enter_context(replacing(output))
