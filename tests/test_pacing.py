"""Prompts are read in parts so small that texts which are written meanwhile do not stutter."""

import itertools
import statistics

import fakes
import pytest
from engines import make_engine, run

from gpt2core.engine import engine as engine_module
from gpt2core.engine.pacing import LEAST_TOKENS, Pacer
from gpt2core.errors import RequestError
from gpt2core.sampling.params import SamplingParams


class Clock:
    """Time that passes only while the backend computes: so much per step, and so much per token.

    A token costs more by `position_s` for each token before it.
    """

    def __init__(self, monkeypatch, *, step_s=0.02, token_s=0.002, position_s=0.0):
        self.now_s, self.step_s, self.token_s = 0.0, step_s, token_s
        self.position_s = position_s
        monkeypatch.setattr(engine_module.time, "perf_counter", lambda: self.now_s)

    def pass_step(self, batch):
        positions = sum(
            count * start + count * (count - 1) // 2
            for start, count in zip(batch.starts, batch.lengths, strict=True)
        )
        self.now_s += self.step_s + self.token_s * len(batch.tokens) + self.position_s * positions


def stream_beside_a_prompt(clock, stretch, *, prompt_tokens=900, streams=16):
    """Gaps between the tokens of streams, before a long prompt comes and from then on until it is read."""
    backend = fakes.FakeBackend(fakes.config(1024), fakes.endless, before=clock.pass_step)
    engine = make_engine(backend)
    if stretch is not None:
        engine.pace_prompts(stretch)
    for _ in range(streams):
        engine.submit([1, 2], SamplingParams(max_new_tokens=1000))
    times = []
    for _ in range(40):
        engine.step()
        times.append(clock.now_s)
    arrived = len(times)
    [long] = engine.submit([1] * prompt_tokens, SamplingParams(max_new_tokens=1))
    while not long.finished:
        engine.step()
        times.append(clock.now_s)
    gaps = [later - earlier for earlier, later in itertools.pairwise(times)]
    return gaps[2 : arrived - 1], gaps[arrived - 1 :], backend, engine


@pytest.mark.parametrize("streams", [1, 4, 16])
@pytest.mark.parametrize(
    "cost",
    [
        {"token_s": 0.0001},
        {"token_s": 0.001},
        {"token_s": 0.002},
        {"token_s": 0.004},
        {"token_s": 0.001, "position_s": 0.000003},
        {"token_s": 0.0002, "position_s": 0.000002},
    ],
    ids=str,
)
def test_no_gap_between_tokens_is_beyond_three_medians_while_a_long_prompt_is_read(
    monkeypatch, cost, streams
):
    before, during, _, _ = stream_beside_a_prompt(Clock(monkeypatch, **cost), 2.0, streams=streams)
    assert max(during) <= 3 * statistics.median(before)


def test_the_next_prompt_begins_with_parts_as_large_as_the_last_one_s_could_be(monkeypatch):
    clock = Clock(monkeypatch, token_s=0.0001)
    *_, backend, engine = stream_beside_a_prompt(clock, 2.0)
    first = len(backend.batches)
    [long] = engine.submit([1] * 900, SamplingParams(max_new_tokens=1))
    while not long.finished:
        engine.step()
    assert len(backend.batches) - first <= 6


def test_without_pacing_the_gap_is_that_of_the_whole_budget(monkeypatch):
    before, during, _, _ = stream_beside_a_prompt(Clock(monkeypatch), None)
    assert max(during) > 10 * statistics.median(before)


def test_a_prompt_takes_as_much_as_its_measured_cost_allows(monkeypatch):
    dear = stream_beside_a_prompt(Clock(monkeypatch, token_s=0.004), 2.0)[1]
    cheap = stream_beside_a_prompt(Clock(monkeypatch, token_s=0.0001), 2.0)[1]
    assert len(cheap) < 20 < len(dear) <= 900 / LEAST_TOKENS + 1


def test_pacing_changes_no_token(monkeypatch):
    texts = []
    for stretch in (None, 1.1, 2.0):
        _, _, backend, engine = stream_beside_a_prompt(
            Clock(monkeypatch), stretch, prompt_tokens=100, streams=3
        )
        run(engine)
        caches = backend.caches[0].histories
        texts.append([tuple(history) for history in caches])
    assert texts[0] == texts[1] == texts[2]


def test_every_prompt_advances_in_every_step_however_many_they_are(monkeypatch):
    clock = Clock(monkeypatch)
    backend = fakes.FakeBackend(fakes.config(256), fakes.endless, before=clock.pass_step)
    engine = make_engine(backend, max_slots=64)
    engine.pace_prompts(1.01)
    engine.submit([1], SamplingParams(max_new_tokens=200))
    for _ in range(5):
        engine.step()
    for _ in range(40):
        engine.submit([1] * 20, SamplingParams(max_new_tokens=1))
    while engine.running > 1 or engine.waiting:
        engine.step()
        if len(backend.batches[-1].lengths) > 1:
            assert min(backend.batches[-1].lengths) >= 1
            assert len(backend.batches[-1].lengths) == 41


def test_with_nobody_who_waits_for_it_a_prompt_takes_the_whole_budget(monkeypatch):
    clock = Clock(monkeypatch)
    backend = fakes.FakeBackend(fakes.config(1024), fakes.endless, before=clock.pass_step)
    engine = make_engine(backend)
    engine.pace_prompts(2.0)
    engine.submit([1] * 900, SamplingParams(max_new_tokens=1))
    engine.step()
    assert backend.batches[-1].lengths.tolist() == [512]


def test_one_slow_step_does_not_make_the_others_small_for_long():
    pacer = Pacer(2.0)
    for _ in range(10):
        pacer.observe(16, 0, 0.05)
        pacer.observe(16, 64, 0.1)
    usual = pacer.limit(16)
    pacer.observe(16, 64, 10.0)
    for _ in range(10):
        pacer.observe(16, 64, 0.1)
    assert pacer.limit(16) >= usual // 2


@pytest.mark.parametrize("stretch", [1, 0.5, float("nan"), float("inf")])
def test_a_stretch_that_means_nothing_is_refused(stretch):
    with pytest.raises(RequestError, match="above 1"):
        make_engine().pace_prompts(stretch)
