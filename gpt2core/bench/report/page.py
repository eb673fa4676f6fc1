"""report.html: figures, tables, findings, method and environment of one folder, in one file."""

import base64
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from jinja2 import Environment, PackageLoader, StrictUndefined

from gpt2core.bench.components import component_figure
from gpt2core.bench.records import COMPONENTS, Records, read_records
from gpt2core.bench.report import comparison_figures, sweep_figures
from gpt2core.bench.report.analysis import Analysis, analyse_records
from gpt2core.bench.report.drawing import png
from gpt2core.bench.report.sweep_analysis import ClassicAnalysis
from gpt2core.bench.store import RUNS, encode_json, write_atomically
from gpt2core.bench.tables import short

REPORT: Final = "report.html"
_FILES: Final = {
    RUNS: "every run, one JSON object a line",
    "benchmark_results.npy": "seconds as a plain float array: prompts x lengths x runs",
    "benchmark_results.json": "the names of that array's axes",
    "settings.json": "what was asked for",
    "environment.json": "the machine and the versions",
    COMPONENTS: "where the time goes, by component",
    "analysis.json": "the analysis, with its intervals",
}
_CLASSIC_METHOD: Final = (
    "Each cell is one prompt at one total length (prompt and new tokens), generated several times. "
    "Warm-up runs are kept apart. Means carry Student's 95 % intervals; a single run has none.",
    "The linear fit takes the mean of each cell. Within a run, a robust line (Theil-Sen) through the tokens' "
    "times gives their growth with the position, whose mean over the prompts has a Student interval.",
)
_COMPARISON_METHOD: Final = (
    "Each engine runs in a process of its own, on the same checkpoint, threads and workload. Rounds are "
    "interleaved: every engine is measured once before any is measured again, so that drift of the "
    "machine hits all alike.",
    "Values are means over the rounds with Student's 95 % intervals. Ratios are taken round by round; "
    "their geometric mean has the interval of their logarithms. The roofline divides the weights' bytes "
    "times the steps per second by the read bandwidth that was measured in the same round.",
    "An engine whose logits or greedy tokens differ from the reference on a variant of the GPT-2 family "
    "is marked WRONG everywhere, however fast it is.",
)


def write_report(folder: str | Path) -> Path:
    """Analyse a folder; write its figures, analysis.json and report.html into it; return the report's path.

    Each file is replaced atomically.

    Raises:
        RequestError: as `gpt2core.bench.analyse`.
        BenchmarkError: a file cannot be written.
    """
    records = read_records(folder)
    analysis = analyse_records(records)
    drawn = {name: (image, caption) for name, image, caption in _figures(analysis)}
    for name, (image, _) in drawn.items():
        write_atomically(records.folder / name, image)
    write_atomically(records.folder / "analysis.json", encode_json(analysis.to_dict(), indent=1))
    path = records.folder / REPORT
    write_atomically(path, _html(records, analysis, drawn).encode("utf-8", "replace"))
    return path


def _figures(analysis: Analysis) -> Iterator[tuple[str, bytes, str]]:
    """(file name, PNG, caption) of each figure that the data allow."""
    if isinstance(analysis, ClassicAnalysis):
        for name, (draw, caption) in sweep_figures.FIGURES.items():
            yield name, png(draw(analysis)), caption
    else:
        for name, (draw_if_measured, caption) in comparison_figures.FIGURES.items():
            figure = draw_if_measured(analysis)
            if figure is not None:
                yield name, png(figure), caption
    if analysis.records.components:
        yield "gpt2_components.png", png(component_figure(analysis.records.components)), "Where the time goes"


def _html(records: Records, analysis: Analysis, drawn: dict[str, tuple[bytes, str]]) -> str:
    environment = Environment(
        loader=PackageLoader("gpt2core.bench.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    what = "Generation benchmark" if records.kind == "classic" else "Comparison of engines"
    model = records.settings.get("model")
    return environment.get_template("report.html.j2").render(
        title=f"{what}: {short(str(model), 60)}" if model else what,
        subtitle=_subtitle(records),
        findings=analysis.findings,
        figures=[
            {"name": name, "caption": caption, "base64": base64.b64encode(image).decode()}
            for name, (image, caption) in drawn.items()
        ],
        tables=analysis.tables,
        method=_CLASSIC_METHOD if records.kind == "classic" else _COMPARISON_METHOD,
        settings=list(_flat(records.settings)),
        environment=list(_flat(records.environment)) or [("unknown", "there is no environment.json")],
        files=[(name, text) for name, text in _FILES.items() if (records.folder / name).is_file()],
    )


def _subtitle(records: Records) -> str:
    machine = records.environment.get("machine")
    where = ""
    if isinstance(machine, dict):
        where = f" on {machine.get('cpu', 'an unknown CPU')}, {machine.get('cores', '?')} cores"
    count = len(records.runs) or len(records.measurements)
    return f"{count} measurements{where}; gpt2core {records.environment.get('gpt2core', '?')}"


def _flat(document: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in document.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key} ")
        elif isinstance(value, list):
            yield f"{prefix}{key}", short(", ".join(map(str, value)), 600)
        else:
            yield f"{prefix}{key}", short(str(value), 300)
