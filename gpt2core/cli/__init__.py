"""The command line: `gpt2core COMMAND`. Text goes to stdout, everything else to stderr.

`EXIT_CODES` says with which code the program ends. An error is one line; `GPT2CORE_DEBUG=1` shows the
traceback instead. Each command is a module of this package; they import the library inside their functions,
since `--help` and the first token should not wait for what they do not need.
"""

import io
import os
import sys
import warnings
from collections.abc import Sequence

import click

from gpt2core import __version__
from gpt2core.cli.backends import backends
from gpt2core.cli.bench import bench
from gpt2core.cli.cache import cache
from gpt2core.cli.chat import chat
from gpt2core.cli.codec import compress, expand
from gpt2core.cli.command import Group, respell_warning
from gpt2core.cli.completion import completion
from gpt2core.cli.console import one_line
from gpt2core.cli.convert import convert
from gpt2core.cli.export import export
from gpt2core.cli.generate import generate
from gpt2core.cli.info import info
from gpt2core.cli.pairs import pairs
from gpt2core.cli.quantize import quantize
from gpt2core.cli.score import score
from gpt2core.cli.serve import serve
from gpt2core.cli.verify import verify
from gpt2core.errors import (
    Gpt2CoreError,
    RequestError,
)

EXIT_FAILED, EXIT_USAGE, EXIT_INTERRUPTED = 1, 2, 130
EXIT_CODES = {
    0: "done, also when the reader of a pipe has closed it early",
    EXIT_FAILED: "failed: a model, engine, file or measurement is missing or faulty; the error says which",
    EXIT_USAGE: "wrong usage or request: an option, a value, a prompt that does not fit",
    EXIT_INTERRUPTED: "interrupted",
}
"""What each exit code means."""


@click.group(
    cls=Group,
    examples=(
        'gpt2core generate "Once upon a time"',
        "gpt2core chat --chat-template plain",
        "gpt2core backends",
        "gpt2core COMMAND --help",
    ),
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)
@click.version_option(__version__, message="%(prog)s %(version)s")
def program() -> None:
    """Run GPT-2-family language models from one checkpoint on any backend."""


for _command in (
    *(generate, chat, score, pairs, serve, bench, verify, info, backends, convert, quantize, export),
    *(compress, expand, cache, completion),
):
    program.add_command(_command)


def main(args: Sequence[str] | None = None) -> int:
    """Run the program with `args` (default: those of the process) and return its exit code."""
    if sys.stderr is None:  # started with `2>&-`; print would take stdout instead
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115 - for as long as the process lives
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(
            errors="replace"
        )  # what the terminal cannot show becomes "?"; the story goes on
    warnings.formatwarning = _warning_line
    try:
        # Commands return nothing; the code of an Exit, --help's for one, comes back as the result.
        code: int | None = program.main(args, prog_name="gpt2core", standalone_mode=False)
    except (click.Abort, KeyboardInterrupt):
        return EXIT_INTERRUPTED
    except Exception as error:
        if os.environ.get("GPT2CORE_DEBUG", "0") not in ("", "0"):
            raise
        return _report(error)
    return code or 0


def _warning_line(message: Warning | str, *_: object, **__: object) -> str:
    return f"gpt2core: warning: {one_line(respell_warning(str(message)))}\n"


def _report(error: Exception) -> int:
    code = EXIT_FAILED
    match error:
        case click.exceptions.NoArgsIsHelpError():
            print(error.format_message(), file=sys.stderr)
            return EXIT_USAGE
        case click.ClickException():
            code, message = error.exit_code, error.format_message()
        case RequestError():
            code, message = EXIT_USAGE, str(error)
        case Gpt2CoreError() | OSError():
            message = str(error)
        case MemoryError():
            message = "not enough memory; try a smaller model"
        case _:
            message = f"unexpected {type(error).__name__}: {error}; set GPT2CORE_DEBUG=1 to see the traceback"
    print("gpt2core: error:", one_line(message), file=sys.stderr)
    return code
