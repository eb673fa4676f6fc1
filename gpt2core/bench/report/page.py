"""report.html: figures, tables, findings, method and environment of one folder, in one file."""

import base64
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from jinja2 import Environment, PackageLoader, StrictUndefined

from gpt2core.bench.components import component_figure
from gpt2core.bench.records import Records, read_records
from gpt2core.bench.report import comparison_figures, sweep_figures
from gpt2core.bench.report.analysis import Analysis, analyse_records
from gpt2core.bench.report.drawing import png
from gpt2core.bench.report.sweep_analysis import ClassicAnalysis
from gpt2core.bench.store import encode_json, write_atomically
from gpt2core.bench.tables import short

REPORT: Final = "report.html"
_FILES: Final = {
    "runs.jsonl": "every run, one JSON object a line",
    "benchmark_results.npy": "seconds as a plain float array: prompts x lengths x runs",
    "benchmark_results.json": "the names of that array's axes",
    "settings.json": "what was asked for",
    "environment.json": "the machine and the versions",
    "components.json": "where the time goes, by component",
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
    figures = []
    for name, image, caption in _draw_figures(analysis):
        write_atomically(records.folder / name, image)
        figures.append({"name": name, "caption": caption, "base64": base64.b64encode(image).decode()})
    write_atomically(records.folder / "analysis.json", encode_json(analysis.to_dict(), indent=1))
    path = records.folder / REPORT
    write_atomically(path, _render(records, analysis, figures).encode("utf-8", "replace"))
    return path


def _draw_figures(analysis: Analysis) -> Iterator[tuple[str, bytes, str]]:
    """(file name, PNG, caption) of each figure that the data allow."""
    if isinstance(analysis, ClassicAnalysis):
        for name, (draw, caption) in sweep_figures.FIGURES.items():
            yield name, png(draw(analysis)), caption
    else:
        for name, (draw_if_measured, caption) in comparison_figures.FIGURES.items():
            if (figure := draw_if_measured(analysis)) is not None:
                yield name, png(figure), caption
    if analysis.records.components:
        yield "gpt2_components.png", png(component_figure(analysis.records.components)), "Where the time goes"


def _render(records: Records, analysis: Analysis, figures: list[dict[str, str]]) -> str:
    classic, machine = records.kind == "classic", records.environment.get("machine")
    title = "Generation benchmark" if classic else "Comparison of engines"
    if model := records.settings.get("model"):
        title += f": {short(str(model), 60)}"
    where = ""
    if isinstance(machine, dict):
        where = f" on {machine.get('cpu', 'an unknown CPU')}, {machine.get('cores', '?')} cores"
    count, version = len(records.runs) or len(records.measurements), records.environment.get("gpt2core", "?")
    how: dict[str, Any] = {"trim_blocks": True, "lstrip_blocks": True, "undefined": StrictUndefined}
    environment = Environment(loader=PackageLoader("gpt2core.bench.report"), autoescape=True, **how)
    return environment.get_template("report.html.j2").render(
        title=title,
        subtitle=f"{count} measurements{where}; gpt2core {version}",
        findings=analysis.findings,
        figures=figures,
        tables=analysis.tables,
        method=_CLASSIC_METHOD if classic else _COMPARISON_METHOD,
        settings=list(_flatten(records.settings)),
        environment=list(_flatten(records.environment)) or [("unknown", "there is no environment.json")],
        files=[(name, text) for name, text in _FILES.items() if (records.folder / name).is_file()],
    )


def _flatten(document: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in document.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{key} ")
        else:
            text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
            yield f"{prefix}{key}", short(text, 600)
