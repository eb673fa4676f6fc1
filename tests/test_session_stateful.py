"""Sessions in any order of calls, with little room in the cache: each call has the bits of a cold model."""

from functools import lru_cache

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, multiple, rule

from gpt2core import GPT2
from gpt2core.backends import load_factory
from gpt2core.testing import random_config, random_weights

CONTEXT = 64
SLOTS = 2
TOKENS = st.lists(st.integers(1, 4), min_size=1, max_size=12)


@lru_cache(None)
def backend():
    return load_factory("native")(random_weights(random_config(n_positions=CONTEXT)), threads=1)


@lru_cache(None)
def draft():
    weights = random_weights(random_config(n_positions=CONTEXT, n_layer=1), seed=1)
    return load_factory("native")(weights, threads=1)


@lru_cache(None)
def cold():
    return GPT2(backend(), None, prefix_cache=False)


@lru_cache(None)
def generate_cold(ids, options):
    found = cold().generate(list(ids), **dict(options))
    return found.token_ids, found.logprobs, found.finish_reason


@lru_cache(None)
def score_cold(ids):
    return cold().score(list(ids)).logprobs


class Sessions(RuleBasedStateMachine):
    options = ()
    sessions = Bundle("sessions")

    @initialize()
    def load(self):
        options = {name: value() if callable(value) else value for name, value in self.options}
        self.model = GPT2(backend(), None, max_batch=SLOTS, **options)

    @rule(target=sessions, ids=TOKENS)
    def begin(self, ids):
        return self.model.session(ids)

    @rule(session=sessions, ids=TOKENS)
    def append(self, session, ids):
        if len(session) + len(ids) < CONTEXT - 8:
            session.append(ids)

    @rule(
        session=sessions,
        new=st.integers(1, 6),
        temperature=st.sampled_from((0, 0.9)),
        streamed=st.booleans(),
        taken=st.integers(1, 6),
    )
    def generate(self, session, new, temperature, streamed, taken):
        before = session.token_ids
        if not before or len(before) + new > CONTEXT:
            return
        options = {"max_new_tokens": new, "temperature": temperature, "seed": 3, "logprobs": 1}
        token_ids, logprobs, reason = generate_cold(tuple(before), tuple(options.items()))
        if streamed:
            pieces = session.stream(**options)
            got = [piece for _, piece in zip(range(taken), pieces, strict=False)]
            pieces.close()
            token_ids, logprobs = token_ids[:taken], logprobs[:taken]
            assert [piece.token_id for piece in got] == token_ids
            assert [entry for piece in got for entry in piece.logprobs] == logprobs
        else:
            got = session.generate(**options)
            assert (got.token_ids, got.logprobs, got.finish_reason) == (token_ids, logprobs, reason)
        assert session.token_ids == before + token_ids

    @rule(session=sessions, ids=TOKENS)
    def score(self, session, ids):
        if len(session) and len(session) + len(ids) <= CONTEXT:
            whole = (*session.token_ids, *ids)
            np.testing.assert_array_equal(session.score(ids).logprobs, score_cold(whole)[-len(ids) :])
            assert session.token_ids == list(whole[: -len(ids)])

    @rule(target=sessions, session=sessions)
    def fork(self, session):
        return session.fork()

    @rule(session=sessions, data=st.data())
    def rewind(self, session, data):
        session.rewind(data.draw(st.integers(0, len(session))))

    @rule(target=sessions, session=consumes(sessions))
    def save_and_load(self, session):
        path = FOLDER[0] / "a.session"
        session.save(path)
        loaded = self.model.load_session(path)
        assert loaded.token_ids == session.token_ids
        return multiple(session, loaded)

    @rule(ids=TOKENS, count=st.integers(1, 3))
    def evict(self, ids, count):
        self.model.generate([[5 + i, *ids] for i in range(count)], max_new_tokens=1)

    def teardown(self):
        engine = self.model.engine
        assert (engine.running, engine.waiting) == (0, 0)
        assert engine.prefixes.free == SLOTS
        engine.close()


FOLDER = []


@pytest.fixture(autouse=True, scope="module")
def folder(tmp_path_factory):
    FOLDER.append(tmp_path_factory.mktemp("sessions"))
    yield
    FOLDER.clear()


def machine(**options):
    case = type("On", (Sessions,), {"options": tuple(options.items())}).TestCase
    case.settings = settings(max_examples=25, stateful_step_count=40, deadline=None)
    return case


TestSessions = machine()
TestSessionsWithPromptLookup = machine(speculation="prompt_lookup")
TestSessionsWithDraft = machine(draft=draft)
