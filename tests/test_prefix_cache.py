"""`prefix_cache=True`: what a slot holds is not read again, and no text changes by it."""

import numpy as np
import pytest
from fakes import FakeBackend, config, endless

from gpt2core import GPT2, BackendError, Engine, RequestError, SamplingParams
from gpt2core.backends import BUILT_IN
from gpt2core.testing import random_checkpoint


class Counting:
    """A `FakeBackend`, whose logits depend on all that its cache holds; counts the tokens of each pass."""

    name = "counting"

    def __init__(self):
        self._backend = FakeBackend(config(), endless)
        self.config = self._backend.config
        self.new_cache, self.close = self._backend.new_cache, self._backend.close
        self.read = []
        self.fail = False

    def forward(self, batch, cache):
        if self.fail:
            raise RuntimeError("no")
        self.read.append(len(batch.tokens))
        return self._backend.forward(batch, cache)


def finish(engine, ids, **sampling):
    [request] = engine.submit(ids, SamplingParams(max_new_tokens=4, temperature=0.8, seed=3, **sampling))
    while not request.finished:
        engine.step()
    return request


def fresh(ids):
    return finish(Engine(Counting(), max_slots=1), ids).generated


def test_only_what_is_new_is_read_and_the_tokens_stay():
    backend = Counting()
    engine = Engine(backend, max_slots=1, prefix_cache=True)
    first = finish(engine, [5, 6, 7])
    ids = [*first.token_ids, 9]
    assert (first.generated, backend.read) == (fresh([5, 6, 7]), [3, 1, 1, 1])
    backend.read.clear()
    second = finish(engine, ids)
    assert (second.generated, backend.read) == (fresh(ids), [2, 1, 1, 1])  # the last drawn token, and 9
    backend.read.clear()
    assert finish(engine, [5, 6, 1, 2]).generated == fresh([5, 6, 1, 2])
    assert backend.read[0] == 2
    backend.read.clear()
    assert finish(engine, [5, 6]).generated == fresh([5, 6])
    assert backend.read[0] == 1  # at least one token is read, for its logits


def test_each_slot_has_its_own_and_a_cancelled_text_leaves_what_it_had_read():
    backend = Counting()
    engine = Engine(backend, max_slots=2, prefix_cache=True)
    params = SamplingParams(max_new_tokens=9, temperature=0.8, seed=3)
    [one], [two] = engine.submit([1, 2, 3], params), engine.submit([4, 5], params)
    engine.step()
    engine.step()
    engine.cancel(one)
    engine.cancel(two)
    for ids in ([4, 5, 6], [1, 2, 3, 4]):
        assert finish(engine, ids).generated == fresh(ids)


def test_after_a_failure_everything_is_read_again():
    backend = Counting()
    engine = Engine(backend, max_slots=1, prefix_cache=True)
    finish(engine, [5, 6, 7])
    backend.fail = True
    assert isinstance(finish(engine, [5, 6, 7, 8]).error, BackendError)
    backend.fail = False
    backend.read.clear()
    assert finish(engine, [5, 6, 7, 8]).generated == fresh([5, 6, 7, 8])
    assert backend.read[0] == 4


def test_logits_that_are_wanted_are_computed():
    engine = Engine(Counting(), max_slots=1, prefix_cache=True)
    finish(engine, [5, 6, 7])
    rows = []
    [request] = engine.submit(
        [5, 6, 7, 8],
        SamplingParams(max_new_tokens=0),
        logits_from=1,
        on_logits=lambda position, logits: rows.append((position, len(logits))),
    )
    while not request.finished:
        engine.step()
    assert rows == [(1, 3)]


def test_without_it_everything_is_read():
    backend = Counting()
    engine = Engine(backend, max_slots=1)
    finish(engine, [5, 6, 7])
    backend.read.clear()
    finish(engine, [5, 6, 7, 8])
    assert backend.read[0] == 4


@pytest.mark.parametrize("backend", BUILT_IN)
def test_a_conversation_has_the_tokens_that_it_has_without(tmp_path, backend):
    folder = random_checkpoint(tmp_path)
    turns = [[5, 6, 7], [8, 9], [10]]
    options = {"max_new_tokens": 8, "temperature": 0.8, "seed": 3}
    with (
        GPT2.from_pretrained(folder, backend=backend, max_batch=1, prefix_cache=True) as kept,
        GPT2.from_pretrained(folder, backend=backend) as fresh,
    ):
        ids = []
        for turn in turns:
            ids += turn
            got, want = kept.generate(ids, **options), fresh.generate(ids, **options)
            assert got.token_ids == want.token_ids
            ids += got.token_ids
        other = [3, *ids[1:]]  # nothing of it is held
        assert kept.generate(other, **options).token_ids == fresh.generate(other, **options).token_ids
        np.testing.assert_allclose(kept.logits(other), fresh.logits(other), rtol=1e-4, atol=1e-4)


def test_it_does_not_go_together_with_speculation(tmp_path):
    folder = random_checkpoint(tmp_path)
    with pytest.raises(RequestError, match="prefix_cache and speculation do not go together"):
        GPT2.from_pretrained(folder, prefix_cache=True, speculation="prompt_lookup")
