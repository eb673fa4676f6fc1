"""`gpt2core bench compare` and `gpt2core bench recommend`: engines side by side, and the fastest of them."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gpt2core.cli.choices import backend_names
from gpt2core.cli.command import Command
from gpt2core.cli.console import (
    checkpoint_options,
    format_nbytes,
    json_option,
    model_option,
    options,
    write,
    write_json,
    write_table,
)
from gpt2core.cli.progress import Status
from gpt2core.errors import RequestError, in_short

if TYPE_CHECKING:
    from gpt2core.bench.compare.recommend import Candidate

precisions_option = click.option(
    "--precision",
    metavar="NAMES",
    default="auto",
    help="Of the weights, with commas between; auto takes them as the checkpoint holds them.",
)
threads_option = click.option("--threads", type=click.IntRange(min=1), help="CPU threads of every engine.")
output_options = (
    click.option(
        "--output",
        metavar="FOLDER",
        type=click.Path(path_type=Path),
        default="gpt2core-bench",
        help="Where everything is written.",
    ),
    click.option(
        "--resume",
        is_flag=True,
        help="Go on with the benchmark in --output, perhaps with more runs or rounds.",
    ),
    click.option("--force", is_flag=True, help="Replace an earlier benchmark in --output."),
    click.option("--no-report", is_flag=True, help="Write the data only, no plots and no report.html."),
    json_option,
)


def timeout_option(default_s: float) -> Callable[[Any], Any]:
    """The limit for one attempt or process."""
    return click.option(
        "--timeout",
        "timeout_s",
        type=click.FloatRange(min=0, min_open=True),
        metavar="SECONDS",
        default=default_s,
        help="For each attempt, or each process of an engine.",
    )


@click.command(
    cls=Command,
    short_help="Compare backends, and other libraries, on the same model.",
    examples=("gpt2core bench compare --backends numpy,native --rounds 3",),
)
@options(
    model_option,
    *checkpoint_options,
    click.option(
        "--backends",
        metavar="NAMES",
        shell_complete=backend_names,
        help="Engines of gpt2core, with commas between; `all` for those that are installed.  [default: all, "
        "unless --peers is given]",
    ),
    click.option("--peers", metavar="NAMES", help="Other libraries, too; `all` for all known ones."),
    click.option(
        "--peer-python",
        "peer_pythons",
        metavar="[PEER=]PATH",
        multiple=True,
        help="Interpreter of the environment in which a peer (or every peer) is installed; may be repeated.",
    ),
    precisions_option,
    click.option("--batch", "batches", metavar="SIZES", default="1,8,32", help="Texts at once."),
    click.option("--prefill", metavar="LENGTHS", default="32,128,512", help="Of prompts."),
    click.option("--rounds", type=click.IntRange(min=1), default=5, help="How often all is measured."),
    threads_option,
    click.option("--check/--no-check", default=True, help="Whether peers must first show right answers."),
    click.option("--baseline", metavar="NAME", help="Engine that ratios are over; by default transformers."),
    timeout_option(1800.0),
    *output_options,
)
def compare(
    *,
    output: Path,
    backends: str | None,
    peers: str | None,
    peer_pythons: tuple[str, ...],
    precision: str,
    batches: str,
    prefill: str,
    threads: int | None,
    resume: bool,
    force: bool,
    offline: bool,
    no_report: bool,
    as_json: bool,
    **settings: Any,
) -> None:
    """Compare engines, each in a process of its own, round by round.

    Measured are start, first token, prefill, decoding and memory. Peers are first checked for right answers
    on every variant of the model family, and marked WRONG where they fail. An engine that is not installed is
    skipped. Ends with 1 if a measurement failed.
    """
    if resume and force:
        raise click.UsageError("--resume and --force contradict each other")
    from gpt2core._machine import count_cores
    from gpt2core.backends import available
    from gpt2core.bench import analyse, write_report
    from gpt2core.bench.compare.plan import Comparison
    from gpt2core.bench.compare.rounds import compare as run
    from gpt2core.bench.engines import PEERS
    from gpt2core.bench.errors import ALWAYS, FOR_REPORTS, check_installed
    from gpt2core.bench.report.comparison_analysis import ComparisonAnalysis

    check_installed(*ALWAYS, *(() if no_report else FOR_REPORTS))
    installed = [name for name, info in available(load_plugins=False).items() if info.available]
    comparison = Comparison(
        **settings,
        backends=_names("all" if backends is None and peers is None else backends, installed),
        peers=_names(peers, list(PEERS)),
        precisions=_names(precision, []),
        batches=parse_numbers(batches, "--batch"),
        prefill=parse_numbers(prefill, "--prefill"),
        threads=threads or count_cores(),
        peer_python=dict(map(_interpreter, peer_pythons)),
    )
    with Status("starting", quiet=True) as status:
        run(
            comparison,
            output,
            resume=resume,
            force=force,
            local_files_only=offline,
            on_progress=status.show,
        )
    analysis = analyse(output)
    assert isinstance(analysis, ComparisonAnalysis)
    report = not no_report and bool(analysis.points)  # of nothing there is nothing to draw
    if report:
        write_report(output)
    if as_json:
        write_json(analysis.to_dict())
    else:
        write(f"{analysis.text()}\n{output / ('report.html' if report else 'runs.jsonl')}\n")
    if analysis.failed():
        raise click.exceptions.Exit(1)


@click.command(
    cls=Command,
    short_help="Find the fastest backend here, for `--backend auto` to take.",
    examples=("gpt2core bench recommend --model demo",),
)
@options(
    model_option,
    *checkpoint_options,
    precisions_option,
    click.option("--device", metavar="NAME", default="cpu", help="Where the engine computes."),
    threads_option,
    timeout_option(1800.0),
)
def recommend(*, model: str, precision: str, offline: bool, threads: int | None, **settings: Any) -> None:
    """Measure every installed backend twice on MODEL, and keep the fastest for `--backend auto`."""
    from gpt2core.bench.compare.recommend import recommend as run

    settings |= {"precisions": _names(precision, []), "local_files_only": offline, "threads": threads}
    with Status("measuring") as status:
        found = run(model, on_progress=status.update, **settings)
    headings = ("backend", "precision", "first token", "tok/s", "10 texts", "peak")
    write_table([headings, *map(_describe, found.candidates)])
    best = found.fastest
    given = f" with --threads {threads}" if threads else ""
    write(f"\nfastest: {best.backend} in {best.precision}; `--backend auto` takes it{given} from now on\n")


def _describe(c: "Candidate") -> tuple[str, ...]:
    if c.error is not None or c.first_token_s is None or c.peak_memory_nbytes is None:
        return c.backend, c.precision, f"failed: {c.error}", "", "", ""
    times = (f"{c.first_token_s:.2f} s", f"{c.tokens_per_s:.4g}", f"{c.session_s:.2f} s")
    return c.backend, c.precision, *times, format_nbytes(round(c.peak_memory_nbytes))


def _names(text: str | None, everything: list[str]) -> tuple[str, ...]:
    if text is None:
        return ()
    if text.strip() == "all" and everything:
        return tuple(everything)
    return tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))


def parse_numbers(text: str, option: str) -> tuple[int, ...]:
    """Whole numbers with commas between, as an option has them.

    Raises:
        RequestError: something else is among them.
    """
    try:
        return tuple(int(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise RequestError(f"{option} is {in_short(text)}; give whole numbers, as 1,8,32") from None


def _interpreter(text: str) -> tuple[str, str]:
    peer, found, path = text.partition("=")
    if not found:
        peer, path = "", text
    if shutil.which(path) is None:
        raise RequestError(f"--peer-python names {path!r}, which is no interpreter that can be run")
    return peer, path
