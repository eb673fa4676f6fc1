"""`gpt2core bench analyse FOLDER`: read what was measured and say what it shows."""

from pathlib import Path

from gpt2core.bench.analysis_classic import analyse_classic
from gpt2core.bench.analysis_comparison import analyse_comparison
from gpt2core.bench.findings_classic import ClassicAnalysis
from gpt2core.bench.findings_comparison import ComparisonAnalysis
from gpt2core.bench.records import Records, read_records

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
