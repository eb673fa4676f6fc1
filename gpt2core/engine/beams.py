"""Beam search in the engine: the beams of a prompt are requests that run, wait and end together.

Each holds a slot, and all get them at once. The first reads the prompt. A beam that is ready waits for the
others; then the likeliest continuations are chosen (`gpt2core.sampling.beam_search`), and a text that goes on
in several ways is copied to the slots of those that do not go on: by the backend, where it can copy, else by
reading what differs. While it runs, a beam's `token_ids` are those of its text so far; at the end the first
`n` beams become the best texts.
"""

# V vocabulary

import time
from collections import deque
from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

import numpy as np

from gpt2core._shapes import Float32
from gpt2core.backends.base import Backend, Cache, CopiesCache
from gpt2core.config import ModelConfig
from gpt2core.engine.request import Request, Update
from gpt2core.engine.rows import Row, RowFailed, fail_row
from gpt2core.engine.scheduler import Scheduler
from gpt2core.errors import Gpt2CoreError, RequestError
from gpt2core.sampling.beam_search import BeamSearch, Candidates, candidates_per_beam, find_candidates
from gpt2core.sampling.params import SamplingParams
from gpt2core.tokenizer.tokenizer import Tokenizer

_BYTES_PER_CHARACTER = 4


class Beams:
    """The requests of one search, and how far it is.

    Args:
        members: as many as there are beams; the first one reads the prompt.
        tokenizer: for stop strings.
    """

    def __init__(self, members: list[Request], tokenizer: Tokenizer | None) -> None:
        first = members[0]
        self.members = members
        self.search = BeamSearch(first.params, first.max_new_tokens, first.end_token_ids, self._stops)
        self.by_rank = [first]  # who holds which of `search.running`
        self.ready: dict[Request, Candidates] = {}
        self._tokenizer = tokenizer
        stops = first.params.stop
        # A stop string that the last token completes lies within so many tokens of a byte or more.
        self._tail = _BYTES_PER_CHARACTER * (max(map(len, stops), default=0) + 1)

    def find_candidates(self, request: Request, logits: Float32[np.ndarray, "V"]) -> Candidates:
        """How one beam may go on."""
        return find_candidates(
            logits,
            request.params,
            token_ids=request.token_ids,
            prompt_tokens=request.prompt_tokens,
            eos_token_ids=request.end_token_ids,
        )

    def _stops(self, token_ids: Sequence[int]) -> bool:
        stops = self.members[0].params.stop
        if not stops or self._tokenizer is None:
            return False
        text = self._tokenizer.decode(token_ids[-self._tail :])
        return any(stop in text for stop in stops)


class Copy(NamedTuple):
    """What is to be copied between two slots before the next step."""

    beams: Beams
    source: int
    target: int
    start: int
    end: int


def check_streams(*params: SamplingParams) -> None:
    """Refuse to stream beams.

    Raises:
        RequestError: there are several.
    """
    for own in params:
        if own.num_beams > 1:
            raise RequestError(
                f"num_beams is {own.num_beams}; beams cannot be streamed, since the best text is known "
                "at the end only: call generate"
            )


def check_beams(
    params: SamplingParams,
    max_new_tokens: int,
    slots: int,
    config: ModelConfig,
    end_token_ids: Collection[int],
) -> None:
    """Refuse a beam search that this engine cannot run.

    Args:
        params: what is asked for.
        max_new_tokens: what it comes to.
        slots: of the engine.
        config: of the model.
        end_token_ids: each ends a text.

    Raises:
        RequestError: it has too many beams for the slots or the vocabulary, or nothing is to be generated.
    """
    beams = params.num_beams
    if beams == 1:
        return
    if beams > slots:
        raise RequestError(
            f"num_beams is {beams}; this engine runs {slots} texts at once; lower it or raise max_batch or "
            "cache_nbytes"
        )
    vocab_size, ends = config.vocab_size, len(end_token_ids)
    most = vocab_size // (candidates_per_beam(params, end_token_ids) // beams)
    if beams > most:
        raise RequestError(
            f"num_beams is {beams}; with a vocabulary of {vocab_size} tokens, {ends} of which end a text, it "
            f"can be at most {most}"
        )
    if max_new_tokens == 0:
        raise RequestError(f"num_beams is {beams} and no token is wanted; pass max_new_tokens=1 or more")


def join_beams(requests: list[Request], tokenizer: Tokenizer | None) -> list[Request]:
    """Let the requests of one prompt run as the beams of one search, if they are; returns those that wait.

    Raises:
        RequestError: beams are to be streamed.
    """
    params = requests[0].params
    if params.num_beams == 1:
        return requests
    if requests[0].pieces is not None:
        check_streams(params)
    beams = Beams(requests, tokenizer)
    for request in requests:
        request.beams = beams
        if request is not requests[0]:
            request.logits_from = None  # the first one reads the prompt
            request.cache_key = None  # and is the one that others may go on from
    return requests[:1]


class BeamKeeper:
    """Runs all searches of an engine: takes what a step gave their requests, and says what to copy.

    Args:
        backend: copies where it has the capability `CopiesCache`.
        scheduler: of the engine; `record` is called within a change of it.
    """

    def __init__(self, backend: Backend, scheduler: Scheduler) -> None:
        self._copier = backend if isinstance(backend, CopiesCache) else None
        self._backend = backend
        self._scheduler = scheduler
        self._copies: deque[Copy] = deque()

    def copy(self, cache: Cache | None, change: Callable[..., Any], step: int) -> list[Update]:
        """Copy what was chosen in the last step; what fails ends its search.

        Args:
            cache: None once the engine is closed.
            change: `GuardedScheduler.change`.
            step: the number of the step, for errors.
        """
        updates: list[Update] = []
        while self._copies:
            copy = self._copies[0]
            if self._copier is not None and cache is not None and not copy.beams.members[0].finished:
                try:
                    self._copier.copy_cache(cache, copy.source, copy.target, copy.start, copy.end)
                except Exception as error:  # of whatever type a backend raises
                    failed = fail_row(error, self._backend.name, step)
                    updates += change(self.fail, copy.beams, failed.error, time.perf_counter())
            self._copies.popleft()  # last: an interrupted one is repeated
        return updates

    def record(self, row: Row, result: object, now_s: float) -> list[Update]:
        """What a step gave one beam; the last one of a search lets all of them go on, or end."""
        request, beams = row.request, row.request.beams
        assert isinstance(beams, Beams)
        if isinstance(result, RowFailed):
            return self.fail(beams, result.error, now_s)
        request.cached += row.tokens
        if not isinstance(result, Candidates):  # in the middle of a prompt
            return []
        self._scheduler.park(request)
        beams.ready[request] = result
        if len(beams.ready) < len(beams.by_rank):
            return []
        candidates = [beams.ready[member] for member in beams.by_rank]
        beams.ready.clear()
        if beams.members[0].first_token_s is None:
            for member in beams.members:
                member.first_token_s = now_s
        try:
            beams.search.advance(candidates)
        except Gpt2CoreError as error:
            return self.fail(beams, error, now_s)
        if beams.search.over:
            return self._end(beams, now_s)
        self._go_on(beams)
        return []

    def fail(self, beams: Beams, error: Gpt2CoreError, now_s: float) -> list[Update]:
        """End a search with an error."""
        updates = []
        for member in beams.members:
            if not member.finished:
                update = member.fail(error, now_s)
                self._scheduler.remove(member)
                if member.choice < member.params.n:
                    updates.append(update)
        return updates

    def _go_on(self, beams: Beams) -> None:
        """Give each text that runs a slot: the first child stays in its parent's, the others move."""
        parents = [beams.by_rank[beam.parent] for beam in beams.search.running]
        free = iter([member for member in beams.members if member not in set(parents)])
        holders: list[Request] = []
        for parent in parents:
            holders.append(next(free) if parent in holders else parent)
        texts = [
            [*parent.token_ids, beam.token_ids[-1]]
            for parent, beam in zip(parents, beams.search.running, strict=True)
        ]
        for member, parent, token_ids in zip(holders, parents, texts, strict=True):
            if member is not parent:
                assert member.slot is not None
                assert parent.slot is not None
                shared, cached = _count_shared(member.cached_ids, token_ids), len(token_ids) - 1
                if self._copier is not None:
                    if shared < cached:
                        self._copies.append(Copy(beams, parent.slot, member.slot, shared, cached))
                    shared = cached
                member.cached, member.to_read = shared, len(token_ids) if shared < cached else shared
        for member, token_ids in zip(holders, texts, strict=True):
            member.token_ids[:] = token_ids
            self._scheduler.resume(member)
        beams.by_rank = holders

    def _end(self, beams: Beams, now_s: float) -> list[Update]:
        first = beams.members[0]
        updates: list[Update] = []
        for member in beams.members:
            self._scheduler.remove(member)  # now, while its tokens are those in its slot
        for member in beams.members[first.params.n :]:
            member.cancel(now_s)
        for member, ended in zip(beams.members, beams.search.ended[: first.params.n], strict=False):
            del member.token_ids[member.prompt_tokens :]
            member.on_logits = first.on_logits  # which has read the prompt
            if (echo := member.take_prompt(now_s)) is not None:
                updates.append(echo)
            updates.append(
                member.take_text(ended.token_ids, ended.reason, ended.score, ended.logprobs, now_s)
            )
        return updates


def _count_shared(held: Sequence[int], wanted: Sequence[int]) -> int:
    """How many of the wanted tokens a slot holds already; the last one is to be read in any case."""
    most = min(len(held), len(wanted) - 1)
    return next((i for i in range(most) if held[i] != wanted[i]), most)
