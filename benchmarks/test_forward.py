"""Forward passes of each backend: decoding steps and prefill."""

import pytest

from gpt2core import Batch


@pytest.mark.parametrize("batch", [1, 8])
def test_step(benchmark, model, shape, batch):
    """One decoding step of `batch` sequences behind 32 tokens each."""
    benchmark.group = f"step, {shape}, batch {batch}"
    cache = model.backend.new_cache(batch, 64)
    model.backend.forward(Batch.of([([1] * 32, 0, slot) for slot in range(batch)]), cache)
    step = Batch.of([([2], 32, slot) for slot in range(batch)])
    model.backend.forward(step, cache)  # compiles, where something does
    logits = benchmark(model.backend.forward, step, cache)
    assert logits.shape == (batch, model.config.vocab_size)


@pytest.mark.parametrize("tokens", [16, 64])
def test_prefill(benchmark, model, shape, tokens):
    """A prompt of `tokens` tokens at once."""
    benchmark.group = f"prefill, {shape}, {tokens} tokens"
    cache = model.backend.new_cache(1, 64)
    prompt = Batch.of([([1 + i % 200 for i in range(tokens)], 0, 0)])
    model.backend.forward(prompt, cache)
    logits = benchmark(model.backend.forward, prompt, cache)
    assert logits.shape == (1, model.config.vocab_size)
