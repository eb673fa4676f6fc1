"""What the library itself costs, without a model: sampling, tokenizer, the engine's loop."""

import numpy as np
import pytest

from gpt2core import GPT2, Engine, SamplingParams
from gpt2core.engine.prefix_tree import PrefixTree, pack
from gpt2core.sampling.draw import sample_token
from gpt2core.testing import random_config

VOCABULARIES = {"tiny": 257, "small": 50257}
SAMPLING = {
    "greedy": {},
    "temperature": {"temperature": 0.8},
    "top-k 50": {"temperature": 0.8, "top_k": 50},
    "top-p 0.95": {"temperature": 0.8, "top_p": 0.95},
    "penalties": {"temperature": 0.8, "repetition_penalty": 1.2, "no_repeat_ngram_size": 3},
}
TEXT = "Once upon a time there was a little girl who lived in a small house. " * 20


@pytest.mark.parametrize("params", SAMPLING)
@pytest.mark.parametrize("size", VOCABULARIES)
def test_sampling(benchmark, size, params):
    """One token from one row of logits."""
    benchmark.group = f"sampling, {size}, vocabulary {VOCABULARIES[size]}"
    logits = np.random.default_rng(0).normal(0, 1.5, VOCABULARIES[size]).astype(np.float32)
    options = SamplingParams(**SAMPLING[params])
    given = {
        "token_ids": list(range(100)),
        "prompt_tokens": 50,
        "eos_token_ids": (0,),
        "seed": 7,
        "choice": 0,
    }
    token = benchmark(lambda: sample_token(logits, options, **given))
    assert 0 <= token < VOCABULARIES[size]


@pytest.fixture(scope="module")
def demo():
    """The bundled model, for its tokenizer."""
    with GPT2.from_pretrained("demo", backend="numpy") as model:
        yield model


def test_encode(benchmark, demo):
    """A text of 1.4 kB to token ids."""
    benchmark.group = "tokenizer, tiny text"
    assert demo.tokenizer.decode(benchmark(demo.tokenizer.encode, TEXT)) == TEXT


def test_decode(benchmark, demo):
    """The same back to text."""
    benchmark.group = "tokenizer, tiny text"
    ids = demo.tokenizer.encode(TEXT)
    assert benchmark(demo.tokenizer.decode, ids) == TEXT


def test_decode_token_by_token(benchmark, demo):
    """The same as a stream does it."""
    benchmark.group = "tokenizer, tiny text"
    ids = demo.tokenizer.encode(TEXT)

    def decode():
        decoder = demo.tokenizer.stream_decoder()
        return "".join([decoder.push(i) for i in ids]) + decoder.flush()

    assert benchmark(decode) == TEXT


class Instant:
    """A backend that has its logits ready: what remains is the engine."""

    name = "instant"

    def __init__(self):
        self.config = random_config("tiny")
        self._logits = np.zeros((64, self.config.vocab_size), np.float32)
        self._logits[:, 5] = 1

    def new_cache(self, slots, capacity):
        """Nothing to keep."""
        return object()

    def forward(self, batch, cache):
        """The same for every token."""
        return self._logits[: len(batch.logits_at)]

    def close(self):
        """Nothing to free."""


@pytest.mark.parametrize("batch", [1, 8, 32])
def test_engine_step(benchmark, batch):
    """The engine's own part of a decoding step: plan, batch, greedy draw, record."""
    benchmark.group = f"engine overhead per step, tiny, batch {batch}"
    engine = Engine(Instant(), max_slots=batch)
    params = SamplingParams(max_new_tokens=80)

    def fill():
        for one in fill.sequences:
            engine.cancel(one)
        fill.sequences = [engine.submit([1, 2], params)[0] for _ in range(batch)]
        engine.step()  # the prompts

    fill.sequences = []

    def steps():
        for _ in range(50):
            engine.step()

    rounds = 20 if benchmark.enabled else 1
    benchmark.extra_info["steps per round"] = 50
    benchmark.pedantic(steps, setup=fill, rounds=rounds)
    fill()
    steps()
    assert [len(one.generated) for one in fill.sequences] == [51] * batch


@pytest.mark.parametrize("prefixes", [10, 1000])
def test_prefix_lookup(benchmark, prefixes):
    """A prompt of 900 tokens in the texts of so many slots, which share beginnings of every length."""
    benchmark.group = "prefix cache, lookup"
    rng = np.random.default_rng(0)
    tree = PrefixTree()
    texts = [rng.integers(0, 50257, 900).tolist()]
    for slot in range(prefixes):
        before = texts[rng.integers(len(texts))]
        cut = int(rng.integers(900))
        texts.append([*before[:cut], *rng.integers(0, 50257, 900 - cut).tolist()])
        tree.insert(slot, pack(texts[-1]), "")
    probe = texts[prefixes // 2]
    found = benchmark(lambda: tree.find(pack(probe), ""))
    assert found[-1][0] == 900
