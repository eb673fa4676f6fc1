"""What changes logits before a token is drawn: pure functions of NumPy arrays, one per transform.

`TRANSFORMS` edit a float64 array in place, in their order; `weigh` says what is left to draw from.
`gpt2core.sampling.draw.transform_logits` documents the order.

What is drawn is the same on every processor. NumPy's `exp` and sums are not: their last bits depend on the
vector instructions in use. So they decide only where a relative error of `MARGIN` could not change the
decision; elsewhere `exp` and `add_in_order` do, which consist of operations that IEEE 754 defines to the last
bit.
"""

# V vocabulary, T tokens so far, G generated so far, K kept tokens

import math
from collections.abc import Callable, Collection, Sequence
from typing import Final, NamedTuple

import numpy as np

from gpt2core._shapes import Float, Float64, Int
from gpt2core.sampling.params import SamplingParams

Logits = Float64[np.ndarray, "V"]

MARGIN: Final = 1e-9
"""Relative. NumPy's `exp` is within 4 ulp, says its pull request 19478; a sum of 2**22 numbers, in any order,
within 5e-10."""


class History(NamedTuple):
    """What the transforms look at.

    Attributes:
        params: which transforms apply, and how strongly.
        token_ids: prompt and text so far.
        prompt_tokens: how many of them are the prompt.
        eos_token_ids: the tokens that end a text.
    """

    params: SamplingParams
    token_ids: Sequence[int]
    prompt_tokens: int
    eos_token_ids: Collection[int]

    @property
    def tokens(self) -> Int[np.ndarray, "T"]:
        """Prompt and text as an array."""
        return np.asarray(self.token_ids, np.int64)


def add_bias(logits: Logits, history: History) -> None:
    """Add a constant to the logits of single tokens (`logit_bias` of OpenAI's API).

    Raises:
        InvalidSamplingError: it names a token outside the vocabulary.
    """
    history.params.check_vocabulary(len(logits))
    for token_id, value in history.params.logit_bias.items():
        logits[token_id] += value


def penalize_repetition(logits: Logits, history: History) -> None:
    """Divide the positive logits of tokens that occurred by the penalty, and multiply the negative ones.

    After Keskar et al. 2019, "CTRL", section 4.1, in the form of Hugging Face's
    `RepetitionPenaltyLogitsProcessor`: each token once, however often it occurred.
    """
    penalty = history.params.repetition_penalty
    seen = np.unique(history.tokens)
    seen = seen[seen < len(logits)]
    values = logits[seen]
    logits[seen] = np.where(values < 0, values * penalty, values / penalty)


def penalize_presence(logits: Logits, history: History) -> None:
    """Subtract `presence_penalty` from each generated token's logit, `frequency_penalty` for each occurrence.

    After the formula in OpenAI's API guide ("Frequency and presence penalties"); the prompt does not count.
    """
    params = history.params
    seen, counts = np.unique(history.tokens[history.prompt_tokens :], return_counts=True)
    inside = seen < len(logits)
    logits[seen[inside]] -= params.presence_penalty + params.frequency_penalty * counts[inside]


def ban_repeated_ngrams(logits: Float[np.ndarray, "V"], history: History) -> None:
    """Ban each token that would complete an n-gram that occurred already.

    After Paulus et al. 2017, "A Deep Reinforced Model for Abstractive Summarization", section 2.5, as Hugging
    Face's `NoRepeatNGramLogitsProcessor` does it.
    """
    tokens, size = history.tokens, history.params.no_repeat_ngram_size
    if len(tokens) < size:
        return
    windows = np.lib.stride_tricks.sliding_window_view(tokens, size)  # (T - size + 1, size)
    prefix = tokens[len(tokens) - size + 1 :]  # (size - 1,)
    banned = windows[(windows[:, :-1] == prefix).all(axis=1), -1]
    logits[banned[banned < len(logits)]] = -np.inf


def ban_end(logits: Float[np.ndarray, "V"], history: History) -> None:
    """Give the tokens that end a text probability 0; ids outside the vocabulary cannot be drawn anyway."""
    for token_id in history.eos_token_ids:
        if token_id < len(logits):
            logits[token_id] = -np.inf


class Transform(NamedTuple):
    """One step from the model's logits to those that a token is drawn from.

    Attributes:
        applies: whether it does anything.
        edit: changes logits in place.
        bans: whether -inf is all that it writes, so that float32 serves as well as float64.
    """

    applies: Callable[[History], bool]
    edit: Callable[[Float[np.ndarray, "V"], History], None]
    bans: bool = False


def _is_too_short(history: History) -> bool:
    return len(history.token_ids) - history.prompt_tokens < history.params.min_new_tokens


TRANSFORMS: Final = (
    Transform(lambda history: bool(history.params.logit_bias), add_bias),
    Transform(lambda history: history.params.repetition_penalty != 1, penalize_repetition),
    Transform(
        lambda history: history.params.presence_penalty != 0 or history.params.frequency_penalty != 0,
        penalize_presence,
    ),
    Transform(lambda history: history.params.no_repeat_ngram_size > 0, ban_repeated_ngrams, bans=True),
    Transform(_is_too_short, ban_end, bans=True),
)
"""In the order in which they act."""


def edit(logits: Float[np.ndarray, "V"], history: History) -> Float[np.ndarray, "V"]:
    """The logits after `TRANSFORMS`; the same array, not a copy, when none of them applies."""
    transforms = [transform for transform in TRANSFORMS if transform.applies(history)]
    if not transforms:
        return logits
    only_bans = all(transform.bans for transform in transforms)
    edited = logits.copy() if only_bans else logits.astype(np.float64)
    with np.errstate(over="ignore", invalid="ignore"):  # whoever draws from them looks for what overflowed
        for transform in transforms:
            transform.edit(edited, history)
    return edited


def temper(logits: Float[np.ndarray, "V"], temperature: float) -> Logits:
    """Logits relative to the greatest, which must be finite, divided by `temperature`, which must be above 0.

    Ackley et al. 1985, "A Learning Algorithm for Boltzmann Machines", section 2. With 0 as the greatest logit
    no temperature, however small, makes anything overflow but to -inf.
    """
    result = logits.astype(np.float64)
    result -= result.max()
    with np.errstate(over="ignore"):
        result /= temperature
    return result


def weigh(
    logits: Float[np.ndarray, "V"], *, temperature: float, top_k: int, top_p: float, min_p: float
) -> tuple[Int[np.ndarray, "K"] | None, Float64[np.ndarray, "K"]]:
    """The tokens that may be drawn, in ascending order (None = all), and their probabilities up to a factor.

    Each filter sees what the one before it left.

    - `top_k` (0 = off), Fan et al. 2018, "Hierarchical Neural Story Generation", section 5.4: the k likeliest
      tokens; those that tie with the k-th stay, as in Hugging Face's `TopKLogitsWarper`.
    - `top_p` (1 = off), Holtzman et al. 2020, "The Curious Case of Neural Text Degeneration", section 3.1:
      the smallest set of likeliest tokens whose probability reaches `top_p`; never empty. Of tokens that tie
      at the border the lower ids stay; Hugging Face's `TopPLogitsWarper` leaves that to an unstable sort.
    - `min_p` (0 = off), Nguyen et al. 2024, "Turning Up the Heat: Min-p Sampling", section 3: tokens at least
      `min_p` times as likely as the likeliest.
    """
    kept: Int[np.ndarray, "K"] | None = None
    left = logits
    if (
        0 < top_k < len(logits)
    ):  # before the temperature, which changes no order: so little is left to compute
        kth = np.partition(logits, len(logits) - top_k)[len(logits) - top_k]
        kept = np.flatnonzero(logits >= kth)
        left = logits[kept]
    weights = temper(left, temperature)
    np.exp(weights, out=weights)
    if top_p < 1:
        inside, certain = _nucleus(weights, top_p, weights.sum())
        if not certain:
            weights = weigh_exactly(left, temperature)
            inside, _ = _nucleus(weights, top_p, add_in_order(weights))
        kept, weights = inside if kept is None else kept[inside], weights[inside]
    if min_p > 0:  # the greatest weight is exp(0) = 1
        inside = np.flatnonzero(weights >= min_p * (1 - MARGIN))
        kept, weights = inside if kept is None else kept[inside], weights[inside]
        if weights.min() < min_p * (1 + MARGIN):
            weights = weigh_exactly(logits[kept], temperature)
            inside = np.flatnonzero(weights >= min_p)
            kept, weights = kept[inside], weights[inside]
    return kept, weights


def weigh_exactly(logits: Float[np.ndarray, "K"], temperature: float) -> Float64[np.ndarray, "K"]:
    """The probabilities up to a factor, the same to the last bit on every processor; slower than `np.exp`."""
    return exp(temper(logits, temperature))


def _nucleus(
    weights: Float64[np.ndarray, "V"], top_p: float, total: float
) -> tuple[Int[np.ndarray, "K"], bool]:
    """Indices of the nucleus, ascending, and whether a relative error of `MARGIN` could not change them."""
    # Tokens of less than the share (1 - top_p) / V come to less than 1 - top_p together: none is in the
    # nucleus. Halved, and less what sums are rounded by, the result is that of sorting all.
    least = max((1 - top_p) / 2 - MARGIN, 0) * total / len(weights)
    descending = np.sort(weights[weights > least])[::-1]
    covered = np.cumsum(descending)
    count = min(1 + int(np.searchsorted(covered, top_p * total, side="left")), len(covered))
    border = descending[count - 1]
    inside = weights > border
    ties = np.flatnonzero(weights == border)
    inside[ties[: count - np.count_nonzero(inside)]] = True
    certain = (
        abs(covered[max(count - 2, 0) : count] - top_p * total).min() > MARGIN * total
        and (count == 1 or border < descending[count - 2] * (1 - MARGIN))
        and (count == len(descending) or descending[count] < border * (1 - MARGIN))
    )
    return np.flatnonzero(inside), bool(certain)


_LN2_HIGH: Final = float.fromhex("0x1.62e42feep-1")  # 33 bits: exact times an integer of up to 20
_LN2_LOW: Final = float.fromhex("0x1.a39ef35793c76p-33")
_TAYLOR: Final = tuple(1 / math.factorial(i) for i in range(13, 1, -1))  # of degree 11 to 0


def exp(x: Float64[np.ndarray, "K"]) -> Float64[np.ndarray, "K"]:
    """The exponential of numbers up to 0, within 0.9 ulp, the same to the last bit on every processor.

    e**x = 2**k * e**r with k = x / ln 2 rounded, so that |r| < 0.35. The reduction is that of Cody and Waite
    1980, "Software Manual for the Elementary Functions", chapter 6; e**r is its Taylor polynomial of degree
    13, which leaves less than 5e-18. It takes additions, multiplications, `rint` and `ldexp` only, all of
    which IEEE 754 rounds correctly, and one per call of NumPy, so that no compiler can fuse two of them.
    """
    x = np.maximum(x, -746.0)  # from here on down it is 0
    k = np.rint(x * 1.4426950408889634)
    high, low = x - k * _LN2_HIGH, k * _LN2_LOW
    r = high - low
    result = np.full_like(r, _TAYLOR[0])
    for coefficient in _TAYLOR[1:]:
        result *= r
        result += coefficient
    result *= r * r  # e**r - 1 - r, to which the parts of r and 1 come last: so little is rounded
    result -= low
    result += high
    result += 1
    return np.ldexp(result, k.astype(np.int32))


def add_in_order(values: Float64[np.ndarray, "K"]) -> float:
    """The sum from left to right, as `np.cumsum` is defined; the order of `np.sum` is NumPy's choice."""
    return float(np.cumsum(values)[-1]) if len(values) else 0.0


def log_softmax(logits: Float[np.ndarray, "V"]) -> Logits:
    """Logarithms of the probabilities, in float64.

    NumPy's `exp` and `log`: between processors the last bits may differ, by less than 1e-12.
    """
    shifted = logits.astype(np.float64)
    shifted -= shifted.max()
    shifted -= np.log(np.exp(shifted).sum())
    return shifted
