"""The command line: `gpt2core COMMAND`. Text goes to stdout, everything else to stderr.

Exit codes: 0 done (also when the reader of a pipe closed it early), 1 failed, 2 wrong usage or request,
130 interrupted. An error is one line; `GPT2CORE_DEBUG=1` shows the traceback instead. Each command is a
module of this package; they import the library inside their functions, since `--help` and the first token
should not wait for what they do not need.
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
from gpt2core.cli.codec import compress, expand
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
from gpt2core.errors import Gpt2CoreError, RequestError

EXIT_FAILED, EXIT_USAGE, EXIT_INTERRUPTED = 1, 2, 130


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, message="%(prog)s %(version)s")
def program() -> None:
    """Run GPT-2-family language models from one checkpoint on any backend."""


for _command in (
    generate,
    score,
    pairs,
    serve,
    bench,
    verify,
    info,
    backends,
    convert,
    quantize,
    export,
    compress,
    expand,
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
    warnings.formatwarning = lambda message, *_, **__: f"gpt2core: warning: {one_line(str(message))}\n"
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
