"""A draft model: a small model of the same vocabulary that proposes how a text goes on."""

# V vocabulary

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final
from weakref import WeakKeyDictionary

import numpy as np

from gpt2core.backends.base import Backend, Cache, EstimatesCost
from gpt2core.batch import Batch
from gpt2core.config import ModelConfig
from gpt2core.engine.request import Request
from gpt2core.engine.speculation import (
    PromptLookup,
    Speculation,
    SpeculationMode,
    check_mode,
    guess_extra_tokens_cost,
)
from gpt2core.errors import Gpt2CoreError, RequestError
from gpt2core.sampling.draw import sample_token

_MOST_COST: Final = 0.5  # so that a draft as large as the model is used too: somebody asked for it


def check_draft(config: ModelConfig, draft: ModelConfig) -> None:
    """Refuse a draft model whose tokens are not the model's.

    Raises:
        RequestError: the vocabularies differ in size.
    """
    if draft.vocab_size != config.vocab_size:
        raise RequestError(
            f"the draft model has a vocabulary of {draft.vocab_size} tokens and the model one of "
            f"{config.vocab_size}; take a draft model with the same tokenizer"
        )


def draft_nbytes(draft: Backend | None, config: ModelConfig) -> int:
    """What one request takes in the cache of a draft model beside a model, bytes, counted in float32."""
    if draft is None:
        return 0
    return draft.config.cache_nbytes(1, min(config.n_positions, draft.config.n_positions))


def make_speculation(
    mode: SpeculationMode, draft: Backend | None, backend: Backend, slots: int, step_tokens: int
) -> Speculation | None:
    """What the options of an engine on `backend` ask for.

    Raises:
        RequestError: they are unknown, contradict each other or do not fit the model.
    """
    check_mode(mode, with_draft=draft is not None)
    estimate = backend.extra_tokens_cost if isinstance(backend, EstimatesCost) else guess_extra_tokens_cost
    if draft is not None:
        return Speculation(DraftModel(draft, backend.config, slots, step_tokens), estimate, step_tokens)
    return None if mode == "off" else Speculation(PromptLookup(), estimate, step_tokens)


@dataclass(slots=True)
class _Read:
    """What the draft model's cache holds of one request."""

    tokens: int  # of the request itself
    proposal: list[int]  # and of its own proposal after them


class DraftModel:
    """Proposes what a smaller model draws with the random numbers that the model itself will use.

    It keeps a cache of its own, with the engine's slots. A request that was not proposed to for a while is
    read on in one pass; a long one in chunks, one a step, and nothing is proposed until it is done.

    Args:
        backend: the draft model; whoever made it closes it.
        config: the model's.
        slots: the engine's.
        chunk_tokens: most tokens that one step reads to catch up.

    Raises:
        RequestError: its vocabulary is not the model's.
    """

    def __init__(self, backend: Backend, config: ModelConfig, slots: int, chunk_tokens: int) -> None:
        check_draft(config, backend.config)
        self._backend = backend
        self._slots = slots
        self._capacity = min(config.n_positions, backend.config.n_positions)
        self._chunk_tokens = chunk_tokens
        self._cache: Cache | None = None
        self._read: WeakKeyDictionary[Request, _Read] = WeakKeyDictionary()
        # Both models decode at the speed at which their weights come from memory.
        self.token_cost = min(backend.config.parameters / config.parameters, _MOST_COST)

    def propose(self, wants: Sequence[tuple[Request, int]]) -> list[list[int]]:
        """See `gpt2core.engine.speculation.Source.propose`."""
        if self._cache is None:
            self._cache = self._backend.new_cache(self._slots, self._capacity)
        rows, budget = [], self._chunk_tokens
        proposals: list[list[int]] = []
        for request, count in wants:
            slot, known = request.slot, len(request.token_ids)  # its slot is None once it was cancelled
            start = self._start(request)
            count = min(count, self._capacity - known + 1)
            proposals.append([])
            if slot is not None and count > 0 and budget > 0:
                end = min(known, start + budget)
                budget -= end - start
                rows.append(_Row(request, slot, start, request.token_ids[start:end], count, proposals[-1]))
        while rows:
            batch = Batch.of([(row.tokens, row.start, row.slot) for row in rows])
            logits = self._backend.forward(batch, self._cache)  # (rows, V)
            rows = [row for row, own in zip(rows, logits, strict=True) if self._goes_on(row, own)]
        return proposals

    def _start(self, request: Request) -> int:
        """How many of the request's tokens are in the cache, but never its last: its logits are wanted."""
        read = self._read.setdefault(request, _Read(0, []))
        later = request.token_ids[read.tokens :]
        agreed = next(
            (i for i, (a, b) in enumerate(zip(later, read.proposal, strict=False)) if a != b),
            min(len(later), len(read.proposal)),
        )
        return min(read.tokens + agreed, len(request.token_ids) - 1)

    def _goes_on(self, row: "_Row", logits: np.ndarray) -> bool:
        """Note what was read, draw the next token, and say whether another one is wanted."""
        request, known = row.request, len(row.request.token_ids)
        end = row.start + len(row.tokens)
        self._read[request] = _Read(min(end, known), row.proposal[: max(0, end - known)])
        if end < known:  # still catching up
            return False
        try:
            token_id = sample_token(
                logits,
                request.params,
                token_ids=[*request.token_ids, *row.proposal],
                prompt_tokens=request.prompt_tokens,
                eos_token_ids=request.end_token_ids,
                seed=request.seed,
                choice=request.choice,
                steer=None if request.steering is None else request.steering.edit,
            )
        except Gpt2CoreError:  # the draft has nothing to say here; the model itself draws from its own logits
            return False
        row.proposal.append(token_id)
        row.start, row.tokens = end, [token_id]
        return len(row.proposal) < row.count and token_id not in request.end_token_ids


@dataclass(slots=True)
class _Row:
    """One request's part of the draft model's passes."""

    request: Request
    slot: int
    start: int
    tokens: list[int]
    count: int
    proposal: list[int]
