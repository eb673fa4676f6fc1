"""Prompts that begin alike are read once: slots that remember what they hold.

A slot that becomes free keeps its text until the slot is needed, the least recently used one first. A prompt
goes on from the longest beginning that any slot holds: in that very slot where nothing else of it is lost,
else in a copy. While another request is still reading a beginning that the two have in common, the later one
waits for it, so that many prompts of one beginning, or the choices of one prompt, read it once.

What a slot holds is a function of its tokens alone where a backend's bits do not depend on how a text was cut
into passes (the capability `PortableBits`). There a text that goes on from a copy has the bits of one that
was read from its beginning. Elsewhere it has the numbers of another chunking: they differ by rounding.
"""

import heapq
from collections import OrderedDict, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple, Protocol

from gpt2core.engine.prefix_tree import TOKEN_NBYTES, PrefixTree, pack
from gpt2core.engine.request import Request

LEAST_GAIN: Final = 16
"""Tokens that waiting for another request must save: with fewer, the step that is waited costs more."""


class Slots(Protocol):
    """Who gives out the slots of the cache. Not thread-safe: the engine calls it under its lock."""

    @property
    def free(self) -> int:
        """How many slots there are to give."""
        ...

    def take(self, request: Request) -> None:
        """Give a request a slot; its `slot` and `cached` say which, and how many tokens it need not read."""
        ...

    def release(self, request: Request) -> None:
        """Take back the slot of a request that ended."""
        ...

    def forget(self, request: Request) -> None:
        """What a request's slot holds is about to be overwritten from its beginning."""
        ...

    def settle(self, prefilling: Iterable[Request]) -> None:
        """Let those go on that have waited for another request, where that is done."""
        ...

    def waits(self, request: Request) -> bool:
        """Whether a request must not read now, since another reads the same for it."""
        ...

    def repair(self, running: Sequence[Request]) -> None:
        """After an interrupt in the midst of a change: only what these requests hold is certain."""
        ...


class PlainSlots:
    """`Slots` that forget, the lowest free one first: keeps cache[:B] a view."""

    def __init__(self, slots: int) -> None:
        self._slots = slots
        self._free = list(range(slots))  # a heap

    @property
    def free(self) -> int:
        """See `Slots.free`."""
        return len(self._free)

    def take(self, request: Request) -> None:
        """See `Slots.take`."""
        request.slot = heapq.heappop(self._free)

    def release(self, request: Request) -> None:
        """See `Slots.release`."""
        assert request.slot is not None
        heapq.heappush(self._free, request.slot)
        request.slot = None

    def forget(self, request: Request) -> None:
        """See `Slots.forget`."""

    def settle(self, prefilling: Iterable[Request]) -> None:
        """See `Slots.settle`."""

    def waits(self, request: Request) -> bool:
        """See `Slots.waits`."""
        return False

    def repair(self, running: Sequence[Request]) -> None:
        """See `Slots.repair`."""
        held = {request.slot for request in running}
        self._free = [slot for slot in range(self._slots) if slot not in held]


@dataclass(frozen=True, eq=False, slots=True)
class Copy:
    """Positions that the backend is to copy before its next pass, in the order in which they were planned."""

    source: int
    target: int
    start: int
    end: int


class _Found(NamedTuple):
    """What slots hold of a prompt: `tokens` are there in each of `slots`, more will be in `leader`'s."""

    tokens: int
    slots: Sequence[int]
    coming: int
    leader: Request | None


_NOTHING: Final = _Found(0, (), 0, None)


class PrefixCache:
    """`Slots` that remember.

    Args:
        slots: of the cache.
        copies: whether the backend can copy from slot to slot; else a prompt can only go on in the very slot
            that holds its beginning.

    Attributes:
        copies: what the backend is to do before its next pass.
        hits: requests that did not read all of their prompt.
        saved_tokens: and how many tokens they did not read.
    """

    def __init__(self, slots: int, *, copies: bool) -> None:
        self._slots = slots
        self._can_copy = copies
        self.hits = 0
        self.saved_tokens = 0
        self._clear(())

    def _clear(self, running: Sequence[Request]) -> None:
        self.copies: deque[Copy] = deque()
        self._tree = PrefixTree()
        self._running: dict[int, Request] = {r.slot: r for r in running if r.slot is not None}
        self._empty = [slot for slot in range(self._slots) if slot not in self._running]  # a heap
        self._kept: OrderedDict[int, int] = (
            OrderedDict()
        )  # free slots with a text -> its tokens, oldest first
        self._reading: dict[int, Request] = {}  # whose prompt, all of it, stands in the tree already
        self._order: dict[Request, int] = {}  # in which they got their slots
        self._admitted = 0
        self._leaders: dict[Request, tuple[Request, int]] = {}  # whom who waits for, and for how many tokens

    @property
    def free(self) -> int:
        """See `Slots.free`."""
        return len(self._empty) + len(self._kept)

    @property
    def kept(self) -> int:
        """How many free slots hold a text."""
        return len(self._kept)

    def take(self, request: Request) -> None:
        """See `Slots.take`."""
        tokens = pack(_ids_to_read(request))
        found = self._look_up(request, tokens)
        slot = self._choose(found)
        is_there = slot in found.slots
        for used in found.slots:
            if used in self._kept:
                self._kept.move_to_end(used)
                break
        self._kept.pop(slot, None)
        self._running[slot] = request
        if request.cache_key is not None:
            self._tree.insert(slot, tokens, request.cache_key)
            self._reading[slot] = request
        else:
            self._tree.remove(slot)
        self._admitted += 1
        self._order[request] = self._admitted
        request.slot = slot
        if is_there:
            request.cached = found.tokens
        self._go_on(request, found)

    def _choose(self, found: _Found) -> int:
        """The slot to take: where nothing is lost that is not in the prompt too, else the least useful."""
        kept = [slot for slot in found.slots if slot in self._kept]
        for slot in kept:
            if self._kept[slot] == found.tokens or not self._can_copy:
                return slot
        if self._empty:
            return heapq.heappop(self._empty)
        return next(iter(self._kept))

    def _go_on(self, request: Request, found: _Found) -> None:
        """Wait for another request, or copy what there is, or begin to read."""
        if found.leader is not None and found.coming >= max(found.tokens, request.cached) + LEAST_GAIN:
            self._leaders[request] = found.leader, found.coming
            return
        if found.tokens > request.cached and self._can_copy:
            assert request.slot is not None
            self.copies.append(Copy(found.slots[0], request.slot, request.cached, found.tokens))
            request.cached = found.tokens  # after that: `repair` finds by the copy who must not believe it
        if request.cached > 0:
            request.reused = request.cached
            self.hits += 1
            self.saved_tokens += request.cached

    def _look_up(self, request: Request, tokens: bytes) -> _Found:
        """What other slots hold of a prompt."""
        if request.cache_key is None:
            return _NOTHING
        places = self._tree.find(tokens[: TOKEN_NBYTES * request.reusable_tokens], request.cache_key)
        if not places:
            return _NOTHING
        self._reading = {slot: r for slot, r in self._reading.items() if r.cached < r.to_read}
        best, slots, coming = 0, list[int](), 0
        leader: Request | None = None
        for depth, holders in reversed(places):
            if depth <= best:
                break
            whole = [slot for slot in holders if slot not in self._reading and slot != request.slot]
            if whole:
                best, slots = depth, whole
            for slot, reader in self._reading.items():
                if slot not in holders or reader is request:
                    continue
                if min(depth, reader.cached) > best:
                    best, slots = min(depth, reader.cached), [slot]
                if depth > coming and self._can_copy and self._may_follow(request, reader):
                    coming, leader = depth, reader
        return _Found(best, slots, coming, leader)

    def _may_follow(self, request: Request, leader: Request) -> bool:
        """Whether a request may wait for another: it was there before, so that nobody waits in a circle."""
        last = self._admitted + 1
        return self._order.get(leader, last) < self._order.get(request, last)

    def settle(self, prefilling: Iterable[Request]) -> None:
        """See `Slots.settle`."""
        if not self._leaders:
            return
        for request in prefilling:
            leader, tokens = self._leaders.get(request, (None, 0))
            if leader is None or (leader.slot is not None and leader.cached < tokens):
                continue
            del self._leaders[request]
            self._go_on(request, self._look_up(request, pack(_ids_to_read(request))))

    def forget(self, request: Request) -> None:
        """See `Slots.forget`."""
        assert request.slot is not None
        self._tree.remove(request.slot)
        self._reading.pop(request.slot, None)
        for follower, (leader, _) in self._leaders.items():
            if leader is request:
                self._leaders[follower] = leader, 0  # it has nothing to wait for any more

    def waits(self, request: Request) -> bool:
        """See `Slots.waits`."""
        return request in self._leaders

    def release(self, request: Request) -> None:
        """See `Slots.release`."""
        slot = request.slot
        assert slot is not None
        for of_slot in (self._running, self._reading):
            of_slot.pop(slot, None)
        self._leaders.pop(request, None)
        self._order.pop(request, None)
        if request.error is None and request.cache_key is not None and request.cached > 0:
            held = request.cached_ids  # a stop string may have cut what speculation read
            self._tree.insert(slot, pack(held), request.cache_key)
            self._kept[slot] = len(held)
        else:
            self._tree.remove(slot)
            heapq.heappush(self._empty, slot)
        request.slot = None

    def find(self, token_ids: Sequence[int], key: str) -> int | None:
        """A slot that holds all of these tokens, if there is one."""
        found = self._tree.find(pack(token_ids), key)
        if not found or found[-1][0] < len(token_ids):
            return None
        unsure = {copy.target for copy in self.copies}
        for slot in found[-1][1] - unsure:
            reader = self._running.get(slot)
            if reader is None or reader.cached >= len(token_ids):
                return slot
        return None

    def begin_keeping(self) -> int | None:
        """A free slot to be written, which holds nothing from now on; None where there is none now."""
        if not self.free or self.copies:
            return None
        slot = heapq.heappop(self._empty) if self._empty else self._kept.popitem(last=False)[0]
        self._tree.remove(slot)
        heapq.heappush(self._empty, slot)
        return slot

    def keep(self, slot: int, token_ids: Sequence[int], key: str) -> None:
        """What `begin_keeping` gave was written: the slot holds these tokens."""
        self._empty.remove(slot)
        heapq.heapify(self._empty)
        self._tree.insert(slot, pack(token_ids), key)
        self._kept[slot] = len(token_ids)

    def note_copied(self, copy: Copy) -> None:
        """The first of `copies` was made."""
        if self.copies and self.copies[0] is copy:  # else an interrupt elsewhere has cleared them
            self.copies.popleft()

    def drop_copies(self) -> list[Request]:
        """A copy failed: whoever was to go on from it, or from what comes after it, must end."""
        failed = []
        for copy in self.copies:
            slot = copy.target
            self._tree.remove(slot)
            if slot in self._running:
                failed.append(self._running[slot])
            elif self._kept.pop(slot, None) is not None:
                heapq.heappush(self._empty, slot)
        self.copies.clear()
        return list(dict.fromkeys(failed))

    def repair(self, running: Sequence[Request]) -> None:
        """See `Slots.repair`."""
        targets = {copy.target for copy in self.copies}
        for request in running:
            if request.slot in targets:  # it has read nothing yet
                request.cached = 0
        self._clear(running)


def _ids_to_read(request: Request) -> list[int]:
    return request.token_ids[request.first : request.first + request.to_read]
