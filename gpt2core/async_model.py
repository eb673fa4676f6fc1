"""AsyncGPT2: a model for an event loop. One thread computes for all requests; coroutines wait."""

import asyncio
import threading
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterable, Sequence
from contextlib import AbstractContextManager, closing
from typing import Any, Final, Literal, Self, Unpack, overload

from gpt2core.engine.request import Piece, Request
from gpt2core.engine.steering import LogitsProcessor, StoppingFunction
from gpt2core.engine.step_loop import all_done, has_news, take_pieces
from gpt2core.errors import BackendError, RequestError
from gpt2core.generation import Generation
from gpt2core.model import GPT2
from gpt2core.prompts import OneChoiceOptions, Params, Prompt, Prompts, SamplingOptions, split_prompts
from gpt2core.scoring.options import ScoreChoices
from gpt2core.scoring.run import Job
from gpt2core.scoring.score import Score

__all__ = ["AsyncGPT2"]

_JOIN_S: Final = 0.002


class AsyncGPT2:
    """`generate`, `stream` and `score` of a model as coroutines of one event loop.

    However many requests are in flight, there is one thread: it runs the engine's steps, together with the
    threads that call the model's own methods meanwhile. A task that is cancelled cancels its requests and
    frees their slots. A text is the one that `GPT2` gives. Prompts are tokenized where the coroutine runs.

    Args:
        model: stays open when this is closed. Several `AsyncGPT2`, each for a loop of its own, may share it.

    Raises:
        RequestError: by every method, if this is closed or belongs to another event loop that still runs.
    """

    def __init__(self, model: GPT2) -> None:
        self.model = model
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._work = threading.Event()  # something may be to do for the thread
        self._closed = False
        self._failure: BaseException | None = None
        self._bells: set[_Bell] = set()
        self._rung: deque[_Bell] = deque()
        self._waking = False  # whether the loop has been told to look at `_rung`

    @overload
    async def generate(
        self,
        prompt: Prompt,
        params: None = None,
        *,
        allow_special: bool = ...,
        logits_processors: Sequence[LogitsProcessor] = ...,
        stopping: Sequence[StoppingFunction] = ...,
        n: Literal[1] = 1,
        **sampling: Unpack[OneChoiceOptions],
    ) -> Generation: ...
    @overload
    async def generate(
        self,
        prompt: list[str] | list[list[int]],
        params: Params = None,
        *,
        allow_special: bool = ...,
        logits_processors: Sequence[LogitsProcessor] = ...,
        stopping: Sequence[StoppingFunction] = ...,
        **sampling: Unpack[SamplingOptions],
    ) -> list[Generation]: ...
    @overload
    async def generate(
        self,
        prompt: Prompts,
        params: Params = None,
        *,
        allow_special: bool = ...,
        logits_processors: Sequence[LogitsProcessor] = ...,
        stopping: Sequence[StoppingFunction] = ...,
        **sampling: Unpack[SamplingOptions],
    ) -> Generation | list[Generation]: ...
    async def generate(
        self,
        prompt: Prompts,
        params: Params = None,
        *,
        allow_special: bool = False,
        logits_processors: Sequence[LogitsProcessor] = (),
        stopping: Sequence[StoppingFunction] = (),
        **sampling: Any,
    ) -> Generation | list[Generation]:
        """Continue one prompt or several: arguments, result and errors of `GPT2.generate`.

        Closing this, or the model, meanwhile ends it with the `finish_reason` "cancelled".
        """
        self._enter()
        functions: dict[str, Any] = {"logits_processors": logits_processors, "stopping": stopping}
        work = self.model._generating(prompt, params, allow_special=allow_special, **functions, **sampling)
        try:
            while True:
                requests = next(work)
                with _Bell(self, requests) as bell:
                    # The lambda takes its list as a default, whose type mypy does not infer.
                    await bell.wait_until(lambda requests=requests: all_done(requests))  # type: ignore[misc]
        except StopIteration as end:
            result: Generation | list[Generation] = end.value
            return result
        finally:
            work.close()

    def stream(
        self,
        prompt: Prompts,
        params: Params = None,
        *,
        allow_special: bool = False,
        logits_processors: Sequence[LogitsProcessor] = (),
        stopping: Sequence[StoppingFunction] = (),
        **sampling: Unpack[SamplingOptions],
    ) -> AsyncGenerator[Piece, None]:
        """Continue a prompt piece by piece, `async for piece in ...`: as `GPT2.stream`.

        What is wrong with the request is raised here; the first piece that is asked for starts the work, and
        leaving the loop ends it. (A `break` leaves that to the event loop's next turn; `contextlib.aclosing`
        does not.)
        """
        functions: dict[str, Any] = {"logits_processors": logits_processors, "stopping": stopping}
        options: dict[str, Any] = {**functions, **sampling}
        return self._pieces(self.model._streaming(prompt, params, allow_special=allow_special, **options))

    async def _pieces(self, submitted: AbstractContextManager[list[Request]]) -> AsyncGenerator[Piece, None]:
        self._enter()
        with submitted as requests, _Bell(self, requests) as bell:
            left = list(requests)
            while left:
                await bell.wait_until(lambda: has_news(left))
                for piece in take_pieces(left):
                    yield piece

    @overload
    async def score(self, text: Prompt, **choices: Unpack[ScoreChoices]) -> Score: ...
    @overload
    async def score(
        self, text: list[str] | list[list[int]], **choices: Unpack[ScoreChoices]
    ) -> list[Score]: ...
    async def score(self, text: Prompts, **choices: Unpack[ScoreChoices]) -> Score | list[Score]:
        """How well the model predicts one text or several: arguments, result and errors of `GPT2.score`."""
        self._enter()
        scorer = self.model._scorer(choices)
        texts, single = split_prompts(text)
        numbered = enumerate(texts)
        scores: list[Score] = []
        while group := scorer.read_group(numbered):
            with closing(scorer.passes([job for job in group if isinstance(job, Job)])) as passes:
                for now in passes:
                    with _Bell(self, now) as bell:
                        # The lambda takes its list as a default, whose type mypy does not infer.
                        await bell.wait_until(lambda now=now: any(request.finished for request in now))  # type: ignore[misc]
                    self._check_open()
            for job in group:
                score = scorer.finish(job) if isinstance(job, Job) else job
                if isinstance(score, RequestError):
                    number = len(scores)
                    raise score if single else type(score)(f"text {number} of the list: {score}")
                scores.append(score)
        return scores[0] if single else scores

    async def close(self) -> None:
        """End what runs as "cancelled" and stop the thread; twice is harmless. The model stays open."""
        self._closed = True
        for bell in list(self._bells):
            for request in bell.requests:
                self.model.engine.cancel(request)
        self._work.set()
        while self._thread is not None and self._thread.is_alive():  # a step cannot be interrupted
            await asyncio.sleep(_JOIN_S)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.close()

    def _enter(self) -> None:
        """Make sure that this loop is the one that is served, and that the thread runs."""
        loop = asyncio.get_running_loop()
        self._check_open()
        if self._loop is not loop:
            if self._loop is not None and not self._loop.is_closed():
                raise RequestError(
                    "this AsyncGPT2 belongs to another event loop; make one for each loop: AsyncGPT2(model)"
                )
            self._loop, self._waking = loop, False
            self._rung.clear()
        self.check_failure()
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="gpt2core-async", daemon=True)
            self._thread.start()

    def _check_open(self) -> None:
        if self._closed:
            raise RequestError("this AsyncGPT2 is closed; make another one: AsyncGPT2(model)")

    def check_failure(self) -> None:
        """Raise what has ended the thread.

        Raises:
            BackendError: naming it.
        """
        if self._failure is not None:
            raise BackendError(
                f"the engine's thread has ended: {self._failure!r}; make another AsyncGPT2"
            ) from self._failure

    # For the bells

    def hang(self, bell: "_Bell") -> None:
        """From now on it may ring; and there may be something to do."""
        self._bells.add(bell)
        self._work.set()

    def take_down(self, bell: "_Bell") -> None:
        """It rings no more."""
        self._bells.discard(bell)

    def ring(self, bell: "_Bell") -> None:
        """On any thread, in a step: tell the loop to look, once for all that happens until it does."""
        self._rung.append(bell)
        if not self._waking:
            self._waking = True
            self._call(self._wake)

    def _wake(self) -> None:
        self._waking = False  # first: who rings from here on calls again
        while self._rung:
            self._rung.popleft().news.set()

    def _call(self, function: Callable[[], None]) -> None:
        assert self._loop is not None
        try:
            self._loop.call_soon_threadsafe(function)
        except RuntimeError:  # the event loop is closed: nobody waits
            self._rung.clear()

    # On the thread

    def _run(self) -> None:
        try:
            while not self._closed:
                self._work.wait()
                self._work.clear()
                self.model._run_until(self._is_idle)
        except BaseException as error:  # whatever it is, nobody may wait for this thread any longer
            self._failure = error
            self._call(self._fail)

    def _is_idle(self) -> bool:
        engine = self.model.engine
        return self._closed or not (engine.running or engine.waiting)

    def _fail(self) -> None:
        for bell in list(self._bells):
            bell.news.set()


class _Bell:
    """Tells a coroutine that something happened to one of its requests."""

    def __init__(self, owner: AsyncGPT2, requests: Iterable[Request]) -> None:
        self.requests = list(requests)
        self.news = asyncio.Event()
        self._owner = owner

    def __enter__(self) -> Self:
        for request in self.requests:
            request.bell = self._ring
        self._owner.hang(self)
        return self

    def __exit__(self, *error: object) -> None:
        self._owner.take_down(self)

    async def wait_until(self, ready: Callable[[], bool]) -> None:
        """Return once `ready()`, which is asked whenever something has happened.

        Raises:
            BackendError: the thread that computes has ended.
        """
        while not ready():
            self._owner.check_failure()
            self.news.clear()
            await self.news.wait()

    def _ring(self) -> None:
        self._owner.ring(self)
