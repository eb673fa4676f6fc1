"""`gpt2core bench`: how long does a model, or a server, take to write?"""

import os
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from gpt2core.cli.bench_comparison import (
    comparison_options,
    recommend_option,
    run_comparison,
    run_recommendation,
)
from gpt2core.cli.console import (
    Status,
    checkpoint_options,
    json_option,
    one_line,
    options,
    write,
    write_json,
    write_table,
)
from gpt2core.errors import RequestError

if TYPE_CHECKING:
    from gpt2core.bench import ClassicResult, Progress, Summary

PROMPT_COLUMNS = 32
ATTEMPT_TIMEOUT_S = 300.0
PROCESS_TIMEOUT_S = 1800.0

model_options = (
    click.option(
        "--model",
        metavar="MODEL",
        help="`demo`, a folder, or an id on the hub; with --url the name that the server is asked for.  "
        "[default: demo, or the first that the server lists]",
    ),
    *checkpoint_options,
    click.option(
        "--backend", metavar="NAME", default="auto", show_default=True, help="Engine; see `backends`."
    ),
    click.option("--precision", metavar="NAME", default="float32", show_default=True, help="Of the weights."),
    click.option(
        "--device", metavar="NAME", default="cpu", show_default=True, help="Where the engine computes."
    ),
    click.option("--threads", type=click.IntRange(min=1), help="CPU threads; by default the engine decides."),
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
        show_default=True,
        help="Total lengths in tokens, prompt and new, with commas between.",
    ),
    click.option(
        "--runs",
        type=click.IntRange(min=1),
        default=3,
        show_default=True,
        help="How often each is measured, after a warm-up that is not counted.",
    ),
    click.option("--seed", type=int, default=0, show_default=True, help="Of run 0; run i has SEED + i."),
    click.option("--temperature", type=float, default=0.8, show_default=True, help="0: the likeliest token."),
    click.option(
        "--timeout",
        "timeout_s",
        type=click.FloatRange(min=0, min_open=True),
        metavar="SECONDS",
        help="For each attempt.  [default: 300; 1800 for each process of a comparison]",
    ),
    click.option(
        "--retries",
        type=click.IntRange(min=0),
        default=2,
        show_default=True,
        help="Further attempts before a generation is recorded as failed.",
    ),
)
output_options = (
    click.option(
        "--output",
        metavar="FOLDER",
        type=click.Path(path_type=Path),
        default="gpt2core-bench",
        show_default=True,
        help="Where everything is written.",
    ),
    click.option("--resume", is_flag=True, help="Go on where an interrupted run in --output ended."),
    click.option("--force", is_flag=True, help="Replace an earlier benchmark in --output."),
    click.option("--no-report", is_flag=True, help="Write the data only, no plots and no report.html."),
    json_option,
)


@click.group(invoke_without_command=True, short_help="Measure how fast a model or a server writes.")
@options(*model_options, *workload_options, *comparison_options, recommend_option, *output_options)
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
    on; ends with 1 if all fail. FOLDER holds afterwards runs.jsonl (each generation with the time of each
    token), benchmark_results.npy with its axes in benchmark_results.json, plots, report.html, settings and
    environment.

    With --backends or --peers engines are compared instead, each in a process of its own, round by round:
    start, first token, prefill, decoding, memory. --recommend finds the fastest for this machine and model.
    """
    if context.invoked_subcommand is not None:
        return
    if resume and force:
        raise click.UsageError("--resume and --force contradict each other")
    compared = {name: settings.pop(name) for name in _COMPARISON}
    compares = compared["backends"] is not None or compared["peers"] is not None
    if settings["timeout_s"] is None:
        settings["timeout_s"] = PROCESS_TIMEOUT_S if compares or settings["recommend"] else ATTEMPT_TIMEOUT_S
    if settings.pop("recommend"):
        _refuse(context, _CLASSIC + _COMPARISON + _OUTPUT, "--recommend measures a workload of its own")
        shared = {name: settings[name] for name in (*_SHARED, "device")}
        run_recommendation(model=settings["model"] or "demo", offline=offline, **shared)
        return
    if compares:
        _refuse(context, (*_CLASSIC, "device"), "--backends and --peers measure a workload of their own")
        shared = {name: settings[name] for name in _SHARED}
        run_comparison(
            model=settings["model"] or "demo",
            output=output,
            resume=resume,
            force=force,
            offline=offline,
            report=not no_report,
            as_json=as_json,
            **compared,
            **shared,
        )
        return
    _refuse(context, _COMPARISON, "it belongs to a comparison; name engines with --backends or --peers")
    from gpt2core.bench import ClassicSettings, run_classic

    if settings["url"] is not None:
        _refuse_engine_options(context)
    try:
        with ExitStack() as stack:
            result = run_classic(
                ClassicSettings(
                    **settings | _prompts(prompts, prompt_file),
                    lengths=_lengths(lengths),
                    local_files_only=offline,
                    api_key=os.environ.get("GPT2CORE_API_KEY") or None,
                ),
                output=output,
                resume=resume,
                force=force,
                report=not no_report,
                on_progress=_Bar(stack),
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
        errors = sorted({one["error"] for one in result.failures})
        more = f" (and {len(errors) - 1} other errors)" if len(errors) > 1 else ""
        end = f"{some} {result.times_s.size} generations failed: {errors[0]}{more}"
        print("gpt2core:", one_line(f"{end}; --resume tries them again"), file=sys.stderr)
    if result.failed:
        raise click.exceptions.Exit(1)


@bench.command(short_help="What do the measurements in a folder say?")
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

    Is time linear in length, does the prompt matter beyond its number of tokens, where does the time go?
    """
    from gpt2core.bench.extras import FOR_REPORTS, check_installed

    check_installed(*FOR_REPORTS)
    from gpt2core.bench.analysis import analyse as run
    from gpt2core.bench.analysis import measure_folder

    if components:
        from gpt2core.bench.report import write_report

        with Status("measuring the components") as status:
            measure_folder(
                folder, on_progress=lambda name: status.update(f"measuring the components: {name}")
            )
        write_report(folder)
    analysis = run(folder)
    if as_json:
        write_json(analysis.to_dict())
    else:
        write(analysis.text().rstrip("\n") + "\n")


def _refuse_engine_options(context: click.Context) -> None:
    for name in ("backend", "precision", "device", "threads", "revision", "offline"):
        if context.get_parameter_source(name) is ParameterSource.COMMANDLINE:
            raise click.UsageError(f"--{name} has no effect on a server; leave it or --url out")


_CLASSIC = ("backend", "url", "prompts", "prompt_file", "lengths", "runs", "seed", "temperature", "retries")
_COMPARISON = ("backends", "peers", "peer_pythons", "batches", "prefill", "rounds", "check", "baseline")
_SHARED = ("threads", "precision", "timeout_s", "revision")
_OUTPUT = ("output", "resume", "force", "no_report", "as_json")


def _refuse(context: click.Context, names: tuple[str, ...], why: str) -> None:
    """Refuse an option that would have no effect, rather than ignore it."""
    for option in context.command.params:
        given = context.get_parameter_source(option.name or "") is ParameterSource.COMMANDLINE
        if option.name in names and given:
            raise click.UsageError(f"{option.opts[0]} has no effect here: {why}")


def _prompts(prompts: tuple[str, ...], file: Path | None) -> dict[str, tuple[str, ...]]:
    if prompts and file is not None:
        raise click.UsageError("--prompt and --prompts are both given; leave one of them out")
    if file is not None:
        from gpt2core.bench.workload import read_prompts

        return {"prompts": read_prompts(file)}
    return {"prompts": prompts} if prompts else {}


def _lengths(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(",") if part.strip())
    except ValueError as error:
        raise RequestError(f"--lengths is {text!r:.60}; give whole numbers, as 50,100,200") from error


class _Bar:
    """A bar with the remaining time on a terminal's stderr; it goes with the context `stack`."""

    def __init__(self, stack: ExitStack) -> None:
        self._stack = stack
        self._bar: Any = None

    def __call__(self, progress: "Progress") -> None:
        if not sys.stderr.isatty():
            return
        cell = progress.cell
        name = "done" if cell is None else "warm-up" if cell.is_warm_up else f"run {cell.run + 1}"
        what = f"{name}, {progress.cells} of {progress.all_cells}"
        if self._bar is None:
            from tqdm import tqdm

            self._bar = self._stack.enter_context(
                tqdm(
                    desc=what,
                    total=progress.all_tokens,
                    bar_format="{desc} {percentage:3.0f}%|{bar}| {elapsed} so far, {remaining} left",
                    file=sys.stderr,
                    leave=False,
                    dynamic_ncols=True,
                )
            )
        self._bar.set_description_str(what, refresh=False)
        self._bar.update(progress.tokens - self._bar.n)


def _write(result: "ClassicResult") -> None:
    write_table([_HEADINGS, *map(_row, result.summaries)])
    settings = result.settings
    what = settings["url"] or f"{settings['model']} on {settings['backend']}, {settings['precision']}"
    write(f"\n{what}; mean of {settings['runs']} runs with its 95 % bootstrap interval\n")
    if early := sum(summary.ended_early for summary in result.summaries):
        write(f"{early} generations ended before their length was reached\n")
    if result.resumed:
        write(f"{result.resumed} generations were there before\n")
    write(f"{result.output / ('report.html' if result.report else 'runs.jsonl')}\n")


_HEADINGS = ("prompt", "length", "mean", "95 % interval", "tokens/s", "first token", "failed")


def _row(one: "Summary") -> tuple[str, ...]:
    prompt = one_line(one.prompt)
    if len(prompt) > PROMPT_COLUMNS:
        prompt = prompt[: PROMPT_COLUMNS - 3] + "..."
    return (
        prompt,
        str(one.length),
        _seconds(one.mean_s),
        "-" if one.low_s is None or one.high_s is None else f"{one.low_s:.3f} to {one.high_s:.3f} s",
        "-" if one.tokens_per_s is None else f"{one.tokens_per_s:.1f}",
        _seconds(one.ttft_s),
        str(one.failed),
    )


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f} s"
