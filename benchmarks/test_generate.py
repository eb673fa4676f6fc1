"""Macro benchmarks: what a caller of the library waits for."""

import pytest

TOKENS = 16


@pytest.mark.parametrize("prompts", [1, 8])
def test_generate(benchmark, model, shape, prompts):
    """`generate` of 16 tokens for each prompt, batched."""
    benchmark.group = f"generate {TOKENS} tokens, {shape}, {prompts} prompts"
    ids = [[1, 2, 3, 4 + i] for i in range(prompts)]
    options = {"max_new_tokens": TOKENS, "min_new_tokens": TOKENS, "temperature": 0.8, "seed": 7}
    model.generate(ids, **options)
    results = benchmark(model.generate, ids, **options)
    assert [len(result.token_ids) for result in results] == [TOKENS] * prompts


def test_first_token(benchmark, model, shape):
    """From the call to the first token, warm."""
    benchmark.group = f"first token, {shape}"
    model.generate([1] * 8, max_new_tokens=1)
    result = benchmark(model.generate, [1] * 8, max_new_tokens=1)
    assert len(result.token_ids) == 1


def test_stream(benchmark, model, shape):
    """`stream` of 16 tokens, piece by piece."""
    benchmark.group = f"stream {TOKENS} tokens, {shape}"

    def stream():
        return sum(1 for _ in model.stream([1, 2, 3], max_new_tokens=TOKENS, min_new_tokens=TOKENS))

    stream()
    assert benchmark(stream) >= 1
