"""Where the time goes: a stacked bar for each backend and phase."""

from typing import Any

from matplotlib.figure import Figure
from matplotlib.patches import Patch

from gpt2core.bench.breakdown import bars
from gpt2core.bench.drawing import COLOURS, INK, finish, grid, label, new_figure
from gpt2core.bench.units import unit_for


def component_figure(components: dict[str, Any]) -> Figure:
    """`gpt2_components.png`: a stacked bar for each backend and phase; see `gpt2core.bench.components`."""
    rows = bars(components)
    names = list(dict.fromkeys(name for row in rows for name in row.seconds))
    figure, [ax] = new_figure(9, 1.8 + 0.5 * len(rows))
    for i, row in enumerate(rows):
        left = 0.0
        for name, seconds in row.seconds.items():
            share = 100 * max(seconds, 0.0) / row.total_s
            k = names.index(name)
            hatch = None if k < len(COLOURS) else "//"
            ax.barh(i, share, 0.7, left=left, color=COLOURS[k % len(COLOURS)], hatch=hatch, edgecolor="white")
            if share >= 6:
                style: dict[str, Any] = {"ha": "center", "va": "center", "fontsize": 8, "color": INK}
                ax.text(left + share / 2, i, f"{share:.0f} %", **style)
            left += share
        unit = unit_for("s", [row.total_s])
        ax.text(101, i, unit.text(row.total_s), va="center", fontsize=9, color=INK)
    ax.set_yticks(range(len(rows)), [row.label for row in rows])
    ax.set_ylim(len(rows) - 0.5, -0.5)
    ax.set_xlim(0, 114)
    ax.set_xticks([0, 20, 40, 60, 80, 100])
    ax.set_xlabel("share of the time (%); at the end the whole", color=INK)
    grid(ax, "x")
    handles = [Patch(color=COLOURS[i % len(COLOURS)], label=name) for i, name in enumerate(names)]
    figure.legend(handles=handles, loc="outside right upper", frameon=False, fontsize=9)
    return finish(figure, "Where the time goes", [label(str(components.get("method", "")), 900)])
