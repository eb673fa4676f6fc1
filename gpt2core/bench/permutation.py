"""Does a group matter once other things are controlled for? A permutation test."""

# n values, R permutations, G groups (prompts), K covariates

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from gpt2core.bench.statistics import Floats, indicators


@dataclass(frozen=True, slots=True)
class GroupEffect:
    """A permutation test: do groups differ once covariates are controlled for?

    Attributes:
        p_value: the share of permutations whose F is at least the observed one, the observed one counted.
        f: the observed F.
        share: of the variance that strata and covariates leave, what the groups explain, corrected for what
            chance explains (omega squared; 0 where there is less than that).
        deviations: each group's mean deviation once all is controlled for, in the unit of y.
        p_values: each group against the others, Holm-corrected.
        permutations: how many.
    """

    p_value: float
    f: float
    share: float
    deviations: dict[Hashable, float]
    p_values: dict[Hashable, float]
    permutations: int


def group_effect(
    y: ArrayLike,
    groups: Sequence[Hashable],
    strata: Sequence[Hashable],
    covariates: ArrayLike | None = None,
    *,
    permutations: int = 2000,
    seed: int = 0,
) -> GroupEffect | None:
    """Permute what strata and covariates leave (Freedman & Lane 1983), inside each stratum only.

    `covariates` is (n, K). None where groups cannot be told from the covariates (two prompts of different
    token counts differ in both), or where nothing is left to judge by.
    """
    y_ = np.asarray(y, np.float64).reshape(-1)
    if len(y_) == 0:
        return None
    of_stratum = indicators(strata)
    given = np.empty((len(y_), 0)) if covariates is None else np.asarray(covariates, np.float64)
    nuisance = _basis(np.column_stack([of_stratum, given - given.mean(0) if len(given) else given]))
    of_group = indicators(groups)
    names = list(dict.fromkeys(groups))
    effect = _basis(_left_by(nuisance, of_group))
    freedom = len(y_) - nuisance.shape[1] - effect.shape[1]
    if effect.shape[1] == 0 or freedom < 1:
        return None
    single = _left_by(nuisance, of_group)  # (n, G): one group against the others
    norms = np.sqrt((single**2).sum(0))
    single = np.divide(single, norms, out=np.zeros_like(single), where=norms > 1e-9)
    residuals = _left_by(nuisance, y_[:, None])[:, 0]

    rng = np.random.default_rng(seed)
    order = np.tile(np.arange(len(y_)), (permutations, 1))  # (R, n)
    for column in of_stratum.T:
        members = np.flatnonzero(column)
        order[:, members] = rng.permuted(np.tile(members, (permutations, 1)), axis=1)
    permuted = _left_by(nuisance, residuals[order].T)  # (n, R)
    everything = np.column_stack([residuals, permuted])  # (n, 1 + R), the observed one first
    total = (everything**2).sum(0)
    explained = ((effect.T @ everything) ** 2).sum(0)
    f = (explained / effect.shape[1]) / np.maximum((total - explained) / freedom, 1e-300)
    alone = np.abs(single.T @ everything) / np.sqrt(np.maximum(total, 1e-300))  # (G, 1 + R)
    error = float(total[0] - explained[0]) / freedom
    share = (float(explained[0]) - effect.shape[1] * error) / (float(total[0]) + error + 1e-300)
    p_each = [_rank(row) for row in alone]
    means = of_group.T @ residuals / of_group.sum(0)
    return GroupEffect(
        p_value=_rank(f),
        f=float(f[0]),
        share=max(share, 0.0),
        deviations=dict(zip(names, means.tolist(), strict=True)),
        p_values=dict(zip(names, holm(p_each), strict=True)),
        permutations=permutations,
    )


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values of several tests, corrected so that their family errs at the level of one (Holm 1979)."""
    corrected, greatest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        greatest = max(greatest, min(1.0, p_values[i] * (len(p_values) - rank)))
        corrected[i] = greatest
    return corrected


def _rank(values: Floats) -> float:
    """The share of all values that are at least the first one."""
    return float((values >= values[0] - 1e-9 * abs(values[0])).mean())


def _basis(columns: Floats) -> Floats:
    """An orthonormal basis of what the columns span."""
    scale = np.sqrt((columns**2).sum(0))
    columns = columns[:, scale > 1e-9]
    if columns.shape[1] == 0:
        return columns
    left, singular, _ = np.linalg.svd(columns / np.sqrt((columns**2).sum(0)), full_matrices=False)
    return left[:, singular > 1e-8]


def _left_by(basis: Floats, columns: Floats) -> Floats:
    return columns - basis @ (basis.T @ columns)
