"""What all commands share: the common options, reading text and writing results."""

import json
import math
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TypeVar

import click

from gpt2core.cli.choices import backend_names, model_names, precision_names
from gpt2core.cli.progress import Status
from gpt2core.errors import RequestError

if TYPE_CHECKING:
    from gpt2core.model import GPT2

Function = TypeVar("Function", bound=Callable[..., Any])

checkpoint_options = (
    click.option("--revision", metavar="NAME", help="Branch, tag or commit of a model on the hub."),
    click.option("--offline", is_flag=True, help="Use local files only; never ask the hub."),
)
adapter_option = click.option(
    "--adapter",
    metavar="ADAPTER",
    help="A LoRA adapter (folder, or an id on the hub) to merge into the model.",
)
model_option = click.option(
    "-m",
    "--model",
    metavar="MODEL",
    default="demo",
    show_default=True,
    shell_complete=model_names,
    help="`demo`, a folder, or an id on the hub.",
)
model_options = (
    model_option,
    *checkpoint_options,
    click.option(
        "-b",
        "--backend",
        metavar="NAME",
        default="auto",
        show_default=True,
        shell_complete=backend_names,
        help="Engine; see `backends`.",
    ),
    click.option(
        "--precision",
        metavar="NAME",
        default="auto",
        show_default=True,
        shell_complete=precision_names,
        help="float32, int8, int4 or bfloat16; auto takes the weights as the checkpoint holds them.",
    ),
    click.option(
        "--device", metavar="NAME", default="cpu", show_default=True, help="Where the engine computes."
    ),
    click.option("--threads", type=click.IntRange(min=1), help="CPU threads; by default the engine decides."),
)
speculation_options = (
    click.option(
        "--speculation",
        type=click.Choice(["off", "prompt_lookup"]),
        default="off",
        show_default=True,
        help="prompt_lookup: faster where a text repeats itself; same tokens.",
    ),
    click.option(
        "--draft-model",
        metavar="MODEL",
        shell_complete=model_names,
        help="A small model of the same vocabulary: faster, same tokens.",
    ),
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")


def options(*groups: Callable[[Function], Function]) -> Callable[[Function], Function]:
    """Apply several `click.option` decorators, shown by --help in the order given."""

    def apply(command: Function) -> Function:
        for option in reversed(groups):
            command = option(command)
        return command

    return apply


def find(model: str, *, revision: str | None, offline: bool) -> Path:
    """The folder of the model that the options name; a download shows its progress on a terminal."""
    from gpt2core.checkpoint.open import Source, resolve

    source = Source(model, revision, local_files_only=offline)
    return resolve(source, progress=sys.stderr.isatty())


def load(
    model: str, *, revision: str | None, offline: bool, draft_model: str | None = None, **engine: Any
) -> "GPT2":
    """Find and load what the options name."""
    from gpt2core.model import GPT2

    folder = find(model, revision=revision, offline=offline)
    draft = None if draft_model is None else find(draft_model, revision=None, offline=offline)
    with Status(f"loading {model}", quiet=True) as status:
        return GPT2.from_pretrained(
            folder, draft_model=draft, local_files_only=offline, on_progress=status.update, **engine
        )


def write(text: str) -> None:
    """Write to stdout at once. When the reader of a pipe is gone, the program ends with 0: it has enough.

    Raises:
        OSError: naming stdout, for any other reason, such as a full disk.
    """
    if sys.stdout is None:  # started with `>&-`
        raise OSError("cannot write to standard output: it is closed")
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        discard_stdout()
        raise click.exceptions.Exit(0) from None
    except OSError as error:
        discard_stdout()
        raise OSError(f"cannot write to standard output: {error.strerror}") from error


def write_json(document: dict[str, Any]) -> None:
    """Write one line of strict JSON, in ASCII so that every locale can carry it; see `finite`."""
    write(json.dumps(document, allow_nan=False) + "\n")


def finite(value: float | None) -> float | None:
    """JSON has no infinity: a perplexity beyond float64 is null."""
    return value if value is not None and math.isfinite(value) else None


def write_table(rows: Sequence[tuple[str, ...]]) -> None:
    """Write `table_lines`."""
    for line in table_lines(rows):
        write(f"{line}\n")


def table_lines(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Rows as columns of equal width, two spaces apart."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]


def discard_stdout() -> None:
    """Let later writes go nowhere; otherwise the interpreter's own flush at exit would complain again."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def one_line(message: str) -> str:
    """Fold white space and escape what a terminal would interpret."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in " ".join(message.split()))


def read_stdin(limit_nbytes: int | None = None) -> str:
    """`read_text` of stdin."""
    if sys.stdin is None:  # started with `<&-`
        raise RequestError("standard input is closed; give the text another way")
    return read_text(sys.stdin.buffer, "standard input", limit_nbytes)


def read_text(stream: BinaryIO, name: str, limit_nbytes: int | None = None) -> str:
    """Read UTF-8; a byte order mark at the start is no part of the text.

    Raises:
        RequestError: `stream` (called `name`) is not UTF-8, or longer than `limit_nbytes`.
    """
    data = stream.read() if limit_nbytes is None else stream.read(limit_nbytes + 1)
    if limit_nbytes is not None and len(data) > limit_nbytes:
        raise RequestError(
            f"{name} has more than {limit_nbytes} bytes; no model's context holds that; shorten it"
        )
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise RequestError(
            f"{name} is not UTF-8: byte 0x{data[error.start]:02x} at offset {error.start}; "
            "convert it first, for example with iconv -f LATIN1 -t UTF-8"
        ) from error


def format_nbytes(nbytes: int) -> str:
    """Bytes with a decimal unit: 12.3 MB."""
    size, units = float(nbytes), ["bytes", "kB", "MB", "GB", "TB"]
    while size >= 999.95 and len(units) > 1:
        size /= 1000
        units.pop(0)
    return f"{nbytes} bytes" if units[0] == "bytes" else f"{size:.1f} {units[0]}"
