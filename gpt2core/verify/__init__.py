"""Do all backends compute the same, on this checkpoint and this machine?

    from gpt2core.verify import verify

    report = verify("demo")
    assert report.passed, report.backends

Each backend runs in a process of its own, so that a crash is one backend's failure, memory and load time are
its own, and this process loads no framework. It is compared with the float64 reference.
"""

import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from gpt2core import backends as registry
from gpt2core.checkpoint.open import open_checkpoint
from gpt2core.errors import BackendUnavailableError, Gpt2CoreError, RequestError
from gpt2core.reference import reference_logits, reference_trace
from gpt2core.sampling.params import SamplingParams
from gpt2core.testing.conformance import ROUNDED_TOLERANCE
from gpt2core.testing.subject import TOLERANCE
from gpt2core.tokenizer.tokenizer import Tokenizer
from gpt2core.trace import Trace
from gpt2core.verify.cases import STORY, Case, cases_of, texts_of
from gpt2core.verify.compare import combine, compare_logits, compare_texts, first_departure
from gpt2core.verify.process import finished
from gpt2core.verify.report import (
    Agreement,
    BackendReport,
    Comparison,
    Departure,
    Disagreement,
    Layers,
    Report,
)
from gpt2core.weights import Weights

__all__ = [
    "TEMPERATURE",
    "TOLERANCE",
    "Agreement",
    "BackendReport",
    "Comparison",
    "Departure",
    "Disagreement",
    "Layers",
    "Report",
    "verify",
]

TEMPERATURE: Final = 0.8
ROUNDS_INPUTS: Final = ("int8", "int4")
"""Precisions in which a backend may multiply integers, and so be near its weights' logits only."""
PROMPT_TOKENS: Final = 8
TRACED_TOKENS: Final = 64


def verify(
    model: str | os.PathLike[str],
    *,
    backends: Sequence[str] | None = None,
    threads: int | None = None,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    token: str | None = None,
    layers: bool = False,
    tolerance: float | None = None,
    seeds: int = 5,
    tokens: int = 40,
    timeout_s: float = 1800.0,
    on_progress: Callable[[str, int, int], None] | None = None,
) -> Report:
    """Run backends on a checkpoint, in its precision, and compare them with the reference and each other.

    The logits at every position are compared for a text of up to 128 tokens (or the context) read at once, in
    chunks and token by token, and for batches of 1, 3 and 8 rows that mix prefill and decode. Then every
    backend draws a text per seed, at temperature 0.8 from the whole vocabulary.

    Args:
        model: "demo", a folder, or a hub id.
        backends: names, or `module:attribute` of a factory, as an entry point names it; None for all known
            ones, of which those that are not installed, or do not run the precision, are skipped. One that is
            named must run.
        threads: CPU threads for each; None lets it decide.
        revision, cache_dir, local_files_only, token: as of `gpt2core.open_checkpoint`.
        layers: also find the first sub-block where a backend leaves the reference; see `Traces`.
        tolerance: largest allowed difference of a logit; None for 2e-4, or in "int8" and "int4", whose
            products may round their inputs too, for a root mean square of 0.1 of the logits' spread.
        seeds: how many texts, drawn with the seeds 0, 1, 2 and so on; 0 for none.
        tokens: of each text; a text ends earlier where it ends by itself, or with the context.
        timeout_s: for each backend.
        on_progress: is called with what is being done, and how many of how many such parts are done.

    Raises:
        CheckpointError: the checkpoint cannot be found, read or trusted.
        BackendUnavailableError: there is no backend of a name.
        RequestError: an option is out of its range.
    """
    _check(threads=threads, tolerance=tolerance, seeds=seeds, tokens=tokens, timeout_s=timeout_s)
    chosen, skipped = _chosen(backends)
    progress = on_progress or (lambda what, done, all: None)
    progress("computing the reference", 0, len(chosen) + 1)
    checkpoint = open_checkpoint(
        model, revision=revision, cache_dir=cache_dir, local_files_only=local_files_only, token=token
    )
    weights, config, precision = checkpoint.weights, checkpoint.config, checkpoint.stored.precision
    relative_tolerance = ROUNDED_TOLERANCE if tolerance is None and precision in ROUNDS_INPUTS else None
    if tolerance is None and relative_tolerance is None:
        tolerance = TOLERANCE
    if backends is None:
        reasons = {name: registry.refuse_precision(name, precision) for name in chosen}
        skipped += [BackendReport(name, "skipped", (reason,)) for name, reason in reasons.items() if reason]
        chosen = [name for name in chosen if reasons[name] is None]
    began = time.perf_counter()
    texts = texts_of(_story_ids(checkpoint.tokenizer_folder), config.vocab_size, config.n_positions)
    prompt_ids = texts[0][: min(PROMPT_TOKENS, config.n_positions // 2)]
    tokens = min(tokens, config.n_positions - len(prompt_ids)) if prompt_ids else 0
    traced_ids = texts[0][:TRACED_TOKENS]
    with np.errstate(all="ignore"):  # broken weights are for the comparison to find
        judge = _Judge(
            weights=weights,
            tolerance=tolerance,
            relative_tolerance=relative_tolerance,
            prompt_ids=prompt_ids,
            cases=cases_of([len(text) for text in texts]),
            logits=[reference_logits(weights, text) for text in texts],
            trace=reference_trace(weights, traced_ids) if layers else None,
        )
    reference_s = time.perf_counter() - began
    job = {
        "model": os.fspath(checkpoint.folder.absolute()),
        "threads": threads,
        "texts": texts,
        "prompt_ids": prompt_ids,
        "seeds": seeds if prompt_ids else 0,
        "tokens": tokens,
        "temperature": TEMPERATURE,
        "traced_ids": traced_ids if layers else None,
    }
    reports = []
    # The baseline of the texts comes first, whatever the order asked for.
    for done, name in enumerate(sorted(chosen, key=lambda one: one != "numpy"), 1):
        progress(f"running {name}", done, len(chosen) + 1)
        with finished(job | {"backend": name}, timeout_s=timeout_s) as (folder, result):
            # A plugin without what it imports, or that does not run the precision.
            if backends is None and result.get("unavailable"):
                skipped.append(BackendReport(name, "skipped", tuple(result["errors"])))
            else:
                reports.append(judge.report(name, folder, result))
    return Report(
        model=os.fspath(model),
        precision=precision,
        tolerance=tolerance,
        relative_tolerance=relative_tolerance,
        baseline=judge.baseline[0] if judge.baseline else None,
        seeds=seeds,
        tokens=tokens,
        temperature=TEMPERATURE,
        prompt_ids=tuple(prompt_ids),
        reference_s=reference_s,
        backends=(*reports, *skipped),
    )


class _Judge:
    """What the reference says, and what the backends are held to."""

    def __init__(
        self,
        *,
        weights: Weights,
        tolerance: float | None,
        relative_tolerance: float | None = None,
        prompt_ids: list[int],
        cases: list[Case],
        logits: list[np.ndarray],
        trace: Trace | None,
    ) -> None:
        self.weights, self.prompt_ids = weights, prompt_ids
        self.tolerance, self.relative_tolerance = tolerance, relative_tolerance
        self.cases, self.logits, self.trace = cases, logits, trace
        self.baseline: tuple[str, list[list[int]]] | None = None
        self.baseline_difference = 0.0

    def report(self, name: str, folder: Path, result: dict[str, Any]) -> BackendReport:
        """Compare what a worker left in its folder."""
        reasons = list(result["errors"])
        comparisons = []
        for number, case in enumerate(self.cases):
            path = folder / f"case-{number}.npy"
            if path.is_file() and "load_s" in result:  # a process that died may leave half a file
                comparisons.append(compare_logits(case, np.load(path, mmap_mode="r"), self.logits))
        overall = combine("all", comparisons) if comparisons else None
        reasons += [fault for one in comparisons if (fault := self._fault(one)) is not None]
        agreement = self._agreement(name, result.get("tokens"), overall)
        if agreement is not None:
            reasons += [
                f"seed {one.seed}: new token {one.index} is {one.got}, not {one.expected} as on "
                f"{agreement.baseline}, and rounding does not explain it"
                for one in agreement.disagreements
                if not one.within
            ]
        layers = self._layers(folder, result)
        if layers is not None and layers.first is not None:
            reasons.append(f"leaves the reference at {layers.first.where}")
        return BackendReport(
            backend=name,
            status="failed" if reasons else "passed",
            reasons=tuple(reasons),
            overall=overall,
            comparisons=tuple(comparisons),
            agreement=agreement,
            layers=layers,
            load_s=result.get("load_s"),
            elapsed_s=result.get("elapsed_s"),
            peak_memory_nbytes=result.get("peak_memory_nbytes"),
        )

    def _fault(self, one: Comparison) -> str | None:
        if not np.isfinite(one.max_difference):
            return f"{one.name}: a logit differs infinitely or is not finite"
        if self.tolerance is not None and one.max_difference > self.tolerance:
            return f"{one.name}: logits differ by {one.max_difference:.3g}, allowed is {self.tolerance:.3g}"
        if self.relative_tolerance is not None and one.relative_difference > self.relative_tolerance:
            return (
                f"{one.name}: logits are off by {one.relative_difference:.3g} of their spread, allowed is "
                f"{self.relative_tolerance:.3g}"
            )
        return None

    def _agreement(
        self, name: str, got: list[list[int]] | None, overall: Comparison | None
    ) -> Agreement | None:
        if got is None:
            return None
        most = np.inf if self.tolerance is None else self.tolerance
        difference = min(overall.max_difference if overall else most, most)
        if self.baseline is None:
            self.baseline, self.baseline_difference = (name, got), difference
            return None
        difference = max(difference, self.baseline_difference)
        return compare_texts(self.weights, self.prompt_ids, TEMPERATURE, difference, self.baseline, got)

    def _layers(self, folder: Path, result: dict[str, Any]) -> Layers | None:
        if self.trace is None or result.get("traced") is None:
            return None
        if not (folder / "trace.npz").is_file():
            return Layers(traced=result["traced"])
        with np.load(folder / "trace.npz") as arrays:
            got = Trace(arrays["hidden_states"], arrays["attentions"], arrays["logits"])
        allowed = self.tolerance if self.relative_tolerance is None else self.relative_tolerance
        assert allowed is not None
        return Layers(traced=True, first=first_departure(got, self.trace, allowed))


def _chosen(names: Sequence[str] | None) -> tuple[list[str], list[BackendReport]]:
    """Which to run, and reports of those that are not installed."""
    known = registry.available(load_plugins=False)
    if names is None:
        skipped = [
            BackendReport(one.name, "skipped", (one.reason,)) for one in known.values() if not one.available
        ]
        return [name for name, one in known.items() if one.available], skipped
    if isinstance(names, str) or not names:
        raise RequestError(f"backends is {names!r}, expected a list of names such as ['numpy', 'torch']")
    for name in names:
        if ":" not in name and name not in known:
            raise BackendUnavailableError(
                f"there is no backend {name!r}; known are {', '.join(known)}, "
                f"and a factory of your own is given as module:attribute{registry.suggest_backend(name)}"
            )
    return list(dict.fromkeys(names)), []


def _story_ids(folder: Path) -> list[int]:
    """The story's token ids; none where the checkpoint has no tokenizer that works."""
    try:
        return Tokenizer.from_folder(folder).encode(STORY)
    except Gpt2CoreError:
        return []


def _check(
    *, threads: int | None, tolerance: float | None, seeds: int, tokens: int, timeout_s: float
) -> None:
    if threads is not None and threads < 1:
        raise RequestError(f"threads is {threads}; it must be 1 or more")
    if tolerance is not None and not 0 < tolerance < np.inf:
        raise RequestError(f"tolerance is {tolerance}; it must be above 0 and finite")
    if seeds < 0:
        raise RequestError(f"seeds is {seeds}; it must be 0 or more")
    SamplingParams(max_new_tokens=tokens)
    if tokens < 1:
        raise RequestError(f"tokens is {tokens}; it must be 1 or more")
    if not timeout_s > 0:
        raise RequestError(f"timeout_s is {timeout_s}; it must be above 0")
