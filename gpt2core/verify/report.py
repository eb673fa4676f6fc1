"""What `verify` found, as frozen data."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal

Status = Literal["passed", "failed", "skipped"]


@dataclass(frozen=True, slots=True)
class Comparison:
    """Logits of one way of running a backend against the float64 reference.

    Attributes:
        name: which way: prefill, chunked prefill, decode, a ragged batch; "all" for all of them.
        positions: how many rows of logits were compared.
        max_difference, mean_difference: absolute, of single logits; infinite where one is not finite.
        top1_agreement: the share of positions at which the likeliest token is the reference's.
        relative_difference: root mean square of the differences, over the spread (the standard deviation) of
            the reference's logits.
        kl_mean_nats, kl_max_nats: Kullback-Leibler divergence of the backend's distribution from the
            reference's.
    """

    name: str
    positions: int
    max_difference: float
    mean_difference: float
    relative_difference: float
    top1_agreement: float
    kl_mean_nats: float
    kl_max_nats: float


@dataclass(frozen=True, slots=True)
class Disagreement:
    """The first token of one seed's text that differs from the baseline's.

    At the bisection where both draws part, the lower half of the vocabulary has probability `share` by the
    reference, and the random number is `uniform`.

    Attributes:
        seed: of the text.
        index: which of its new tokens, from 0.
        expected, got: the baseline's token and this backend's; None where a text had already ended.
        uniform, share: as above.
        margin: their distance.
        numeric_difference: by how much `share` can move when every logit moves by the measured difference,
            or by the tolerance where that is less.
        within: whether `margin` is not above `numeric_difference`: rounding explains the disagreement.
    """

    seed: int
    index: int
    expected: int | None
    got: int | None
    uniform: float | None
    share: float | None
    margin: float | None
    numeric_difference: float | None
    within: bool


@dataclass(frozen=True, slots=True)
class Agreement:
    """The same seeds on the baseline and on this backend.

    Attributes:
        baseline: the backend whose texts are compared with.
        texts, equal_texts: how many seeds, and with how many of them every token is the same.
        tokens, equal_tokens: the baseline's tokens, and how many of them come before the first that differs.
        disagreements: one per text that differs.
    """

    baseline: str
    texts: int
    equal_texts: int
    tokens: int
    equal_tokens: int
    disagreements: tuple[Disagreement, ...]


@dataclass(frozen=True, slots=True)
class Departure:
    """A sub-block's output that differs from the reference's by more than is allowed.

    Attributes:
        where: "embedding", "layer 1 attention map", "layer 1 attention", "layer 1 MLP" or "logits"; layers
            count from 0, as in the checkpoint's names.
        position: of the token at which it differs most.
        difference: the greatest, infinite where a number is not finite.
        allowed: the tolerance, times the reference's greatest number at that position where that is above 1.
    """

    where: str
    position: int
    difference: float
    allowed: float


@dataclass(frozen=True, slots=True)
class Layers:
    """What the trace of a backend shows.

    Attributes:
        traced: False for a backend without the capability `Traces`.
        first: the first sub-block that leaves the reference, in the order of computation; None if none does.
    """

    traced: bool
    first: Departure | None = None


@dataclass(frozen=True, slots=True)
class BackendReport:
    """One backend.

    Attributes:
        backend: its name, or the `module:attribute` of its factory.
        status: "skipped" where it is not installed, or does not run the model's precision.
        reasons: why it failed or was skipped.
        overall: all comparisons in one; None where it failed before there were any.
        comparisons: one per way of running it.
        agreement: None for the baseline itself, and where no text was drawn.
        layers: None where they were not asked for.
        load_s: from the start of its imports to the loaded model, wall-clock.
        elapsed_s: of all passes and texts.
        peak_memory_nbytes: of its process, resident; None where the system does not tell.
    """

    backend: str
    status: Status
    reasons: tuple[str, ...] = ()
    overall: Comparison | None = None
    comparisons: tuple[Comparison, ...] = ()
    agreement: Agreement | None = None
    layers: Layers | None = None
    load_s: float | None = None
    elapsed_s: float | None = None
    peak_memory_nbytes: int | None = None


@dataclass(frozen=True, slots=True)
class Report:
    """All backends on one checkpoint.

    Attributes:
        model: what was asked for.
        precision: of the weights; the reference is computed from what rounded ones stand for.
        tolerance: largest allowed difference of a logit; None where `relative_tolerance` holds.
        relative_tolerance: largest allowed `relative_difference`, in "int8" and "int4", whose products may
            round their inputs too.
        baseline: the backend whose texts the others are compared with; None where none drew any.
        seeds, tokens, temperature: how many texts, of how many tokens, drawn how.
        prompt_ids: what the texts begin with.
        reference_s: how long the float64 reference took.
        backends: one report each, in the order in which they ran.
    """

    model: str
    precision: str
    tolerance: float | None
    relative_tolerance: float | None
    baseline: str | None
    seeds: int
    tokens: int
    temperature: float
    prompt_ids: tuple[int, ...]
    reference_s: float
    backends: tuple[BackendReport, ...]

    @property
    def passed(self) -> bool:
        """Whether no backend failed."""
        return all(one.status != "failed" for one in self.backends)

    def to_dict(self) -> dict[str, Any]:
        """The same for strict JSON: what is not finite is None."""
        document: dict[str, Any] = _strict(dataclasses.asdict(self))
        return document | {"passed": self.passed}


def _strict(value: Any) -> Any:
    match value:
        case float():
            return value if math.isfinite(value) else None
        case dict():
            return {key: _strict(inner) for key, inner in value.items()}
        case list() | tuple():
            return [_strict(inner) for inner in value]
    return value
