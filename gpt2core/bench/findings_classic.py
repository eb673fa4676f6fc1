"""What the classic benchmark says, as frozen data, as sentences and as a table."""

from dataclasses import dataclass
from typing import Any, Final, Literal

from gpt2core.bench.breakdown import breakdown_tables
from gpt2core.bench.permutation import GroupEffect
from gpt2core.bench.records import Records
from gpt2core.bench.statistics import Curvature, Interval, LinearFit
from gpt2core.bench.tables import Table, plain, short
from gpt2core.bench.units import Unit, of, unit_for

SIGNIFICANT: Final = 0.05
LEAST_TOKENS: Final = 20
"""Of a run whose steps are looked at one by one."""


@dataclass(frozen=True, slots=True)
class Cell:
    """All runs of one prompt at one length.

    Attributes:
        prompt_index, length: which cell.
        runs, failed: how many runs have a time, and how many failed.
        elapsed_s: mean with its 95 % interval; None where all failed.
        ttft_s: median; None where it is unknown.
        tokens_per_s: new tokens divided by time, the median over the runs.
    """

    prompt_index: int
    length: int
    runs: int
    failed: int
    elapsed_s: Interval | None
    ttft_s: float | None
    tokens_per_s: float | None


@dataclass(frozen=True, slots=True)
class WithinRun:
    """How the time of a token changes with its position inside one generation.

    Attributes:
        slope: seconds per token and position, the mean over `units`, with its 95 % interval.
        step_s: median time of a token.
        units: what is independent: "prompts", or "runs" where there are fewer than three prompts.
        count: how many units.
        positions: the first and the last position.
    """

    slope: Interval
    step_s: float
    units: Literal["prompts", "runs"]
    count: int
    positions: tuple[int, int]


@dataclass(frozen=True, slots=True)
class WarmUp:
    """The runs that were kept apart.

    Attributes:
        runs: how many.
        ratio: of a warm-up's time to the median of the measured runs of its cell; the median over the cells.
    """

    runs: int
    ratio: float | None


@dataclass(frozen=True, slots=True)
class ClassicAnalysis:
    """What the classic benchmark says; `x` of its fits is `regressor`, each prompt has its own intercept."""

    records: Records
    cells: tuple[Cell, ...]
    regressor: Literal["new tokens", "total length"]
    line: LinearFit | None
    curvature: Curvature | None
    longest_s: float
    within_run: WithinRun | None
    prompt_effect: GroupEffect | None
    prompt_reason: str
    warm_up: WarmUp
    failures: tuple[tuple[str, int], ...]

    def to_dict(self) -> dict[str, Any]:
        """For strict JSON."""
        parts = {name: getattr(self, name) for name in self.__dataclass_fields__ if name != "records"}
        return {"kind": "classic", "folder": str(self.records.folder), **plain(parts)}

    @property
    def findings(self) -> list[str]:
        """One sentence per question."""
        return [_linear(self), _curved(self), _within(self), _prompts(self), *_rest(self)]

    @property
    def tables(self) -> list[Table]:
        """The means, and where the time goes if that was measured."""
        return [_means(self), *breakdown_tables(self.records.components)]

    def text(self) -> str:
        """For a terminal."""
        findings = "".join(f"- {line}\n" for line in self.findings)
        return "\n".join([*(table.text() for table in self.tables), findings])


def _linear(a: ClassicAnalysis) -> str:
    if a.line is None:
        return "Linear fit: not possible; it needs at least two lengths and more runs."
    per_token = "new token" if a.regressor == "new tokens" else "token of length"
    return (
        f"Linear fit over {a.line.points} points: {of('s', a.line.slope)} per {per_token}, and "
        f"{of('s', a.line.intercept)} beside it; R² {a.line.r_squared:.5f}, residual spread "
        f"{unit_for('s', [a.line.residual_std]).text(a.line.residual_std)}."
    )


def _curved(a: ClassicAnalysis) -> str:
    if a.curvature is None:
        return "Curvature: not known; it needs three lengths, and more than one prompt or run."
    percent = a.curvature.bend.scaled(100 / a.longest_s)
    c = a.curvature.coefficient
    verdict = "no curve is visible"
    if a.curvature.p_value < SIGNIFICANT:
        verdict = "time grows faster than length" if c.mid > 0 else "time grows more slowly than length"
    return (
        f"Curvature: {of('s', c)} per token², a bend of {Unit('', 1).interval(percent)} % of the "
        f"longest time (p = {a.curvature.p_value:.2g}, {a.curvature.freedom} degrees of freedom): {verdict}."
    )


def _within(a: ClassicAnalysis) -> str:
    within = a.within_run
    if within is None:
        return (
            f"Within a run: not known; it needs two runs of {LEAST_TOKENS} tokens with a time for each token."
        )
    verdict = "no growth is visible"
    if not within.slope.covers(0):
        verdict = "later tokens take longer" if within.slope.mid > 0 else "later tokens are faster"
    hundred = within.slope.scaled(100)
    percent = 100 * hundred.mid / within.step_s if within.step_s else 0.0
    return (
        f"Within a run: a token takes {unit_for('s', [within.step_s]).text(within.step_s)}, and per 100 "
        f"positions {Unit('µs', 1e6).interval(hundred)} more ({percent:+.2g} %; {within.count} "
        f"{within.units}, positions {within.positions[0]} to {within.positions[1]}): {verdict}."
    )


def _prompts(a: ClassicAnalysis) -> str:
    effect = a.prompt_effect
    if effect is None:
        return f"Effect of the prompt beyond its token count: cannot be told; {a.prompt_reason}."
    named = [
        f"{i + 1 if isinstance(i, int) else i} ({unit_for('s', [d]).text(d)})"
        for i, d in effect.deviations.items()
        if effect.p_values[i] < SIGNIFICANT
    ]
    verdict = "no effect is visible"
    if effect.p_value < SIGNIFICANT:
        verdict = "the prompt matters" + (f"; apart stand prompts {', '.join(named)}" if named else "")
    reason = f" ({a.prompt_reason})" if a.prompt_reason else ""
    return (
        f"Effect of the prompt beyond its token count{reason}: p = {effect.p_value:.2g} by "
        f"{effect.permutations} permutations within length and round, {100 * effect.share:.1f} % of the "
        f"variance that length and token counts leave: {verdict}."
    )


def _rest(a: ClassicAnalysis) -> list[str]:
    lines = []
    if a.warm_up.runs:
        ratio = "" if a.warm_up.ratio is None else f"; they took {a.warm_up.ratio:.2f} times the usual time"
        lines.append(f"Warm-up: {a.warm_up.runs} runs, not counted above{ratio}.")
    early = sum(run.finish_reason == "stop" for run in a.records.measured)
    if early:
        lines.append(f"{early} runs ended before their length, at an end-of-text token or stop string.")
    lines += [f"Failed: {count} x {short(error, 200)}" for error, count in a.failures]
    return lines


def _means(a: ClassicAnalysis) -> Table:
    unit = unit_for("s", [cell.elapsed_s.mid for cell in a.cells if cell.elapsed_s])
    cells = {(cell.prompt_index, cell.length): cell for cell in a.cells}
    rows = []
    for index, prompt in a.records.prompts.items():
        row = [f"{index + 1}  {short(prompt)}"]
        for length in a.records.lengths:
            cell = cells[index, length]
            text = (
                "-"
                if cell.elapsed_s is None
                else unit.interval(cell.elapsed_s).removesuffix(unit.name).rstrip()
            )
            row.append(text + (f" ({cell.failed} failed)" if cell.failed else ""))
        last = [cells[index, length] for length in a.records.lengths if cells[index, length].runs]
        speed = last[-1].tokens_per_s if last else None
        ttft = last[-1].ttft_s if last else None
        row += ["-" if speed is None else f"{speed:.1f}"]
        row += ["-" if ttft is None else f"{ttft * 1e3:.2f}"]
        rows.append(tuple(row))
    runs = max((cell.runs for cell in a.cells), default=0)
    return Table(
        title=f"Mean generation time in {unit.name}, with 95 % intervals over up to {runs} runs",
        columns=("prompt", *(f"{length} tokens" for length in a.records.lengths), "tok/s", "TTFT ms"),
        rows=tuple(rows),
        note="tok/s (new tokens divided by time) and TTFT: medians at the greatest length",
    )
