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
from gpt2core.errors import RequestError

if TYPE_CHECKING:
    from gpt2core.bench.compare.recommend import Candidate

precisions_option = click.option(
    "--precision",
    metavar="NAMES",
    default="auto",
    show_default=True,
    help="Of the weights, with commas between; auto takes them as the checkpoint holds them.",
)
threads_option = click.option("--threads", type=click.IntRange(min=1), help="CPU threads of every engine.")
output_options = (
    click.option(
        "--output",
        metavar="FOLDER",
        type=click.Path(path_type=Path),
        default="gpt2core-bench",
        show_default=True,
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
        show_default=True,
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
    click.option(
        "--batch", "batches", metavar="SIZES", default="1,8,32", show_default=True, help="Texts at once."
    ),
    click.option("--prefill", metavar="LENGTHS", default="32,128,512", show_default=True, help="Of prompts."),
    click.option(
        "--rounds",
        type=click.IntRange(min=1),
        default=5,
        show_default=True,
        help="How often all is measured.",
    ),
    threads_option,
    click.option("--check/--no-check", default=True, help="Whether peers must first show right answers."),
    click.option("--baseline", metavar="NAME", help="Engine that ratios are over; by default transformers."),
    timeout_option(1800.0),
    *output_options,
)
def compare(
    *,
    model: str,
    output: Path,
    backends: str | None,
    peers: str | None,
    peer_pythons: tuple[str, ...],
    precision: str,
    batches: str,
    prefill: str,
    rounds: int,
    check: bool,
    baseline: str | None,
    threads: int | None,
    timeout_s: float,
    resume: bool,
    force: bool,
    revision: str | None,
    offline: bool,
    no_report: bool,
    as_json: bool,
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
        model=model,
        backends=_names("all" if backends is None and peers is None else backends, installed),
        peers=_names(peers, list(PEERS)),
        precisions=_names(precision, []),
        batches=_numbers(batches, "--batch"),
        prefill=_numbers(prefill, "--prefill"),
        rounds=rounds,
        threads=threads or count_cores(),
        peer_python=dict(map(_python, peer_pythons)),
        check=check,
        baseline=baseline,
        revision=revision,
        timeout_s=timeout_s,
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
    if not no_report and analysis.points:  # there is nothing to draw where nothing was measured
        write_report(output)
    if as_json:
        write_json(analysis.to_dict())
    else:
        write(analysis.text())
        write(f"\n{output / ('runs.jsonl' if no_report or not analysis.points else 'report.html')}\n")
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
    click.option(
        "--device", metavar="NAME", default="cpu", show_default=True, help="Where the engine computes."
    ),
    threads_option,
    timeout_option(1800.0),
)
def recommend(
    *,
    model: str,
    revision: str | None,
    offline: bool,
    precision: str,
    device: str,
    threads: int | None,
    timeout_s: float,
) -> None:
    """Measure every installed backend twice on MODEL, and keep the fastest for `--backend auto`."""
    from gpt2core.bench.compare.recommend import recommend as run

    with Status("measuring") as status:
        found = run(
            model,
            threads=threads,
            device=device,
            precisions=_names(precision, []),
            revision=revision,
            local_files_only=offline,
            timeout_s=timeout_s,
            on_progress=status.update,
        )
    headings = ("backend", "precision", "first token", "tok/s", "10 texts", "peak")
    write_table([headings, *map(_candidate, found.candidates)])
    best = found.fastest
    given = f" with --threads {threads}" if threads else ""
    write(f"\nfastest: {best.backend} in {best.precision}; `--backend auto` takes it{given} from now on\n")


def _candidate(candidate: "Candidate") -> tuple[str, ...]:
    c = candidate
    if c.error is not None or c.first_token_s is None or c.peak_memory_nbytes is None:
        return (c.backend, c.precision, f"failed: {c.error}", "", "", "")
    return (
        c.backend,
        c.precision,
        f"{c.first_token_s:.2f} s",
        f"{c.tokens_per_s:.4g}",
        f"{c.session_s:.2f} s",
        format_nbytes(round(c.peak_memory_nbytes)),
    )


def _names(text: str | None, everything: list[str]) -> tuple[str, ...]:
    if text is None:
        return ()
    if text.strip() == "all" and everything:
        return tuple(everything)
    return tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))


def _numbers(text: str, option: str) -> tuple[int, ...]:
    try:
        return tuple(dict.fromkeys(int(part) for part in text.split(",") if part.strip()))
    except ValueError:
        raise RequestError(f"{option} is {text!r}; give whole numbers with commas between") from None


def _python(text: str) -> tuple[str, str]:
    peer, found, path = text.partition("=")
    if not found:
        peer, path = "", text
    if shutil.which(path) is None:
        raise RequestError(f"--peer-python names {path!r}, which is no interpreter that can be run")
    return peer, path
