"""The figures of the comparison: a wrong engine is hatched or crossed and named wrong."""

import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, Final

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter, NullLocator

from gpt2core.bench.report.comparison_analysis import ComparisonAnalysis
from gpt2core.bench.report.comparison_results import ONCE, SHORT_NAMES, EngineResult, Point
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
    write_beside,
)
from gpt2core.bench.statistics import Interval
from gpt2core.bench.tables import Unit, fitting_unit

_WRONG: Final = "#b00020"
_PANELS_ACROSS: Final = 5
_STARTUP: Final = ("build_s", "start_s", "load_s", "compile_s", "first_token_cold_s", "ttft_s")


def line_figure(
    analysis: ComparisonAnalysis, *, measure: str, title: str, x_label: str, y_label: str, logarithmic: bool
) -> Figure | None:
    """A line for each engine, bars where there is one place; None where the measure was not taken."""
    points = [point for point in analysis.points_of(measure) if point.x is not None]
    if not points:
        return None
    ticks = sorted({point.x for point in points if point.x is not None})
    if len(ticks) == 1:
        return _panels(analysis, (measure,), title)
    unit = fitting_unit(points[0].unit, [point.value.mid for point in points])
    figure, [ax] = new_figure(10, 5.4)
    handles = []
    for engine in _measured(analysis):
        mine = sorted((p for p in points if p.engine == engine.label), key=lambda p: p.x or 0)
        if mine:
            style = _style(analysis, engine)
            ax.errorbar(
                [p.x or 0 for p in mine],
                [p.value.mid * unit.factor for p in mine],
                yerr=bars_of((p.value for p in mine), unit.factor),
                linewidth=1.5,
                capsize=3,
                **style,
            )
            handles.append(Line2D([], [], label=_name(engine), **style))
    if logarithmic and ticks[0] > 0:
        ax.set_xscale("log", base=2)
        ax.set_yscale("log")
        _plain_ticks(ax)
    else:
        ax.set_ylim(bottom=0)
    ax.xaxis.set_major_locator(FixedLocator(ticks))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0f}"))
    ax.set_xlabel(x_label, color=INK)
    ax.set_ylabel(f"{y_label} ({unit.name})", color=INK)
    grid(ax, "both")
    legend = figure.legend(handles=handles, loc="outside right upper", frameon=False, fontsize=9)
    for text, engine in zip(legend.get_texts(), _in_legend(analysis, points), strict=True):
        text.set_color(_WRONG if engine.wrong else INK)
    return finish(figure, _title(analysis, measure, title), _notes(analysis, points))


def startup_figure(analysis: ComparisonAnalysis) -> Figure | None:
    """A panel of bars for each part of the way to the first token."""
    return _panels(analysis, _STARTUP, "From the start of the process to the first token")


def memory_figure(analysis: ComparisonAnalysis) -> Figure | None:
    """Peak memory of each engine's process."""
    return _panels(analysis, ("peak_memory_nbytes",), "Peak memory of the process")


def roofline_figure(analysis: ComparisonAnalysis) -> Figure | None:
    """Bytes of weights read per second of decoding, beside what the memory can deliver."""
    roofs = {roof.engine: roof for roof in analysis.roofs}
    engines = [engine for engine in _measured(analysis) if engine.label in roofs]
    if not engines:
        return None
    figure, [ax] = new_figure(9, 1.9 + 0.4 * len(engines))
    unit = Unit("GB/s", 1e-9)
    texts = []
    for engine in engines:
        roof = roofs[engine.label]
        share = "" if roof.share is None else f"  ({roof.share.mid:.0%})"
        texts.append(unit.number(roof.achieved_bytes_s.mid) + share)
    _bars(ax, analysis, engines, [roofs[engine.label].achieved_bytes_s for engine in engines], unit, texts)
    if analysis.bandwidth_bytes_s is not None:
        top = analysis.bandwidth_bytes_s
        low = max(top.low, 0.0) * unit.factor
        ax.axvspan(low, min(top.high, 2 * top.mid) * unit.factor, color="#bbbbbb", alpha=0.6, linewidth=0)
        ax.axvline(top.mid * unit.factor, color=INK, linestyle="--", linewidth=1.2)
        ax.annotate(
            f"read bandwidth {unit.text(top.mid)}",
            (top.mid * unit.factor, 1.0),
            xycoords=("data", "axes fraction"),
            xytext=(0, 3),
            textcoords="offset points",
            ha="right",
            fontsize=8.5,
            color=INK,
        )
        ax.set_xlim(right=max(ax.get_xlim()[1], upper_limit([top], unit.factor)))
    ax.set_xlabel("weights read per second while one sequence is decoded (GB/s)", color=INK)
    right = [engine for engine in engines if not engine.wrong] or engines
    best = max(right, key=lambda engine: roofs[engine.label].achieved_bytes_s.mid)
    nearest = roofs[best.label].share
    title = "Weights read per second of decoding"
    if nearest is not None:
        title = f"{_name(best)} reads weights at {nearest.mid:.0%} of the memory's speed"
    return finish(figure, title, _notes(analysis, ()))


def ratio_figure(analysis: ComparisonAnalysis) -> Figure | None:
    """Ratios to the baseline with intervals, a panel for each measure."""
    points = [point for point in analysis.points if point.ratio is not None]
    columns = list(dict.fromkeys((point.measure, point.at) for point in points))
    chosen = _spread(columns)
    engines = [e for e in _measured(analysis) if any(p.engine == e.label for p in points)]
    if not engines:
        return None
    across = min(len(chosen), _PANELS_ACROSS)
    down = -(-len(chosen) // across)
    figure, axes = new_figure(2.2 + 2.0 * across, 1.2 + down * (1.2 + 0.32 * len(engines)), across, down)
    for ax in axes[len(chosen) :]:
        ax.remove()
    for i, column in enumerate(chosen):
        ax = axes[i]
        for row, engine in enumerate(engines):
            for point in points:
                if (point.measure, point.at) == column and point.engine == engine.label and point.ratio:
                    style = _style(analysis, engine) | {"linestyle": "none"}
                    ax.errorbar(point.ratio.mid, row, xerr=bars_of([point.ratio], 1), capsize=3, **style)
        _rows(ax, engines, i % across == 0)
        ax.axvline(1, color=INK, linewidth=1, linestyle="--", zorder=0.9)
        ax.set_xscale("log", base=2)
        low, high = ax.get_xlim()
        ax.set_xlim(min(low, 0.8) / 1.05, max(high, 1.25) * 1.05)
        _ratio_ticks(ax)
        better = "less is better" if column[0] == "peak_memory_nbytes" else "more is better"
        ax.set_title(f"{SHORT_NAMES[column[0]]}\n{column[1] or ' '}", fontsize=9, color=INK)
        ax.set_xlabel(better, fontsize=8, color=INK)
    title = f"Times as fast as {label(analysis.baseline or '', 40)} (memory: times as much)"
    decoding = [p for p in points if p.measure == "decode_tok_s" and p.ratio is not None]
    fastest = analysis.ranking("decode_tok_s")
    for point in decoding:
        if fastest and point.ratio and (point.engine, point.at) == (fastest.labels[0], fastest.at):
            times = f"{point.ratio.mid:.2f} times as fast as {label(analysis.baseline or '', 30)}"
            title = f"{label(point.engine, 30)} decodes {times} at {point.at}"
    return finish(figure, title, _notes(analysis, points))


FIGURES: Final[dict[str, tuple[Callable[[ComparisonAnalysis], Figure | None], str]]] = {
    "gpt2_throughput.png": (
        partial(
            line_figure,
            measure="decode_tok_s",
            title="Decoding throughput",
            x_label="sequences decoded at once (logarithmic)",
            y_label="throughput, logarithmic",
            logarithmic=True,
        ),
        "Decoding throughput against batch size",
    ),
    "gpt2_prefill.png": (
        partial(
            line_figure,
            measure="prefill_s",
            title="Prefill",
            x_label="prompt length (tokens, logarithmic)",
            y_label="time to the first token, logarithmic",
            logarithmic=True,
        ),
        "Time to the first token against prompt length",
    ),
    "gpt2_step.png": (
        partial(
            line_figure,
            measure="step_s",
            title="Time of one decoding step against position",
            x_label="position (tokens already cached)",
            y_label="time of a step",
            logarithmic=False,
        ),
        "Time of one decoding step against position",
    ),
    "gpt2_startup.png": (startup_figure, "Start, load, compilation and first token"),
    "gpt2_memory.png": (memory_figure, "Peak memory of each engine's process"),
    "gpt2_roofline.png": (roofline_figure, "Bytes of weights read per second beside the machine's bandwidth"),
    "gpt2_ratios.png": (
        ratio_figure,
        "Ratios to the baseline, round by round, with 95 % intervals (speed: more is better; memory: less)",
    ),
}
"""File name -> what draws it (None where nothing was measured), and what it shows."""


def _measured(analysis: ComparisonAnalysis) -> list[EngineResult]:
    return [engine for engine in analysis.engines if engine.skipped is None]


def _in_legend(analysis: ComparisonAnalysis, points: Iterable[Point]) -> list[EngineResult]:
    drawn = {point.engine for point in points}
    return [engine for engine in _measured(analysis) if engine.label in drawn]


def _name(engine: EngineResult) -> str:
    return label(engine.label, 28) + (" (WRONG)" if engine.wrong else "")


def _style(analysis: ComparisonAnalysis, engine: EngineResult) -> dict[str, Any]:
    """An engine's colour is the same in every figure; precisions of one engine differ in dash and marker."""
    names = list(dict.fromkeys(each.name for each in analysis.engines))
    precisions = list(dict.fromkeys(each.precision for each in analysis.engines))
    index, variant = names.index(engine.name), precisions.index(engine.precision)
    return {
        "color": COLORS[index % len(COLORS)],
        "marker": "x" if engine.wrong else MARKERS[(index + variant * 5) % len(MARKERS)],
        "markersize": 8 if engine.wrong else 6,
        "linestyle": DASHES[variant % len(DASHES)],
    }


def _title(analysis: ComparisonAnalysis, measure: str, otherwise: str) -> str:
    """The finding, where somebody's answers are right."""
    ranking = analysis.ranking(measure)
    return label(ranking.title(), 160) if ranking else otherwise


def _panels(analysis: ComparisonAnalysis, measures: Sequence[str], title: str) -> Figure | None:
    """A panel of bars for each measure."""
    measures = [m for m in measures if any(p.value.mid > 0 for p in analysis.points_of(m))]
    points = [point for measure in measures for point in analysis.points_of(measure)]
    engines = _in_legend(analysis, points)
    if not engines:
        return None
    figure, axes = new_figure(max(8.0, 2.4 + 2.6 * len(measures)), 1.9 + 0.4 * len(engines), len(measures))
    for ax, measure in zip(axes, measures, strict=True):
        own = analysis.points_of(measure)
        values = {point.engine: point.value for point in own}
        shown = [engine for engine in engines if engine.label in values]
        unit = fitting_unit(own[0].unit, [value.mid for value in values.values()])
        texts = [unit.number(values[engine.label].mid) for engine in shown]
        _bars(ax, analysis, shown, [values[engine.label] for engine in shown], unit, texts, engines)
        if ax is not axes[0]:
            ax.tick_params(axis="y", labelleft=False)
        name = ONCE.get(measure, f"{SHORT_NAMES.get(measure)}, {own[0].at}")
        ax.set_title(name, fontsize=10, color=INK)
        ax.set_xlabel(unit.name, color=INK)
    told = "first_token_cold_s" if "first_token_cold_s" in measures else measures[0]
    return finish(figure, _title(analysis, told, title), _notes(analysis, points))


def _bars(
    ax: Axes,
    analysis: ComparisonAnalysis,
    shown: list[EngineResult],
    values: Sequence[Interval],
    unit: Unit,
    texts: list[str],
    rows: list[EngineResult] | None = None,
) -> None:
    """Bars from left to right, one row for each engine of `rows`; a wrong engine's is hatched."""
    rows = rows or shown
    for engine, value, text in zip(shown, values, texts, strict=True):
        row, style = rows.index(engine), _style(analysis, engine)
        paint = {"facecolor": "white", "edgecolor": style["color"], "hatch": "////"} if engine.wrong else {}
        ax.barh(row, value.mid * unit.factor, 0.72, **(paint or {"color": style["color"]}))
        ax.errorbar(
            value.mid * unit.factor, row, xerr=bars_of([value], unit.factor), color=INK, capsize=2, fmt="none"
        )
        write_beside(ax, row, text)
    ax.set_xlim(0, upper_limit(values, unit.factor))
    ax.locator_params(axis="x", nbins=4)
    _rows(ax, rows, True)


def _rows(ax: Axes, engines: list[EngineResult], named: bool) -> None:
    ax.set_yticks(range(len(engines)), [_name(engine) for engine in engines])
    ax.set_ylim(len(engines) - 0.5, -0.5)
    grid(ax, "x")
    ax.tick_params(axis="y", length=0, labelleft=named)
    for text, engine in zip(ax.get_yticklabels() if named else [], engines, strict=False):
        text.set_color(_WRONG if engine.wrong else INK)


def _plain_ticks(ax: Axes) -> None:
    """0.5, 20, 400 instead of powers of ten."""
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.yaxis.set_minor_formatter(NullFormatter())


def _ratio_ticks(ax: Axes) -> None:
    low, high = ax.get_xlim()
    apart = max(1, math.ceil(math.log2(high / low) / 5))  # at most five labels
    powers = [2.0 ** (k * apart) for k in range(-30, 31)]
    ticks = powers if high / low > 6 else sorted([*powers, *(1.5 * power for power in powers)])
    ax.xaxis.set_major_locator(FixedLocator([tick for tick in ticks if low <= tick <= high]))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _spread(columns: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """At most two columns of a measure, the first and the last."""
    chosen = []
    for measure in dict.fromkeys(measure for measure, _ in columns):
        mine = [column for column in columns if column[0] == measure]
        chosen += mine[:1] + mine[1:][-1:]
    return chosen


def _notes(analysis: ComparisonAnalysis, points: Sequence[Point]) -> list[str]:
    rounds = max((point.rounds for point in points), default=0)
    notes = (
        [f"Means of up to {rounds} interleaved rounds, with 95 % intervals (Student's t)."]
        if rounds > 1
        else []
    )
    for engine in analysis.engines:
        if engine.wrong:
            where = ", ".join(variant for variant, _ in engine.wrong)
            notes.append(f"{engine.label} answers WRONG on: {where}.")
    skipped = [
        f"{engine.label} ({engine.skipped})" for engine in analysis.engines if engine.skipped is not None
    ]
    if skipped:
        notes.append(f"Skipped: {'; '.join(skipped)}.")
    return notes
