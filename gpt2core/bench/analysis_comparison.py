"""The comparison analysed: medians over the rounds, and ratios to a baseline round by round."""

from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Final

import numpy as np

from gpt2core.bench.findings_comparison import (
    MEASURES,
    SHORT_NAMES,
    ComparisonAnalysis,
    Engine,
    Point,
    Roof,
)
from gpt2core.bench.records import Measurement, Records
from gpt2core.bench.statistics import Interval, bootstrap_interval, paired_ratio
from gpt2core.errors import RequestError

_MACHINE: Final = "machine"

Key = tuple[str, str]  # engine, precision
Place = tuple[str, int | None, int | None, int | None]  # measure, batch, length, position


def analyse_comparison(records: Records) -> ComparisonAnalysis:
    """Analyse.

    Raises:
        RequestError: the settings name a baseline that was not measured.
    """
    values: dict[Place, dict[Key, dict[int, float]]] = defaultdict(lambda: defaultdict(dict))
    units = {}
    for one in records.measurements:
        if one.status == "ok" and one.value is not None and one.measure != "correct":
            place = (one.measure, one.batch, one.length, one.position)
            values[place][one.engine, one.precision][one.round] = one.value
            units[one.measure] = one.unit
    checked: dict[str, list[Measurement]] = defaultdict(list)
    for one in records.measurements:
        if one.measure == "correct" and one.status == "ok":
            checked[one.engine].append(one)
    engines = {key: _engine(key, lines, checked[key[0]]) for key, lines in _by_engine(records.measurements)}
    measured = [key for key, engine in engines.items() if engine.skipped is None]
    baseline = _baseline(records, measured)
    points = [
        _point(
            place,
            units[place[0]],
            engines[key].label,
            rounds,
            None if baseline in (None, key) else by_engine.get(baseline),
        )
        for place, by_engine in sorted(values.items(), key=_order)
        if place[0] in MEASURES
        for key, rounds in by_engine.items()
        if key in engines
    ]
    bandwidths = [
        one.value for one in records.measurements if one.measure == "read_bandwidth" and one.value is not None
    ]
    bandwidth = bootstrap_interval(bandwidths) if bandwidths else None
    return ComparisonAnalysis(
        records=records,
        baseline=engines[baseline].label if baseline else None,
        engines=tuple(engines.values()),
        points=tuple(points),
        roofs=tuple(_roofs(values, engines, bandwidth)),
        bandwidth_bytes_s=bandwidth,
    )


def _order(item: tuple[Place, object]) -> tuple[int, ...]:
    measure, *numbers = item[0]
    rank = list(MEASURES).index(measure) if measure in MEASURES else len(MEASURES)
    return rank, *(-1 if number is None else number for number in numbers)


def _by_engine(measurements: Iterable[Measurement]) -> Iterator[tuple[Key, list[Measurement]]]:
    groups: dict[Key, list[Measurement]] = {}
    for one in measurements:
        if one.engine != _MACHINE:
            groups.setdefault((one.engine, one.precision), []).append(one)
    yield from groups.items()


def _engine(key: Key, lines: list[Measurement], checked: list[Measurement]) -> Engine:
    """`checked`: what was found of its answers, in whatever precision."""
    name, precision = key
    checks = {one.variant or "this checkpoint": one for one in checked if one.precision == precision}
    if not checks:  # what its adapter computes wrong in one precision is wrong in the others too
        checks = {one.variant or "this checkpoint": one for one in checked}
    failures: dict[str, int] = defaultdict(int)
    for one in lines:
        if one.status == "failed":
            failures[f"{one.measure}: {one.error or 'failed'}"] += 1
    reasons = [one.error or "no reason given" for one in lines if one.status == "skipped"]
    measured = any(one.status != "skipped" for one in lines)
    return Engine(
        name=name,
        precision=precision,
        peer=lines[0].peer,
        label=name if precision == "float32" else f"{name} {precision}",
        wrong=tuple((v, one.error or "it differs") for v, one in checks.items() if one.value == 0),
        checked=len(checks),
        failures=tuple(failures.items()),
        skipped=None if measured or not reasons else reasons[-1],
    )


def _baseline(records: Records, measured: list[Key]) -> Key | None:
    """What the settings name, else what people have: transformers; else the first engine."""
    named = records.settings.get("baseline")
    if named is not None:
        for key in measured:
            if named in (key[0], " ".join(key)):
                return key
        known = ", ".join(name for name, _ in measured) or "none"
        raise RequestError(f"baseline {named!r} was not measured; measured are: {known}")
    return next((key for key in measured if key[0] == "transformers"), measured[0] if measured else None)


def _point(
    place: Place, unit: str, label: str, rounds: dict[int, float], base: dict[int, float] | None
) -> Point:
    measure, batch, length, position = place
    at = [
        f"{name} {x}"
        for name, x in (("batch", batch), ("length", length), ("position", position))
        if x is not None
    ]
    return Point(
        engine=label,
        measure=measure,
        unit=unit,
        at=", ".join(at),
        x=next((x for x in _relevant(place) if x is not None), None),
        value=bootstrap_interval(list(rounds.values())),
        rounds=len(rounds),
        ratio=_ratio(unit, rounds, base) if base and measure in SHORT_NAMES else None,
    )


def _relevant(place: Place) -> tuple[int | None, ...]:
    """Batch, length, position: the one that this measure is about comes first."""
    measure, batch, length, position = place
    if measure == "prefill_s":
        return length, batch, position
    return (position, batch, length) if measure == "step_s" else (batch, length, position)


def _ratio(unit: str, rounds: dict[int, float], base: dict[int, float]) -> Interval | None:
    common = [i for i in rounds if i in base and rounds[i] > 0 and base[i] > 0]
    if not common:
        return None
    own, others = [rounds[i] for i in common], [base[i] for i in common]
    return paired_ratio(others, own) if unit == "s" else paired_ratio(own, others)


def _roofs(
    values: dict[Place, dict[Key, dict[int, float]]], engines: dict[Key, Engine], bandwidth: Interval | None
) -> Iterator[Roof]:
    read: dict[Key, list[float]] = defaultdict(list)
    for place, by_engine in values.items():
        if place[0] == "weight_nbytes":
            for key, rounds in by_engine.items():
                read[key] += rounds.values()
    for place, by_engine in values.items():
        if place[:2] == ("decode_tok_s", 1):
            for key, rounds in by_engine.items():
                if key in read and key in engines:
                    nbytes = float(np.median(read[key]))
                    achieved = bootstrap_interval([speed * nbytes for speed in rounds.values()])
                    share = achieved.scaled(1 / bandwidth.mid) if bandwidth else None
                    yield Roof(engines[key].label, achieved, share)
