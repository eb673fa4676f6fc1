"""The figures of the classic benchmark: generation time per prompt and length, and against length."""

from collections.abc import Callable
from itertools import pairwise
from typing import Final

import seaborn
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from gpt2core.bench.drawing import (
    COLOURS,
    DASHES,
    INK,
    MARKERS,
    bars_of,
    finish,
    grid,
    label,
    new_figure,
    wrapped,
)
from gpt2core.bench.findings_classic import Cell, ClassicAnalysis
from gpt2core.bench.units import Unit, unit_for

_BAR: Final = 0.8  # of the room between two prompts that its bars take
_ROW_IN: Final = 0.24  # inches for a bar


def bar_figure(analysis: ClassicAnalysis) -> Figure:
    """`gpt2_benchmark.png`: for each prompt one bar per length, with the 95 % interval of its mean."""
    records, unit, cells = analysis.records, _unit(analysis), _cells(analysis)
    prompts, lengths = records.prompts, records.lengths
    colours = seaborn.color_palette("viridis_r", len(lengths) + 1)[1:]  # ordered, and without the yellow
    height = 1.7 + len(prompts) * max(0.42, _ROW_IN * len(lengths) + 0.1)
    figure, [ax] = new_figure(9, height)
    thick = _BAR / len(lengths)
    greatest = max((c.elapsed_s.high for c in analysis.cells if c.elapsed_s), default=1.0) * unit.factor
    for row, prompt in enumerate(prompts):
        for i, length in enumerate(lengths):
            cell, y = cells[prompt, length], row + (i - (len(lengths) - 1) / 2) * thick
            if cell.elapsed_s is None:
                ax.text(greatest * 0.005, y, _failure(cell), va="center", fontsize=8, color="#b00020")
                continue
            mean = cell.elapsed_s.mid * unit.factor
            ax.barh(y, mean, thick * 0.92, color=colours[i], linewidth=0)
            if cell.runs > 1:
                error = bars_of([cell.elapsed_s], unit.factor)
                ax.errorbar(mean, y, xerr=error, color=INK, capsize=2, linewidth=1, fmt="none")
            text = unit.number(cell.elapsed_s.mid) + (f"   ({_failure(cell)})" if cell.failed else "")
            ax.annotate(
                text,
                (cell.elapsed_s.high * unit.factor, y),
                xytext=(4, 0),
                textcoords="offset points",
                va="center",
                fontsize=8,
                color="#b00020" if cell.failed else INK,
            )
    ax.set_xlim(0, greatest * 1.18)
    ax.set_yticks(range(len(prompts)), [wrapped(f"{i + 1}. {text}") for i, text in prompts.items()])
    ax.set_ylim(len(prompts) - 0.5, -0.5)
    ax.set_xlabel(f"mean generation time ({unit.name})", color=INK)
    grid(ax, "x")
    ax.tick_params(axis="y", length=0)
    handles = [Patch(color=colour, label=f"{n}") for colour, n in zip(colours, lengths, strict=True)]
    figure.legend(
        handles=handles,
        title="total tokens",
        loc="outside right upper",
        frameon=False,
        fontsize=9,
        title_fontsize=9,
    )
    return finish(figure, f"Generation time per prompt and length: {_what(analysis)}", _notes(analysis))


def line_figure(analysis: ClassicAnalysis) -> Figure:
    """`gpt2_benchmark_line.png`: a line for each prompt over the lengths, with 95 % intervals."""
    records, unit, cells = analysis.records, _unit(analysis), _cells(analysis)
    lengths, prompts = records.lengths, records.prompts
    figure, [ax] = new_figure(10, max(5.0, 1.6 + 0.4 * len(prompts)))
    reach = (lengths[-1] - lengths[0]) or lengths[0]
    gap = min((after - before for before, after in pairwise(lengths)), default=reach)
    spread = min(0.035 * reach, 0.25 * gap)
    handles = []
    for rank, (index, prompt) in enumerate(prompts.items()):
        shift = spread * ((rank + 0.5) / len(prompts) - 0.5)  # apart, where all take the same time
        points = [(n + shift, cells[index, n].elapsed_s) for n in lengths]
        known = [(x, value) for x, value in points if value is not None]
        colour = COLOURS[rank % len(COLOURS)]
        marker = MARKERS[rank % len(MARKERS)]
        dash = DASHES[rank // len(COLOURS) % len(DASHES)]
        if known:
            ax.errorbar(
                [x for x, _ in known],
                [value.mid * unit.factor for _, value in known],
                yerr=bars_of((value for _, value in known), unit.factor),
                color=colour,
                marker=marker,
                markersize=5,
                linestyle=dash,
                linewidth=1.4,
                capsize=3,
            )
        text = wrapped(f"{index + 1}. {prompt}", 30) + ("" if known else "\n(all runs failed)")
        handles.append(Line2D([], [], color=colour, marker=marker, linestyle=dash, label=text))
    ax.set_xticks(lengths)
    ax.set_xlim(lengths[0] - 0.1 * reach, lengths[-1] + 0.1 * reach)
    ax.set_ylim(bottom=0)
    ax.set_xlabel("total length (tokens, prompt included)", color=INK)
    ax.set_ylabel(f"mean generation time ({unit.name})", color=INK)
    grid(ax, "both")
    figure.legend(handles=handles, loc="outside right upper", frameon=False, fontsize=8.5, labelspacing=0.8)
    notes = [*_notes(analysis), "Points are moved sideways a little, so that they do not hide each other."]
    return finish(figure, f"Generation time against length: {_what(analysis)}", notes)


FIGURES: Final[dict[str, tuple[Callable[[ClassicAnalysis], Figure], str]]] = {
    "gpt2_benchmark.png": (bar_figure, "Mean generation time per prompt and length, with 95 % intervals"),
    "gpt2_benchmark_line.png": (line_figure, "Generation time against length, a line for each prompt"),
}
"""File name -> what draws it, and what it shows."""


def _unit(analysis: ClassicAnalysis) -> Unit:
    return unit_for("s", [cell.elapsed_s.mid for cell in analysis.cells if cell.elapsed_s])


def _cells(analysis: ClassicAnalysis) -> dict[tuple[int, int], Cell]:
    return {(cell.prompt_index, cell.length): cell for cell in analysis.cells}


def _failure(cell: Cell) -> str:
    return f"all {cell.failed} runs failed" if not cell.runs else f"{cell.failed} failed"


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
    return [f"Whiskers: 95 % intervals (bootstrap over up to {runs} runs; warm-up not counted).{where}"]
