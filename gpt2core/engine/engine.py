"""The only generation loop: submit, step, cancel.

Each step is one forward pass over all rows that run (continuous batching): the scheduler says who, the
backend returns logits, `sampling` draws each row's token, the request decides whether it goes on. Text,
randomness and stopping do not depend on what else is in the batch.
"""

# n logits rows of one request, M of the whole batch, V vocabulary

import math
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Final, TypeVar

import numpy as np

from gpt2core._shapes import Float32
from gpt2core.backends.base import Backend, Cache, CopiesCache, Embeds, PortableBits, ScoresTokens
from gpt2core.batch import Batch
from gpt2core.constraints.compiler import Constraints
from gpt2core.engine.beams import BeamKeeper, check_beams, join_beams
from gpt2core.engine.draft import make_speculation
from gpt2core.engine.errands import Errands
from gpt2core.engine.guarded import GuardedScheduler
from gpt2core.engine.limits import count_slots
from gpt2core.engine.pacing import Pacer
from gpt2core.engine.prefix_cache import PrefixCache
from gpt2core.engine.prefix_moves import PrefixMoves
from gpt2core.engine.request import LOGITS_CHUNK, LogitsReader, PromptLogprobs, Request, ScoreReader, Update
from gpt2core.engine.rows import (
    Result,
    Row,
    RowFailed,
    build_batch,
    build_query,
    count_accepted,
    draw_row,
    fail_row,
)
from gpt2core.engine.scheduler import Scheduler, Step
from gpt2core.engine.speculation import SpeculationMode
from gpt2core.engine.steering import LogitsProcessor, StoppingFunction, check_functions, make_steering
from gpt2core.errors import BackendError, NumericalError, RequestError, in_short
from gpt2core.prompts import encode_prompt
from gpt2core.sampling.beam_search import Candidates
from gpt2core.sampling.overflow import Fit
from gpt2core.sampling.params import SamplingParams
from gpt2core.token_ids import Tensor, TokenIds, check_token_ids
from gpt2core.token_scores import TokenScores
from gpt2core.tokenizer.stream import TextStream
from gpt2core.tokenizer.tokenizer import Tokenizer

T = TypeVar("T")
_READ_ONLY: Final = SamplingParams(max_new_tokens=0)
CACHE_NBYTES: Final = 4 * 2**30
"""Default limit on the KV cache of one engine, bytes."""


class Engine:
    """Runs many requests on one backend, batched.

    `submit`, `cancel` and `close` may be called from any thread, also during a step; steps run one at a time,
    and a second caller of `step` waits for the first.

    Args:
        backend: what computes; the engine does not close it.
        tokenizer: turns tokens into text; without one there is no text, and stop strings and echo are
            refused.
        max_slots: most requests that run at once; more of them wait in order of arrival.
        cache_nbytes: limit on the KV cache, bytes, counted in float32; lowers the number of slots where it
            must.
        step_tokens: about how many tokens one step takes; what decoding rows leave of it is shared by
            prompts.
        speculation: "prompt_lookup" reads what followed the last tokens before, several tokens in one pass;
            the tokens stay the same (`gpt2core.engine.speculation`).
        draft: a smaller model of the same vocabulary, whose tokens are read so; the engine does not close it.
        prefix_cache: whether a prompt goes on from what another has left in the cache, as far as both begin
            alike (`gpt2core.engine.prefix_cache`). None: where that gives the same bits, which is on backends
            with the capabilities `PortableBits` and `CopiesCache`. Without `CopiesCache` a prompt only goes
            on in the very slot that holds its beginning.

    Raises:
        RequestError: a limit is not a whole number of 1 or more, not even one request fits `cache_nbytes`,
            or `speculation` and `draft` are unknown, contradict each other or do not fit the model.
    """

    def __init__(
        self,
        backend: Backend,
        tokenizer: Tokenizer | None = None,
        *,
        max_slots: int = 32,
        cache_nbytes: int = CACHE_NBYTES,
        step_tokens: int = 512,
        speculation: SpeculationMode = "off",
        draft: Backend | None = None,
        prefix_cache: bool | None = None,
    ) -> None:
        if prefix_cache not in (True, False, None):
            raise RequestError(f"prefix_cache is {in_short(prefix_cache)}; it must be True, False or None")
        self.config = backend.config
        self.backend = backend
        self.tokenizer = tokenizer
        limits = {"max_slots": max_slots, "cache_nbytes": cache_nbytes, "step_tokens": step_tokens}
        self.slots = count_slots(self.config, draft, **limits)
        self.steps = 0
        copies = isinstance(backend, CopiesCache)
        if prefix_cache is None:
            prefix_cache = copies and isinstance(backend, PortableBits)
        self.prefixes = PrefixCache(self.slots, copies=copies) if prefix_cache else None
        self._scheduler = Scheduler(slots=self.slots, step_tokens=step_tokens, given_by=self.prefixes)
        self._guarded = GuardedScheduler(self._scheduler)
        self._beams = BeamKeeper(backend, self._scheduler)
        self._speculation = make_speculation(speculation, draft, backend, self.slots, step_tokens)
        self._scorer = backend if isinstance(backend, ScoresTokens) else None
        self._cache: Cache | None = None
        self._closed = False
        self._constraints = Constraints(tokenizer, self.config)
        self._stepping = threading.Lock()  # one step at a time; held while the backend computes
        self._errands = Errands(self._stepping, lambda: self._closed)
        self._moves = PrefixMoves(backend, self.prefixes, self._guarded)

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._closed

    @property
    def waiting(self) -> int:
        """How many requests wait for a slot."""
        return len(self._scheduler.waiting)

    @property
    def running(self) -> int:
        """How many requests hold a slot."""
        return self._scheduler.running

    @property
    def proposed_tokens(self) -> int:
        """How many tokens speculation has proposed so far."""
        return self._speculation.proposed if self._speculation else 0

    @property
    def accepted_tokens(self) -> int:
        """How many of the proposed tokens were drawn, so that no pass of their own was needed."""
        return self._speculation.accepted if self._speculation else 0

    def encode(
        self, prompt: str | TokenIds, params: SamplingParams, *, allow_special: bool = False
    ) -> list[int]:
        """The token ids of a prompt that can run: a text, or token ids.

        Args:
            prompt: a text needs a tokenizer.
            params: what it is to run with.
            allow_special: whether special tokens that a text spells out become those tokens.

        Raises:
            ContextLengthError: prompt and new tokens exceed the context; a text with too many bytes for it is
                refused without tokenizing, which may be slow.
            RequestError: what `check` raises; or a text is given without a tokenizer, or refused by it.
        """
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise RequestError("prompt is a text; make the engine with a tokenizer, or give token ids")
            context = self.config.n_positions if params.overflow == "error" else None
            prompt = encode_prompt(prompt, self.tokenizer, context, allow_special=allow_special)
        return self.check(prompt, params)[0]

    def check(self, prompt_ids: Iterable[int] | Tensor, params: SamplingParams) -> tuple[list[int], Fit]:
        """Refuse what cannot run; return all token ids as a new list, and how they fit the context.

        Raises:
            RequestError: the prompt is empty or holds what is not a token id; stop strings or echo are asked
                for without a tokenizer; there are too many beams.
            ContextLengthError: prompt and new tokens exceed the context.
            InvalidSamplingError: an id is outside the vocabulary, or a constraint cannot be compiled.
            BackendUnavailableError: the package that constraints need is missing.
        """
        ids = check_token_ids(prompt_ids, self.config.vocab_size)
        params.check_vocabulary(self.config.vocab_size)
        self._constraints.check(params)
        if self.tokenizer is None and (params.stop or params.echo):
            raise RequestError("stop strings and echo need text; make the engine with a tokenizer")
        fit = params.fit(len(ids), self.config.n_positions)
        check_beams(params, fit.max_new_tokens, self.slots, self.config, self._end_token_ids(params))
        return ids, fit

    def submit(
        self,
        prompt_ids: Iterable[int] | Tensor,
        params: SamplingParams,
        *,
        prompt: int = 0,
        stream: bool = False,
        logits_from: int = 0,
        on_logits: LogitsReader | None = None,
        on_scores: ScoreReader | None = None,
        cache_key: str | None = "",
        logits_processors: Sequence[LogitsProcessor] = (),
        stopping: Sequence[StoppingFunction] = (),
    ) -> list[Request]:
        """Queue a prompt; return one request per choice (`params.n`), in order of choice.

        Args:
            prompt_ids: at least one token id; where prompt and new tokens exceed the context,
                `params.overflow` says what happens.
            params: how to sample; `seed=None` draws a seed, which the requests name.
            prompt: number of the prompt in the caller's list, for the pieces.
            stream: whether to collect `Piece`s in `request.pieces`, for the caller to take.
            logits_from: first prompt position whose logits are read.
            on_logits: is called in a step with a position and the logits from there on, (n, V) float32, chunk
                by chunk in order, until the prompt's last. It must not call the engine.
            on_scores: what is asked of these logits instead; on a backend with the capability `ScoresTokens`
                they are never kept. For prompts after which nothing is generated.
            cache_key: with a prefix cache, requests reuse what those of the same key have read: how long an
                answer takes tells whether somebody has asked alike, so give each tenant a key of its own.
                None: this one neither reuses what others have read nor keeps what it reads.
            logits_processors, stopping: functions as of `GPT2.generate`. They must not call the engine.

        Raises:
            RequestError: what `check` raises; a function is none; the engine is closed; logits are read of a
                prompt that may be cut (`params.overflow`); or beams are to be streamed or get functions.
            BackendError: the cache cannot be made.
        """
        ids, fit = self.check(prompt_ids, params)
        functions = check_functions(logits_processors, stopping)
        slides = params.overflow == "slide"
        if not slides:
            ids = ids[fit.skipped :]
        steer = partial(make_steering, len(ids), params, functions, self.tokenizer)
        scored = on_logits is None and params.echo and params.logprobs is not None
        reads = on_logits is not None or on_scores is not None
        if reads and params.overflow != "error":
            raise RequestError(
                f"overflow is {params.overflow!r}; logits are read at the positions of a prompt; leave it out"
            )
        seed = int.from_bytes(os.urandom(8)) >> 1 if params.seed is None else params.seed
        end_token_ids = self._end_token_ids(params)
        now_s = time.perf_counter()
        requests = [
            Request(
                token_ids=ids.copy(),
                prompt_tokens=len(ids),
                prompt=prompt,
                choice=choice,
                params=params,
                seed=seed,
                max_new_tokens=fit.max_new_tokens,
                end_token_ids=end_token_ids,
                stream=TextStream(self.tokenizer.stream_decoder(), params.stop) if self.tokenizer else None,
                echo=self.tokenizer.decode(ids) if self.tokenizer and params.echo else "",
                logits_from=0 if scored else logits_from if reads else None,
                on_logits=PromptLogprobs(ids, params.logprobs or 0) if scored else on_logits,
                on_scores=on_scores,
                logits_chunk=None if on_scores is not None and self._scorer is not None else LOGITS_CHUNK,
                cache_key=cache_key,
                steering=steer(self._constraints.start(params, end_token_ids)),
                pieces=deque() if stream else None,
                truncated_tokens=fit.skipped,
                context=self.config.n_positions if slides else None,
                first=fit.skipped if slides else 0,
                submitted_s=now_s,
            )
            for choice in range(max(params.n, params.num_beams))
        ]
        self._guarded.change(self._add, join_beams(requests, self.tokenizer))
        return requests[: params.n]

    def _end_token_ids(self, params: SamplingParams) -> frozenset[int]:
        return frozenset((*params.stop_token_ids, *(() if params.ignore_eos else self.config.eos_token_ids)))

    def cancel(self, request: Request) -> None:
        """End a request wherever it stands, with `finish_reason` "cancelled", and free its slot.

        It has ended when this returns, and no later step reports it; what ended before stays as it is. Never
        waits for a step, and may be called by a finaliser.
        """
        self._guarded.cancel(request)

    def step(self) -> list[Update]:
        """Run one forward pass and return what it did, in the order of the batch; [] if nothing is to do.

        A backend that raises ends the requests of this step with `BackendError`, and logits that are not
        finite end only their own request with `NumericalError`; the others go on. An interrupt
        (`KeyboardInterrupt`) during the pass propagates and changes nothing: the next step repeats it.
        """
        with self._stepping:
            self._errands.run_next()
            begun_s = time.perf_counter()
            updates = self._beams.copy(self._cache, self._guarded.change, self.steps)
            failed, planned = self._next_batch()
            updates += failed
            if planned is None:
                return updates
            rows, batch = planned
            updates += self._guarded.change(self._commit, rows, self._draw(rows, batch))
            self._scheduler.note_time(time.perf_counter() - begun_s)
            return updates

    def pace_prompts(self, stretch: float) -> None:
        """From now on read prompts in parts so small that texts which are written meanwhile do not stutter.

        The parts are chosen by measured time, and their sizes may change the last bits of a prompt's numbers
        on a backend whose products depend on the number of rows, so this is off by default.

        Args:
            stretch: how many times as long as a step without prompts one with prompts may take.

        Raises:
            RequestError: `stretch` is not a number above 1.
        """
        self._scheduler.pacer = Pacer(stretch)

    def hidden_states(self, token_ids: Iterable[int] | Tensor) -> Float32[np.ndarray, "T D"]:
        """What the logits of one sequence are made from, (T, D): computed between two steps.

        Raises:
            RequestError: no tokens, more than the context, or what is not a token id; the backend lacks the
                capability `Embeds`, or the engine is closed.
            BackendError: the backend failed; `NumericalError` if what it returned is not finite.
        """
        backend = self.backend
        if not isinstance(backend, Embeds):
            raise RequestError(
                f"backend {backend.name!r} gives no hidden states; take one with the capability Embeds, as "
                "'numpy' or 'torch'"
            )
        ids, _ = self.check(token_ids, _READ_ONLY)
        hidden = self.between_steps(lambda: backend.hidden_states(ids))
        if not np.isfinite(hidden).all():
            raise NumericalError(
                f"backend {backend.name!r} returned hidden states that are not finite; check the checkpoint "
                "with `gpt2core verify`, or take another backend"
            )
        return hidden

    def between_steps(self, work: Callable[[], T]) -> T:
        """Call what needs the backend, or the cache, for itself, and return what it returns.

        Raises:
            RequestError: the engine is closed; or whatever `work` raises.
        """
        return self._errands.run(work)

    def read_prefix(self, token_ids: Sequence[int], cache_key: str = "") -> np.ndarray | None:
        """What the cache holds of these tokens, from the first on, (L, 2, H, T, K); None where it does not.

        None too without a prefix cache, or on a backend without the capability `MovesCache`.
        """
        return self.between_steps(lambda: self._moves.read(self._cache, token_ids, cache_key))

    def write_prefix(self, token_ids: Sequence[int], positions: np.ndarray, cache_key: str = "") -> bool:
        """Let prompts of `cache_key` that begin with these tokens go on from what `read_prefix` returned.

        Returns:
            Whether it is kept; not where every slot is in use, or `read_prefix` would return None for all.

        Raises:
            RequestError: the positions are not of this model, or the engine is closed.
            BackendError: the cache cannot be made.
        """
        self._guarded.change(self._make_cache)
        return self.between_steps(lambda: self._moves.write(self._cache, token_ids, positions, cache_key))

    def close(self) -> None:
        """Cancel whatever waits or runs, once a step under way has ended, and let go of the cache."""
        with self._stepping:
            self._guarded.change(self._end_all)

    def _add(self, requests: list[Request]) -> None:
        self._make_cache()
        for request in requests:
            self._scheduler.add(request)

    def _make_cache(self) -> None:
        if self._closed:
            raise RequestError("this model is closed; load it again")
        if self._cache is None:
            try:
                self._cache = self.backend.new_cache(self.slots, self.config.n_positions)
            except Exception as error:  # of whatever type the framework has for too little memory
                nbytes = self.config.cache_nbytes(self.slots, self.config.n_positions)
                raise BackendError(
                    f"backend {self.backend.name!r} cannot make a cache of {self.slots} slots (some {nbytes} "
                    f"bytes): {error!r}; lower max_batch or cache_nbytes"
                ) from error

    def _end_all(self) -> None:
        self._guarded.cancel_all()
        self._closed = True
        self._cache = None
        if self.prefixes is not None:
            self.prefixes.drop_copies()
        if self._speculation is not None:
            self._speculation.close()

    def _next_batch(self) -> tuple[list[Update], tuple[list[Row], Batch] | None]:
        """Who ended before the pass, and the pass."""
        step = self._guarded.change(self._scheduler.plan)
        failed = self._copy_prefixes()
        proposals: dict[Request, list[int]] = {}
        if self._speculation is not None:  # without the lock: a draft model takes its time
            proposals = self._speculation.propose(step.without_ended() if failed else step)
        return failed, self._guarded.change(lambda: self._build_batch(step.without_ended(), proposals))

    def _copy_prefixes(self) -> list[Update]:
        """Copy what prompts go on from; without the lock, since it takes as long as memory does."""
        try:
            self._moves.copy_all(self._cache)
        except Exception as error:  # of whatever type a backend raises
            return self._guarded.change(self._fail_copies, error)
        return []

    def _fail_copies(self, error: Exception) -> list[Update]:
        assert self.prefixes is not None
        now_s = time.perf_counter()
        updates = []
        for request in self.prefixes.drop_copies():
            updates.append(request.fail(fail_row(error, self.backend.name, self.steps).error, now_s))
            self._scheduler.remove(request)
        return updates

    def _build_batch(self, step: Step, proposals: dict[Request, list[int]]) -> tuple[list[Row], Batch] | None:
        if not step.prefill and not step.decode:
            return None
        self.steps += 1
        return build_batch(step, proposals)

    def _draw(self, rows: list[Row], batch: Batch) -> list[Result]:
        """What the pass gives each row."""
        try:
            logits, scores = self._forward(rows, batch)
        except Exception as error:  # of whatever type a backend raises
            return [fail_row(error, self.backend.name, self.steps) for _ in rows]
        with np.errstate(invalid="ignore", over="ignore"):
            finite = math.isfinite(logits.sum())  # else a look at each row decides: a sum may overflow
        return [draw_row(row, logits, scores, finite, self.backend, self.steps) for row in rows]

    def _forward(
        self, rows: list[Row], batch: Batch
    ) -> tuple[Float32[np.ndarray, "N V"], TokenScores | None]:
        assert self._cache is not None
        query = None if self._scorer is None else build_query(rows)
        wanted = len(batch.logits_at), self.config.vocab_size
        if self._scorer is None or query is None:
            logits, scores = self.backend.forward(batch, self._cache), None
        else:
            logits, scores = self._scorer.score(batch, self._cache, query)
            wanted = wanted[0] - len(query.targets), wanted[1]
        if logits.shape != wanted:
            raise BackendError(f"it returned logits of shape {logits.shape} instead of {wanted}")
        return logits, scores

    def _commit(self, rows: list[Row], drawn: list[Result]) -> list[Update]:
        now_s = time.perf_counter()
        try:
            return self._record(rows, drawn, now_s)
        except BaseException as error:
            # Which of these requests took its token is not known any more, so none may go on.
            for request in (member for row in rows for member in row.request.together):
                if not request.finished:
                    request.fail(BackendError(f"interrupted in step {self.steps}: {error!r}"), now_s)
            raise  # to `change`, which repairs the scheduler

    def _record(self, rows: list[Row], drawn: list[Result], now_s: float) -> list[Update]:
        updates: list[Update] = []
        for row, result in zip(rows, drawn, strict=True):
            request = row.request
            if request.finished:  # cancelled while the backend computed: its slot is free already
                continue
            if request.beams is not None:
                updates += self._beams.record(row, result, now_s)
                continue
            assert not isinstance(result, Candidates)
            if isinstance(result, RowFailed):
                updates.append(request.fail(result.error, now_s))
            else:
                prefilling = request.cached < request.to_read
                request.cached += row.tokens if prefilling else len(result)  # what was refused is forgotten
                if prefilling and request.cached == request.to_read:
                    if not request.generated and (update := request.take_prompt(now_s)) is not None:
                        updates.append(update)
                    if not request.finished:
                        self._scheduler.begin_decoding(request)
                if row.proposed and self._speculation is not None:
                    self._speculation.settle(request, len(row.proposed), count_accepted(row, result))
                for token in result:
                    if not request.finished:
                        updates.append(request.take_token(*token, now_s))
            if request.finished:
                self._scheduler.remove(request)
            elif request.is_full:
                request.slide()
                self._scheduler.read_anew(request)
        return updates
