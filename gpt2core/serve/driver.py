"""One thread loads the model and drives its engine; the event loop hands it tickets and gets updates back.

Each step wakes the event loop once, with everything that the step did. Whatever ends the thread, every
ticket fails at once and readiness says so.
"""

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Final, Literal

from gpt2core import (
    GPT2,
    BackendError,
    Engine,
    NumericalError,
    Request,
    SamplingParams,
    Update,
    __version__,
)
from gpt2core.serve import logs
from gpt2core.serve.errors import engine_failed, unavailable
from gpt2core.serve.metrics import Metrics
from gpt2core.serve.places import Places
from gpt2core.serve.settings import Settings
from gpt2core.serve.state import Client
from gpt2core.serve.ticket import Ticket

State = Literal["loading", "ready", "draining", "failed", "closed"]
JOIN_S: Final = 5.0
LOOK_S: Final = 0.1
WAIT_S: Final = 0.001
REFUSALS_S: Final = 1.0
"""Between two lines about refused requests."""


class Driver:
    """Runs one model's engine. All methods belong to the event loop, except where they say otherwise."""

    def __init__(self, load: Callable[[], GPT2], settings: Settings, metrics: Metrics) -> None:
        self._load = load
        self._settings = settings
        self._metrics = metrics
        self._tickets: set[Ticket] = set()
        self._ticket_of: dict[Request, Ticket] = {}
        self._inbox: deque[tuple[Ticket, list[list[int]], SamplingParams]] = deque()
        self._bell = threading.Event()
        self._stopping = False
        self.places: Places | None = None  # once the model is loaded
        self._watch: asyncio.Task[None] | None = None
        self._loop: asyncio.AbstractEventLoop
        self._thread: threading.Thread
        self.state: State = "loading"
        self.leaving = False  # it still works, and nobody should send it anything new
        self.failure: BaseException | None = None
        self.model: GPT2 | None = None
        self.engine: Engine | None = None

    # On the event loop

    def start(self) -> None:
        """Begin to load."""
        self._loop = asyncio.get_running_loop()
        self._thread = threading.Thread(target=self._run, name="gpt2core-engine", daemon=True)
        self._thread.start()
        self._watch = asyncio.create_task(self._look())

    def reserve(self, client: Client, count: int, begun_s: float, route: str = "none") -> Ticket:
        """A place for `count` requests of `route`.

        Raises:
            Refusal: 503 while nothing can run, 429 when the queue is full, or the client's part of it.
        """
        self.check_ready()
        assert self.places is not None
        refusal = self.places.refuse(client, count)
        if refusal is not None:
            raise refusal
        deadline_s = self._settings.deadline_s
        ticket = Ticket(count, begun_s=begun_s, deadline_s=deadline_s, release=self._release)
        ticket.client, ticket.route = client, route
        self._tickets.add(ticket)
        self.places.take(client, count)
        return ticket

    def submit(
        self, ticket: Ticket, prompts: list[list[int]], params: SamplingParams, *, stream: bool
    ) -> None:
        """Let prompts run that `engine.encode` has passed; the ticket tells how they fare."""
        ticket.stream = stream
        if ticket.error is None:
            self._inbox.append((ticket, prompts, params))
            self._bell.set()

    def check_ready(self) -> None:
        """Refuse what cannot run now.

        Raises:
            Refusal: 503, saying why.
        """
        if self.state == "loading":
            raise unavailable("loading", "the model is being loaded; try again a little later")
        if self.state == "failed":
            raise engine_failed()
        if self.state != "ready":
            raise unavailable("draining", "the server is stopping; ask another one")

    def check_staying(self) -> None:
        """Refuse to be called ready: it cannot work now, or soon no more.

        Raises:
            Refusal: 503, saying why.
        """
        self.check_ready()
        if self.leaving:
            raise unavailable("draining", "the server will stop; ask another one")

    def leave(self, lame_duck_s: float) -> None:
        """Accept what comes, but say that it is not ready."""
        self.leaving = True
        logs.event("info", "leaving", lame_duck_s=lame_duck_s)

    def drain(self) -> None:
        """Accept nothing more; what runs has `drain_s` to end."""
        if self.state in ("loading", "ready"):
            self.state = "draining"
            logs.event("info", "draining", requests=len(self._tickets), drain_s=self._settings.drain_s)
            self._loop.call_later(
                self._settings.drain_s, self._end_all, "its time for running requests is over"
            )

    async def close(self) -> None:
        """End everything and free the model."""
        if self.state != "failed":
            self.state = "closed"
        self._end_all("it does not wait for running requests")
        self._stopping = True
        self._bell.set()
        if self._watch is not None:
            self._watch.cancel()
        self._tell_refusals()
        end = self._loop.time() + JOIN_S  # a step, or loading, cannot be interrupted
        while self._thread.is_alive() and self._loop.time() < end:
            await asyncio.sleep(0.005)

    @property
    def requests(self) -> int:
        """How many requests hold a place."""
        return len(self._tickets)

    @property
    def waiting(self) -> int:
        """How many texts wait for a slot."""
        if self.engine is None or self.places is None:
            return 0
        return max(0, self.places.used - self.engine.running)

    @property
    def cache_use(self) -> float:
        """The part of the KV cache that holds tokens."""
        if self.engine is None:
            return 0.0
        cached = sum(request.cached for request in list(self._ticket_of) if request.slot is not None)
        return cached / (self.engine.slots * self.engine.config.n_positions)

    def _release(self, ticket: Ticket) -> None:
        """Cancel what still runs of a ticket and give its place back; twice is harmless."""
        ticket.cancelled = True  # before its requests are read: see `_submit`
        for request in list(ticket.requests):
            if self.engine is not None:
                self.engine.cancel(request)
            self._ticket_of.pop(request, None)
        if ticket in self._tickets:
            self._tickets.remove(ticket)
            assert self.places is not None
            assert ticket.client is not None
            self.places.take(ticket.client, -ticket.count)

    def _end_all(self, why: str) -> None:
        for ticket in list(self._tickets):
            ticket.fail(unavailable("draining", f"the server is stopping, and {why}"))

    def _deliver(self, updates: list[Update], now_s: float) -> None:
        rows = len({update.request for update in updates})  # with speculation one may have several
        self._metrics.count_step(rows, sum(update.token_id is not None for update in updates))
        for update in updates:
            ticket = self._ticket_of.get(update.request)
            if ticket is None:  # cancelled meanwhile
                continue
            if update.token_id is not None:
                self._measure(ticket, update.request, now_s)
            if update.finish_reason is not None:
                self._metrics.count_text(update.request, ticket.route)
            ticket.take(update)

    def _measure(self, ticket: Ticket, request: Request, now_s: float) -> None:
        """Note what a client feels of a token that came at `now_s`."""
        measured = self._metrics.of_route(ticket.route)
        if ticket.waits_for_token:
            ticket.waits_for_token = False
            measured.ttft_s.observe(now_s - ticket.begun_s)
            if request.started_s is not None:
                measured.queue_s.observe(max(0.0, request.started_s - ticket.begun_s))
        before_s = ticket.token_s.get(request)
        if before_s is not None:
            measured.gap_s.observe(now_s - before_s)
        ticket.token_s[request] = now_s

    def _become_ready(self) -> None:
        if self.state == "loading":
            self.state = "ready"
            assert self.engine is not None
            self.places = Places(
                self.engine.slots + self._settings.max_queue,
                running=self.engine.slots,
                share=self._settings.client_share,
            )
            self._metrics.describe_server(
                version=__version__,
                model=self._settings.name,
                backend=self.engine.backend.name,
                precision=str(getattr(self.engine.backend, "precision", self._settings.precision)),
            )
            logs.event("info", "ready", model=self._settings.name, backend=self.engine.backend.name)

    def fail(self, error: BaseException) -> None:
        """The engine does not work any more: everybody is told, and readiness and liveness say so."""
        if self.state in ("failed", "closed"):
            return
        self.state = "failed"
        self.failure = error
        logs.event("error", "engine_failed", error=logs.describe_error(error))
        for ticket in list(self._tickets):
            ticket.fail(engine_failed())

    async def _look(self) -> None:
        """Measure how late the event loop wakes up, and see whether the engine thread still lives."""
        told_s = 0.0
        while True:
            due_s = time.perf_counter() + LOOK_S
            await asyncio.sleep(LOOK_S)
            self._metrics.observe_lag(max(0.0, time.perf_counter() - due_s))
            if due_s - told_s >= REFUSALS_S:
                told_s = due_s
                self._tell_refusals()
            if not self._thread.is_alive():
                self.fail(BackendError("the engine thread has ended"))

    def _tell_refusals(self) -> None:
        requests, clients = (0, 0) if self.places is None else self.places.pop_refusals()
        if requests:
            logs.event("warning", "refused", status=429, requests=requests, clients=clients)

    # On the engine thread

    def _run(self) -> None:
        error: BaseException | None = None
        try:
            self.model = self._load()
            engine = self.model.engine
            _warm_up(engine)
            self.model.wait_with(self._wait_until)
            engine.pace_prompts(self._settings.max_stretch)
            self.engine = engine
            self._call(self._become_ready)
            self._drive(engine)
        except BaseException as caught:  # whatever it is, nobody may wait for this thread any longer
            error = caught
        if error is not None:
            self._call(self.fail, error)
        if self.model is not None:
            self.model.close()

    def _drive(self, engine: Engine) -> None:
        while not self._stopping:
            self._bell.clear()
            while self._inbox:
                self._submit(engine, *self._inbox.popleft())
            if not engine.running and not engine.waiting:
                if not self._inbox and not self._stopping:
                    self._bell.wait()
                continue
            updates = engine.step()
            if updates:
                self._call(self._deliver, updates, time.perf_counter())
            for update in updates:
                if isinstance(update.error, BackendError) and not isinstance(update.error, NumericalError):
                    raise update.error  # what made one pass fail may make each fail: let it be restarted

    def _submit(
        self, engine: Engine, ticket: Ticket, prompts: list[list[int]], params: SamplingParams
    ) -> None:
        assert ticket.client is not None
        cache_key = ticket.client.cache_key if self._settings.prefix_cache == "per-key" else ""
        for i, ids in enumerate(prompts):
            if ticket.cancelled:
                break
            requests = engine.submit(ids, params, prompt=i, cache_key=cache_key)
            ticket.requests += requests
            for request in requests:
                self._ticket_of[request] = ticket
        if ticket.cancelled:  # since it was looked at; `_release` may have missed the last of them
            for request in ticket.requests:
                engine.cancel(request)
                self._ticket_of.pop(request, None)

    def _wait_until(self, ready: Callable[[], bool]) -> None:
        """On another thread: wait for what steps of this one bring about, or the closing of the engine."""
        self._bell.set()
        while not ready():
            if not self._thread.is_alive():
                raise BackendError("the engine thread has ended; start the server again")
            time.sleep(WAIT_S)

    def _call(self, function: Callable[..., None], *args: object) -> None:
        try:
            self._loop.call_soon_threadsafe(function, *args)
        except RuntimeError:  # the event loop is closed: nobody waits
            self._stopping = True


def _warm_up(engine: Engine) -> None:
    """Generate one token: the cache is made and the first request finds an engine that works."""
    [request] = engine.submit([0], SamplingParams(max_new_tokens=1))
    while not request.finished:
        engine.step()
    if request.error is not None:
        raise request.error
