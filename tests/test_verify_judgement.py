"""What `verify` calls explained by rounding, and what it reads of a process that died."""

import numpy as np
import pytest

from gpt2core.reference import reference_logits
from gpt2core.sampling.draw import sample_token
from gpt2core.sampling.params import SamplingParams
from gpt2core.sampling.transforms import temper
from gpt2core.testing import random_config, random_weights
from gpt2core.testing.subject import TOLERANCE
from gpt2core.verify import _Judge
from gpt2core.verify.cases import cases_of, texts_of
from gpt2core.verify.compare import compare_texts, parting


def test_what_rounding_explains_is_how_far_it_can_move_the_share():
    """The worst case by trial: every logit of one half too high by the difference, all others too low."""
    weights, difference = random_weights(random_config()), 0.05
    for prompt, a, b in (([3, 5], 10, 200), ([7], 40, 41), ([9, 9, 9], 0, 256)):
        logits = reference_logits(weights, prompt)[-1]
        depth, share = parting(np.exp(temper(logits, 0.8)), a, b)
        size = (1 << (len(logits) - 1).bit_length()) >> depth
        ids = np.arange(len(logits))
        low, upper = min(a, b) // size * size, max(a, b) // (size // 2) * (size // 2)
        assert low < upper
        sign = np.where((ids >= low) & (ids < upper), 1, -1)
        moved = [
            abs(parting(np.exp(temper(logits + way * difference * sign, 0.8)), a, b)[1] - share)
            for way in (1, -1)
        ]
        (one,) = compare_texts(weights, prompt, 0.8, difference, ("numpy", [[a]]), [[b]]).disagreements
        assert one.numeric_difference == pytest.approx(max(moved), rel=1e-6)


def test_a_disagreement_at_the_border_is_within_the_margin_of_a_large_enough_difference():
    weights = random_weights(random_config())
    prompt = [3, 5]
    logits = reference_logits(weights, prompt)[-1]
    options = {"token_ids": prompt, "prompt_tokens": 2, "eos_token_ids": (), "seed": 0, "choice": 0}
    token = sample_token(logits, SamplingParams(temperature=0.8), **options)
    other = token ^ 1
    near = compare_texts(weights, prompt, 0.8, 5.0, ("numpy", [[token]]), [[other]])
    far = compare_texts(weights, prompt, 0.8, 1e-6, ("numpy", [[token]]), [[other]])
    (a,), (b,) = near.disagreements, far.disagreements
    assert (near.equal_texts, near.equal_tokens, near.tokens) == (0, 0, 1)
    assert (a.expected, a.got, a.margin) == (token, other, b.margin)
    assert a.margin == abs(a.uniform - a.share)
    assert (a.within, b.within) == (True, False)


def test_half_a_file_of_a_process_that_died_is_not_read(tmp_path):
    weights = random_weights(random_config())
    texts = texts_of([], 257, 96)
    judge = _Judge(
        weights=weights,
        tolerance=TOLERANCE,
        prompt_ids=[],
        cases=cases_of([len(text) for text in texts]),
        logits=[reference_logits(weights, text) for text in texts],
        trace=None,
    )
    np.save(tmp_path / "case-0.npy", np.zeros((96, 257), np.float32))
    whole = (tmp_path / "case-0.npy").read_bytes()
    (tmp_path / "case-0.npy").write_bytes(whole[: len(whole) // 2])
    report = judge.report("x", tmp_path, {"errors": ["its process was killed by SIGKILL"]})
    assert (report.status, report.reasons) == ("failed", ("its process was killed by SIGKILL",))
    assert report.comparisons == ()


def test_a_text_that_ended_early_is_never_within_the_margin():
    weights = random_weights(random_config())
    found = compare_texts(weights, [1], 0.8, 1e-3, ("numpy", [[4, 5]]), [[4]])
    (one,) = found.disagreements
    assert (one.index, one.expected, one.got, one.margin, one.within) == (1, 5, None, None, False)
