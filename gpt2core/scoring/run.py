"""Texts to scores: many short ones to a pass, long ones in windows, as rows of the engine."""

# T tokens of a text, P of them predicted, V vocabulary

import itertools
import math
from collections import deque
from collections.abc import (
    AsyncIterable,
    AsyncIterator,
    Callable,
    Collection,
    Generator,
    Iterable,
    Iterator,
    Sequence,
)
from contextlib import closing
from dataclasses import dataclass, field
from typing import Final

import numpy as np

from gpt2core import (
    Engine,
    Request,
    RequestError,
    SamplingParams,
    ScoreReader,
    Tokenizer,
    TokenScores,
)
from gpt2core._shapes import Float32
from gpt2core.scoring.options import ResolvedOptions
from gpt2core.scoring.score import Alternative, Score, mean_perplexity
from gpt2core.scoring.windows import Window, score_windows
from gpt2core.token_ids import TokenIds, check_token_ids

Text = str | TokenIds
Progress = Callable[[int, int, int], None]
"""Is called with a text's number, its tokens scored so far, and its tokens in all."""

PASS_TOKENS: Final = 512
"""Tokens that wait or run at once: whole texts that share one pass."""
GROUP_TOKENS: Final = 8192
GROUP_TEXTS: Final = 1024
"""What is read ahead of the scores that are given out, and sorted by length."""
_READ_ONLY: Final = SamplingParams(max_new_tokens=0)


@dataclass(slots=True, eq=False)
class Job:
    """One text on its way."""

    number: int  # of the caller's
    text: str | None  # None for token ids
    ids: list[int]  # T
    sequence: list[int]  # what the model reads, and the last token, which it need not read
    targets: list[int]  # for each position of the sequence the token that follows
    scores: TokenScores  # (P,), or (P + 1,) with boundaries
    left: int = 0  # windows that are not done
    ends: deque[int] = field(default_factory=deque)  # of the windows in their order, for the progress
    done: set[int] = field(default_factory=set)  # ends of windows that were done early


class Scorer:
    """Scores texts on one engine.

    Args:
        engine: what runs them.
        run_until: returns once what it is given says so, which steps of the engine bring about.
        options: how.
        members: (V,) 1 for the tokens that mark a word's beginning or a text's end; always the same array for
            an engine.
        get_tokenizer: the model's tokenizer, or an error that says why it has none.
    """

    def __init__(
        self,
        engine: Engine,
        run_until: Callable[[Callable[[], bool]], None],
        options: ResolvedOptions,
        members: Float32[np.ndarray, "V"] | None,
        get_tokenizer: Callable[[], Tokenizer],
    ) -> None:
        self._engine, self._run_until, self._options = engine, run_until, options
        self._tokenizer = engine.tokenizer
        self._members = members
        self._get_tokenizer = get_tokenizer

    def score(
        self, texts: Iterable[Text], on_progress: Progress | None = None
    ) -> Iterator[Score | RequestError]:
        """A score for each text, in order, or why it cannot be scored.

        Raises:
            BackendError: the backend failed.
            RequestError: the engine is closed.
        """
        numbered = enumerate(texts)
        while group := self.read_group(numbered):
            with closing(self.passes([job for job in group if isinstance(job, Job)], on_progress)) as passes:
                for now in passes:
                    self._run_until(lambda now=now: any(request.finished for request in now))  # type: ignore[misc]
            for job in group:
                yield self.finish(job) if isinstance(job, Job) else job

    def prepare(self, number: int, given: Text) -> Job:
        """One text, checked and turned into tokens.

        Raises:
            RequestError: there is nothing to score in it, or it is no text.
        """
        options, text = self._options, None
        if isinstance(given, str):
            text = " " + given if options.leading_space and not given.startswith(" ") else given
            given = self._get_tokenizer().encode(text, allow_special=options.allow_special)
        ids = check_token_ids(given, self._engine.config.vocab_size)
        if options.end is not None:
            ids.append(options.end)
        if len(ids) < 2 and options.bos is None:
            raise RequestError(
                "text has 1 token; a score needs at least 2, since the first is not predicted; "
                "or give bos='eos'"
            )
        sequence = ids if options.bos is None else [options.bos, *ids]
        targets = sequence[1:]
        if options.boundaries:
            targets = [*targets, sequence[-1]]  # any: only the set's probability is wanted there
        scores = TokenScores.empty(len(targets), self._query_top(), options.boundaries)
        return Job(number, text, ids, sequence, targets, scores)

    def _query_top(self) -> int:
        return min(self._options.top, self._engine.config.vocab_size)

    def read_group(self, numbered: Iterator[tuple[int, Text]]) -> list[Job | RequestError]:
        """The next texts, as many as are scored together, prepared; [] at the end."""
        group: list[Job | RequestError] = []
        tokens = 0
        for number, given in itertools.islice(numbered, GROUP_TEXTS):
            try:
                job = self.prepare(number, given)
            except RequestError as error:
                group.append(error)
                continue
            group.append(job)
            tokens += len(job.ids)
            if tokens >= GROUP_TOKENS:
                break
        return group

    def _windows(self, jobs: list[Job]) -> Iterator[tuple[Job, Window]]:
        """Of texts that are about equally long one after the other: some backends pad."""
        for job in sorted(jobs, key=lambda job: -len(job.targets)):
            for window in score_windows(len(job.targets) + 1, self._options.context, self._options.stride):
                yield job, window

    def passes(
        self, jobs: list[Job], on_progress: Progress | None = None
    ) -> Generator[Collection[Request], None, None]:
        """Score texts; yields requests of which one must have ended before it goes on.

        Closing it cancels what runs.
        """
        for job in jobs:
            windows = score_windows(len(job.targets) + 1, self._options.context, self._options.stride)
            job.left = sum(1 for _ in windows)
        waiting = self._windows(jobs)
        after = next(waiting, None)
        running: dict[Request, tuple[Job, Window]] = {}
        tokens = 0
        try:
            while after is not None or running:
                while after is not None:
                    job, window = after
                    size = window.end - window.start
                    if running and tokens + size > PASS_TOKENS:
                        break
                    running[self._submit(job, window)] = after
                    tokens += size
                    after = next(waiting, None)
                yield running
                for request in [request for request in running if request.finished]:
                    job, window = running.pop(request)
                    tokens -= window.end - window.start
                    self._take(request, job, window, on_progress)
        finally:
            for request in running:
                self._engine.cancel(request)

    def _submit(self, job: Job, window: Window) -> Request:
        def read(position: int, scores: TokenScores) -> None:
            first = window.start + position
            job.scores.put(slice(first, first + len(scores.logprobs)), scores)

        reader = ScoreReader(
            targets=job.targets[window.start : window.end],
            top=self._query_top(),
            members=self._members if self._options.boundaries else None,
            read=read,
        )
        [request] = self._engine.submit(
            job.sequence[window.start : window.end],
            _READ_ONLY,
            logits_from=window.scored_from - window.start,
            on_scores=reader,
            cache_key=None,  # most texts are scored once, and would take the place of others
        )
        job.ends.append(window.end)
        return request

    def _take(self, request: Request, job: Job, window: Window, on_progress: Progress | None) -> None:
        if request.error is not None:
            raise request.error
        if request.finish_reason == "cancelled":
            raise RequestError("this model is closed; load it again with GPT2.from_pretrained")
        job.left -= 1
        if on_progress is None:
            return
        job.done.add(window.end)
        while job.ends and job.ends[0] in job.done:
            end = job.ends.popleft()
            job.done.remove(end)
            on_progress(job.number, min(end + 1, len(job.sequence)), len(job.sequence))

    def finish(self, job: Job) -> Score:
        """The score of a text whose windows are all done."""
        assert job.left == 0
        options, scores = self._options, job.scores
        predicted = len(job.sequence) - 1
        logprobs = scores.logprobs[:predicted]
        own = len(job.ids) - (options.end is not None)
        text, spans = "", [(0, 0)] * own  # nobody knows without a tokenizer
        if self._tokenizer is not None:
            special = options.allow_special
            text, spans = self._tokenizer.locate(job.ids[:own], job.text, allow_special=special)
        nbytes = len(text.encode())
        spans += [(nbytes, nbytes)] * (len(job.ids) - own)
        nats = -math.fsum(logprobs)
        first = len(job.ids) - predicted
        scored_nbytes = nbytes - spans[first][0]
        return Score(
            token_ids=job.ids,
            logprobs=logprobs,
            perplexity=mean_perplexity(logprobs),
            bits_per_byte=(
                nats / math.log(2) / scored_nbytes if scored_nbytes and job.text is not None else None
            ),
            ranks=scores.ranks[:predicted],
            entropies=scores.entropies[:predicted] if options.entropy else None,
            top=self._alternatives(scores, predicted) if options.top else None,
            boundary_logprobs=scores.member_logprobs,
            text=text,
            byte_offsets=spans,
            marks=self._marks(job.ids) if options.boundaries else None,
        )

    def _marks(self, ids: list[int]) -> list[bool]:
        assert self._members is not None
        return [bool(mark) for mark in self._members[ids]]

    def _alternatives(self, scores: TokenScores, predicted: int) -> list[tuple[Alternative, ...]]:
        text_of = (lambda token_id: "") if self._tokenizer is None else self._tokenizer.token_text
        return [
            tuple(
                Alternative(token_id, text_of(token_id), logprob)
                for token_id, logprob in zip(ids, logprobs, strict=True)
            )
            for ids, logprobs in zip(
                scores.top_ids[:predicted].tolist(), scores.top_logprobs[:predicted].tolist(), strict=True
            )
        ]


def boundary_members(tokenizer: Tokenizer, vocab_size: int, eos: Sequence[int]) -> Float32[np.ndarray, "V"]:
    """(V,) 1 for the tokens that begin with what marks a word (a space), and for the text's end."""
    members = np.zeros(vocab_size, np.float32)
    for token_id in range(min(vocab_size, tokenizer.vocab_size)):
        spelled = tokenizer.content(token_id)
        if spelled is not None and token_id not in tokenizer.special_ids and spelled[:1] in ("Ġ", "\u2581"):
            members[token_id] = 1
    members[list(eos)] = 1
    return members


async def in_groups(texts: Iterable[Text] | AsyncIterable[Text]) -> AsyncIterator[list[Text]]:
    """Lists of texts as large as what `Scorer.score` reads ahead, by a guess of their tokens."""
    group: list[Text] = []
    size = 0
    async for text in texts if isinstance(texts, AsyncIterable) else _asynchronous(texts):
        group.append(text)
        size += len(text) if isinstance(text, str | Sequence) else text.shape[0]
        if len(group) >= GROUP_TEXTS or size >= 4 * GROUP_TOKENS:
            yield group
            group, size = [], 0
    if group:
        yield group


async def _asynchronous(texts: Iterable[Text]) -> AsyncIterator[Text]:
    for text in texts:
        yield text
