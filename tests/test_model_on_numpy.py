"""GPT2 from a folder on disk, on NumPy and others, from end to end."""

import numpy as np
import pytest
from engines import HOT, start

from gpt2core import testing
from gpt2core.backends import create_backend
from gpt2core.batch import Batch
from gpt2core.errors import (
    BackendUnavailableError,
    CheckpointError,
    RequestError,
)
from gpt2core.model import GPT2
from gpt2core.reference import reference_logits
from gpt2core.sampling.draw import sample_token
from gpt2core.sampling.params import SamplingParams


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return testing.random_checkpoint(tmp_path_factory.mktemp("tiny"), seed=5, n_positions=64)


@pytest.fixture(scope="module")
def tiny(folder):
    with GPT2.from_pretrained(folder, backend="numpy", threads=1) as loaded:
        yield loaded


def test_from_pretrained_loads_what_lies_in_a_folder(tiny):
    assert tiny.backend.name == "numpy"
    assert tiny.config.n_positions == 64
    assert tiny.tokenizer.decode(tiny.tokenizer.encode("häh")) == "häh"


def test_auto_takes_the_backend_that_the_registry_chooses(folder, monkeypatch):
    monkeypatch.delenv("GPT2CORE_BACKEND", raising=False)
    with GPT2.from_pretrained(folder) as loaded:
        assert loaded.backend.name == "numpy"


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"backend": "nonesuch"}, BackendUnavailableError, "'nonesuch'; known are auto, numpy"),
        ({"precision": "float7"}, RequestError, "precision 'float7' is unknown"),
        ({"threads": 0}, RequestError, "threads"),
        ({"max_batch": 0}, RequestError, "max_slots is 0"),
    ],
)
def test_from_pretrained_refuses_what_it_cannot_do(folder, options, kind, message):
    with pytest.raises(kind, match=message):
        GPT2.from_pretrained(folder, **({"backend": "numpy"} | options))


def test_from_pretrained_names_a_folder_that_is_no_checkpoint(tmp_path):
    with pytest.raises(CheckpointError, match=r"config\.json"):
        GPT2.from_pretrained(tmp_path)


@pytest.mark.parametrize("options", [{"temperature": 0.0}, {"temperature": 1.3, "top_p": 0.9, "seed": 11}])
def test_generate_equals_a_loop_over_forward_and_sample_token(tiny, options):
    params = SamplingParams(max_new_tokens=40, **options)
    prompt = tiny.tokenizer.encode("Once upon a time")
    cache = tiny.backend.new_cache(1, 64)
    tokens, cached = list(prompt), 0
    while len(tokens) < len(prompt) + 40:
        logits = tiny.backend.forward(Batch.of([(tokens[cached:], cached, 0)]), cache)
        cached = len(tokens)
        token = sample_token(
            logits[0],
            params,
            token_ids=tokens,
            prompt_tokens=len(prompt),
            eos_token_ids=tiny.config.eos_token_ids,
            seed=params.seed or 0,
            choice=0,
        )
        tokens.append(token)
        if token in tiny.config.eos_token_ids:
            break
    assert tiny.generate("Once upon a time", params).token_ids == tokens[len(prompt) :]


def test_greedy_text_equals_that_of_transformers(folder, tiny, request):
    import torch
    from transformers import GPT2LMHeadModel

    threads = torch.get_num_threads()
    request.addfinalizer(lambda: torch.set_num_threads(threads))
    torch.set_num_threads(1)  # two threads that spin for each other are slow on a busy machine
    theirs = GPT2LMHeadModel.from_pretrained(folder, attn_implementation="eager").eval()
    for text in ("Once", "upon a time", "The quick brown fox", "Zoë"):
        ids = tiny.tokenizer.encode(text)
        with torch.no_grad():
            want = theirs.generate(
                torch.tensor([ids]),
                do_sample=False,
                max_new_tokens=40,
                pad_token_id=tiny.config.eos_token_ids[0],
            )
        assert tiny.generate(text, max_new_tokens=40).token_ids == want[0, len(ids) :].tolist()


def test_logits_and_score_agree_with_the_reference(folder, tiny):
    from gpt2core.checkpoint.open import open_checkpoint

    ids = [(11 * i) % 257 for i in range(64)]
    want = reference_logits(open_checkpoint(folder).weights, ids)
    np.testing.assert_allclose(tiny.logits(ids), want, atol=2e-4)
    logprobs = want - np.log(np.exp(want).sum(-1, keepdims=True))
    np.testing.assert_allclose(tiny.score(ids).logprobs, logprobs[np.arange(63), ids[1:]], atol=2e-4)


@pytest.mark.parametrize("backend", ["numpy", "native", "torch"])
def test_the_same_seed_gives_the_same_text_batched_streamed_and_on_every_backend(folder, tiny, backend):
    from gpt2core.checkpoint.open import open_checkpoint

    prompts = ["a", "Once upon", "b" * 20, "Zoë", "the end", "x", "yz"]
    want = [tiny.generate(p, max_new_tokens=25, temperature=0.9, seed=4).text for p in prompts]
    weights = open_checkpoint(folder).weights
    with GPT2(create_backend(backend, weights, threads=1), tiny.tokenizer, max_batch=3) as model:
        batched = model.generate(prompts, max_new_tokens=25, temperature=0.9, seed=4)
        assert [g.text for g in batched] == want
        pieces = list(model.stream(prompts, max_new_tokens=25, temperature=0.9, seed=4))
        assert ["".join(p.text for p in pieces if p.prompt == i) for i in range(len(prompts))] == want


def test_16_threads_on_numpy_get_what_one_gets(tiny):
    prompts = [f"thread {t}" for t in range(16)]
    want = [tiny.generate(p, max_new_tokens=12, **HOT).token_ids for p in prompts]
    started = [
        start(lambda p=p: [tiny.generate(p, max_new_tokens=12, **HOT).token_ids for _ in range(5)])
        for p in prompts
    ]
    for thread, _ in started:
        thread.join(60)
    assert [got[0] for _, got in started] == [[tokens] * 5 for tokens in want]
