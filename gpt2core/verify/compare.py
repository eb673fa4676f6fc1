"""The numbers of `verify`: logits, texts and traces against the float64 reference."""

# n positions of one block, V vocabulary, T tokens

import math
from collections.abc import Sequence

import numpy as np

from gpt2core._shapes import Float
from gpt2core.reference import reference_logits
from gpt2core.sampling import transforms as _logits
from gpt2core.sampling.draw import uniform
from gpt2core.trace import Trace
from gpt2core.verify.cases import Case
from gpt2core.verify.report import Agreement, Comparison, Departure, Disagreement
from gpt2core.weights import Weights

_BLOCK = 64  # positions at a time: float64 logits of all of them would take gigabytes


def compare_logits(case: Case, got: np.ndarray, want: Sequence[np.ndarray]) -> Comparison:
    """A case's logits (n, V) against those of the reference, one array (T, V) per text."""
    where = [(row.text, position) for row in case.rows for position in range(row.start, row.end)]
    parts = []
    for begin in range(0, len(where), _BLOCK):
        block = where[begin : begin + _BLOCK]
        parts.append(
            _compare(np.asarray(got[begin : begin + _BLOCK]), np.stack([want[t][p] for t, p in block]))
        )
    return combine(case.name, parts)


def _compare(got: Float[np.ndarray, "n V"], want: Float[np.ndarray, "n V"]) -> Comparison:
    with np.errstate(all="ignore"):  # what is not finite is counted as infinite below
        difference = np.abs(got - want)
        log_p, log_q = _log_softmax(want), _log_softmax(got.astype(np.float64))
        kl = (np.exp(log_p) * (log_p - log_q)).sum(-1)  # (n,)
    kl = np.where(np.isfinite(kl), np.maximum(kl, 0), np.inf)  # rounding makes some -1e-17
    difference[~np.isfinite(difference)] = np.inf
    with np.errstate(all="ignore"):
        relative = float(np.sqrt(np.square(difference).mean()) / want.std())
    return Comparison(
        name="",
        positions=len(got),
        max_difference=float(difference.max()),
        mean_difference=float(difference.mean()),
        relative_difference=relative if np.isfinite(relative) else np.inf,
        top1_agreement=float((got.argmax(-1) == want.argmax(-1)).mean()),
        kl_mean_nats=float(kl.mean()),
        kl_max_nats=float(kl.max()),
    )


def _log_softmax(logits: Float[np.ndarray, "n V"]) -> Float[np.ndarray, "n V"]:
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def combine(name: str, parts: Sequence[Comparison]) -> Comparison:
    """Several comparisons as one."""
    positions = sum(part.positions for part in parts)

    def mean(field: str) -> float:
        return math.fsum(part.positions * getattr(part, field) for part in parts) / positions

    return Comparison(
        name=name,
        positions=positions,
        max_difference=max(part.max_difference for part in parts),
        mean_difference=mean("mean_difference"),
        relative_difference=math.sqrt(
            math.fsum(part.positions * part.relative_difference**2 for part in parts) / positions
        ),
        top1_agreement=mean("top1_agreement"),
        kl_mean_nats=mean("kl_mean_nats"),
        kl_max_nats=max(part.kl_max_nats for part in parts),
    )


def compare_texts(
    weights: Weights,
    prompt_ids: Sequence[int],
    temperature: float,
    difference: float,
    baseline: tuple[str, list[list[int]]],
    got: list[list[int]],
) -> Agreement:
    """One seed's tokens after the other; `difference` is how much a logit may be off, as measured."""
    name, want = baseline
    disagreements, equal_tokens = [], 0
    for seed, (expected, mine) in enumerate(zip(want, got, strict=True)):
        same = _common(expected, mine)
        equal_tokens += same
        if expected != mine:
            a, b = (ids[same] if same < len(ids) else None for ids in (expected, mine))
            history = [*prompt_ids, *expected[:same]]
            disagreements.append(_explain(weights, history, temperature, difference, seed, same, a, b))
    return Agreement(
        baseline=name,
        texts=len(want),
        equal_texts=len(want) - len(disagreements),
        tokens=sum(map(len, want)),
        equal_tokens=equal_tokens,
        disagreements=tuple(disagreements),
    )


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens two texts begin with alike."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _explain(
    weights: Weights,
    history: Sequence[int],
    temperature: float,
    difference: float,
    seed: int,
    index: int,
    expected: int | None,
    got: int | None,
) -> Disagreement:
    """Follow the draw to where both tokens part (see `sampling.draw.sample_token`) and measure there."""
    if expected is None or got is None:
        return Disagreement(seed, index, expected, got, None, None, None, None, within=False)
    with np.errstate(all="ignore"):
        logits = reference_logits(weights, history)[-1]
        depth, share = parting(np.exp(_logits.temper(logits, temperature)), expected, got)
    u = uniform(seed, 0, len(history), depth)
    # Logits that are off by d change the odds of a half by a factor between e^(-2d/T) and e^(2d/T).
    factor = math.exp(min(2 * difference / temperature, 700.0))
    odds = share / (1 - share) if share < 1 else math.inf
    highest = 1.0 if math.isinf(odds) else odds * factor / (1 + odds * factor)
    lowest = 1.0 if math.isinf(odds) else odds / factor / (1 + odds / factor)
    margin, numeric = abs(u - share), max(highest - share, share - lowest)
    return Disagreement(seed, index, expected, got, u, share, margin, numeric, within=margin <= numeric)


def parting(weights: Float[np.ndarray, "V"], a: int, b: int) -> tuple[int, float]:
    """The depth of the bisection that sends tokens `a` and `b` into different halves, and its lower half's
    share of the probability; the halves are those of `sample_token`.
    """
    low, high, depth = 0, len(weights), 0
    size = 1 << (len(weights) - 1).bit_length()
    while True:
        size //= 2
        middle = min(low + size, high)
        if (a < middle) != (b < middle):
            lower, total = float(weights[low:middle].sum()), float(weights[low:high].sum())
            return depth, lower / total if total else math.nan
        low, high = (low, middle) if a < middle else (middle, high)
        depth += 1


def first_departure(got: Trace, want: Trace, tolerance: float) -> Departure | None:
    """The first part, in the order of computation, that differs by more than the tolerance.

    A residual stream may reach thousands, so the tolerance grows with the reference's greatest number at
    each position where that is above 1.
    """
    for (where, mine), (_, theirs) in zip(got.parts(), want.parts(), strict=True):
        if mine.shape != theirs.shape:
            return Departure(where, 0, math.inf, tolerance)
        with np.errstate(all="ignore"):
            difference = np.abs(mine - theirs)
        difference[~np.isfinite(difference)] = np.inf
        others = tuple(axis for axis in range(mine.ndim) if axis != mine.ndim - 2)  # all but the position
        by_position = difference.max(axis=others)  # (T,)
        allowed = tolerance * np.maximum(1, np.abs(theirs).max(axis=others))  # (T,)
        if (by_position > allowed).any():
            worst = int((by_position / allowed).argmax())
            return Departure(where, worst, float(by_position[worst]), float(allowed[worst]))
    return None
