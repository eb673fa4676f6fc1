"""The bundled model: equal to transformers, one text on every backend however it is asked for, small, and a
writer of stories that end."""

import functools
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, GPT2LMHeadModel

import gpt2core
from gpt2core import GPT2, SamplingParams
from gpt2core.engine.engine import Engine

DEMO = Path(gpt2core.__file__).parent / "demo"
BACKENDS = ("numpy", "native", "torch", "onnx", "jax")
PROMPTS = [
    "Once upon a time",
    "In a galaxy far, far away",
    "The king had three daughters, and the youngest",
    "There was once a poor woodcutter who lived",
    '"Who are you?" asked the wolf.',
    "Dorothy looked at the Scarecrow",
    "Far out in the sea the water is as blue",
    "A Fox",
    "The little mermaid",
    "Long, long ago, in the days when",
    "The giant laughed so loudly that",
    "Alice was beginning to get very",
    "He opened the door, and there stood",
    "In the middle of the forest",
    "The old woman said:",
    "When the sun rose the next morning,",
    "No one knew where the prince",
    "It was winter, and the snow",
    "The ship sailed",
    "1234 Überraschung, naïve café!",
]
SAMPLED = {"max_new_tokens": 40, "temperature": 0.8, "top_p": 0.95}


@pytest.fixture(scope="module", params=BACKENDS)
def model(request):
    with GPT2.from_pretrained("demo", backend=request.param) as model:
        yield model


@pytest.fixture(scope="module")
def alone():
    """What each prompt gives by itself on NumPy, with its own seed."""
    with GPT2.from_pretrained("demo", backend="numpy") as model:
        return [model.generate(p, seed=i, **SAMPLED).token_ids for i, p in enumerate(PROMPTS)]


@functools.cache
def greedy_by_transformers():
    """(token ids, text) of transformers after each prompt."""
    theirs = GPT2LMHeadModel.from_pretrained(DEMO, attn_implementation="eager", dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(DEMO)
    results = []
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        want = theirs.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=200, do_sample=False, pad_token_id=0
        )[0, ids.shape[1] :]
        results.append((want.tolist(), tokenizer.decode(want, skip_special_tokens=True)))
    return results


def test_greedy_text_equals_transformers_for_200_tokens_from_20_prompts(model):
    ours = model.generate(PROMPTS, max_new_tokens=200)
    for prompt, generation, want in zip(PROMPTS, ours, greedy_by_transformers(), strict=True):
        assert (generation.token_ids, generation.text) == want, prompt


@pytest.mark.parametrize("size", range(1, 17))
def test_same_seed_same_tokens_in_batches_of_1_to_16_in_any_order_of_arrival(model, alone, size):
    """Requests arrive between steps, shuffled, beside rows that are cancelled in mid-flight."""
    rng = random.Random(size)
    engine = Engine(model.backend, model.tokenizer, max_slots=size, step_tokens=rng.choice([8, 64, 512]))
    arrivals = rng.sample(range(len(PROMPTS)), len(PROMPTS))
    running, victims = {}, []
    while arrivals or engine.running or engine.waiting:
        for _ in range(rng.randint(0, 3)):
            if arrivals:
                i = arrivals.pop()
                ids = model.tokenizer.encode(PROMPTS[i])
                (running[i],) = engine.submit(ids, SamplingParams(seed=i, **SAMPLED))
        if rng.random() < 0.1:
            victims += engine.submit([rng.randrange(4096)], SamplingParams(seed=99, **SAMPLED))
        if victims and rng.random() < 0.2:
            engine.cancel(victims.pop())
        engine.step()
    got = [running[i].generated for i in range(len(PROMPTS))]
    assert got == alone
    engine.close()


def test_same_seed_same_tokens_streamed(model, alone):
    for i, prompt in enumerate(PROMPTS[:6]):
        pieces = list(model.stream(prompt, seed=i, **SAMPLED))
        assert [piece.token_id for piece in pieces] == alone[i]
        assert "".join(piece.text for piece in pieces) == model.generate(prompt, seed=i, **SAMPLED).text


SEEDS, OPEN = (
    10,
    {"max_new_tokens": 100, "temperature": 0.8},
)  # from all of the vocabulary; .ci/run verifies 50


@functools.cache
def seeded_one_by_one():
    with GPT2.from_pretrained("demo", backend="numpy", max_batch=1) as model:
        return [model.generate("Once upon a time", seed=s, **OPEN).token_ids for s in range(SEEDS)]


def test_ten_seeds_give_the_tokens_of_numpy_one_by_one_in_a_batch_on_every_backend(model):
    engine, ids = Engine(model.backend, model.tokenizer), model.tokenizer.encode("Once upon a time")
    sequences = [engine.submit(ids, SamplingParams(seed=s, **OPEN))[0] for s in range(SEEDS)]
    while engine.running or engine.waiting:
        engine.step()
    assert [s.generated for s in sequences] == seeded_one_by_one()


def test_stories_end_by_themselves():
    """On one backend: the tests above hold the others to the same tokens."""
    with GPT2.from_pretrained("demo", backend="onnx") as model:
        generations = model.generate(
            "A Fox once saw", n=20, seed=1, temperature=0.8, top_p=0.95, max_new_tokens=400
        )
    ended = [g for g in generations if g.finish_reason == "stop"]
    assert len(ended) >= 12
    assert all(g.token_ids[-1] in model.config.eos_token_ids for g in ended)
    assert all("endoftext" not in g.text for g in generations)


def test_the_end_is_likely_after_a_last_sentence_and_not_in_the_midst(model):
    def p_end(text):
        logits = model.logits(model.tokenizer.encode(text))[-1].astype(np.float64)
        p = np.exp(logits - logits.max())
        return p[0] / p.sum()

    assert p_end("And so they lived happily ever after.") > 0.1
    assert p_end("Once upon a time there was a king who had three daughters.") < 0.01


def test_the_model_predicts_english_stories_better_than_shuffled_ones(model):
    text = (
        "The king sent for his daughter, and told her that she must marry the first man to come to the gate. "
        "She wept bitterly, but the king would not change his mind."
    )
    words = text.split()
    random.Random(0).shuffle(words)
    told, shuffled = model.score(text), model.score(" ".join(words))
    assert told.bits_per_byte < 1.6
    assert shuffled.bits_per_byte > told.bits_per_byte + 1


def test_the_checkpoint_is_small_and_in_the_standard_layout():
    files = {path.name: path.stat().st_size for path in DEMO.iterdir() if path.is_file()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "MODEL_CARD.md"} <= set(files)
    assert sum(files.values()) <= 13_000_000
