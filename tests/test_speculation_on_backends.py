"""Speculation through the facade and the example, and on every backend."""

import runpy
import sys
from itertools import product
from pathlib import Path

import fakes
import pytest
from engines import TOKENIZER, run
from speculating import PROMPT, big, walk

from gpt2core import testing
from gpt2core.backends import available, create_backend
from gpt2core.backends.base import EstimatesCost
from gpt2core.engine.engine import Engine
from gpt2core.engine.speculation import LENGTHS
from gpt2core.model import GPT2
from gpt2core.sampling.params import SamplingParams


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return testing.random_checkpoint(tmp_path_factory.mktemp("tiny"), n_positions=128, vocab_size=257)


@pytest.mark.parametrize("temperature", [0, 0.8])
def test_a_stream_joins_to_the_same_text_piece_by_piece(temperature):
    def make(**options):
        return GPT2(fakes.FakeBackend(big(256), walk), TOKENIZER, **options)

    options = {"max_new_tokens": 200, "temperature": temperature, "seed": 5, "stop": "fff", "logprobs": 1}
    want = make().generate(PROMPT, **options)
    model = make(speculation="prompt_lookup")
    pieces = list(model.stream(PROMPT, **options))
    again = model.generate(PROMPT, **options)
    assert [piece.token_id for piece in pieces] == want.token_ids == again.token_ids
    assert "".join(piece.text for piece in pieces) == want.text == again.text
    assert pieces[-1].finish_reason == want.finish_reason
    assert (want.timing.proposed_tokens, want.timing.accepted_tokens) == (0, 0)
    assert 0 < again.timing.accepted_tokens <= again.timing.proposed_tokens
    assert model.speculated == (2 * again.timing.proposed_tokens, 2 * again.timing.accepted_tokens)


def test_leaving_a_stream_in_the_midst_of_an_accepted_proposal_frees_its_slot():
    backend = fakes.FakeBackend(big(), fakes.scripted({bytes(PROMPT): b"abc" * 20}))
    with GPT2(backend, TOKENIZER, speculation="prompt_lookup", max_batch=1) as model:
        for _ in model.stream(PROMPT, max_new_tokens=50):
            if model.speculated[1] > 3:
                break
        assert (model.engine.running, model.engine.waiting) == (0, 0)
        assert model.generate(PROMPT, max_new_tokens=50).text == "abc" * 16 + "ab"


@pytest.mark.parametrize("backend", available())
def test_every_backend_has_a_price_at_which_a_single_text_gains(folder, backend):
    from gpt2core.checkpoint.open import open_checkpoint

    made = create_backend(backend, open_checkpoint(folder).weights, threads=1)
    assert isinstance(made, EstimatesCost)
    costs = [made.extra_tokens_cost(n, 1) for n in LENGTHS]
    assert sorted(costs) == costs
    assert all(0 < cost < n for n, cost in zip(LENGTHS, costs, strict=True))


@pytest.mark.parametrize("backend", available())
def test_every_backend_gives_the_same_tokens_with_and_without(folder, backend):
    from gpt2core.checkpoint.open import open_checkpoint

    weights = open_checkpoint(folder).weights
    prompts = [[5, 6, 7, 8] * 5, [9] * 12]
    small = create_backend("numpy", weights, threads=1)
    results = []
    for options in ({}, {"speculation": "prompt_lookup"}, {"draft": small}):
        engine = Engine(create_backend(backend, weights, threads=1), **options)
        results.append([])
        for prompt, temperature in product(prompts, (0, 0.5)):
            params = SamplingParams(max_new_tokens=60, temperature=temperature, seed=1, logit_bias={0: -100})
            [request] = engine.submit(prompt, params)
            run(engine)
            results[-1].append(request.generated)
        if options:
            assert engine.proposed_tokens > 0
    assert results[1] == results[0]
    assert results[2] == results[0]


def test_the_example_measures_five_texts_and_single_passes(folder, monkeypatch, capsys):
    script = str(Path(__file__).parent.parent / "examples/speculation.py")
    args = [str(folder), "--backend", "numpy", "--threads", "1", "--rounds", "1", "--new-tokens", "40"]
    monkeypatch.setattr(sys, "argv", [script, *args])
    runpy.run_path(script, run_name="__main__")
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| ")][1:]
    assert [row[0] for row in rows] == [
        "| repeating",
        "| unrelated",
        "| misleading",
        "| the model's own, greedy",
        "| the model's own, temperature 0.8",
    ]
    assert {row[-1] for row in rows} == {"1 of 1 |"}  # the same tokens
    accepted = [row[-2].split(" of ") for row in rows]
    assert int(accepted[0][0]) == int(accepted[0][1]) > 20
    assert accepted[1] == ["0", "0"]
    assert int(accepted[2][0]) == 0 < int(accepted[2][1])
    monkeypatch.setattr(sys, "argv", [script, *args, "--passes"])
    runpy.run_path(script, run_name="__main__")
    assert [line.split()[1] for line in capsys.readouterr().out.splitlines()[2:]] == [
        "1",
        "2",
        "4",
        "8",
        "16",
    ]
