"""What the tests of the classic benchmark share."""

from gpt2core.bench.store import read_log
from gpt2core.bench.sweep import model_target as targets
from gpt2core.errors import NumericalError


def failing(monkeypatch, fails, error: Exception | None = None):
    """Let the measurements fail for which `fails(cell, attempt)` holds; returns all attempts."""
    tried, real = [], targets.ModelTarget.measure

    def measure(self, cell):
        tried.append(cell)
        if fails(cell, tried.count(cell)):
            raise error or NumericalError("broken")
        return real(self, cell)

    monkeypatch.setattr(targets.ModelTarget, "measure", measure)
    return tried


def interrupt_at(monkeypatch, number: int) -> None:
    """Interrupt the measurement of that number, as Ctrl-C would."""
    tried, real = [], targets.ModelTarget.measure

    def measure(self, cell):
        tried.append(cell)
        if len(tried) == number:
            raise KeyboardInterrupt
        return real(self, cell)

    monkeypatch.setattr(targets.ModelTarget, "measure", measure)


def cells_of(path) -> list[tuple[int, ...]]:
    return [tuple(record["cell"]) for record in read_log(path / "runs.jsonl")]
