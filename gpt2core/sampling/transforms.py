"""What changes logits before a token is drawn: pure functions of NumPy arrays, one per transform.

The functions of the first half edit a float64 array in place; `weigh` says what is left to draw from.
`gpt2core.sampling.draw.transform_logits` composes them and documents the order.
"""

# V vocabulary, T tokens so far, G generated so far, K kept tokens

from collections.abc import Iterable, Mapping
from typing import Final

import numpy as np

from gpt2core._shapes import Float, Float64, Int

Logits = Float64[np.ndarray, "V"]

_ROUNDING: Final = 1e-9  # relative, of a sum of up to 2**22 numbers


def add_bias(logits: Logits, bias: Mapping[int, float]) -> None:
    """Add a constant to the logits of single tokens (`logit_bias` of OpenAI's API); ids must lie below V."""
    for token_id, value in bias.items():
        logits[token_id] += value


def penalize_repetition(logits: Logits, tokens: Int[np.ndarray, "T"], penalty: float) -> None:
    """Divide the positive logits of tokens that occurred by `penalty`, and multiply the negative ones.

    After Keskar et al. 2019, "CTRL", section 4.1, in the form of Hugging Face's
    `RepetitionPenaltyLogitsProcessor`: each token once, however often it occurred.
    """
    seen = np.unique(tokens)
    seen = seen[seen < len(logits)]
    values = logits[seen]
    logits[seen] = np.where(values < 0, values * penalty, values / penalty)


def penalize_presence(
    logits: Logits, generated: Int[np.ndarray, "G"], presence: float, frequency: float
) -> None:
    """Subtract `presence` from each generated token's logit, and `frequency` for each time it was generated.

    After the formula in OpenAI's API guide ("Frequency and presence penalties"); the prompt does not count.
    """
    seen, counts = np.unique(generated, return_counts=True)
    inside = seen < len(logits)
    logits[seen[inside]] -= presence + frequency * counts[inside]


def ban_repeated_ngrams(logits: Logits, tokens: Int[np.ndarray, "T"], size: int) -> None:
    """Ban each token that would complete an n-gram of `size` tokens that occurred already.

    After Paulus et al. 2017, "A Deep Reinforced Model for Abstractive Summarization", section 2.5, as Hugging
    Face's `NoRepeatNGramLogitsProcessor` does it.
    """
    if len(tokens) < size:
        return
    windows = np.lib.stride_tricks.sliding_window_view(tokens, size)  # (T - size + 1, size)
    prefix = tokens[len(tokens) - size + 1 :]  # (size - 1,)
    banned = windows[(windows[:, :-1] == prefix).all(axis=1), -1]
    logits[banned[banned < len(logits)]] = -np.inf


def ban(logits: Logits, token_ids: Iterable[int]) -> None:
    """Give tokens probability 0; ids outside the vocabulary cannot be drawn anyway."""
    for token_id in token_ids:
        if token_id < len(logits):
            logits[token_id] = -np.inf


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
    if (
        0 < top_k < len(logits)
    ):  # before the temperature, which changes no order: so little is left to compute
        kth = np.partition(logits, len(logits) - top_k)[len(logits) - top_k]
        kept = np.flatnonzero(logits >= kth)
        logits = logits[kept]
    weights = temper(logits, temperature)
    np.exp(weights, out=weights)
    if top_p < 1:
        inside = _nucleus(weights, top_p)
        kept, weights = inside if kept is None else kept[inside], weights[inside]
    if min_p > 0:
        inside = np.flatnonzero(weights >= min_p)  # the greatest weight is exp(0) = 1
        kept, weights = inside if kept is None else kept[inside], weights[inside]
    return kept, weights


def _nucleus(weights: Float64[np.ndarray, "V"], top_p: float) -> Int[np.ndarray, "K"]:
    """Indices of the nucleus, ascending."""
    total = weights.sum()
    # Tokens of less than the share (1 - top_p) / V come to less than 1 - top_p together: none is in the
    # nucleus. Halved, and less what sums are rounded by, the result is that of sorting all.
    least = max((1 - top_p) / 2 - _ROUNDING, 0) * total / len(weights)
    descending = np.sort(weights[weights > least])[::-1]
    covered = np.cumsum(descending)
    count = min(1 + int(np.searchsorted(covered, top_p * total, side="left")), len(covered))
    border = descending[count - 1]
    inside = weights > border
    ties = np.flatnonzero(weights == border)
    inside[ties[: count - np.count_nonzero(inside)]] = True
    return np.flatnonzero(inside)


def log_softmax(logits: Float[np.ndarray, "V"]) -> Logits:
    """Logarithms of the probabilities, in float64."""
    shifted = logits.astype(np.float64)
    shifted -= shifted.max()
    shifted -= np.log(np.exp(shifted).sum())
    return shifted
