"""The figures of the classic benchmark: generation time per prompt and length, and against length."""

from collections.abc import Callable
from itertools import pairwise
from typing import Any, Final

import seaborn
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from gpt2core.bench.report import drawing
from gpt2core.bench.report.drawing import BAD, INK, label, wrapped
from gpt2core.bench.report.sweep_analysis import ClassicAnalysis
from gpt2core.bench.statistics import Interval
from gpt2core.bench.tables import TOKENS_PER_SECOND, fitting_unit, show


def bar_figure(analysis: ClassicAnalysis) -> Figure:
    """`gpt2_benchmark.png`: for each prompt one bar per length, with the 95 % interval of its mean."""
    prompts, lengths, values = analysis.records.prompts, analysis.records.lengths, _intervals(analysis)
    unit = fitting_unit("s", [value.mid for value in values])
    colors = seaborn.color_palette("viridis_r", len(lengths) + 1)[1:]  # ordered, and without the yellow
    figure, [ax] = drawing.new_figure(9, 1.9 + len(prompts) * max(0.42, 0.24 * len(lengths) + 0.1))
    thickness = 0.8 / len(lengths)
    for cell in analysis.cells:
        i, prompt = lengths.index(cell.length), list(prompts).index(cell.prompt_index)
        row = prompt + (i - (len(lengths) - 1) / 2) * thickness
        if cell.interval is None:
            drawing.write_beside(ax, row, f"all {cell.failed} runs failed", BAD)
            continue
        text = unit.number(cell.interval.mid) + (f"   ({cell.failed} failed)" if cell.failed else "")
        ink = BAD if cell.failed else INK
        drawing.draw_bar(ax, row, cell.interval, unit, text, colors[i], thickness=thickness * 0.92, ink=ink)
    ax.set_xlim(0, drawing.upper_limit(values, unit))
    ax.set_xlabel(f"mean generation time ({unit.name})", color=INK)
    drawing.name_rows(ax, [wrapped(f"{i + 1}. {text}") for i, text in prompts.items()])
    handles = [Patch(color=color, label=f"{n}") for color, n in zip(colors, lengths, strict=True)]
    how: Any = {"loc": "outside right upper", "frameon": False, "fontsize": 9, "title_fontsize": 9}
    figure.legend(handles=handles, title="total tokens", **how)
    return drawing.finish(
        figure, f"{_describe_target(analysis)}: {_describe_speed(analysis)}", _notes(analysis)
    )


def line_figure(analysis: ClassicAnalysis) -> Figure:
    """`gpt2_benchmark_line.png`: a line for each prompt over the lengths; bars where there is one length."""
    prompts, lengths, values = analysis.records.prompts, analysis.records.lengths, _intervals(analysis)
    if len(lengths) == 1:
        return bar_figure(analysis)
    unit = fitting_unit("s", [value.mid for value in values])
    figure, [ax] = drawing.new_figure(10, max(5.0, 1.6 + 0.4 * len(prompts)))
    reach = lengths[-1] - lengths[0]
    spread = min(0.035 * reach, 0.25 * min(after - before for before, after in pairwise(lengths)))
    legend = []
    for rank, (index, prompt) in enumerate(prompts.items()):
        shift = spread * ((rank + 0.5) / len(prompts) - 0.5)  # apart, where all take the same time
        cells = [cell for cell in analysis.cells if cell.prompt_index == index]
        known = [(cell.length + shift, cell.interval) for cell in cells if cell.interval is not None]
        style = {
            "color": drawing.COLORS[rank % len(drawing.COLORS)],
            "marker": drawing.MARKERS[rank % len(drawing.MARKERS)],
            "linestyle": drawing.DASHES[rank // len(drawing.COLORS) % len(drawing.DASHES)],
        }
        if known:
            drawing.draw_line(
                ax, [x for x, _ in known], [value for _, value in known], unit, markersize=5, **style
            )
        text = wrapped(f"{index + 1}. {prompt}", 30) + ("" if known else "\n(all runs failed)")
        legend.append((text, INK, style))
    ax.set_xticks(lengths)
    ax.set_xlim(lengths[0] - 0.1 * reach, lengths[-1] + 0.1 * reach)
    ax.set_ylim(0, drawing.upper_limit(values, unit))
    ax.set_xlabel("total length (tokens, prompt included)", color=INK)
    ax.set_ylabel(f"mean generation time ({unit.name})", color=INK)
    drawing.grid(ax, "both")
    drawing.add_legend(figure, legend)
    notes = [*_notes(analysis), "Points are moved sideways a little, so that they do not hide each other."]
    return drawing.finish(figure, f"{_describe_target(analysis)}: {_describe_growth(analysis)}", notes)


FIGURES: Final[dict[str, tuple[Callable[[ClassicAnalysis], Figure], str]]] = {
    "gpt2_benchmark.png": (bar_figure, "Mean generation time per prompt and length, with 95 % intervals"),
    "gpt2_benchmark_line.png": (line_figure, "Generation time against length, a line for each prompt"),
}
"""File name -> what draws it, and what it shows."""


def _intervals(analysis: ClassicAnalysis) -> list[Interval]:
    return [cell.interval for cell in analysis.cells if cell.interval is not None]


def _describe_speed(analysis: ClassicAnalysis) -> str:
    ranked = analysis.at_longest()
    if not ranked:
        return "generation time per prompt and length"
    ends = dict.fromkeys(f"{cell.tokens_per_s or 0:.0f}" for cell in (ranked[-1], ranked[0]))
    return f"{' to '.join(ends)} {TOKENS_PER_SECOND} at {ranked[0].length} tokens"


def _describe_growth(analysis: ClassicAnalysis) -> str:
    if analysis.line is None:
        return "generation time against length"
    per_token, within = f"{show('s', analysis.line.slope.mid)} per token", analysis.within_run
    return per_token if within is None or within.slope.covers(0) else f"{per_token}, {within.verdict}"


def _describe_target(analysis: ClassicAnalysis) -> str:
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
