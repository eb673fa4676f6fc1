"""The prefix cache: what a slot holds is not read again, and no text changes by it."""

import numpy as np
import pytest
from fakes import FakeBackend, config, endless
from hypothesis import given
from hypothesis import strategies as st

from gpt2core import GPT2, BackendError, Engine, RequestError, SamplingParams
from gpt2core.backends import BUILT_IN, load_factory
from gpt2core.engine.prefix_tree import PrefixTree, pack
from gpt2core.testing import random_checkpoint, random_config, random_weights


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


class Copying(Counting):
    """The same, and it can copy."""

    def __init__(self):
        super().__init__()
        self.copied = []
        self.copy_raises = None

    def copy_cache(self, cache, *where):
        if self.copy_raises is not None:
            error, self.copy_raises = self.copy_raises, None
            raise error
        self.copied.append(where)
        self._backend.copy_cache(cache, *where)


def finish(engine, ids, **sampling):
    [request] = engine.submit(ids, SamplingParams(max_new_tokens=4, temperature=0.8, seed=3, **sampling))
    while not request.finished:
        engine.step()
    return request


HEAD = list(range(30, 60))  # what prompts have in common


def submit(engine, ids, **options):
    params = SamplingParams(max_new_tokens=4, temperature=0.8, seed=3, n=options.pop("n", 1))
    return engine.submit(ids, params, **options)


def end(engine, *requests):
    while not all(request.finished for request in requests):
        engine.step()


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
        assert kept.engine.prefixes.hits == 2
        other = [3, *ids[1:]]  # nothing of it is held
        assert kept.generate(other, **options).token_ids == fresh.generate(other, **options).token_ids
        np.testing.assert_allclose(kept.logits(other), fresh.logits(other), rtol=1e-4, atol=1e-4)


def test_prompts_that_come_together_read_what_they_share_once():
    backend = Copying()
    engine = Engine(backend, max_slots=4, prefix_cache=True)
    prompts = [[*HEAD, i] for i in range(6)]
    requests = [request for ids in prompts for request in submit(engine, ids)]
    end(engine, *requests)
    assert [request.generated for request in requests] == [fresh(ids) for ids in prompts]
    assert backend.read[0] == len(prompts[0])
    assert sum(backend.read) == len(HEAD) + 6 * (1 + 3)
    assert [request.reused for request in requests] == [0, *[len(HEAD)] * 5]
    assert (engine.prefixes.hits, engine.prefixes.saved_tokens) == (5, 5 * len(HEAD))


def test_the_choices_of_a_prompt_read_it_once():
    backend = Copying()
    engine = Engine(backend, max_slots=4, step_tokens=10, prefix_cache=True)
    requests = submit(engine, HEAD, n=3)
    end(engine, *requests)
    plain = Engine(Counting(), max_slots=4)
    alone = submit(plain, HEAD, n=3)
    end(plain, *alone)
    assert [request.generated for request in requests] == [request.generated for request in alone]
    assert sum(backend.read) == len(HEAD) + 2 + 3 * 3  # each choice reads the last token of the prompt itself


def test_what_a_request_still_reads_or_writes_is_copied_for_others():
    backend = Copying()
    engine = Engine(backend, max_slots=4, step_tokens=8, prefix_cache=True)
    [first] = submit(engine, HEAD)
    engine.step()
    [second] = submit(engine, [*HEAD[:25], 1])
    [third] = submit(engine, [*HEAD[:20], 2])
    engine.step()
    assert second.cached == 0  # it waits for the 25th token
    assert third.cached > third.reused == 8  # to wait for 12 more would not pay
    end(engine, first, second, third)
    assert second.reused == 25
    for request in (first, second, third):
        assert request.generated == fresh(request.token_ids[: request.prompt_tokens])


def test_who_waited_for_a_request_that_is_cancelled_or_fails_goes_on_by_itself():
    for fail in (False, True):
        backend = Copying()
        engine = Engine(backend, max_slots=3, step_tokens=8, prefix_cache=True)
        [first] = submit(engine, HEAD)
        second, third = (submit(engine, [*HEAD, i])[0] for i in (1, 2))
        engine.step()
        assert first.cached == 8
        if fail:
            backend.fail = True
            engine.step()
            backend.fail = False
            assert isinstance(first.error, BackendError)
            expected = [0, len(HEAD)]
        else:
            engine.cancel(first)
            expected = [8, len(HEAD)]
        end(engine, second, third)
        assert [second.reused, third.reused] == expected
        assert [second.generated, third.generated] == [fresh([*HEAD, 1]), fresh([*HEAD, 2])]


def test_the_least_recently_used_text_goes_first():
    backend = Copying()
    engine = Engine(backend, max_slots=2, prefix_cache=True)
    one, two, three = ([i] * 20 for i in (1, 2, 3))
    finish(engine, one)
    finish(engine, two)
    assert finish(engine, [*one, 9]).reused == 20
    finish(engine, three)  # in the place of two
    assert finish(engine, [*one, 8]).reused == 20
    assert finish(engine, [*two, 8]).reused == 0


def test_a_text_that_is_longer_than_what_is_shared_stays_and_is_copied():
    backend = Copying()
    engine = Engine(backend, max_slots=2, prefix_cache=True)
    finish(engine, [*HEAD, 1, 1, 1])
    assert finish(engine, [*HEAD, 2]).reused == len(HEAD)
    assert backend.copied == [(0, 1, 0, len(HEAD))]
    assert finish(engine, [*HEAD, 1, 1, 1]).reused == len(HEAD) + 2


def test_requests_of_another_key_read_for_themselves():
    engine = Engine(Copying(), max_slots=4, prefix_cache=True)
    [mine] = submit(engine, HEAD, cache_key="a")
    [theirs] = submit(engine, HEAD, cache_key="b")
    end(engine, mine, theirs)
    [again] = submit(engine, [*HEAD, 1], cache_key="b")
    [nobody] = submit(engine, [*HEAD, 1])
    end(engine, again, nobody)
    assert [r.reused for r in (mine, theirs, again, nobody)] == [0, 0, len(HEAD), 0]


def test_a_copy_that_fails_ends_who_needed_it_and_nothing_of_it_is_used():
    backend = Copying()
    engine = Engine(backend, max_slots=4, prefix_cache=True)
    finish(engine, [*HEAD, 1, 1, 1])
    backend.copy_raises = RuntimeError("no memory")
    [fails] = submit(engine, [*HEAD, 2])
    [other] = submit(engine, [9, 9])
    updates = engine.step()
    assert [update.request for update in updates] == [fails, other]
    assert isinstance(fails.error, BackendError)
    assert "no memory" in str(fails.error)
    end(engine, other)
    assert finish(engine, [*HEAD, 2]).generated == fresh([*HEAD, 2])
    assert engine.prefixes.free == 4


def test_an_interrupted_copy_is_repeated():
    backend = Copying()
    engine = Engine(backend, max_slots=4, prefix_cache=True)
    finish(engine, [*HEAD, 1, 1, 1])
    backend.copy_raises = KeyboardInterrupt()
    requests = [submit(engine, [*HEAD, i])[0] for i in (2, 3)]
    with pytest.raises(KeyboardInterrupt):
        engine.step()
    end(engine, *requests)
    assert [r.generated for r in requests] == [fresh([*HEAD, 2]), fresh([*HEAD, 3])]
    assert [r.reused for r in requests] == [len(HEAD)] * 2


def test_what_a_text_that_slides_on_has_overwritten_is_not_reused():
    backend = Copying()
    engine = Engine(backend, max_slots=2, prefix_cache=True)
    params = SamplingParams(max_new_tokens=50, temperature=0.8, seed=3, overflow="slide")
    [slides] = engine.submit(HEAD, params)
    while slides.first == 0:
        engine.step()
    [other] = submit(engine, [*HEAD, 1])
    end(engine, slides, other)
    assert (other.reused, other.generated) == (0, fresh([*HEAD, 1]))
    plain = Engine(Counting(), max_slots=1)
    [alone] = plain.submit(HEAD, params)
    end(plain, alone)
    assert slides.generated == alone.generated
    seen = slides.token_ids[slides.first :]
    got = finish(engine, seen)
    assert (got.reused, got.generated) == (len(seen) - 1, fresh(seen))


def test_who_is_cancelled_before_its_copy_was_made_leaves_what_it_says():
    backend = Copying()
    engine = Engine(backend, max_slots=2, prefix_cache=True)
    finish(engine, [*HEAD, 1, 1, 1])
    backend.copy_raises = KeyboardInterrupt()
    [request] = submit(engine, [*HEAD, 2])
    with pytest.raises(KeyboardInterrupt):
        engine.step()
    engine.cancel(request)
    got = [submit(engine, [*HEAD, i])[0] for i in (2, 3)]
    end(engine, *got)
    assert [r.generated for r in got] == [fresh([*HEAD, 2]), fresh([*HEAD, 3])]


def test_it_is_on_where_no_bit_changes_by_it_and_else_an_option(tmp_path):
    folder = random_checkpoint(tmp_path)
    for backend in BUILT_IN:
        with GPT2.from_pretrained(folder, backend=backend) as model:
            assert (model.engine.prefixes is not None) == (backend == "native")
    with GPT2.from_pretrained(folder, backend="native", prefix_cache=False) as model:
        assert model.engine.prefixes is None
    with pytest.raises(RequestError, match="prefix_cache is 'yes'; it must be True, False or None"):
        GPT2.from_pretrained(folder, prefix_cache="yes")


@pytest.mark.parametrize("precision", ["float32", "int8", "int4", "bfloat16"])
def test_on_native_a_warm_cache_gives_the_bits_of_a_cold_one(tmp_path, precision):
    folder = random_checkpoint(tmp_path)
    options = {"max_new_tokens": 8, "temperature": 0.9, "seed": 3, "logprobs": 5, "n": 3}
    head = [(7 * i) % 90 for i in range(50)]
    with (
        GPT2.from_pretrained(folder, backend="native", precision=precision) as warm,
        GPT2.from_pretrained(folder, backend="native", precision=precision, prefix_cache=False) as cold,
    ):
        prompts = [[*head[:count], *range(i)] for i, count in enumerate((50, 50, 33, 17, 50, 3, 49))]
        for _ in range(2):
            got, want = warm.generate(prompts, **options), cold.generate(prompts, **options)
            assert [(g.token_ids, g.logprobs) for g in got] == [(g.token_ids, g.logprobs) for g in want]
        assert warm.engine.prefixes.hits > 20
        for text in (head, head[:40]):
            entropies = [model.score(text, entropy=True).entropies for model in (warm, cold)]
            np.testing.assert_array_equal(*entropies)
        np.testing.assert_array_equal(warm.logits(head), cold.logits(head))


@pytest.mark.parametrize("speculation", ["prompt_lookup", "draft"])
def test_with_speculation_too_the_bits_are_those_of_a_cold_cache(speculation):
    make = load_factory("native")
    weights = random_weights(random_config())
    head = [1, 2, 3, 4] * 10
    options = {"max_new_tokens": 12, "temperature": 0.2, "seed": 3, "logprobs": 2}

    def generate(**given):
        draft = make(random_weights(random_config(n_layer=1), seed=1)) if speculation == "draft" else None
        mode = "off" if draft else speculation
        with GPT2(make(weights), None, speculation=mode, draft=draft, **given) as model:
            results = []
            for ids in (head, [*head, 5], [*head[:20], 9], head):
                found = model.generate(ids, **options)
                results.append((found.token_ids, found.logprobs))
            return results, model.speculated, model.engine.prefixes

    warm, speculated, prefixes = generate()
    assert speculated[0] > 0
    assert prefixes.hits == 3
    assert warm == generate(prefix_cache=False)[0]


def count_common(a, b):
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def texts_of(length):
    return st.lists(st.integers(0, 2), max_size=length)


@given(st.lists(st.tuples(st.integers(0, 5), st.one_of(st.none(), texts_of(12)), st.sampled_from("ab"))))
def test_the_tree_finds_what_a_look_at_every_text_finds(changes):
    tree, held = PrefixTree(), {}
    for slot, text, key in changes:
        if text is None:
            tree.remove(slot)
            held.pop(slot, None)
        else:
            tree.insert(slot, pack(text), key)
            held[slot] = (key, text)
        for probe in ([0, 1, 2, 0, 1, 2], [0, 0, 0, 0], [2], [], *(text for _, text in held.values())):
            for key in "ab":
                common = {slot: count_common(probe, text) for slot, (own, text) in held.items() if own == key}
                found = tree.find(pack(probe), key)
                assert [depth for depth, _ in found] == sorted({depth for depth, _ in found})
                best = max(common.values(), default=0)
                assert (found[-1][0] if found else 0) == best
                for depth, slots in found:
                    assert slots == {slot for slot, count in common.items() if count >= depth}
    assert len(tree) == len(held)
    assert tree.count_nodes() <= 2 * len(held) + 2
    for slot in list(held):
        tree.remove(slot)
    assert tree.count_nodes() == 0
