"""Was the machine quiet while it was measured?"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from gpt2core.bench.records import Records

BUSY_SHARE: Final = 0.1
"""Of the cores: what other processes may take before it is said."""
STOLEN_SHARE: Final = 0.02
DRIFT: Final = 1.1


@dataclass(frozen=True, slots=True)
class MachineState:
    """What else the machine did while it was measured; None where that is not known."""

    others_cores: float | None  # cores that other processes kept busy, on average
    steal_share: float | None  # of the processors' time, what the hypervisor gave to others
    drift: float | None  # the slowest repetition of the same measurements over the fastest one


def weigh_other_work(values: Sequence[float | None], weights: Sequence[float] | None = None) -> float | None:
    """The mean of those that are known; ticks that are counted a moment late may give less than nothing."""
    pairs = zip(values, weights or [1.0] * len(values), strict=True)
    known = [(value, weight) for value, weight in pairs if value is not None]
    if not sum(weight for _, weight in known):
        return None
    return max(0.0, float(np.average([v for v, _ in known], weights=[weight for _, weight in known])))


def describe_machine(state: MachineState, records: Records) -> list[str]:
    """What a reader must know of it: one sentence for each disturbance, or one that there was none."""
    machine = records.environment.get("machine")
    cores = machine.get("cores") if isinstance(machine, dict) else None
    lines = []
    if state.others_cores is not None and state.others_cores > BUSY_SHARE * (cores or 1):
        lines.append(f"other processes kept {state.others_cores:.1f} of {cores or '?'} cores busy")
    if state.steal_share is not None and state.steal_share > STOLEN_SHARE:
        lines.append(f"the hypervisor gave {state.steal_share:.0%} of the processors' time to others (steal)")
    if state.drift is not None and state.drift > DRIFT:
        lines.append(f"the same measurement took {state.drift:.2f} times as long in the slowest repetition")
    if lines:
        return [f"The machine was busy: {'; '.join(lines)}. Measure again on a quiet one."]
    if state.others_cores is None:
        return []
    return ["The machine was quiet: no other work, steal or drift worth mentioning was seen."]
