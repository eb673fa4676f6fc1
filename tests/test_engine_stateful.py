"""Random submits, steps, cancels and faults: each text is that of a cold engine, and no slot leaks."""

from collections.abc import Callable, Mapping
from functools import lru_cache
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
from fakes import FakeBackend, config, endless
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from gpt2core import Backend, BackendError, Engine, NumericalError, SamplingParams, TokenLogprob
from gpt2core.backends import load_factory
from gpt2core.engine import prefix_cache
from gpt2core.testing import random_config, random_weights

STEMS = ([1, 2, 3, 4] * 6, [1, 2, 3, 4, 5, 6] * 3, [9] * 20, [])
FAULTS = (
    *("pass", "interrupted pass", "interrupted after a pass", "nan"),
    *("copy", "interrupted copy", "interrupted after a copy"),
)
SLOTS = 3


class Faulty:
    """A backend that fails once when it is told to: `fault` says how."""

    name = "faulty"

    def __init__(self, backend):
        self._backend = backend
        self.config = backend.config
        self.new_cache, self.close = backend.new_cache, backend.close
        self.fault = None
        self.copies = 0

    def _fail(self, *faults):
        fault = self.fault
        if fault in faults:
            self.fault = None
            raise KeyboardInterrupt if fault.startswith("interrupt") else RuntimeError(fault)

    def forward(self, batch, cache):
        self._fail("pass", "interrupted pass")
        logits = self._backend.forward(batch, cache)
        self._fail("interrupted after a pass")
        if self.fault == "nan" and len(logits):
            self.fault = None
            logits[0, 0] = np.nan
        return logits

    def copy_cache(self, cache, *where):
        self._fail("copy", "interrupted copy")
        self._backend.copy_cache(cache, *where)
        self.copies += 1
        self._fail("interrupted after a copy")


class Machine(RuleBasedStateMachine):
    """An engine; `make` is how, and `cold` what each request must give."""

    make: Callable[[], Backend]
    cold: Callable[[tuple[int, ...], int, int], tuple[list[int], list[TokenLogprob], np.ndarray]]
    options: Mapping[str, Any] = MappingProxyType({})

    def __init__(self):
        super().__init__()
        self.backend = Faulty(type(self).make())
        options = {name: value() if callable(value) else value for name, value in self.options.items()}
        self.engine = Engine(self.backend, max_slots=SLOTS, step_tokens=6, **options)
        self.requests = []
        self.faulty = False

    @rule(
        stem=st.sampled_from(STEMS),
        cut=st.integers(0, 24),
        end=st.lists(st.integers(1, 3), max_size=3),
        new=st.integers(0, 6),
        n=st.sampled_from((1, 1, 1, 2, 3)),
        key=st.sampled_from(("", "", "a")),
        from_end=st.one_of(st.none(), st.integers(1, 8)),
    )
    def submit(self, stem, cut, end, new, n, key, from_end):
        ids = [*stem[:cut], *end] or [7]
        params = SamplingParams(max_new_tokens=new, temperature=0.9, seed=5, n=n, logprobs=1)
        rows = {}
        reads = {} if from_end is None else {"logits_from": max(0, len(ids) - from_end)}
        if reads:
            reads["on_logits"] = lambda at, logits: rows.update({at + i: row for i, row in enumerate(logits)})
        got = self.engine.submit(ids, params, cache_key=key, **reads)
        self.requests += [(request, rows if reads else None) for request in got]

    @rule(count=st.integers(1, 4))
    def step(self, count):
        for _ in range(count):
            try:
                self.engine.step()
            except KeyboardInterrupt:
                self.faulty = True

    @precondition(lambda self: any(not request.finished for request, _ in self.requests))
    @rule(data=st.data())
    def cancel(self, data):
        going = [request for request, _ in self.requests if not request.finished]
        self.engine.cancel(data.draw(st.sampled_from(going)))

    @rule(fault=st.sampled_from(FAULTS))
    def fail(self, fault):
        self.backend.fault, self.faulty = fault, True

    @invariant()
    def every_slot_has_one_owner(self):
        slots = [request.slot for request, _ in self.requests if request.slot is not None]
        assert len(set(slots)) == len(slots) == self.engine.running
        assert self.engine.running + self.engine._scheduler._given_by.free == SLOTS

    def teardown(self):
        self.backend.fault = None
        for _ in range(2000):
            if not (self.engine.running or self.engine.waiting):
                break
            self.engine.step()
        assert (self.engine.running, self.engine.waiting) == (0, 0)
        assert self.engine._scheduler._given_by.free == SLOTS
        for request, rows in self.requests:
            assert request.finished
            want, logprobs, logits = type(self).cold(
                tuple(request.token_ids[: request.prompt_tokens]), request.max_new_tokens, request.choice
            )
            count = len(request.generated)
            assert request.generated == want[:count]
            assert request.logprobs == logprobs[:count]
            if request.error is not None:
                assert self.faulty
                assert isinstance(request.error, (BackendError, NumericalError))
            elif request.finish_reason != "cancelled":
                assert request.generated == want
            for position, row in (rows or {}).items():
                if np.isfinite(row).all():
                    np.testing.assert_array_equal(row, logits[position])
        self.engine.close()


def machine(make, **options):
    """A test case on the backend that `make` makes."""

    @lru_cache(None)
    def backend():
        return make()

    @lru_cache(None)
    def cold(ids, new, choice):
        engine = Engine(backend(), max_slots=1, prefix_cache=False)
        params = SamplingParams(max_new_tokens=new, temperature=0.9, seed=5, n=choice + 1, logprobs=1)
        logits = np.empty((len(ids), backend().config.vocab_size), np.float32)

        def read(at, rows):
            logits[at : at + len(rows)] = rows

        requests = engine.submit(ids, params, logits_from=0, on_logits=read)
        while not requests[-1].finished:
            engine.step()
        engine.close()
        return requests[-1].generated, requests[-1].logprobs, logits

    names = {"make": staticmethod(backend), "cold": staticmethod(cold), "options": options}
    case = type("On", (Machine,), names).TestCase
    case.settings = settings(max_examples=25, stateful_step_count=40, deadline=None)
    return case


def fake():
    return FakeBackend(config(), endless)


def native():
    return load_factory("native")(random_weights(random_config(n_positions=64)), threads=1)


@lru_cache(None)
def draft():
    return load_factory("native")(random_weights(random_config(n_positions=64, n_layer=1), seed=1), threads=1)


@pytest.fixture(autouse=True, scope="module")
def fewer_tokens_pay():
    """Let requests wait for each other more often than it pays."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prefix_cache, "LEAST_GAIN", 4)
        yield


TestPlain = machine(fake, prefix_cache=False)
TestPrefixCache = machine(fake, prefix_cache=True)
TestOnNative = machine(native, prefix_cache=True)
TestOnNativeWithPromptLookup = machine(native, prefix_cache=True, speculation="prompt_lookup")
TestOnNativeWithDraft = machine(native, prefix_cache=True, draft=draft)
