"""`gpt2core bench analyse FOLDER`: read what was measured and say what it shows."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from gpt2core.bench.components import measure_components
from gpt2core.bench.records import COMPONENTS, Records, read_records
from gpt2core.bench.report.comparison_analysis import ComparisonAnalysis, analyse_comparison
from gpt2core.bench.report.sweep_analysis import ClassicAnalysis, analyse_classic
from gpt2core.bench.store import write_json
from gpt2core.errors import RequestError

Analysis = ClassicAnalysis | ComparisonAnalysis
"""Both have `findings` and `tables`, `text()` for a terminal and `to_dict()` for strict JSON."""


def analyse(folder: str | Path) -> Analysis:
    """Analyse an output folder of `gpt2core bench`, classic or comparison.

    Raises:
        RequestError: there is no such folder, it has no runs, or a file in it is not what it should be.
    """
    return analyse_records(read_records(folder))


def analyse_records(records: Records) -> Analysis:
    """The same for what was read already."""
    return analyse_classic(records) if records.kind == "classic" else analyse_comparison(records)


def measure_folder(
    folder: str | Path, *, on_progress: Callable[[str], object] | None = None
) -> dict[str, Any]:
    """`measure_components` for the model, backends, precision and threads of a benchmark; kept in its folder.

    Raises:
        RequestError: the folder holds no benchmark, or one of a server, whose parts cannot be seen.
        CheckpointError: the benchmark's model is gone.
    """
    settings = read_records(folder).settings
    if settings.get("url") is not None:
        of = f"{folder} is a benchmark of the server {settings['url']}"
        raise RequestError(f"{of}; its parts cannot be seen")
    measured = measure_components(
        settings["model"],
        backends=settings.get("backends") or [settings["backend"]],
        precision=settings.get("precision") or settings["precisions"][0],
        threads=settings["threads"],
        on_progress=on_progress,
    )
    write_json(Path(folder) / COMPONENTS, measured)
    return measured
