"""The pictures, the README's number and docs/performance.md's table, from one folder of a comparison.

    python scripts/readme_figures.py FOLDER      # what `gpt2core bench` wrote; see scripts/measure-readme

Values are medians over the rounds. Whiskers reach from the slowest round to the fastest. A ratio compares an
engine with OpenVINO in the same precision and the same round; the table shows the median of these.
"""

import json
import re
import shutil
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Final

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

ROOT: Final = Path(__file__).parent.parent
FIGURES: Final = ROOT / "docs/figures"
CHART: Final = FIGURES / "tokens_per_second.png"
REPORTED: Final = ("throughput", "roofline")
"""Figures of the comparison's own report that docs/benchmarks.md shows."""
BEGIN, END = "<!-- scripts/measure-readme: begin -->", "<!-- scripts/measure-readme: end -->"
NAMES: Final = {
    "transformers": "transformers",
    "llamacpp": "llama.cpp",
    "openvino": "OpenVINO GenAI",
    "native": "gpt2core, native",
}
COLORS: Final = {"transformers": "#bbbbbb", "llamacpp": "#8c9aa6", "openvino": "#5b7083", "native": "#d1495b"}
PRECISIONS: Final = ("float32", "int8", "int4", "bfloat16")
BASELINE: Final = "openvino"
DECODE, PREFILL, COLD = "decode_tok_s", "prefill_s", "first_token_cold_s"
LONG_PROMPT_TOKENS: Final = 512
INK, FAINT = "#222222", "#666666"

Key = tuple[str, str, str, int | None]
"""Engine, precision, measure, and batch or prompt length."""


@dataclass(frozen=True)
class Measured:
    """One comparison: by key the value of each round, and what is said about the machine and the day."""

    values: dict[Key, dict[int, float]]
    environment: dict[str, Any]
    settings: dict[str, Any]
    day: str

    @classmethod
    def read(cls, folder: Path) -> "Measured":
        """Read `runs.jsonl`, `environment.json` and `settings.json`; lines without a value are left out."""
        values: dict[Key, dict[int, float]] = {}
        days = set()
        for text in (folder / "runs.jsonl").read_text(encoding="utf-8").splitlines():
            line = json.loads(text)
            days.add(line["started_at"][:10])
            if line["family"] == "machine" or line["status"] != "ok":
                continue
            size = line["batch"] if line["measure"] == DECODE else line["length"]
            key = line["engine"], line["precision"], line["measure"], size
            values.setdefault(key, {})[line["round"]] = line["value"]
        if len(days) != 1:
            raise SystemExit(
                f"{folder} was measured on {sorted(days)}; a table needs one day, so measure again"
            )
        environment, settings = (
            json.loads((folder / name).read_text(encoding="utf-8"))
            for name in ("environment.json", "settings.json")
        )
        return cls(values, environment, settings, days.pop())

    def engines(self) -> list[tuple[str, str]]:
        """Engine and precision, by precision; ours first, in the order of the comparison."""
        found = dict.fromkeys((engine, precision) for engine, precision, *_ in self.values)
        return sorted(found, key=lambda pair: PRECISIONS.index(pair[1]))

    def mid(self, *key: Any) -> float | None:
        """The median over the rounds, if there is one."""
        rounds = self.values.get(key)
        return median(rounds.values()) if rounds else None

    def ratio(self, engine: str, precision: str, measure: str, size: int | None) -> float | None:
        """How many times faster than the baseline in the same precision: the median over common rounds."""
        own = self.values.get((engine, precision, measure, size), {})
        base = self.values.get((BASELINE, precision, measure, size), {})
        ratios = [own[i] / base[i] for i in own.keys() & base.keys()]
        if engine == BASELINE or not ratios:
            return None
        return median(ratios if measure == DECODE else [1 / ratio for ratio in ratios])

    def machine(self) -> str:
        """One line about where and when."""
        machine, threads = self.environment["machine"], self.settings["threads"]
        return f"{machine['cpu']}, {threads} threads, {self.settings['rounds']} rounds, {self.day}"


def name_of(engine: str) -> str:
    """An engine as readers know it."""
    return NAMES.get(engine, f"gpt2core, {engine}")


def table(measured: Measured) -> str:
    """The rows of all engines as Markdown."""
    batches = measured.settings["batches"]
    heads = [*(f"batch {batch}, tok/s" for batch in batches), f"prefill {LONG_PROMPT_TOKENS}, ms"]
    lines = [
        "| engine | precision | " + " | ".join([*heads, "first token, cold, s", "peak memory, MB"]) + " |",
        "|---" * (len(heads) + 4) + "|",
    ]
    for engine, precision in measured.engines():
        who = (engine, precision)
        cells = [shown(measured, *who, DECODE, batch) for batch in batches]
        cells.append(shown(measured, *who, PREFILL, LONG_PROMPT_TOKENS, scale=1000))
        cells.append(shown(measured, *who, COLD, None, digits=3, ratio=False))
        cells.append(shown(measured, *who, "peak_memory_nbytes", None, scale=1e-6, ratio=False))
        lines.append("| " + " | ".join([name_of(engine), precision, *cells]) + " |")
    return "\n".join(lines)


def shown(measured: Measured, *key: Any, scale: float = 1, digits: int = 3, ratio: bool = True) -> str:
    """A value of three digits, and its ratio in brackets."""
    value = measured.mid(*key)
    if value is None:
        return ""
    value *= scale
    text = f"{value:.0f}" if value >= 100 else f"{value:.{digits}g}"
    factor = measured.ratio(*key) if ratio else None
    return text if factor is None else f"{text} ({factor:.2f}x)"


def chart(measured: Measured) -> Figure:
    """Tokens per second at batch 1 as bars, grouped by precision."""
    rows = [
        (engine, precision)
        for precision in reversed(PRECISIONS)
        for engine in NAMES
        if (engine, precision, DECODE, 1) in measured.values
    ]
    figure = Figure(figsize=(8, 0.36 * len(rows) + 1.6), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    position, places, previous = 0.0, [], None
    for engine, precision in rows:
        position += 1.0 if previous in (None, precision) else 1.6
        previous = precision
        rounds = measured.values[engine, precision, DECODE, 1].values()
        mid, low, high = median(rounds), min(rounds), max(rounds)
        axes.barh(position, mid, color=COLORS[engine], height=0.8)
        axes.plot([low, high], [position] * 2, color=INK, linewidth=1)
        axes.annotate(
            f"{mid:.0f}",
            (max(mid, high), position),
            (5, 0),
            textcoords="offset points",
            va="center",
            color=INK,
        )
        places.append((position, f"{NAMES[engine]}  {precision}"))
    axes.set_yticks([place for place, _ in places], [text for _, text in places])
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.set_xlabel("tokens per second, one text (batch 1); line: slowest to fastest round", color=FAINT)
    figure.suptitle(finding(measured), x=0.01, ha="left", fontsize=12, color=INK)
    figure.text(0.01, -0.04, f"GPT-2 small (124M). {measured.machine()}", fontsize=8, color=FAINT)
    return figure


def finding(measured: Measured) -> str:
    """The chart's title: the best precision, how fast it is, and by how much it leads."""
    own = {p: measured.mid("native", p, DECODE, 1) for p in PRECISIONS}
    best, speed = max(((p, v) for p, v in own.items() if v), key=lambda pair: pair[1])
    others = {e: measured.mid(e, best, DECODE, 1) for e in NAMES if e != "native"}
    engine, other = max(((e, v or 0.0) for e, v in others.items()), key=lambda pair: pair[1])
    text = f"gpt2core in {best}: {speed:.0f} tokens per second"
    return text if not other else f"{text}, {speed / other:.1f} times {NAMES[engine]}"


def replace_between(path: Path, text: str) -> None:
    """Put a text between the two marks of a file."""
    before, rest = path.read_text(encoding="utf-8").split(BEGIN)
    after = rest.split(END)[1]
    path.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}", encoding="utf-8")


def replace_number(path: Path, speed: float) -> None:
    """Put the measured speed into the README's first sentence."""
    text, count = re.subn(r"\*\*\d+ tokens per second\*\*", f"**{speed:.0f} tokens per second**",
                          path.read_text(encoding="utf-8"), count=1)  # fmt: skip
    if not count:
        raise SystemExit(f"{path.name} has no **N tokens per second** to replace")
    path.write_text(text, encoding="utf-8")


def copy_figures(folder: Path, target: Path) -> None:
    """Take the figures that the comparison itself drew."""
    for name in REPORTED:
        source = folder / f"gpt2_{name}.png"
        if not source.is_file():
            raise SystemExit(f"{folder} has no {source.name}; run the comparison without --no-report")
        shutil.copyfile(source, target / f"{name}.png")


def main(folders: Iterable[str]) -> None:
    """Draw what FOLDER holds."""
    (folder,) = folders
    measured = Measured.read(Path(folder))
    speed = measured.mid("native", "int4", DECODE, 1)
    if speed is None:
        raise SystemExit(f"{folder} holds no int4 speed of native at batch 1, which the README begins with")
    copy_figures(Path(folder), FIGURES)
    chart(measured).savefig(CHART, dpi=130, bbox_inches="tight", metadata={"Software": None})
    replace_between(ROOT / "docs/performance.md", f"{measured.machine()}:\n\n{table(measured)}")
    replace_number(ROOT / "README.md", speed)
    print(f"docs/figures, docs/performance.md and README.md show {measured.machine()}")


if __name__ == "__main__":
    main(sys.argv[1:])
