"""Who runs in the next step, with how many tokens, and in which cache slot.

Continuous batching with chunked prefill, after Orca (Yu et al. 2022, section 3: iteration-level scheduling)
and Sarathi-Serve (Agrawal et al. 2024, section 4: decode first, prefill in chunks out of what is left).

What it guarantees, whatever arrives:

- Every request that decodes gets its token in every step: a long prompt does not stall the others.
- Every request that holds a slot and still has prompt left advances by at least one token in every step, and
  by an equal share of the budget or all that it needs: a short prompt does not wait for a long one beside it.
  With a `PrefixCache` it may wait instead while another request reads the tokens that both begin with.
- Waiting requests get slots in the order in which they came; each slot comes free, since every request ends
  after so many tokens. So nobody starves.
- A step takes at most `step_tokens` tokens, or two per slot where that is more; with a `Pacer`, beside rows
  that decode, at most as many prompt tokens as it says, or one per prompt where that is more.
"""

import time
from bisect import insort
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from gpt2core.engine.pacing import Pacer
from gpt2core.engine.prefix_cache import PlainSlots, Slots
from gpt2core.engine.request import Request


@dataclass(frozen=True, slots=True)
class Step:
    """The rows of one forward pass; a request stands in at most one of the two lists."""

    prefill: list[tuple[Request, int]]  # with the number of prompt tokens to take, in order of arrival
    decode: list[Request]  # one token each, by slot

    def without_ended(self) -> "Step":
        """The same without those that were cancelled since it was planned."""
        return Step(
            [(request, count) for request, count in self.prefill if not request.finished],
            [request for request in self.decode if not request.finished],
        )


class Scheduler:
    """Queues, slots and the token budget. Not thread-safe: the engine calls it under its lock.

    Args:
        slots: of the cache.
        step_tokens: most tokens of a step.
        given_by: who gives out the slots; None: the lowest free one, each time anew.
    """

    def __init__(self, *, slots: int, step_tokens: int, given_by: Slots | None = None) -> None:
        self._slots = slots
        self._given_by = PlainSlots(slots) if given_by is None else given_by
        self._step_tokens = step_tokens
        self.pacer: Pacer | None = None
        self._planned = (0, 0)  # rows that decode in the last step, and prompt tokens
        self.waiting: deque[Request] = deque()
        self.prefilling: list[Request] = []  # in order of arrival
        self.decoding: list[Request] = []  # by slot: lets a backend see that its rows are cache[:B]
        self.parked: list[Request] = []  # hold a slot and wait for others

    @property
    def running(self) -> int:
        """How many requests hold a slot."""
        return len(self.prefilling) + len(self.decoding) + len(self.parked)

    def add(self, request: Request) -> None:
        """Queue a request behind those that wait."""
        self.waiting.append(request)

    def plan(self) -> Step:
        """Give free slots to those that wait, and share out the next step's tokens; a list may be empty."""
        self._given_by.settle(self.prefilling)  # first: those who come may need the slots to copy from
        while self.waiting and self._given_by.free >= _slots_for(self.waiting[0]):
            request = self.waiting[0]
            for follower in request.followers:
                if follower.slot is None:  # before an interrupted admission
                    self.parked.append(follower)
                    self._given_by.take(follower)
            self.prefilling.append(request)
            request.started_s = time.perf_counter()
            self._given_by.take(request)
            self.waiting.popleft()  # last: `repair` can tell how far an interrupted admission came
        self._planned = len(self.decoding), 0
        reading = [request for request in self.prefilling if not self._given_by.waits(request)]
        if not reading:
            return Step([], self.decoding.copy())
        # The floor of one token per slot is what keeps decoding rows from starving prefill.
        budget = max(self._step_tokens - len(self.decoding), self._slots)
        limit = None if self.pacer is None else self.pacer.limit(len(self.decoding))
        if limit is not None:
            budget = max(min(budget, limit), len(reading))
        shares = fair_shares(budget, [request.prefill_tokens for request in reading])
        self._planned = len(self.decoding), sum(shares)
        return Step(list(zip(reading, shares, strict=True)), self.decoding.copy())

    def note_time(self, elapsed_s: float) -> None:
        """Learn how long the step took that was planned last."""
        if self.pacer is not None:
            self.pacer.observe(*self._planned, elapsed_s)

    def begin_decoding(self, request: Request) -> None:
        """The prompt is in the cache: from the next step on the request takes one token a step."""
        self.prefilling.remove(request)
        insort(self.decoding, request, key=_slot)

    def read_anew(self, request: Request) -> None:
        """The model shall see something else than its slot holds: it reads that before it goes on."""
        self.decoding.remove(request)
        self.prefilling.append(request)
        self._given_by.forget(request)

    def park(self, request: Request) -> None:
        """It keeps its slot, and takes part in no step until `resume`."""
        (self.prefilling if request in self.prefilling else self.decoding).remove(request)
        self.parked.append(request)

    def resume(self, request: Request) -> None:
        """Let a parked request go on: read what is left to be read, or decode."""
        self.parked.remove(request)
        if request.cached < request.to_read:
            self.prefilling.append(request)
        else:
            insort(self.decoding, request, key=_slot)

    def remove(self, request: Request) -> None:
        """Forget a request that ended, wherever it stands, and free its slot for the next `plan`."""
        if request.slot is None:
            if request is request.together[0]:
                self.waiting.remove(request)
            return
        queues = (self.prefilling, self.parked, self.decoding)
        next(queue for queue in queues if request in queue).remove(request)
        self._given_by.release(request)

    def repair(self) -> None:
        """After an interrupt in the midst of a change: drop what has ended, find which slots are free."""
        self.waiting = deque(s for s in self.waiting if s.slot is None and not s.finished)
        for queue in (self.prefilling, self.decoding, self.parked):
            queue[:] = [s for s in queue if s.slot is not None and not s.finished]
        self._given_by.repair((*self.prefilling, *self.decoding, *self.parked))


def _slots_for(request: Request) -> int:
    return 1 + sum(follower.slot is None for follower in request.followers)


def fair_shares(budget: int, wants: Sequence[int]) -> list[int]:
    """Divide `budget` as equally as the wants allow (max-min fairness, by water-filling).

    Nobody gets more than it wants; what the modest leave goes to the others in equal parts, odd units to the
    smaller want and then to the earlier. With a budget of at least `len(wants)` everybody gets at least 1.
    """
    shares = [0] * len(wants)
    left = len(wants)
    for i in sorted(range(left), key=wants.__getitem__):
        shares[i] = min(wants[i], -(-budget // left))
        budget -= shares[i]
        left -= 1
    return shares


def _slot(request: Request) -> int:
    assert request.slot is not None
    return request.slot
