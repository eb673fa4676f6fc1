"""Logits and greedy texts against Hugging Face transformers, eager attention, at every position."""

import numpy as np
import pytest
import torch
from transformers import GPT2LMHeadModel

from gpt2core.backends import create_backend
from gpt2core.batch import Batch
from gpt2core.checkpoint.open import open_checkpoint
from gpt2core.testing import VARIANTS, random_checkpoint
from gpt2core.testing.conformance import TOLERANCE

BACKENDS = ("numpy", "native", "torch", "onnx", "jax")


def hugging_face(folder):
    return GPT2LMHeadModel.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32).eval()


@torch.inference_mode()
def hugging_face_logits(folder, tokens):
    return hugging_face(folder)(torch.tensor([tokens])).logits[0].numpy()


def our_logits(backend, weights, tokens, chunk):
    """Logits at every position, prefilled in chunks, the second half token by token."""
    engine = create_backend(backend, weights)
    cache, half, got, start = engine.new_cache(1, weights.config.n_positions), len(tokens) // 2, [], 0
    while start < len(tokens):
        count = min(chunk, half - start) if start < half else 1
        batch = Batch.of([(tokens[start : start + count], start, 0)], logits_at=range(count))
        got.append(engine.forward(batch, cache))
        start += count
    return np.concatenate(got)


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_equal_transformers_on_every_variant_up_to_the_full_context(tmp_path, variant):
    folder = random_checkpoint(tmp_path, "tiny", **VARIANTS[variant])
    checkpoint = open_checkpoint(folder)
    tokens = np.random.default_rng(3).integers(0, 257, checkpoint.config.n_positions).tolist()
    want = hugging_face_logits(folder, tokens)
    for backend in BACKENDS:
        got = our_logits(backend, checkpoint.weights, tokens, chunk=17)
        np.testing.assert_allclose(got, want, rtol=0, atol=TOLERANCE, err_msg=f"{backend}, {variant}")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_files_equal_transformers(tmp_path, dtype):
    folder = random_checkpoint(tmp_path, "tiny", dtype=dtype)
    tokens = np.random.default_rng(4).integers(0, 257, 60).tolist()
    got = our_logits("numpy", open_checkpoint(folder).weights, tokens, chunk=60)
    np.testing.assert_allclose(got, hugging_face_logits(folder, tokens), rtol=0, atol=TOLERANCE)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """GPT-2 small's shape: its weights, a full context of tokens and transformers' logits there."""
    folder = random_checkpoint(tmp_path_factory.mktemp("small"), "small")
    tokens = np.random.default_rng(5).integers(0, 50257, 1024).tolist()
    return open_checkpoint(folder).weights, tokens, hugging_face_logits(folder, tokens)


@pytest.mark.parametrize("backend", BACKENDS)
def test_logits_equal_transformers_on_gpt2_smalls_shape_up_to_the_full_context(small, backend):
    weights, tokens, want = small
    engine = create_backend(backend, weights)
    cache = engine.new_cache(2, 1024)
    for start, count in ((0, 300), (300, 717), (1017, 1), (1018, 6)):
        batch = Batch.of([(tokens[start : start + count], start, 1)], logits_at=range(count))
        got = engine.forward(batch, cache)
        np.testing.assert_allclose(got, want[start : start + count], rtol=0, atol=TOLERANCE)
