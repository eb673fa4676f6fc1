"""The server's driver in any order of requests, departures, deadlines and drains, against a model of places.

The engine's thread takes a step when the test lets it, so that each run is the same for the same choices.
"""

import asyncio
import threading
import time
from collections import Counter
from dataclasses import dataclass, field

from engines import alone
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from serving import HANG_S, Fake

from gpt2core import SamplingParams
from gpt2core.serve.driver import Driver
from gpt2core.serve.errors import Disconnected, Refusal
from gpt2core.serve.metrics import Metrics
from gpt2core.serve.settings import Settings
from gpt2core.serve.state import Client
from gpt2core.serve.ticket import Ticket

CONTEXT = 24
SLOTS = 3
QUEUE = 5
SHARE = 4  # half of all places
CLIENTS = [Client("192.0.2.1"), Client("192.0.2.2"), Client("192.0.2.2", 1), Client(None)]


@dataclass(eq=False)
class Asked:
    """One request: what it asked for, what came, and how it must end."""

    ticket: Ticket
    client: Client
    prompts: list[list[int]]
    params: SamplingParams
    tokens: Counter = field(default_factory=Counter)  # (prompt, choice) -> those that a stream has brought
    ends_with: type[BaseException] | None = None
    code: str | None = None  # of a refusal

    @property
    def count(self) -> int:
        return len(self.prompts) * self.params.n


class Steps:
    """Lets the engine's thread take as many passes as the test wants."""

    def __init__(self) -> None:
        self.allowed = 0
        self.waits = False  # whether it stands before a pass
        self.changed = threading.Condition()

    def before_pass(self) -> None:
        with self.changed:
            self.waits = True
            self.changed.notify_all()
            assert self.changed.wait_for(lambda: self.allowed, HANG_S)
            self.allowed -= 1
            self.waits = False

    def allow(self, count: int) -> None:
        with self.changed:
            self.allowed = count
            self.changed.notify_all()


class DriverStates(RuleBasedStateMachine):
    """What holds a place, by the rules alone: no threads, no engine."""

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.steps = Steps()
        self.running: list[Asked] = []  # hold places
        self.draining = False
        self.time_is_over = False

    @initialize(drain_s=st.sampled_from([0.0, 600.0]))
    def load(self, drain_s: float) -> None:
        self.settings = Settings(
            max_batch=SLOTS, max_queue=QUEUE, client_share=SHARE / (SLOTS + QUEUE), drain_s=drain_s
        )
        fake = Fake(CONTEXT)
        self.driver = Driver(lambda: fake.load(self.settings), self.settings, Metrics())
        self.do(self.driver.start)
        self.until(lambda: self.driver.state == "ready")
        fake.backend.before = lambda batch: self.steps.before_pass()

    def do(self, work, *args, **options):
        """Call what belongs to the event loop there, and let the loop do what waits."""

        async def call():
            result = work(*args, **options)
            for _ in range(3):
                await asyncio.sleep(0)
            return result

        return self.loop.run_until_complete(call())

    def until(self, true) -> None:
        end_s = time.monotonic() + HANG_S
        while not self.do(true):
            assert time.monotonic() < end_s, "it did not come to be"
            time.sleep(0.0005)

    # The rules

    def refusal_of(self, client: Client, count: int) -> str | None:
        """What the model of places says."""
        if self.draining:
            return "draining"
        held: Counter = Counter()
        for asked in self.running:
            held[asked.client] += asked.count
        shared = sum(n if c.address is None else min(n, SHARE) for c, n in held.items())
        if shared and shared + count > SLOTS + QUEUE:
            return "queue_full"
        if client.address is not None and held[client] and held[client] + count > SHARE:
            return "client_queue_full"
        return None

    @rule(
        client=st.sampled_from(CLIENTS),
        lengths=st.lists(st.integers(1, 9), min_size=1, max_size=3),
        n=st.integers(1, 3),
        new=st.integers(0, 12),
        stream=st.booleans(),
        late=st.sampled_from([False, False, False, True]),
    )
    def ask(self, client, lengths, n, new, stream, late) -> None:
        prompts = [[length, *range(length - 1)] for length in lengths]
        params = SamplingParams(max_new_tokens=new, n=n, temperature=1.0, seed=sum(lengths))
        count = len(prompts) * n
        begun_s = time.perf_counter() - late * (self.settings.deadline_s + 1)
        want = self.refusal_of(client, count)
        ticket = self.do(self.reserve, client, count, begun_s)
        if isinstance(ticket, Refusal):
            assert (ticket.code, ticket.status) == (want, 503 if want == "draining" else 429)
            return
        assert want is None
        asked = Asked(ticket, client, prompts, params)
        if late:  # its deadline was over when it came
            self.must_end(asked, Refusal, "deadline_exceeded")
            self.do(self.driver.submit, ticket, prompts, params, stream=stream)
            self.check_ended(asked)
        else:
            self.running.append(asked)
            self.do(self.driver.submit, ticket, prompts, params, stream=stream)

    def reserve(self, client: Client, count: int, begun_s: float) -> Ticket | Refusal:
        try:
            return self.driver.reserve(client, count, begun_s)
        except Refusal as refusal:
            return refusal

    def must_end(self, asked: Asked, error: type[BaseException], code: str | None = None) -> None:
        asked.ends_with, asked.code = error, code
        if asked in self.running:
            self.running.remove(asked)

    def check_ended(self, asked: Asked) -> None:
        assert isinstance(asked.ticket.error, asked.ends_with)
        assert getattr(asked.ticket.error, "code", None) == asked.code
        self.do(asked.ticket.close)
        self.do(asked.ticket.close)  # twice is harmless

    @precondition(lambda self: self.running)
    @rule(data=st.data(), closes=st.booleans())
    def leave(self, data, closes) -> None:
        """A client goes, or its route gives up."""
        asked = data.draw(st.sampled_from(self.running))
        if closes:
            self.running.remove(asked)
            self.do(asked.ticket.close)
            assert asked.ticket.error is None
        else:
            self.must_end(asked, Disconnected)
            self.do(asked.ticket.fail, Disconnected())
            self.check_ended(asked)
        self.until(lambda: self.in_engine() <= self.places_held())

    def in_engine(self) -> int:
        return self.driver.engine.running + self.driver.engine.waiting

    def places_held(self) -> int:
        return sum(asked.count for asked in self.running)

    @precondition(lambda self: self.running)
    @rule(count=st.integers(1, 5))
    def step(self, count) -> None:
        """The engine takes some passes; whoever is done by then has the right texts and goes."""
        self.steps.allow(count)
        self.until(lambda: not self.steps.allowed or self.all_written())
        self.steps.allow(0)
        self.until(lambda: self.steps.waits or self.all_written())
        self.collect()

    @precondition(lambda self: self.running)
    @rule()
    def finish(self) -> None:
        """All texts are written to their ends."""
        self.steps.allow(10_000)
        self.until(self.all_written)
        self.steps.allow(0)
        self.collect()
        assert self.running == []

    @precondition(lambda self: not self.draining)
    @rule()
    def drain(self) -> None:
        self.draining = True
        self.do(self.driver.drain)
        if self.settings.drain_s == 0:
            self.do(lambda: None)
            for asked in list(self.running):
                self.must_end(asked, Refusal, "draining")
                self.check_ended(asked)

    def all_written(self) -> bool:
        return not any(asked.ticket._open for asked in self.running)

    def collect(self) -> None:
        """Read what came, as a route does, and close what is done."""
        for asked in list(self.running):
            ticket = asked.ticket
            assert ticket.error is None
            updates, ticket._updates = ticket._updates, []
            for update in updates:
                asked.tokens[update.request.prompt, update.request.choice] += update.token_id is not None
            if ticket._open:
                continue
            self.check_texts(asked)
            self.do(ticket.close)
            self.running.remove(asked)

    def check_texts(self, asked: Asked) -> None:
        params = asked.params
        requests = {(r.prompt, r.choice): r for r in asked.ticket.requests}
        assert len(requests) == asked.count
        for (prompt, choice), request in requests.items():
            assert request.finish_reason == "length"
            assert len(request.generated) == params.max_new_tokens
            if choice == 0:
                options = {"max_new_tokens": params.max_new_tokens, "temperature": 1.0, "seed": params.seed}
                assert request.generated == alone(asked.prompts[prompt], context=CONTEXT, **options)
            if asked.ticket.stream:
                assert asked.tokens[prompt, choice] == params.max_new_tokens

    # What holds after each rule

    @invariant()
    def places_are_those_of_the_model(self) -> None:
        if not hasattr(self, "driver"):
            return
        assert self.driver.requests == len(self.running)
        assert self.driver.places.used == self.places_held()
        assert self.driver.engine.running <= SLOTS
        assert 0 <= self.driver.cache_use <= 1
        assert self.driver.state == ("draining" if self.draining else "ready")
        held = {asked.client for asked in self.running}
        assert set(self.driver.places._held) == held

    def teardown(self) -> None:
        if hasattr(self, "driver"):
            for asked in self.running:
                asked.ends_with, asked.code = Refusal, "draining"
            left, self.running = self.running, []
            self.steps.allow(10_000)
            self.loop.run_until_complete(self.driver.close())
            assert not self.driver._thread.is_alive()
            for asked in left:
                self.check_ended(asked)
            assert (self.driver.requests, self.driver.places.used) == (0, 0)
            assert not self.driver._ticket_of
        self.loop.close()


DriverStates.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
TestDriverStates = DriverStates.TestCase
