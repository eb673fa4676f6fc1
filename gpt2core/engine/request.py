"""One choice of one request: its tokens, its text, where it stands in the cache and how it ended."""

# n logits rows, V vocabulary

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final, Literal, NamedTuple, Protocol

import numpy as np

from gpt2core._shapes import Float32
from gpt2core.engine.steering import Steering
from gpt2core.errors import Gpt2CoreError
from gpt2core.sampling.beam_search import Candidates
from gpt2core.sampling.draw import SamplingParams, TokenLogprob, token_logprobs
from gpt2core.sampling.overflow import window_start
from gpt2core.token_scores import TokenScores
from gpt2core.tokenizer.stream import TextStream

FinishReason = Literal["stop", "length", "cancelled"]
LogitsReader = Callable[[int, Float32[np.ndarray, "n V"]], None]
"""Is called with the position of the first row and the logits there and at the positions after it."""

LOGITS_CHUNK: Final = 128
"""Prompt positions per step whose logits one request may ask for: 26 MB of float32 at GPT-2's vocabulary."""


@dataclass(frozen=True, slots=True)
class Piece:
    """What one token added to a stream; the texts of a stream join to exactly `Generation.text`."""

    text: str  # may be empty: a split character or the possible start of a stop string is held back
    token_id: int | None  # None for the echoed prompt, and when no token was asked for
    logprobs: tuple[TokenLogprob, ...]  # () unless asked for; all of the prompt's for the echoed prompt
    finish_reason: FinishReason | None  # on the last piece
    prompt: int  # which prompt of the call, from 0
    choice: int  # which of the `n` choices, from 0
    truncated_tokens: int = 0  # how many of the prompt's first tokens were not read; the same on all pieces


class Update(NamedTuple):
    """What one step did to one request; the last one has a `finish_reason` or an `error`.

    One per token drawn; the echoed prompt is one before the first, with `token_id` None.
    """

    request: "Request"
    token_id: int | None
    text: str
    logprobs: tuple[TokenLogprob, ...]
    finish_reason: FinishReason | None
    error: Gpt2CoreError | None


@dataclass(frozen=True, slots=True)
class ScoreReader:
    """What is asked of a prompt whose positions are scored, and who reads the answers.

    Attributes:
        targets: for each position of the prompt the token whose probability is wanted there.
        top: how many of the likeliest tokens are wanted.
        members: 1 for the tokens of a set whose probability is wanted too, else 0; one array for all requests
            of an engine, or they cannot be answered together.
        read: is called in a step with a position and the scores from there on, chunk by chunk in order; after
            an interrupt a chunk may come again. It must not call the engine.
    """

    targets: Sequence[int]
    top: int
    members: Float32[np.ndarray, "V"] | None
    read: Callable[[int, TokenScores], None]


class PromptLogprobs:
    """A `LogitsReader` that keeps the log probability of each token that follows a position read."""

    def __init__(self, token_ids: Sequence[int], top: int) -> None:
        self._token_ids = token_ids
        self._top = top
        self._first: int | None = None  # the first position read
        self.entries: list[TokenLogprob] = []

    def __call__(self, position: int, logits: Float32[np.ndarray, "n V"]) -> None:
        """Score the tokens after `position` and after the positions that follow it."""
        if self._first is None:
            self._first = position
        del self.entries[position - self._first :]  # a pass that was interrupted is repeated
        for row, token_id in zip(logits, self._token_ids[position + 1 :], strict=False):
            self.entries.append(token_logprobs(row, token_id, self._top))


class Group(Protocol):
    """The beams of one search (`gpt2core.engine.beams`), as a beam sees them."""

    members: list["Request"]

    def find_candidates(self, request: "Request", logits: Float32[np.ndarray, "V"]) -> Candidates:
        """How one of them may go on."""
        ...


@dataclass(eq=False, repr=False, slots=True, weakref_slot=True, kw_only=True)
class Request:
    """One choice of one request. The engine writes, others read; `_s`: of `time.perf_counter()`."""

    token_ids: list[int]  # the prompt, then what was generated
    prompt_tokens: int
    prompt: int  # which prompt of its call, from 0
    choice: int
    params: SamplingParams
    seed: int
    max_new_tokens: int
    end_token_ids: frozenset[int]  # each ends the text: the end-of-text tokens, and `stop_token_ids`
    stream: TextStream | None  # None without a tokenizer: then there is no text
    echo: str  # the prompt's text, when the parameters ask for it
    logits_from: int | None = None  # first prompt position whose logits are read
    on_logits: LogitsReader | None = None
    on_scores: ScoreReader | None = None  # instead: reads what they say of given tokens
    logits_chunk: int | None = LOGITS_CHUNK  # most positions per step whose logits are read; None: any number
    cache_key: str | None = ""  # what it reads is reused by requests of the same key; None: by nobody
    steering: Steering | None = None  # None: nothing but the parameters
    pieces: deque[Piece] | None = None  # not yet taken by the one who streams; None when nobody does
    bell: Callable[[], None] | None = (
        None  # is called, in the step, when it has a piece, and when it has ended
    )
    truncated_tokens: int = 0  # of the prompt, which are not read
    context: int | None = None  # where the text slides on when it is full; None: it fits
    first: int = 0  # the first of its tokens that the model sees
    beams: Group | None = None  # the search that it is a beam of

    slot: int | None = None  # in the cache; None while waiting
    cached: int = 0  # tokens in the cache, of those from `first` on
    to_read: int = field(init=False)  # with so many a token is drawn: the prompt's, or what is read anew
    reused: int = 0  # tokens of the prompt that it did not have to read
    proposed: int = 0  # tokens that speculation proposed
    accepted: int = 0  # and how many of them were drawn
    texts: list[str] = field(default_factory=list)  # one per update
    logprobs: list[TokenLogprob] = field(default_factory=list)
    score: float | None = None  # of a beam
    finish_reason: FinishReason | None = None
    error: Gpt2CoreError | None = None
    submitted_s: float = 0.0
    started_s: float | None = None  # when it got its slot
    first_token_s: float | None = None
    last_token_s: float | None = None
    finished_s: float | None = None

    def __post_init__(self) -> None:
        self.to_read = self.prompt_tokens - self.first

    @property
    def finished(self) -> bool:
        """Whether it has ended, well or not."""
        return self.finished_s is not None

    @property
    def generated(self) -> list[int]:
        """The tokens after the prompt, an end-of-text token included."""
        return self.token_ids[self.prompt_tokens :]

    @property
    def text(self) -> str:
        """The text so far, as far as it is certain; with `echo` it begins with the prompt's."""
        return "".join(self.texts)

    @property
    def prefill_tokens(self) -> int:
        """How many tokens the next step may read: all that are left, or fewer if logits are wanted."""
        left = self.to_read - self.cached
        if self.logits_from is None or self.logits_chunk is None:
            return left
        return min(left, max(0, self.logits_from - self.cached) + self.logits_chunk)

    @property
    def read_prompt_tokens(self) -> int:
        """How many tokens of the prompt the model has seen, or will."""
        return self.prompt_tokens - (0 if self.context is None else self.truncated_tokens)

    @property
    def together(self) -> list["Request"]:
        """Those that end when it ends: the beams of its search, or it alone."""
        return [self] if self.beams is None else self.beams.members

    @property
    def followers(self) -> list["Request"]:
        """Those that get their slots together with it, and do not wait by themselves."""
        return [] if self.beams is None else self.beams.members[1:]

    @property
    def cached_ids(self) -> list[int]:
        """The tokens that its slot holds."""
        return self.token_ids[self.first : self.first + self.cached]

    @property
    def tokens_after_next(self) -> int:
        """How many tokens the text may have after the next one, before it ends or slides on."""
        if self.beams is not None:
            return 0
        left = self.prompt_tokens + self.max_new_tokens - len(self.token_ids) - 1
        return left if self.context is None else min(left, self.context - self.cached - 1)

    @property
    def is_full(self) -> bool:
        """Whether the context has no room for its next token."""
        return self.cached == self.context

    def slide(self) -> None:
        """Let the model see the newest half of the context only, which is to be read anew."""
        assert self.context is not None
        self.first = window_start(len(self.token_ids), self.context)
        self.cached, self.to_read = 0, len(self.token_ids) - self.first
        self.logits_from = None  # whoever read the prompt's has them

    @property
    def reusable_tokens(self) -> int:
        """How many tokens of the prompt need not be read if a slot holds them.

        At least one is left to be read, whose logits give the first token, and all whose logits are wanted.
        """
        if self.cache_key is None:
            return 0
        most = self.to_read - 1
        return most if self.logits_from is None else min(most, self.logits_from)

    def take_prompt(self, now_s: float) -> Update | None:
        """The prompt is in the cache: emit the echo, and end here when no new token is wanted."""
        logprobs: tuple[TokenLogprob, ...] = ()
        if self.params.echo and isinstance(self.on_logits, PromptLogprobs):
            logprobs = (TokenLogprob(self.token_ids[0], None, ()), *self.on_logits.entries)
        if self.max_new_tokens > 0:
            return self._record(None, self.echo, logprobs, None, now_s) if self.params.echo else None
        return self._record(None, self.echo, logprobs, "length", now_s)

    def take_token(
        self, token_id: int, logprobs: tuple[TokenLogprob, ...], ends: bool, now_s: float
    ) -> Update:
        """Append a drawn token; end at a token that ends it, a stop string or the last token allowed.

        With `ends` the text ends with this token, which is part of it.
        """
        self.token_ids.append(token_id)
        self.last_token_s = now_s
        if self.first_token_s is None:
            self.first_token_s = now_s
        text = ""
        reason: FinishReason | None = None
        if token_id in self.end_token_ids:
            reason = "stop"
        elif self.stream is not None:
            text = self.stream.push(token_id)
            if self.stream.stopped:
                reason = "stop"
        if reason is None and ends:
            reason = "stop"
        if reason is None and len(self.token_ids) - self.prompt_tokens >= self.max_new_tokens:
            reason = "length"
        if reason is not None and self.stream is not None and not self.stream.stopped:
            text += self.stream.flush()
            if self.stream.stopped:  # the end of a split character completed a stop string
                reason = "stop"
        return self._record(token_id, text, logprobs, reason, now_s)

    def take_text(
        self,
        token_ids: Sequence[int],
        reason: FinishReason,
        score: float,
        logprobs: tuple[TokenLogprob, ...],
        now_s: float,
    ) -> Update:
        """Be one of the texts that a beam search has found."""
        self.token_ids += token_ids
        self.score = score
        self.last_token_s = now_s
        texts: list[str] = []
        if self.stream is not None:
            for token_id in token_ids:
                if token_id in self.end_token_ids or self.stream.stopped:
                    break
                texts.append(self.stream.push(token_id))
            texts.append(self.stream.flush())
        return self._record(None, "".join(texts), logprobs, reason, now_s)

    def cancel(self, now_s: float) -> None:
        """End where it stands; text that was held back is given out."""
        text = "" if self.stream is None else self.stream.flush()
        self._record(None, text, (), "cancelled", now_s)

    def fail(self, error: Gpt2CoreError, now_s: float) -> Update:
        """End with an error."""
        self.error = error
        self.finished_s = now_s
        self._ring()
        return Update(self, None, "", (), None, error)

    def _record(
        self,
        token_id: int | None,
        text: str,
        logprobs: tuple[TokenLogprob, ...],
        reason: FinishReason | None,
        now_s: float,
    ) -> Update:
        self.texts.append(text)
        if logprobs:
            self.logprobs.extend(logprobs)
        if self.pieces is not None:
            self.pieces.append(
                Piece(text, token_id, logprobs, reason, self.prompt, self.choice, self.truncated_tokens)
            )
        if reason is not None:
            self.finish_reason = reason
            self.finished_s = now_s  # last: who reads without a lock sees all of the rest then
        if reason is not None or self.pieces is not None:
            self._ring()
        return Update(self, token_id, text, logprobs, reason, None)

    def _ring(self) -> None:
        if self.bell is not None:
            self.bell()
