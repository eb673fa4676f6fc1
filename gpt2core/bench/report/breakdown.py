"""What components.json says, as table and as figure: where the time goes."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gpt2core.bench.store.records import COMPONENTS
from gpt2core.bench.tables import Table, fitting_unit
from gpt2core.errors import RequestError

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True, slots=True)
class Bar:
    """One line of components.json, for drawing."""

    label: str
    seconds: dict[str, float]
    total_s: float


def read_bars(components: dict[str, Any]) -> list[Bar]:
    """The lines of components.json; decoding first.

    Raises:
        RequestError: it is not what `gpt2core.bench.components` writes.
    """
    try:
        lines = sorted(components["lines"], key=lambda line: line["phase"])
        return [
            Bar(
                label=f"{line['backend']}, {line['phase']}",
                seconds={name: float(value["mid"]) for name, value in line["seconds"].items()},
                total_s=float(line["total_s"]),
            )
            for line in lines
        ]
    except (KeyError, TypeError, ValueError) as error:
        raise RequestError(f"{COMPONENTS} is not what it should be ({error!r}); measure it again") from error


def breakdown_tables(components: dict[str, Any]) -> list[Table]:
    """Time by component, a row for each backend and phase; no table where nothing was measured."""
    if not components:
        return []
    bars = read_bars(components)
    names = list(dict.fromkeys(name for bar in bars for name in bar.seconds))
    rows = []
    for bar in bars:
        unit = fitting_unit("s", [bar.total_s])
        times = [unit.number(bar.seconds[name]) if name in bar.seconds else "-" for name in names]
        rows.append((f"{bar.label} ({unit.name})", *times, unit.number(bar.total_s)))
    return [
        Table(
            title="Time by component",
            columns=("backend, phase", *names, "all"),
            rows=tuple(rows),
            note=str(components.get("method", "")),
        )
    ]


def component_figure(components: dict[str, Any]) -> "Figure":
    """`gpt2_components.png`: a stacked bar for each backend and phase."""
    from matplotlib.patches import Patch

    from gpt2core.bench.report.drawing import COLORS, INK, finish, grid, label, new_figure

    bars = read_bars(components)
    names = list(dict.fromkeys(name for bar in bars for name in bar.seconds))
    figure, [ax] = new_figure(9, 1.8 + 0.5 * len(bars))
    for i, bar in enumerate(bars):
        left = 0.0
        for name, seconds in bar.seconds.items():
            share = 100 * max(seconds, 0.0) / bar.total_s
            k = names.index(name)
            hatch = None if k < len(COLORS) else "//"
            ax.barh(i, share, 0.7, left=left, color=COLORS[k % len(COLORS)], hatch=hatch, edgecolor="white")
            if share >= 6:
                ax.text(
                    left + share / 2, i, f"{share:.0f} %", ha="center", va="center", fontsize=8, color=INK
                )
            left += share
        ax.text(
            101, i, fitting_unit("s", [bar.total_s]).text(bar.total_s), va="center", fontsize=9, color=INK
        )
    ax.set_yticks(range(len(bars)), [bar.label for bar in bars])
    ax.set_ylim(len(bars) - 0.5, -0.5)
    ax.set_xlim(0, 114)
    ax.set_xticks([0, 20, 40, 60, 80, 100])
    ax.set_xlabel("share of the time (%); at the end the whole", color=INK)
    grid(ax, "x")
    handles = [Patch(color=COLORS[i % len(COLORS)], label=name) for i, name in enumerate(names)]
    figure.legend(handles=handles, loc="outside right upper", frameon=False, fontsize=9)
    title = "Where the time goes"
    if bars:
        first = bars[0]
        most = max(first.seconds, key=first.seconds.__getitem__)
        title = f"{most} takes the most: {first.seconds[most] / first.total_s:.0%} of {first.label}"
    return finish(figure, title, [label(str(components.get("method", "")), 900)])
