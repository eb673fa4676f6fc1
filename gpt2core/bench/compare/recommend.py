"""Which backend is the fastest here, for this model? A short run whose answer `backend="auto"` then takes.

Each backend runs in a process of its own, twice, in turns. What counts is the time of a process that starts,
loads the model and writes `TEXTS` texts of 128 tokens one after the other: for a small model the start of a
framework outweighs its speed, for a large one it does not.

The precision is that of the checkpoint; another is lossy and measured only where it is asked for. What
`backend="auto"` takes for a precision is the fastest backend in that precision.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from gpt2core import BackendUnavailableError, RequestError, open_checkpoint
from gpt2core.backends import BUILT_IN, PRECISIONS, available, resolve_precision
from gpt2core.backends import recommendation as recommended
from gpt2core.backends.recommendation import Recommendation
from gpt2core.bench.compare import worker
from gpt2core.bench.compare.worker import EngineSetup, Workload
from gpt2core.bench.records import Cell

TEXTS: Final = 10
TEXT_TOKENS: Final = 128
MEASURED_TOKENS: Final = 64
ROUNDS: Final = 2
CELLS: Final = (Cell("first_token_cold_s"), Cell("decode_tok_s", batch=1), Cell("peak_memory_nbytes"))


@dataclass(frozen=True, slots=True)
class Candidate:
    """One backend in one precision, as measured; without figures where it failed."""

    backend: str
    precision: str
    first_token_s: float | None  # from the start of its process
    tokens_per_s: float | None  # while decoding one text
    peak_memory_nbytes: float | None  # of its process
    error: str | None

    @property
    def session_s(self) -> float:
        """Seconds for a process that starts and writes `TEXTS` texts; infinite where it failed."""
        if self.first_token_s is None or self.tokens_per_s is None:
            return float("inf")
        return self.first_token_s + TEXTS * TEXT_TOKENS / self.tokens_per_s


@dataclass(frozen=True, slots=True)
class Recommended:
    """What was measured and what follows from it."""

    candidates: tuple[Candidate, ...]  # fastest first
    fastest: Candidate
    path: Path  # where it is kept for `backend="auto"`


def recommend(
    model: str = "demo",
    *,
    threads: int | None = None,
    device: str = "cpu",
    precisions: Sequence[str] = ("auto",),
    revision: str | None = None,
    local_files_only: bool = False,
    timeout_s: float = 600.0,
    on_progress: Callable[[str], None] | None = None,
) -> Recommended:
    """Measure every backend that is installed, and keep the fastest of each precision for `backend="auto"`.

    Args:
        model: "demo", a folder or a hub id; the answer holds for all models of its shape.
        threads: of each backend, None for what it decides; the answer holds for this number.
        device: where it computes; the answer holds for it.
        precisions: those to try; "auto" is that of the checkpoint, without any loss.
        revision, local_files_only: as of `gpt2core.open_checkpoint`.
        timeout_s: for each process.
        on_progress: is called with what is being done.

    Raises:
        CheckpointError: the model cannot be read.
        BackendUnavailableError: no backend ran; with the reasons.
        RequestError: a precision that gpt2core does not offer.
    """
    for precision in precisions:
        if precision not in ("auto", *PRECISIONS):
            raise RequestError(
                f"gpt2core offers no precision {precision!r}, only auto, {', '.join(PRECISIONS)}"
            )
    checkpoint = open_checkpoint(model, revision=revision, local_files_only=local_files_only)
    config, folder = checkpoint.config, checkpoint.folder.absolute()
    chosen = tuple(dict.fromkeys(resolve_precision(checkpoint.stored, name) for name in precisions))
    del checkpoint
    infos = available(load_plugins=False)
    engines = [
        EngineSetup.own(name, precision) for precision in chosen for name in BUILT_IN if infos[name].available
    ]
    found: dict[EngineSetup, list[dict[str, Any]]] = {engine: [] for engine in engines}
    for number in range(ROUNDS):
        for engine in engines[number % 2 :] + engines[: number % 2]:
            if any(line["status"] != "ok" for line in found[engine]):
                continue  # it failed before
            if on_progress is not None:
                on_progress(f"round {number + 1} of {ROUNDS}: {engine.name} in {engine.precision}")
            found[engine] += worker.measure(
                engine,
                checkpoint=folder,
                work=folder,
                cells=CELLS,
                workload=Workload.for_model(config.vocab_size, config.n_positions, MEASURED_TOKENS),
                threads=threads,
                device=device,
                timeout_s=timeout_s,
            )
    candidates = sorted((_summarize(*item) for item in found.items()), key=lambda c: c.session_s)
    fastest = {c.precision: c for c in reversed(candidates) if c.error is None}
    if not fastest:
        reasons = "; ".join(f"{c.backend}: {c.error}" for c in candidates)
        raise BackendUnavailableError(f"no backend ran on {device}: {reasons}")
    now = datetime.now(UTC).isoformat(timespec="seconds")
    entries = {}
    for precision, best in fastest.items():
        others = [c for c in candidates if c.precision == precision and c is not best and c.error is None]
        beside = "".join(f", {c.backend} {c.session_s:.3g} s" for c in others)
        texts = f"{TEXTS} texts in {best.session_s:.3g} s"
        why = f"measured {now[:10]}: {texts}{beside} (bench recommend)"
        entries[precision] = Recommendation(best.backend, precision, why, now)
    path = recommended.save(entries, config, device=device, threads=threads)
    return Recommended(tuple(candidates), candidates[0], path)


def _summarize(engine: EngineSetup, lines: Sequence[dict[str, Any]]) -> Candidate:
    error = next((line["error"] for line in lines if line["status"] != "ok"), None)

    def best(measure: str, pick: Callable[[list[float]], float]) -> float | None:
        return None if error else pick([line["value"] for line in lines if line["measure"] == measure])

    return Candidate(
        backend=engine.name,
        precision=engine.precision,
        first_token_s=best("first_token_cold_s", min),  # the first round may have compiled for the later ones
        tokens_per_s=best("decode_tok_s", max),
        peak_memory_nbytes=best("peak_memory_nbytes", max),
        error=error,
    )
