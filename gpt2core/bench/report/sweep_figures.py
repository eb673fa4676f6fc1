"""The figures of the classic benchmark: generation time per prompt and length, and against length."""

from collections.abc import Callable
from itertools import pairwise
from typing import Final

import seaborn
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from gpt2core.bench.report.drawing import (
    COLORS,
    DASHES,
    INK,
    MARKERS,
    bars_of,
    finish,
    grid,
    label,
    new_figure,
    upper_limit,
    wrapped,
    write_beside,
)
from gpt2core.bench.report.sweep_analysis import ClassicAnalysis
from gpt2core.bench.statistics import Interval
from gpt2core.bench.sweep.summary import Summary
from gpt2core.bench.tables import TOKENS_PER_SECOND, Unit, fitting_unit

_BAR: Final = 0.8  # of the room between two prompts that its bars take
_ROW_IN: Final = 0.24  # inches for a bar
_FAILED: Final = "#b00020"


def bar_figure(analysis: ClassicAnalysis) -> Figure:
    """`gpt2_benchmark.png`: for each prompt one bar per length, with the 95 % interval of its mean."""
    unit, cells = _unit(analysis), _cells(analysis)
    prompts, lengths = analysis.records.prompts, analysis.records.lengths
    colors = seaborn.color_palette("viridis_r", len(lengths) + 1)[1:]  # ordered, and without the yellow
    height = 1.9 + len(prompts) * max(0.42, _ROW_IN * len(lengths) + 0.1)
    figure, [ax] = new_figure(9, height)
    thick = _BAR / len(lengths)
    for row, prompt in enumerate(prompts):
        for i, length in enumerate(lengths):
            cell, y = cells[prompt, length], row + (i - (len(lengths) - 1) / 2) * thick
            if cell.interval is None:
                write_beside(ax, y, _failure(cell), _FAILED)
                continue
            ax.barh(y, cell.interval.mid * unit.factor, thick * 0.92, color=colors[i], linewidth=0)
            if cell.runs > 1:
                error = bars_of([cell.interval], unit.factor)
                ax.errorbar(
                    cell.interval.mid * unit.factor,
                    y,
                    xerr=error,
                    color=INK,
                    capsize=2,
                    linewidth=1,
                    fmt="none",
                )
            failed = f"   ({_failure(cell)})" if cell.failed else ""
            write_beside(ax, y, unit.number(cell.interval.mid) + failed, _FAILED if failed else INK)
    ax.set_xlim(0, upper_limit(_intervals(analysis), unit.factor))
    ax.set_yticks(range(len(prompts)), [wrapped(f"{i + 1}. {text}") for i, text in prompts.items()])
    ax.set_ylim(len(prompts) - 0.5, -0.5)
    ax.set_xlabel(f"mean generation time ({unit.name})", color=INK)
    grid(ax, "x")
    ax.tick_params(axis="y", length=0)
    handles = [Patch(color=color, label=f"{n}") for color, n in zip(colors, lengths, strict=True)]
    figure.legend(
        handles=handles,
        title="total tokens",
        loc="outside right upper",
        frameon=False,
        fontsize=9,
        title_fontsize=9,
    )
    return finish(figure, f"{_what(analysis)}: {_speed(analysis)}", _notes(analysis))


def line_figure(analysis: ClassicAnalysis) -> Figure:
    """`gpt2_benchmark_line.png`: a line for each prompt over the lengths; bars where there is one length."""
    lengths, prompts = analysis.records.lengths, analysis.records.prompts
    if len(lengths) == 1:
        return bar_figure(analysis)
    unit, cells = _unit(analysis), _cells(analysis)
    figure, [ax] = new_figure(10, max(5.0, 1.6 + 0.4 * len(prompts)))
    reach = lengths[-1] - lengths[0]
    spread = min(0.035 * reach, 0.25 * min(after - before for before, after in pairwise(lengths)))
    handles = []
    for rank, (index, prompt) in enumerate(prompts.items()):
        shift = spread * ((rank + 0.5) / len(prompts) - 0.5)  # apart, where all take the same time
        points = [(n + shift, cells[index, n].interval) for n in lengths]
        known = [(x, value) for x, value in points if value is not None]
        color = COLORS[rank % len(COLORS)]
        marker = MARKERS[rank % len(MARKERS)]
        dash = DASHES[rank // len(COLORS) % len(DASHES)]
        if known:
            ax.errorbar(
                [x for x, _ in known],
                [value.mid * unit.factor for _, value in known],
                yerr=bars_of((value for _, value in known), unit.factor),
                color=color,
                marker=marker,
                markersize=5,
                linestyle=dash,
                linewidth=1.4,
                capsize=3,
            )
        text = wrapped(f"{index + 1}. {prompt}", 30) + ("" if known else "\n(all runs failed)")
        handles.append(Line2D([], [], color=color, marker=marker, linestyle=dash, label=text))
    ax.set_xticks(lengths)
    ax.set_xlim(lengths[0] - 0.1 * reach, lengths[-1] + 0.1 * reach)
    ax.set_ylim(0, upper_limit(_intervals(analysis), unit.factor))
    ax.set_xlabel("total length (tokens, prompt included)", color=INK)
    ax.set_ylabel(f"mean generation time ({unit.name})", color=INK)
    grid(ax, "both")
    figure.legend(handles=handles, loc="outside right upper", frameon=False, fontsize=8.5, labelspacing=0.8)
    notes = [*_notes(analysis), "Points are moved sideways a little, so that they do not hide each other."]
    return finish(figure, f"{_what(analysis)}: {_growth(analysis)}", notes)


FIGURES: Final[dict[str, tuple[Callable[[ClassicAnalysis], Figure], str]]] = {
    "gpt2_benchmark.png": (bar_figure, "Mean generation time per prompt and length, with 95 % intervals"),
    "gpt2_benchmark_line.png": (line_figure, "Generation time against length, a line for each prompt"),
}
"""File name -> what draws it, and what it shows."""


def _unit(analysis: ClassicAnalysis) -> Unit:
    return fitting_unit("s", [value.mid for value in _intervals(analysis)])


def _intervals(analysis: ClassicAnalysis) -> list[Interval]:
    return [cell.interval for cell in analysis.cells if cell.interval is not None]


def _cells(analysis: ClassicAnalysis) -> dict[tuple[int, int], Summary]:
    return {(cell.prompt_index, cell.length): cell for cell in analysis.cells}


def _failure(cell: Summary) -> str:
    return f"all {cell.failed} runs failed" if not cell.runs else f"{cell.failed} failed"


def _speed(analysis: ClassicAnalysis) -> str:
    ranked = analysis.at_longest()
    if not ranked:
        return "generation time per prompt and length"
    length, worst, best = ranked[0].length, ranked[-1].tokens_per_s or 0, ranked[0].tokens_per_s or 0
    reach = f"{worst:.0f} to {best:.0f}" if f"{worst:.0f}" != f"{best:.0f}" else f"{best:.0f}"
    return f"{reach} {TOKENS_PER_SECOND} at {length} tokens"


def _growth(analysis: ClassicAnalysis) -> str:
    if analysis.line is None:
        return "generation time against length"
    slope, within = analysis.line.slope.mid, analysis.within_run
    per_token = f"{fitting_unit('s', [slope]).text(slope)} per token"
    if within is None or within.slope.covers(0):
        return per_token
    return f"{per_token}, {'later tokens take longer' if within.slope.mid > 0 else 'later tokens are faster'}"


def _what(analysis: ClassicAnalysis) -> str:
    settings = analysis.records.settings
    named = [str(settings[key]) for key in ("model", "url", "backend", "precision") if settings.get(key)]
    return label(", ".join(named) or analysis.records.folder.name, 60)


def _notes(analysis: ClassicAnalysis) -> list[str]:
    runs = max((cell.runs for cell in analysis.cells), default=0)
    machine = analysis.records.environment.get("machine", {})
    where = f" {machine.get('cpu', '')}, {machine.get('cores', '?')} cores." if machine else ""
    if runs < 2:
        return [f"One run for each bar or point, so there are no intervals.{where}"]
    return [f"Whiskers: 95 % intervals (Student's t over up to {runs} runs; warm-up not counted).{where}"]
