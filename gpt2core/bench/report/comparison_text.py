"""What a comparison found, as sentences and tables."""

from collections.abc import Sequence

from gpt2core.bench.report.comparison_results import MEASURES, ONCE, SHORT_NAMES, ComparisonResults, Point
from gpt2core.bench.tables import (
    PLAIN,
    Table,
    Unit,
    fitting_unit,
    short,
    show_interval,
)


def list_few(names: Sequence[str]) -> str:
    """At most three of the names, each once, and how many more there are."""
    different = list(dict.fromkeys(names))
    more = f" and {len(different) - 3} more" if len(different) > 3 else ""
    return ", ".join(different[:3]) + more


# -------------------------------------------------------------------------------------------------
# Sentences


def say_rankings(a: ComparisonResults) -> list[str]:
    """Who is the best at what."""
    contests = [("decode_tok_s", False), ("decode_tok_s", True), ("prefill_s", True)]
    contests += [("first_token_cold_s", True), ("peak_memory_nbytes", True)]
    found = [ranking for measure, last in contests if (ranking := a.ranking(measure, last=last))]
    return list(dict.fromkeys(ranking.sentence() for ranking in found))


def say_baseline(a: ComparisonResults) -> list[str]:
    """Where the ratios are over another engine than was asked for."""
    if a.missing_baseline is None:
        return []
    instead = f"ratios are over {a.baseline}" if a.baseline else "nothing else was measured either"
    return [f"The baseline {a.missing_baseline} was not measured; {instead}."]


def say_correctness(a: ComparisonResults) -> list[str]:
    """Whose answers are right, wrong or unknown."""
    lines = []
    for engine in a.engines:
        for variant, how in engine.wrong:
            lines.append(f"{engine.label} is WRONG on {variant}: {short(how, 200)}")
    right = [
        engine.label + (f" (within {engine.difference:.0e})" if engine.difference else "")
        for engine in a.engines
        if engine.checked and not engine.wrong
    ]
    if right:
        lines.append(f"Right on every variant that was checked: {', '.join(right)}.")
    for engine in a.engines:
        reasons: dict[str, list[str]] = {}
        for variant, why in engine.unanswered if engine.skipped is None else ():
            reasons.setdefault(why, []).append(variant)
        for why, variants in reasons.items():
            lines.append(f"{engine.label} was not checked on {list_few(variants)}: {short(why, 200)}")
    unchecked = [e.label for e in a.engines if not e.checked and not e.unanswered and e.skipped is None]
    if unchecked:
        lines.append(f"Answers not checked: {', '.join(unchecked)}.")
    return lines


def say_troubles(a: ComparisonResults) -> list[str]:
    """What was skipped or failed, with the reason."""
    skipped = [f"{e.label} was skipped: {short(e.skipped, 200)}" for e in a.engines if e.skipped is not None]
    failed = [
        f"{engine.label} failed {count} x: {short(error, 200)}"
        for engine in a.engines
        for error, count in engine.failures
    ]
    lacking = [f"{e.label} has no {short(what, 200)}" for e in a.engines for what in e.lacking]
    return skipped + failed + lacking


# -------------------------------------------------------------------------------------------------
# Tables


def _grid(a: ComparisonResults, points: list[Point], texts: list[str]) -> tuple[tuple[str, ...], ...]:
    """A row for each engine, a column for each of `_columns(points)`."""
    cells = {(p.engine, p.measure, p.at): text for p, text in zip(points, texts, strict=True)}
    columns = _columns(points)
    return tuple(
        (engine.marked, *(cells.get((engine.label, *column), "-") for column in columns))
        for engine in a.engines
        if any((engine.label, *column) in cells for column in columns)
    )


def _columns(points: list[Point]) -> list[tuple[str, str]]:
    return list(dict.fromkeys((point.measure, point.at) for point in points))


def measure_table(a: ComparisonResults, measure: str) -> Table:
    """A measure at every place."""
    points = a.points_of(measure)
    unit = fitting_unit(points[0].unit, [point.value.mid for point in points])
    rounds = max(point.rounds for point in points)
    return Table(
        title=f"{MEASURES[measure]} ({unit.name}; mean of up to {rounds} rounds, 95 % interval)",
        columns=("engine", *(at or unit.name for _, at in _columns(points))),
        rows=_grid(a, points, [unit.numbers(point.value) for point in points]),
    )


def once_table(a: ComparisonResults) -> list[Table]:
    """What depends on nothing."""
    points = [point for measure in ONCE for point in a.points_of(measure)]
    if not points:
        return []
    units = {
        m: fitting_unit(a.points_of(m)[0].unit, [p.value.mid for p in a.points_of(m)])
        for m, _ in _columns(points)
    }
    return [
        Table(
            title="Start-up, first token and peak memory (means, 95 % intervals)",
            columns=("engine", *(f"{ONCE[m]} ({units[m].name})" for m, _ in _columns(points))),
            rows=_grid(a, points, [units[point.measure].numbers(point.value) for point in points]),
            note="build: once, before the rounds, and near 0 where an earlier build was kept; compile: what "
            "the first call takes beyond a warm one of the same shape",
        )
    ]


def ratio_tables(a: ComparisonResults) -> list[Table]:
    """Speed, and memory, over the baseline's."""
    tables = []
    for of_bytes, title in ((False, "Times as fast as"), (True, "Times the memory of")):
        points = [p for p in a.points if p.ratio is not None and (p.unit == "bytes") == of_bytes]
        if points:
            columns = [f"{SHORT_NAMES[measure]} {at}".strip() for measure, at in _columns(points)]
            tables.append(
                Table(
                    title=f"{title} {a.baseline} (geometric mean of the rounds' ratios, 95 % interval)",
                    columns=("engine", *columns),
                    rows=_grid(a, points, [PLAIN.numbers(p.ratio) for p in points if p.ratio is not None]),
                )
            )
    return tables


def roofline_table(a: ComparisonResults) -> list[Table]:
    """How near decoding comes to the memory's speed."""
    if not a.roofs:
        return []
    unit, marked = Unit("GB/s", 1e-9), {engine.label: engine.marked for engine in a.engines}
    rows = [
        (
            marked[roof.engine],
            unit.numbers(roof.achieved_bytes_s),
            "-" if roof.share is None else Unit("%", 100).interval(roof.share),
        )
        for roof in a.roofs
    ]
    measured = a.bandwidth_bytes_s
    roofline = "not measured" if measured is None else show_interval("bytes/s", measured)
    return [
        Table(
            title="Roofline: weights read per second while one sequence is decoded",
            columns=("engine", "GB/s", "of the bandwidth"),
            rows=tuple(rows),
            note=f"read bandwidth of this machine: {roofline}; shares are of the same round's",
        )
    ]
