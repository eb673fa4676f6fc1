"""What all figures share: colors, fonts, bars, lines, labels, and a PNG's bytes.

Figures are made as objects and drawn with Agg, without pyplot: the caller's backend, style and open figures
stay as they are.
"""

import io
import textwrap
import unicodedata
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any, Final, Literal

import seaborn
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import fontManager, get_font
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.text import Text

from gpt2core.bench.statistics import Interval
from gpt2core.bench.tables import Unit, short

COLORS: Final[tuple[Any, ...]] = tuple(seaborn.color_palette("colorblind"))
MARKERS: Final = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "*", "p", "h")
DASHES: Final[tuple[Literal["-", "--", ":", "-."], ...]] = ("-", "--", ":", "-.")
INK: Final = "#222222"
FAINT: Final = "#666666"
BAD: Final = "#b00020"
_DPI: Final = 130
_FALLBACKS: Final = ("Noto Sans CJK JP", "Noto Sans CJK SC", "Noto Emoji", "Noto Sans Symbols2", "Symbola")
_TICKS: Final = "$\\mathdefault{"  # so begins what matplotlib itself writes at logarithmic axes


@lru_cache(maxsize=1)
def _families() -> tuple[str, ...]:
    """DejaVu Sans, which comes with matplotlib, and the installed ones that know what it does not."""
    installed = {font.name for font in fontManager.ttflist}
    return "DejaVu Sans", *(name for name in _FALLBACKS if name in installed)


@lru_cache(maxsize=4096)
def _drawable(character: str) -> bool:
    paths = (font.fname for font in fontManager.ttflist if font.name in _families())
    return any(get_font(path).get_char_index(ord(character)) for path in paths)


def label(text: str, width: int = 40) -> str:
    """A text as figures show it: one line, shortened, and a box for each character that no font here has."""
    return "".join(c if c == " " or _drawable(c) else "□" for c in short(text, width))


def wrapped(text: str, width: int = 26, lines: int = 2) -> str:
    """The same over up to `lines` lines of `width` columns; a Chinese or Japanese character takes two."""
    shown = label(text, width * lines)
    columns = sum(2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in shown)
    per_line = max(4, width * len(shown) // columns) if shown else width
    parts = textwrap.wrap(shown, per_line)
    if len(parts) > lines:
        parts = [*parts[: lines - 1], short(" ".join(parts[lines - 1 :]), per_line)]
    return "\n".join(parts)


def new_figure(width: float, height: float, columns: int = 1, rows: int = 1) -> tuple[Figure, list[Axes]]:
    """A white figure, inches wide and high, with axes in a grid and a layout that keeps labels apart."""
    figure = Figure(figsize=(width, height), layout=ConstrainedLayoutEngine(wspace=0.05), facecolor="white")
    FigureCanvasAgg(figure)
    axes = [figure.add_subplot(rows, columns, i + 1) for i in range(rows * columns)]
    for ax in axes:
        ax.set_facecolor("white")
        seaborn.despine(ax=ax)
    return figure, axes


def finish(figure: Figure, title: str, notes: Sequence[str] = ()) -> Figure:
    """Title above, notes below, our fonts everywhere, and no text read as a formula."""
    lines = textwrap.wrap(title, int(figure.get_size_inches()[0] * 9.3))
    figure.suptitle("\n".join(lines), fontsize=12, color=INK, x=0.01, ha="left")
    if notes:
        width = int(figure.get_size_inches()[0] * 15)
        lines = [line for note in notes for line in textwrap.wrap(label(note, 900), width)]
        figure.supxlabel("\n".join(lines), fontsize=8, color=FAINT, x=0.01, ha="left", parse_math=False)
    for text in figure.findobj(Text):
        text.set_fontfamily(list(_families()))
        if not text.get_text().startswith(_TICKS):
            text.set_parse_math(False)
    return figure


def png(figure: Figure) -> bytes:
    """The figure as a PNG, without a date, so that the same data give the same bytes."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=_DPI, metadata={"Software": None})
    return buffer.getvalue()


def whiskers(values: Iterable[Interval], unit: Unit) -> list[list[float]]:
    """Lengths of error bars below and above; what is measured here is never below 0."""
    values = list(values)
    below = [max(0.0, (value.mid - max(value.low, 0.0)) * unit.factor) for value in values]
    above = [max(0.0, (value.high - value.mid) * unit.factor) for value in values]
    return [below, above]


def upper_limit(values: Iterable[Interval], unit: Unit) -> float:
    """Where an axis from 0 ends: at the longest whisker, or at twice the longest bar."""
    values = list(values)
    longest = max((value.mid for value in values), default=0.0)
    highest = max((value.high for value in values), default=0.0)
    return (min(highest, 2 * longest) or 1.0) * unit.factor * 1.05


def draw_bar(
    ax: Axes, row: float, value: Interval, unit: Unit, text: str, color: Any,
    *, thickness: float = 0.72, hatched: bool = False, ink: str = INK,
) -> None:  # fmt: skip
    """A bar with its whisker, if it has one, and its number beside the axes."""
    paint = {"facecolor": "white", "edgecolor": color, "hatch": "////"} if hatched else {"color": color}
    ax.barh(row, value.mid * unit.factor, thickness, **paint)
    if value.low < value.high:
        error = whiskers([value], unit)
        ax.errorbar(value.mid * unit.factor, row, xerr=error, color=INK, capsize=2, linewidth=1, fmt="none")
    write_beside(ax, row, text, ink)


def draw_line(ax: Axes, x: Sequence[float], values: Sequence[Interval], unit: Unit, **style: Any) -> None:
    """Means with their whiskers, joined."""
    y = [value.mid * unit.factor for value in values]
    ax.errorbar(x, y, yerr=whiskers(values, unit), linewidth=1.5, capsize=3, **style)


def write_beside(ax: Axes, row: float, text: str, color: str = INK) -> None:
    """A bar's number, in a column right of the axes, where no whisker crosses it."""
    ax.annotate(
        text, (1, row), xycoords=("axes fraction", "data"), xytext=(5, 0), textcoords="offset points",
        va="center", fontsize=8, color=color, annotation_clip=False,
    )  # fmt: skip


def name_rows(ax: Axes, names: Sequence[str], colors: Sequence[str] = (), *, shown: bool = True) -> None:
    """A name at the left of each row of bars, from above; `shown=False` where a panel beside has them."""
    ax.set_yticks(range(len(names)), names)
    ax.set_ylim(len(names) - 0.5, -0.5)
    grid(ax, "x")
    ax.tick_params(axis="y", length=0, labelleft=shown)
    for text, color in zip(ax.get_yticklabels(), colors, strict=False):
        text.set_color(color)


def add_legend(figure: Figure, entries: Sequence[tuple[str, str, dict[str, Any]]]) -> None:
    """At the right, a line for each (text, its color, style)."""
    handles = [Line2D([], [], label=text, **style) for text, _, style in entries]
    legend = figure.legend(handles=handles, loc="outside right upper", frameon=False, fontsize=9)
    for text, (_, color, _) in zip(legend.get_texts(), entries, strict=True):
        text.set_color(color)


def grid(ax: Axes, axis: Literal["x", "y", "both"]) -> None:
    """Faint lines behind the data, across the given axis."""
    ax.set_axisbelow(True)
    ax.grid(True, axis=axis, color="#dddddd", linewidth=0.8)
    ax.tick_params(colors=INK, labelsize=9)
