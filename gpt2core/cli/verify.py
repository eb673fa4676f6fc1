"""`gpt2core verify`: do all backends compute the same, and what the reference computes?"""

import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from gpt2core.cli.choices import backend_names
from gpt2core.cli.command import Command
from gpt2core.cli.console import (
    checkpoint_options,
    find,
    format_nbytes,
    json_option,
    options,
    write,
    write_json,
    write_table,
)
from gpt2core.cli.progress import Status

if TYPE_CHECKING:
    from gpt2core.verify import BackendReport, Disagreement, Report


@click.command(
    cls=Command,
    short_help="Compare the engines with each other and with a reference.",
    examples=("gpt2core verify demo", "gpt2core verify FOLDER --backends numpy,native --layers"),
)
@click.argument("model", default="demo")
@options(*checkpoint_options)
@click.option(
    "--backends",
    metavar="NAMES",
    shell_complete=backend_names,
    help="Engines, with commas between; by default all that are installed. A factory of your own is given as "
    "module:attribute.",
)
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads; by default each engine decides.")
@click.option("--layers", is_flag=True, help="Name the first layer and part that leaves the reference.")
@click.option(
    "--tolerance",
    type=click.FloatRange(min=0, min_open=True),
    help="Largest allowed difference of a logit.  [default: 2e-4; in int8 and int4 a root mean square of 0.1 "
    "of the logits' spread]",
)
@click.option(
    "--seeds", type=click.IntRange(min=0), default=5, show_default=True, help="How many texts to draw."
)
@click.option(
    "--tokens", type=click.IntRange(min=1), default=40, show_default=True, help="Tokens of each text."
)
@click.option(
    "--timeout",
    "timeout_s",
    type=click.FloatRange(min=0, min_open=True),
    metavar="SECONDS",
    default=1800.0,
    show_default=True,
    help="For each engine.",
)
@click.option(
    "--bits",
    is_flag=True,
    help="Only hash the demo model's logits on `native`, and say whether they are those of every machine.",
)
@json_option
def verify(
    model: str,
    *,
    revision: str | None,
    offline: bool,
    backends: str | None,
    bits: bool,
    as_json: bool,
    **limits: Any,
) -> None:
    """Run MODEL on every engine, in its precision, each in a process of its own, and compare.

    The logits of several ways of running a text (at once, in chunks, token by token, in ragged batches) are
    held against a float64 reference, which of rounded weights computes what they stand for. Then texts
    are drawn at temperature 0.8, and their tokens compared between engines. Ends with 1 if an engine fails.
    """
    if bits:
        _verify_bits(threads=limits["threads"], as_json=as_json)
        return
    from gpt2core.verify import verify as run

    folder = find(model, revision=revision, offline=offline)
    names = None if backends is None else [name.strip() for name in backends.split(",") if name.strip()]
    with Status("computing the reference") as status:
        report = run(folder, backends=names, on_progress=status.update, **limits)
    if as_json:
        write_json(report.to_dict() | {"model": model, "folder": str(folder)})
    else:
        _write(report)
    if not report.passed:
        failed = [one for one in report.backends if one.status == "failed"]
        print(f"gpt2core: {', '.join(one.backend for one in failed)} failed", file=sys.stderr)
        raise click.exceptions.Exit(1)


def _verify_bits(*, threads: int | None, as_json: bool) -> None:
    from gpt2core.verify.bits import verify_bits

    reports = list(verify_bits(threads=threads))
    if as_json:
        write_json({"bits": [asdict(one) | {"passed": one.passed} for one in reports]})
    else:
        rows = [(one.precision, one.digest, "same" if one.passed else f"NOT {one.golden}") for one in reports]
        write_table([("precision", "hash", "every machine"), *rows])
    if not all(one.passed for one in reports):
        print(
            "gpt2core: native's logits are not those of other machines; see docs/reproducibility.md",
            file=sys.stderr,
        )
        raise click.exceptions.Exit(1)


def _write(report: "Report") -> None:
    write_table([_HEADINGS, *(_row(one, report.baseline) for one in report.backends)])
    write("\n")
    positions = max((one.overall.positions for one in report.backends if one.overall), default=0)
    if report.relative_tolerance is None:
        allowed = f"difference {report.tolerance:g}"
    else:
        allowed = f"root mean square of the differences {report.relative_tolerance:g} of the logits' spread"
    reference = "the reference"
    if report.precision != "float32":
        reference += f" of the weights that its {report.precision} stands for"
    write(f"logits: {positions} positions against {reference}; allowed {allowed}\n")
    if report.baseline is not None:
        write(
            f"tokens: {report.seeds} seeds x {report.tokens} tokens at temperature {report.temperature:g}, "
            f"compared with {report.baseline}'s\n"
        )
    for one in report.backends:
        for line in _remarks(one, relative=report.relative_tolerance is not None):
            write(f"{one.backend}: {line}\n")


_HEADINGS = (
    *("backend", "status", "max diff", "mean diff", "top-1", "KL mean", "KL max", "same tokens"),
    *("load", "run", "peak"),
)


def _row(one: "BackendReport", baseline: str | None) -> tuple[str, ...]:
    overall, cells = one.overall, ["-"] * 5
    if overall is not None:
        cells = [
            f"{overall.max_difference:.2g}",
            f"{overall.mean_difference:.2g}",
            f"{100 * overall.top1_agreement:.4g}%",
            f"{overall.kl_mean_nats:.2g}",
            f"{overall.kl_max_nats:.2g}",
        ]
    agreement = one.agreement
    same = "-" if agreement is None else f"{agreement.equal_tokens}/{agreement.tokens}"
    if one.backend == baseline:
        same = "baseline"
    peak = one.peak_memory_nbytes
    return (
        one.backend,
        one.status,
        *cells,
        same,
        _seconds(one.load_s),
        _seconds(one.elapsed_s),
        "-" if peak is None else format_nbytes(peak),
    )


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f} s"


def _remarks(one: "BackendReport", *, relative: bool) -> list[str]:
    if one.status == "skipped":
        return [f"skipped: {reason}" for reason in one.reasons]
    lines = []
    if relative and one.overall is not None:
        lines.append(f"off by {one.overall.relative_difference:.2g} of the logits' spread")
    lines += [_drawn(each) for each in one.agreement.disagreements] if one.agreement is not None else []
    if one.layers is not None:
        lines.append(_layers(one))
    return [*lines, *(f"FAILED: {reason}" for reason in one.reasons)]


def _drawn(one: "Disagreement") -> str:
    line = f"seed {one.seed}, new token {one.index}: {one.got} instead of {one.expected}; "
    if one.margin is None or one.numeric_difference is None:
        return line + "one text had ended"
    within = "within margin" if one.within else "NOT within margin"
    return (
        f"{line}the random number is {one.margin:.2g} from the border, which rounding moves by up to "
        f"{one.numeric_difference:.2g}: {within}"
    )


def _layers(one: "BackendReport") -> str:
    assert one.layers is not None
    if not one.layers.traced:
        return "layers: this backend lacks the capability Traces"
    first = one.layers.first
    if first is None:
        return "layers: no part leaves the reference"
    return (
        f"layers: first leaves the reference at {first.where} (position {first.position}: "
        f"{first.difference:.2g}, allowed {first.allowed:.2g})"
    )
