"""The figures of the comparison: a wrong engine is hatched or crossed and named wrong."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Final

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter, NullLocator

from gpt2core.bench.report import drawing
from gpt2core.bench.report.comparison_analysis import (
    GIGABYTES_PER_SECOND,
    MEASURES,
    ONCE,
    ComparisonAnalysis,
    EngineResult,
    Point,
)
from gpt2core.bench.report.drawing import BAD, INK, label
from gpt2core.bench.statistics import Interval
from gpt2core.bench.tables import PLAIN, Unit, fitting_unit

_PANELS_ACROSS: Final = 5
Draw = Callable[[ComparisonAnalysis], Figure | None]


def line_figure(
    analysis: ComparisonAnalysis, *, measure: str, labels: tuple[str, str], logarithmic: bool
) -> Figure | None:
    """A line for each engine, bars where there is one place; None where the measure was not taken."""
    points = [point for point in analysis.points_of(measure) if point.x is not None]
    ticks = sorted({point.x or 0 for point in points})
    if len(ticks) < 2:
        return panel_figure(analysis, measures=(measure,))
    unit = fitting_unit(points[0].unit, [point.value.mid for point in points])
    figure, [ax] = drawing.new_figure(10, 5.4)
    legend = []
    for engine in _in_rows(analysis, points):
        mine = sorted((p for p in points if p.engine == engine.label), key=lambda p: p.x or 0)
        style = _style(analysis, engine)
        drawing.draw_line(ax, [p.x or 0 for p in mine], [p.value for p in mine], unit, **style)
        legend.append((_name(engine), _ink(engine), style))
    if logarithmic and ticks[0] > 0:
        ax.set_xscale("log", base=2)
        ax.set_yscale("log")
        ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))  # 0.5, 20, 400 instead of powers of ten
        ax.yaxis.set_minor_formatter(NullFormatter())
        ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    else:
        ax.set_ylim(bottom=0)
    _set_ticks(ax, ticks)
    ax.set_xlabel(labels[0], color=INK)
    ax.set_ylabel(f"{labels[1]} ({unit.name})", color=INK)
    drawing.grid(ax, "both")
    drawing.add_legend(figure, legend)
    return drawing.finish(figure, _title(analysis, measure), _notes(analysis, points))


def panel_figure(analysis: ComparisonAnalysis, *, measures: Sequence[str]) -> Figure | None:
    """A panel of bars for each measure that was taken; None where none was."""
    measures = [m for m in measures if any(p.value.mid > 0 for p in analysis.points_of(m))]
    points = [point for measure in measures for point in analysis.points_of(measure)]
    engines = _in_rows(analysis, points)
    if not engines:
        return None
    width, height = max(8.0, 2.4 + 2.6 * len(measures)), 1.9 + 0.4 * len(engines)
    figure, axes = drawing.new_figure(width, height, len(measures))
    for ax, measure in zip(axes, measures, strict=True):
        own = analysis.points_of(measure)
        unit = fitting_unit(own[0].unit, [point.value.mid for point in own])
        bars = {p.engine: (p.value, unit.number(p.value.mid)) for p in own}
        _draw_bars(ax, analysis, engines, bars, unit, named=ax is axes[0])
        ax.set_title(
            MEASURES[measure].column or f"{MEASURES[measure].ratio}, {own[0].at}", fontsize=10, color=INK
        )
        ax.set_xlabel(unit.name, color=INK)
    told = "first_token_cold_s" if "first_token_cold_s" in measures else measures[0]
    return drawing.finish(figure, _title(analysis, told), _notes(analysis, points))


def roofline_figure(analysis: ComparisonAnalysis) -> Figure | None:
    """Bytes of weights read per second of decoding, beside what the memory can deliver."""
    unit, roofs = GIGABYTES_PER_SECOND, {roof.engine: roof for roof in analysis.roofs}
    engines = [engine for engine in analysis.engines if engine.label in roofs]
    if not engines:
        return None
    figure, [ax] = drawing.new_figure(9, 1.9 + 0.4 * len(engines))
    bars = {}
    for roof in analysis.roofs:
        share = "" if roof.share is None else f"  ({roof.share.mid:.0%})"
        bars[roof.engine] = roof.achieved_bytes_s, unit.number(roof.achieved_bytes_s.mid) + share
    _draw_bars(ax, analysis, engines, bars, unit)
    if (top := analysis.bandwidth_bytes_s) is not None:
        at, low, high = (n * unit.factor for n in (top.mid, max(top.low, 0.0), min(top.high, 2 * top.mid)))
        ax.axvspan(low, high, color="#bbbbbb", alpha=0.6, linewidth=0)
        ax.axvline(at, color=INK, linestyle="--", linewidth=1.2)
        ax.annotate(
            f"read bandwidth {unit.text(top.mid)}", (at, 1.0), xycoords=("data", "axes fraction"),
            xytext=(0, 3), textcoords="offset points", ha="right", fontsize=8.5, color=INK,
        )  # fmt: skip
        ax.set_xlim(right=max(ax.get_xlim()[1], drawing.upper_limit([top], unit)))
    ax.set_xlabel("weights read per second while one sequence is decoded (GB/s)", color=INK)
    right = [engine for engine in engines if not engine.wrong] or engines
    best = max(right, key=lambda engine: roofs[engine.label].achieved_bytes_s.mid)
    title, nearest = "Weights read per second of decoding", roofs[best.label].share
    if nearest is not None:
        title = f"{_name(best)} reads weights at {nearest.mid:.0%} of the memory's speed"
    return drawing.finish(figure, title, _notes(analysis, ()))


def ratio_figure(analysis: ComparisonAnalysis) -> Figure | None:
    """Ratios to the baseline with intervals; a panel for each measure, at its first and its last place."""
    points = [point for point in analysis.points if point.ratio is not None]
    engines = _in_rows(analysis, points)
    if not engines:
        return None
    places = {measure: [p.at for p in points if p.measure == measure] for measure in MEASURES}
    panels = [(m, at) for m, ats in places.items() for at in dict.fromkeys([*ats[:1], *ats[-1:]])]
    across = min(len(panels), _PANELS_ACROSS)
    down = -(-len(panels) // across)
    size = (2.2 + 2.0 * across, 1.2 + down * (1.2 + 0.32 * len(engines)))
    figure, axes = drawing.new_figure(*size, across, down)
    for ax in axes[len(panels) :]:
        ax.remove()
    for i, (ax, (measure, at)) in enumerate(zip(axes, panels, strict=False)):
        ratios = {p.engine: p.ratio for p in points if (p.measure, p.at) == (measure, at) and p.ratio}
        for row, engine in enumerate(engines):
            if ratio := ratios.get(engine.label):
                style = _style(analysis, engine) | {"linestyle": "none"}
                ax.errorbar(ratio.mid, row, xerr=drawing.whiskers([ratio], PLAIN), capsize=3, **style)
        drawing.name_rows(ax, *_names(engines), shown=i % across == 0)
        ax.axvline(1, color=INK, linewidth=1, linestyle="--", zorder=0.9)
        _scale_ratios(ax)
        ax.set_title(f"{MEASURES[measure].ratio}\n{at or ' '}", fontsize=9, color=INK)
        better = "less is better" if measure == "peak_memory_nbytes" else "more is better"
        ax.set_xlabel(better, fontsize=8, color=INK)
    baseline = label(analysis.baseline or "", 30)
    title = f"Times as fast as {baseline} (memory: times as much)"
    fastest = analysis.ranking("decode_tok_s")
    for p in analysis.points_of("decode_tok_s"):
        if fastest and p.ratio and (p.engine, p.at) == (fastest.labels[0], fastest.at):
            times = f"{p.ratio.mid:.2f} times as fast as {baseline}"
            title = f"{label(p.engine, 30)} decodes {times} at {p.at}"
    return drawing.finish(figure, title, _notes(analysis, points))


def _lines(measure: str, x_label: str, y_label: str, *, logarithmic: bool = True) -> Draw:
    """`line_figure` with its labels."""
    return partial(line_figure, measure=measure, labels=(x_label, y_label), logarithmic=logarithmic)


FIGURES: Final[dict[str, tuple[Draw, str]]] = {
    "gpt2_throughput.png": (
        _lines("decode_tok_s", "sequences decoded at once (logarithmic)", "throughput, logarithmic"),
        "Decoding throughput against batch size",
    ),
    "gpt2_prefill.png": (
        _lines("prefill_s", "prompt length (tokens, logarithmic)", "time to the first token, logarithmic"),
        "Time to the first token against prompt length",
    ),
    "gpt2_step.png": (
        _lines("step_s", "position (tokens already cached)", "time of a step", logarithmic=False),
        "Time of one decoding step against position",
    ),
    "gpt2_startup.png": (partial(panel_figure, measures=ONCE[:-1]), "Start, load, compilation, first token"),
    "gpt2_memory.png": (partial(panel_figure, measures=ONCE[-1:]), "Peak memory of each engine's process"),
    "gpt2_roofline.png": (roofline_figure, "Bytes of weights read per second beside the machine's bandwidth"),
    "gpt2_ratios.png": (
        ratio_figure,
        "Ratios to the baseline, round by round, with 95 % intervals (speed: more is better; memory: less)",
    ),
}
"""File name -> what draws it (None where nothing was measured), and what it shows."""


def _in_rows(analysis: ComparisonAnalysis, points: Sequence[Point]) -> list[EngineResult]:
    drawn = {point.engine for point in points}
    return [engine for engine in analysis.engines if engine.label in drawn]


def _name(engine: EngineResult) -> str:
    return label(engine.label, 28) + (" (WRONG)" if engine.wrong else "")


def _ink(engine: EngineResult) -> str:
    return BAD if engine.wrong else INK


def _names(engines: Sequence[EngineResult]) -> tuple[list[str], list[str]]:
    return [_name(engine) for engine in engines], [_ink(engine) for engine in engines]


def _style(analysis: ComparisonAnalysis, engine: EngineResult) -> dict[str, Any]:
    """An engine's color is the same in every figure; precisions of one engine differ in dash and marker."""
    names = list(dict.fromkeys(each.name for each in analysis.engines))
    precisions = list(dict.fromkeys(each.precision for each in analysis.engines))
    index, variant = names.index(engine.name), precisions.index(engine.precision)
    marker = drawing.MARKERS[(index + variant * 5) % len(drawing.MARKERS)]
    return {
        "color": drawing.COLORS[index % len(drawing.COLORS)],
        "marker": "x" if engine.wrong else marker,
        "markersize": 8 if engine.wrong else 6,
        "linestyle": drawing.DASHES[variant % len(drawing.DASHES)],
    }


def _title(analysis: ComparisonAnalysis, measure: str) -> str:
    """The finding, where somebody's answers are right."""
    ranking = analysis.ranking(measure)
    return label(ranking.claim(), 160) if ranking else MEASURES[measure].title


def _draw_bars(
    ax: Axes,
    analysis: ComparisonAnalysis,
    engines: list[EngineResult],
    bars: dict[str, tuple[Interval, str]],
    unit: Unit,
    *,
    named: bool = True,
) -> None:
    """Bars from left to right, one row for each engine; a wrong engine's is hatched."""
    for row, engine in enumerate(engines):
        if engine.label in bars:
            value, text = bars[engine.label]
            color = _style(analysis, engine)["color"]
            drawing.draw_bar(ax, row, value, unit, text, color, hatched=bool(engine.wrong))
    ax.set_xlim(0, drawing.upper_limit([value for value, _ in bars.values()], unit))
    ax.locator_params(axis="x", nbins=4)
    drawing.name_rows(ax, *_names(engines), shown=named)


def _scale_ratios(ax: Axes) -> None:
    """A logarithmic axis around 1 with at most five labels."""
    ax.set_xscale("log", base=2)
    low, high = ax.get_xlim()
    low, high = min(low, 0.8) / 1.05, max(high, 1.25) * 1.05
    ax.set_xlim(low, high)
    apart = max(1, math.ceil(math.log2(high / low) / 5))
    powers = [2.0 ** (k * apart) for k in range(-30, 31)]
    ticks = powers if high / low > 6 else [*powers, *(1.5 * power for power in powers)]
    _set_ticks(ax, sorted(tick for tick in ticks if low <= tick <= high))


def _set_ticks(ax: Axes, ticks: Sequence[float]) -> None:
    ax.xaxis.set_major_locator(FixedLocator(list(ticks)))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _notes(analysis: ComparisonAnalysis, points: Sequence[Point]) -> list[str]:
    rounds = max((point.rounds for point in points), default=0)
    notes = [f"Means of up to {rounds} interleaved rounds, with 95 % intervals (Student's t)."]
    notes = notes if rounds > 1 else []
    for engine in analysis.engines:
        if engine.wrong:
            variants = ", ".join(variant for variant, _ in engine.wrong)
            notes.append(f"{engine.label} answers WRONG on: {variants}.")
    skipped = [f"{engine.label} ({engine.skipped})" for engine in analysis.engines if engine.skipped]
    return [*notes, f"Skipped: {'; '.join(skipped)}."] if skipped else notes
