"""`gpt2core bench --backends ...`, `--peers ...` and `--recommend`: the comparison and the recommendation."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import click

from gpt2core.cli.console import Status, format_nbytes, write, write_json, write_table
from gpt2core.errors import RequestError

if TYPE_CHECKING:
    from gpt2core.bench.comparison import Cell, Row, Table
    from gpt2core.bench.recommend import Candidate

T = TypeVar("T")

comparison_options = (
    click.option(
        "--backends",
        metavar="NAMES",
        help="Compare engines of gpt2core, with commas between; `all` for those that are installed.",
    ),
    click.option("--peers", metavar="NAMES", help="Compare with other libraries; `all` for all known ones."),
    click.option(
        "--peer-python",
        "peer_pythons",
        metavar="[PEER=]PATH",
        multiple=True,
        help="Interpreter of the environment in which a peer (or every peer) is installed; may be repeated.",
    ),
    click.option(
        "--batch", "batches", metavar="SIZES", default="1,8,32", show_default=True, help="Texts at once."
    ),
    click.option(
        "--prefill", "prefill", metavar="LENGTHS", default="32,128,512", show_default=True, help="Of prompts."
    ),
    click.option(
        "--rounds",
        type=click.IntRange(min=1),
        default=3,
        show_default=True,
        help="How often all is measured.",
    ),
    click.option("--check/--no-check", default=True, help="Whether peers must first show right answers."),
    click.option("--baseline", metavar="NAME", help="Engine that ratios are over; by default transformers."),
)
recommend_option = click.option(
    "--recommend", is_flag=True, help="Find the fastest engine here, for `--backend auto` to take."
)


def run_comparison(
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
    report: bool,
    as_json: bool,
) -> None:
    """Run the comparison that the options describe, write its table, and its report into the folder."""
    from gpt2core.backends import available
    from gpt2core.bench.comparison import comparison_table
    from gpt2core.bench.engines import PEERS
    from gpt2core.bench.extras import FOR_REPORTS, check_installed
    from gpt2core.bench.plan import Comparison
    from gpt2core.bench.rounds import compare

    check_installed(*(FOR_REPORTS if report else ("scipy",)))
    installed = [name for name, info in available(load_plugins=False).items() if info.available]
    comparison = Comparison(
        model=model,
        backends=_names(backends, installed),
        peers=_names(peers, list(PEERS)),
        precisions=_names(precision, []),
        batches=_numbers(batches, "--batch"),
        prefill=_numbers(prefill, "--prefill"),
        rounds=rounds,
        threads=threads or usable_cores(),
        peer_python=dict(map(_python, peer_pythons)),
        check=check,
        baseline=baseline,
        revision=revision,
        timeout_s=timeout_s,
    )
    with Status("comparing") as status:
        lines = compare(
            comparison,
            output,
            resume=resume,
            force=force,
            local_files_only=offline,
            on_progress=status.update,
        )
    table = comparison_table(lines, baseline=baseline)
    if report and table.cells:  # there is nothing to draw where nothing was measured
        from gpt2core.bench.report import write_report  # loads matplotlib, so only now

        write_report(output)
    if as_json:
        write_json(table.to_dict())
    else:
        write_comparison(table)


def run_recommendation(
    *,
    model: str,
    threads: int | None,
    device: str,
    precision: str,
    timeout_s: float,
    revision: str | None,
    offline: bool,
) -> None:
    """Find the fastest engine, keep it, and write what was measured."""
    from gpt2core.bench.recommend import recommend

    with Status("measuring") as status:
        found = recommend(
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


def write_comparison(table: "Table") -> None:
    """Write the medians with their intervals, the ratios, the bandwidth, and what failed or is wrong."""
    headings = ("engine", "precision", "correct", *map(_heading, table.cells))
    write_table([headings, *(_row(row, table.cells) for row in table.rows)])
    if table.baseline is not None:
        name, precision = table.baseline
        write(f"\ntimes faster than {name} in {precision}, by pairs of the same round (memory: smaller)\n")
        rows = [row for row in table.rows if row.ratios]
        write_table([("engine", "precision", *headings[3:]), *(_ratios(row, table.cells) for row in rows)])
    if table.read_bandwidth is not None:
        _write_roofline(table)
    for row in table.rows:
        for variant, error in row.wrong.items():
            write(f"{row.engine} in {row.precision} is WRONG on {variant}: {error}\n")
        for error in dict.fromkeys(row.unanswered.values()):
            names = [variant for variant, why in row.unanswered.items() if why == error]
            write(f"{row.engine} in {row.precision} was not checked on {_listed(names)}: {error}\n")
    for reason in dict.fromkeys(reason for row in table.rows for reason in row.reasons):
        names = [f"{row.engine} in {row.precision}" for row in table.rows if reason in row.reasons]
        write(f"{_listed(names)}: {reason}\n")


def usable_cores() -> int:
    """Processors that this process may use: one number for all engines."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _write_roofline(table: "Table") -> None:
    assert table.read_bandwidth is not None
    bandwidth = table.read_bandwidth.mid
    write(f"\nweights read while decoding, of {bandwidth / 1e9:.3g} GB/s that this machine reads\n")
    batches = sorted({batch for row in table.rows for batch in row.achieved})
    rows = [("engine", "precision", *(f"batch {batch}" for batch in batches))]
    for row in table.rows:
        if row.achieved:
            shares = (row.achieved.get(batch) for batch in batches)
            cells = (
                "-" if one is None else f"{one / 1e9:.3g} GB/s ({one / bandwidth:.0%})" for one in shares
            )
            rows.append((row.engine, row.precision, *cells))
    write_table(rows)
    write("\n")


_LABELS = {
    "first_token_cold_s": "cold start",
    "load_s": "load",
    "compile_s": "compile",
    "ttft_s": "TTFT",
    "prefill_s": "prefill",
    "decode_tok_s": "tok/s",
    "peak_memory_nbytes": "peak",
}


def _heading(cell: "Cell") -> str:
    measure, batch, length, _ = cell
    where = f" b{batch}" if batch is not None else f" {length}" if length is not None else ""
    return _LABELS[measure] + where


def _row(row: "Row", cells: "tuple[Cell, ...]") -> tuple[str, ...]:
    shown = []
    for cell in cells:
        value, show = row.values.get(cell), _format(cell[0])
        if value is None:
            shown.append("-")
        elif value.low == value.high:
            shown.append(show(value.mid))
        else:
            shown.append(f"{show(value.mid)} [{show(value.low)}, {show(value.high)}]")
    return (row.engine, row.precision, row.correct, *shown)


def _ratios(row: "Row", cells: "tuple[Cell, ...]") -> tuple[str, ...]:
    found = (row.ratios.get(cell) for cell in cells)
    shown = ("-" if one is None else f"{one.mid:.2f} [{one.low:.2f}, {one.high:.2f}]" for one in found)
    return (row.engine, row.precision, *shown)


def _format(measure: str) -> Callable[[float], str]:
    if measure == "peak_memory_nbytes":
        return lambda value: format_nbytes(round(value))
    if measure == "decode_tok_s":
        return lambda value: f"{value:.4g}" if value < 1000 else f"{value:.0f}"
    return lambda value: f"{value:.2f} s" if value >= 1 else f"{1e3 * value:.3g} ms"


def _candidate(one: "Candidate") -> tuple[str, ...]:
    if one.error is not None or one.first_token_s is None or one.peak_memory_nbytes is None:
        return (one.backend, one.precision, f"failed: {one.error}", "", "", "")
    return (
        one.backend,
        one.precision,
        f"{one.first_token_s:.2f} s",
        f"{one.tokens_per_s:.4g}",
        f"{one.session_s:.2f} s",
        format_nbytes(round(one.peak_memory_nbytes)),
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


def _listed(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
