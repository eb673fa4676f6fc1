"""The same token on every processor: exact operations, and the same results without vector instructions."""

import hashlib
import json
import math
import os
import subprocess
import sys
from decimal import Decimal, localcontext

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy._core._multiarray_umath import __cpu_dispatch__, __cpu_features__

from gpt2core.sampling import transforms
from gpt2core.sampling.draw import SamplingParams, sample_token

# What follows was drawn with NumPy's own exp and sums: text `seed` of setting i has seeds 10 i to 10 i + 9.
SETTINGS = [
    {"temperature": 1.0},
    {"temperature": 0.7, "top_k": 40},
    {"temperature": 1.1, "top_p": 0.9},
    {"temperature": 1.0, "min_p": 0.2},
    {
        "temperature": 0.9,
        "top_k": 200,
        "top_p": 0.95,
        "min_p": 0.02,
        "repetition_penalty": 1.3,
        "presence_penalty": 1.5,
        "frequency_penalty": -0.5,
        "no_repeat_ngram_size": 2,
        "min_new_tokens": 4,
        "logit_bias": {0: 9.0, 700: 5.0},
    },
]
# fmt: off
TEXTS = [
    [
        [710, 137, 97, 755, 272, 154], [787, 481, 787, 24, 84, 242], [296, 367, 213, 178, 449, 348],
        [756, 805, 756, 333, 563, 814], [435, 232, 196, 949, 968, 145], [128, 903, 69, 412, 692, 354],
        [618, 948, 728, 573, 85, 924], [481, 394, 11, 585, 42, 586], [898, 605, 809, 121, 786, 249],
        [758, 376, 161, 445, 400, 545],
    ],
    [
        [97, 215, 461, 638, 473, 827], [66, 171, 422, 715, 50, 848], [20, 500, 429, 632, 518, 582],
        [189, 79, 282, 551, 970, 160], [204, 197, 488, 329, 653, 201], [526, 793, 399, 90, 279, 132],
        [204, 289, 398, 818, 644, 851], [618, 381, 461, 914, 202, 876], [66, 355, 487, 106, 742, 501],
        [848, 71, 97, 233, 160, 255],
    ],
    [
        [450, 105, 640, 296, 701, 43], [36, 166, 919, 922, 941, 975], [6, 773, 320, 420, 633, 749],
        [758, 224, 746, 317, 7, 403], [434, 348, 3, 769, 413, 694], [97, 844, 602, 964, 43, 411],
        [572, 757, 929, 189, 627, 840], [848, 546, 990, 178, 879, 994], [281, 633, 387, 318, 107, 69],
        [711, 743, 713, 363, 966, 359],
    ],
    [
        [618, 566, 503, 247, 791, 349], [281, 648, 120, 521, 152, 346], [5, 888, 839, 218, 28, 584],
        [205, 404, 902, 421, 962, 895], [343, 460, 667, 907, 837, 496], [143, 285, 321, 521, 368, 386],
        [879, 498, 245, 567, 560, 208], [634, 216, 576, 392, 581, 617], [848, 684, 402, 22, 635, 581],
        [281, 510, 601, 665, 424, 795],
    ],
    [
        [604, 700, 451, 176, 863, 393], [204, 810, 548, 984, 920, 0], [434, 700, 789, 791, 80, 0],
        [802, 492, 213, 700, 377, 0], [894, 708, 700, 138, 0, 57], [342, 621, 507, 295, 739, 417],
        [113, 525, 734, 880, 0, 762], [894, 494, 229, 748, 907, 371], [175, 92, 844, 671, 0, 609],
        [388, 553, 954, 800, 0, 624],
    ],
]
# fmt: on


def make_logits(token_ids):
    """997 numbers with many ties, exact in float32, that depend on the text."""
    return np.array(
        [
            ((i * 7919 + len(token_ids) * 104729 + token_ids[-1] * 611953) % 4093) / 256 - 8
            for i in range(997)
        ],
        np.float32,
    )


@pytest.mark.parametrize("number", range(len(SETTINGS)))
def test_seeds_give_the_same_texts_for_ever(number):
    params, drawn = SamplingParams(**SETTINGS[number]), []
    for seed in range(10 * number, 10 * number + 10):
        token_ids = [3, 5, 3]
        for _ in range(6):
            token = sample_token(
                make_logits(token_ids),
                params,
                token_ids=token_ids,
                prompt_tokens=3,
                eos_token_ids=[0],
                seed=seed,
                choice=0,
            )
            token_ids.append(token)
        drawn.append(token_ids[3:])
    assert drawn == TEXTS[number]


# On the border: each decision depends on the last bits of e**x, which vector instructions change.

BORDERS = """
import json, math
import numpy as np
from gpt2core.sampling.draw import SamplingParams, sample_token, transform_logits, uniform
from gpt2core.sampling.transforms import exp

text = {"token_ids": [0], "prompt_tokens": 1, "eos_token_ids": ()}

def count_kept(logits, **settings):
    params = SamplingParams(temperature=1, **settings)
    return int(np.isfinite(transform_logits(np.array(logits), params, **text)).sum())

drawn = []
for seed in range(200):
    u = uniform(seed, 0, 1)
    x = -abs(math.log(u / (1 - u)))
    for steps in range(-8, 9):
        y = x + steps * math.ulp(x)
        logits = np.array([0, y] if u > 0.5 else [y, 0])
        drawn.append(sample_token(logits, SamplingParams(temperature=1), **text, seed=seed, choice=0))
kept = []
for x in np.linspace(-8, -0.01, 2000).tolist():
    kept.append(count_kept([0, x], min_p=math.exp(x)))
    rest = math.exp(x) + math.exp(x - 1)
    kept.append(count_kept([0, x, x - 1], top_p=1 - rest / (1 + rest)))
weights = [w.hex() for w in exp(np.linspace(-760, 0, 20000)).tolist()]
print(json.dumps([drawn, kept, weights]))
"""


def run_borders(*, disabled):
    environment = os.environ | {"NPY_DISABLE_CPU_FEATURES": " ".join(disabled)}
    done = subprocess.run(
        [sys.executable, "-c", BORDERS], capture_output=True, text=True, env=environment, check=True
    )
    return json.loads(done.stdout)


def test_decisions_on_the_border_do_not_depend_on_the_processors_vector_instructions():
    found = [name for name in __cpu_dispatch__ if __cpu_features__.get(name)]
    assert run_borders(disabled=[]) == run_borders(disabled=found)


@pytest.mark.parametrize("settings", [{}, {"top_p": 0.75}, {"min_p": 1}], ids=str)
def test_where_rounding_could_decide_the_exact_weights_do(monkeypatch, settings):
    """MARGIN so wide that all is in doubt: the same tokens, of exact weights."""
    logits = np.random.default_rng(0).standard_normal((200, 500)).astype(np.float32)

    def draw_all():
        return [
            sample_token(
                row,
                SamplingParams(temperature=1, **settings),
                token_ids=[0],
                prompt_tokens=1,
                eos_token_ids=(),
                seed=seed,
                choice=0,
            )
            for seed, row in enumerate(logits)
        ]

    want, exactly = draw_all(), transforms.weigh_exactly
    calls = []
    monkeypatch.setattr(transforms, "MARGIN", 0.4)
    monkeypatch.setattr(transforms, "weigh_exactly", lambda *a: calls.append(0) or exactly(*a))
    assert draw_all() == want
    assert len(calls) >= len(logits)


# The exponential


def measure_ulps(x):
    got = transforms.exp(np.array(x, np.float64)).tolist()
    with localcontext() as context:
        context.prec, context.Emin = 50, -10000
        return [
            float(abs(Decimal(g) - Decimal(v).exp()) / Decimal(math.ulp(float(Decimal(v).exp()))))
            for g, v in zip(got, x, strict=True)
        ]


@given(st.lists(st.floats(-800, 0) | st.floats(-1, 0) | st.integers(-1100, 0).map(lambda k: k * math.log(2))))
def test_the_exponential_is_within_nine_tenths_of_an_ulp(x):
    assert max(measure_ulps([max(v, -800.0) for v in x]), default=0) < 0.9


def test_the_exponential_is_within_nine_tenths_of_an_ulp_everywhere():
    rng = np.random.default_rng(0)
    x = np.concatenate([-rng.exponential(5, 10_000), -rng.random(5_000) * 750, -(rng.random(5_000) ** 9)])
    assert max(measure_ulps(x.tolist())) < 0.9


def test_the_exponential_of_the_extremes():
    x = np.array([0.0, -0.0, -5e-324, -745.13, -745.14, -746, -1e300, -np.inf])
    assert transforms.exp(x).tolist() == [1, 1, 1, 5e-324, 0, 0, 0, 0]


def test_the_bits_of_the_exponential_are_pinned():
    weights = transforms.exp(-np.arange(20_000) / 27)
    assert hashlib.sha256(weights.astype("<f8").tobytes()).hexdigest()[:16] == "d21feb4c3538cd85"


def test_equal_numbers_have_equal_exponentials_wherever_they_stand():
    for length in range(1, 40):
        assert len(set(transforms.exp(np.full(length, -1.2345)).tolist())) == 1


def test_a_sum_in_order_is_from_left_to_right():
    values = np.random.default_rng(0).random(1000)
    total = 0.0
    for value in values.tolist():
        total += value
    assert transforms.add_in_order(values) == total
    assert transforms.add_in_order(values[:0]) == 0
