"""`gpt2core bench`: how long does a model, or a server, take to write?"""

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from gpt2core.cli.bench_compare import compare, output_options, parse_numbers, recommend, timeout_option
from gpt2core.cli.choices import model_names
from gpt2core.cli.command import Command, Group
from gpt2core.cli.console import (
    json_option,
    model_options,
    one_line,
    options,
    read_text,
    write,
    write_json,
)
from gpt2core.cli.progress import Status
from gpt2core.errors import RequestError

if TYPE_CHECKING:
    from gpt2core.bench import ClassicResult

MAX_PROMPTS_NBYTES = 2**20

target_options = (
    click.option(
        "-m",
        "--model",
        metavar="MODEL",
        shell_complete=model_names,
        help="`demo`, a folder, or an id on the hub; with --url the name that the server is asked for.  "
        "[default: demo, or the first that the server lists]",
    ),
    *model_options[1:],  # what all commands have beside --model
    click.option(
        "--url",
        metavar="URL",
        help="Measure a running server instead: its /generate, or an OpenAI-style endpoint if URL ends in "
        "/v1 or /v1/completions. A key is read from the variable GPT2CORE_API_KEY.",
    ),
)
workload_options = (
    click.option("--prompt", "prompts", metavar="TEXT", multiple=True, help="Repeatable; else --prompts."),
    click.option(
        "--prompts",
        "prompt_file",
        metavar="FILE",
        type=click.Path(path_type=Path),
        help="One prompt a line.  [default: six built-in ones]",
    ),
    click.option(
        "--lengths",
        metavar="NUMBERS",
        default="50,100,200",
        help="Total lengths in tokens, prompt and new, with commas between.",
    ),
    click.option(
        "--runs",
        type=click.IntRange(min=1),
        default=5,
        help="How often each is measured, after a warm-up that is not counted.",
    ),
    click.option("--seed", type=int, default=0, help="Of run 0; run i has SEED + i."),
    click.option("--temperature", type=float, default=0.8, help="0: the likeliest token."),
    timeout_option(300.0),
    click.option(
        "--retries",
        type=click.IntRange(min=0),
        default=2,
        help="Further attempts before a generation is recorded as failed.",
    ),
)


class BenchGroup(Group):
    """`bench` alone is the classic run; options that meant another command before it had a name still do."""

    def parse_args(self, context: click.Context, args: list[str]) -> list[str]:
        """Put the name of the command first that such options mean."""
        if args and args[0] not in self.commands:
            names = {arg.partition("=")[0] for arg in args}
            if "--recommend" in names:
                args = ["recommend", *(arg for arg in args if arg != "--recommend")]
            elif names & {"--backends", "--peers"}:
                args = ["compare", *args]
        return super().parse_args(context, args)


@click.group(
    cls=BenchGroup,
    invoke_without_command=True,
    context_settings={"show_default": True},
    short_help="Measure how fast a model or a server writes.",
    examples=(
        "gpt2core bench --output my-benchmark",
        "gpt2core bench --url http://127.0.0.1:8000 --output server",
    ),
)
@options(*target_options, *workload_options, *output_options)
@click.pass_context
def bench(
    context: click.Context,
    /,
    *,
    prompts: tuple[str, ...],
    prompt_file: Path | None,
    lengths: str,
    offline: bool,
    output: Path,
    resume: bool,
    force: bool,
    no_report: bool,
    as_json: bool,
    **settings: Any,
) -> None:
    """Time every prompt at every total length several times, and keep everything that was measured.

    The runs are interleaved and a warm-up comes first. A generation that fails is recorded and the others go
    on; ends with 1 if any failed. FOLDER holds afterwards runs.jsonl (each generation with the time of each
    token), benchmark_results.npy with its axes in benchmark_results.json, plots, report.html, settings and
    environment.
    """
    given = [
        max(option.opts, key=len)
        for option in context.command.params
        if context.get_parameter_source(option.name or "") is ParameterSource.COMMANDLINE
    ]
    if context.invoked_subcommand is not None:
        if given:
            name = context.invoked_subcommand
            raise click.UsageError(f"{given[0]} has no effect before {name}; give it after, if {name} has it")
        return
    if resume and force:
        raise click.UsageError("--resume and --force contradict each other")
    if settings["url"] is not None:
        for name in ("--backend", "--precision", "--device", "--threads", "--revision", "--offline"):
            if name in given:
                raise click.UsageError(f"{name} has no effect on a server; leave it or --url out")
    from gpt2core.bench import ClassicSettings, run_classic

    settings |= {"lengths": parse_numbers(lengths, "--lengths"), "local_files_only": offline}
    settings |= _choose_prompts(prompts, prompt_file)
    try:
        with Status("starting", quiet=True) as status:
            result = run_classic(
                ClassicSettings(**settings, api_key=os.environ.get("GPT2CORE_API_KEY") or None),
                output=output,
                resume=resume,
                force=force,
                report=not no_report,
                on_progress=status.show,
            )
    except KeyboardInterrupt:
        if output.exists():
            print("gpt2core: interrupted; go on with the same command and --resume", file=sys.stderr)
        raise
    if as_json:
        write_json(result.to_dict())
    else:
        _write(result)
    if result.failures:
        some = "all" if result.failed else f"{len(result.failures)} of"
        errors = sorted({record["error"] for record in result.failures})
        more = f" (and {len(errors) - 1} other errors)" if len(errors) > 1 else ""
        end = f"{some} {result.times_s.size} generations failed: {errors[0]}{more}"
        print("gpt2core:", one_line(f"{end}; --resume tries them again"), file=sys.stderr)
        raise click.exceptions.Exit(1)


bench.add_command(compare)
bench.add_command(recommend)


@bench.command(
    cls=Command,
    short_help="What do the measurements in a folder say?",
    examples=("gpt2core bench analyse my-benchmark",),
)
@click.argument("folder", type=click.Path(path_type=Path))
@click.option(
    "--components",
    is_flag=True,
    help="First measure where the time goes, on the same model and backends; a minute or so. The report is "
    "written anew.",
)
@json_option
def analyse(folder: Path, *, components: bool, as_json: bool) -> None:
    """Analyse the benchmark in FOLDER.

    Who is the fastest and by how much, is time linear in length, where does the time go?
    """
    from gpt2core.bench.errors import ALWAYS, check_installed

    check_installed(*ALWAYS)
    from gpt2core.bench.report.analysis import analyse as run

    if components:
        from gpt2core.bench import write_report
        from gpt2core.bench.report.analysis import measure_folder

        what = "measuring the components"
        with Status(what) as status:
            measure_folder(folder, on_progress=lambda name: status.update(f"{what}: {name}"))
        write_report(folder)
    analysis = run(folder)
    if as_json:
        write_json(analysis.to_dict())
    else:
        write(analysis.text().rstrip("\n") + "\n")


def _choose_prompts(prompts: tuple[str, ...], file: Path | None) -> dict[str, tuple[str, ...]]:
    if prompts and file is not None:
        raise click.UsageError("--prompt and --prompts are both given; leave one of them out")
    if file is not None:
        return {"prompts": _read_prompts(file)}
    return {"prompts": prompts} if prompts else {}


def _read_prompts(file: Path) -> tuple[str, ...]:
    """One prompt a line; lines of white space only are left out."""
    try:
        with file.open("rb") as stream:
            text = read_text(stream, f"prompt file {file}", MAX_PROMPTS_NBYTES)
    except OSError as error:
        raise RequestError(f"prompt file {file} cannot be read: {error.strerror}") from error
    prompts = tuple(line for line in text.splitlines() if line.strip())
    if not prompts:
        raise RequestError(f"prompt file {file} holds no prompt; write one prompt a line")
    return prompts


def _write(result: "ClassicResult") -> None:
    from gpt2core.bench.sweep.summary import summary_table

    settings = result.settings
    what = settings["url"] or f"{settings['model']} on {settings['backend']}, {settings['precision']}"
    write(f"{summary_table(result.summaries).text()}\n{what}\n")
    if early := sum(summary.ended_early for summary in result.summaries):
        write(f"{early} generations ended before their length was reached\n")
    if result.resumed:
        write(f"{result.resumed} generations were there before\n")
    write(f"{result.output / ('report.html' if result.report else 'runs.jsonl')}\n")
