"""How one token is drawn from logits: pure functions, the same for every backend."""

# V vocabulary, K kept tokens

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Final, TypeAlias

import numpy as np

from gpt2core._shapes import Float, Float64, Int
from gpt2core.errors import InvalidSamplingError, NumericalError
from gpt2core.sampling import transforms
from gpt2core.sampling.params import SamplingParams

__all__ = ["SamplingParams", "TokenLogprob", "sample_token", "token_logprobs", "transform_logits", "uniform"]

_U64: Final = 2**64 - 1
Steer: TypeAlias = Callable[[Sequence[int], Float[np.ndarray, "V"]], Float[np.ndarray, "V"]]
"""Prompt and text so far, and logits (V,), which it must leave as they are -> logits (V,)."""


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """The model's own probability of a token, before any transform.

    Attributes:
        token_id: the token.
        logprob: natural logarithm of its probability; None for a text's first token, which nothing precedes.
        top: the likeliest tokens with their logprobs, likeliest first, lowest id first among equals.
    """

    token_id: int
    logprob: float | None
    top: tuple[tuple[int, float], ...] = ()


def uniform(seed: int, choice: int, position: int, draw: int = 0) -> float:
    """Random number `draw`, in [0, 1), for the token at `position` of the text number `choice`.

    Counter-based: it depends on these numbers only, so that a seed gives the same text alone, in a batch, or
    on another backend. Word `draw % 4` of Philox4x64-10 (Salmon et al. 2011, "Parallel Random Numbers: As
    Easy as 1, 2, 3") with key (seed, choice) and counter (position + 1, draw // 4), its upper 53 bits as a
    fraction. The first four are the first doubles of `numpy.random.Philox(key=[seed, choice],
    counter=[position, 0, 0, 0])`; written out because importing numpy.random takes longer than all draws of
    a text.
    """
    return (_philox(seed, choice, position, draw // 4)[draw % 4] >> 11) * 2.0**-53


def _philox(seed: int, choice: int, position: int, block: int) -> tuple[int, int, int, int]:
    c0, c1, c2, c3 = position + 1, block, 0, 0
    k0, k1 = seed, choice
    for _ in range(10):
        p0, p1 = 0xD2E7470EE14C6C93 * c0, 0xCA5A826395121157 * c2
        c0, c1, c2, c3 = (p1 >> 64) ^ c1 ^ k0, p1 & _U64, (p0 >> 64) ^ c3 ^ k1, p0 & _U64
        k0, k1 = (k0 + 0x9E3779B97F4A7C15) & _U64, (k1 + 0xBB67AE8584CAA73B) & _U64
    return c0, c1, c2, c3


def transform_logits(
    logits: Float[np.ndarray, "V"],
    params: SamplingParams,
    *,
    token_ids: Sequence[int],
    prompt_tokens: int,
    eos_token_ids: Collection[int],
    steer: Steer | None = None,
) -> Float64[np.ndarray, "V"]:
    """The logits whose softmax the next token is drawn from; a token that cannot be drawn has -inf.

    In this order, which is Hugging Face's for what it has:

    1. `logit_bias`
    2. `repetition_penalty`, over prompt and text
    3. `presence_penalty` and `frequency_penalty`, over the text
    4. `no_repeat_ngram_size`, over prompt and text
    5. `min_new_tokens`: no end of text before
    6. `steer`: the caller's `logits_processors`, in their order; then `regex`, `json_schema`, `choice` or
       `grammar`, which ban what does not fit
    7. `temperature`; from here on the greatest logit is 0. With temperature 0 the order ends before this step
    8. `top_k`
    9. `top_p`
    10. `min_p`

    Args:
        logits: (V,) the model's own.
        params: what to apply.
        token_ids: prompt and text so far.
        prompt_tokens: how many of them are the prompt.
        eos_token_ids: the tokens that end a text.
        steer: what changes the logits further, if anything.

    Raises:
        NumericalError: `logits` hold NaN or +inf, or nothing above -inf.
        InvalidSamplingError: no token is left, or `logit_bias` names one outside the vocabulary.
    """
    edited = transforms.edit(logits, transforms.History(params, token_ids, prompt_tokens, eos_token_ids))
    if steer is not None:
        edited = steer(token_ids, edited)
    _check_maximum(edited.max(), logits, len(token_ids))
    if params.temperature == 0:
        return edited.astype(np.float64)  # a copy also where nothing was edited
    tempered = transforms.temper(edited, params.temperature)
    kept, _ = _weigh(edited, params)
    if kept is None:
        return tempered
    result = np.full_like(tempered, -np.inf)
    result[kept] = tempered[kept]
    return result


def sample_token(
    logits: Float[np.ndarray, "V"],
    params: SamplingParams,
    *,
    token_ids: Sequence[int],
    prompt_tokens: int,
    eos_token_ids: Collection[int],
    seed: int,
    choice: int,
    steer: Steer | None = None,
) -> int:
    """Draw the next token: the arguments of `transform_logits`, and whose random numbers to use.

    With temperature 0 the greatest logit wins, the lowest id among equals. Otherwise the vocabulary is
    bisected, in the order of token ids and in float64, until one token is left: at depth d its lower half is
    taken if `uniform(seed, choice, len(token_ids), d)` lies below that half's share of the probability.

    That is the inverse CDF, with a fresh random number for each bisection. With one number for all of them,
    an error of 1e-7 in the cumulated probability moves the borders of all unlikely tokens, of which there
    are thousands, and two backends part on about one draw in 2,000; a half's share is as exact as the
    probabilities themselves.

    The same logits, on any processor, give the same token (see `gpt2core.sampling.transforms`).

    Raises:
        NumericalError: `logits` hold NaN or +inf, or nothing above -inf.
        InvalidSamplingError: no token is left, or `logit_bias` names one outside the vocabulary.
    """
    edited = transforms.edit(logits, transforms.History(params, token_ids, prompt_tokens, eos_token_ids))
    if steer is not None:
        edited = steer(token_ids, edited)
    if params.temperature == 0:
        best = int(edited.argmax())  # the first NaN, if there is one
        _check_maximum(edited[best], logits, len(token_ids))
        return best
    _check_maximum(edited.max(), logits, len(token_ids))
    kept, weights = _weigh(edited, params)
    whose = (len(logits), seed, choice, len(token_ids))
    try:
        return _bisect(weights, kept, *whose)
    except _InDoubtError:
        exact = transforms.weigh_exactly(edited if kept is None else edited[kept], params.temperature)
        return _bisect(exact, kept, *whose, exact=True)


def token_logprobs(logits: Float[np.ndarray, "V"], token_id: int, k: int) -> TokenLogprob:
    """The logprob of `token_id` and the `k` likeliest tokens, of the model's own distribution, in float64.

    Raises:
        NumericalError: `logits` hold NaN or +inf, or nothing above -inf.
    """
    _check_maximum(logits.max(), logits, None)
    logprobs = transforms.log_softmax(logits)
    top: tuple[tuple[int, float], ...] = ()
    if k > 0:
        k = min(k, len(logits))
        kth = np.partition(logprobs, len(logprobs) - k)[len(logprobs) - k]
        best = np.flatnonzero(logprobs >= kth)  # k, and those that tie with the last
        order = best[np.argsort(-logprobs[best], kind="stable")][:k]
        top = tuple(zip(order.tolist(), logprobs[order].tolist(), strict=True))
    return TokenLogprob(token_id, float(logprobs[token_id]), top)


def _weigh(
    edited: Float[np.ndarray, "V"], params: SamplingParams
) -> tuple[Int[np.ndarray, "K"] | None, Float64[np.ndarray, "K"]]:
    """Steps 7 to 10 of `transform_logits`."""
    return transforms.weigh(
        edited,
        temperature=params.temperature,
        top_k=params.top_k or 0,
        top_p=params.top_p,
        min_p=params.min_p,
    )


class _InDoubtError(Exception):
    """Rounding could change what is drawn."""


def _bisect(
    weights: Float64[np.ndarray, "K"],
    kept: Int[np.ndarray, "K"] | None,
    vocab_size: int,
    seed: int,
    choice: int,
    position: int,
    *,
    exact: bool = False,
) -> int:
    """A token id, drawn in proportion to `weights`; never one of weight 0.

    The halves are those of the vocabulary, whatever was kept of it: so a token more or less at the border of
    `top_p` does not shift the others.

    Raises:
        _InDoubtError: not `exact`, and a relative error of `MARGIN` in the weights could change the result.
    """
    add = transforms.add_in_order if exact else np.add.reduce
    margin = 0.0 if exact else transforms.MARGIN
    low, high = 0, len(weights)  # where the halves lie among the weights
    first, size, depth = 0, 1 << (vocab_size - 1).bit_length(), 0  # and among the token ids
    words: tuple[int, ...] = ()
    while high - low > 1:
        size //= 2
        middle = first + size if kept is None else int(kept.searchsorted(first + size))
        middle = min(max(middle, low), high)
        lower, upper = float(add(weights[low:middle])), float(add(weights[middle:high]))
        if depth % 4 == 0:
            words = _philox(seed, choice, position, depth // 4)
        u = (words[depth % 4] >> 11) * 2.0**-53
        # Numbers below 1e-280 are near those that processors round differently.
        if abs(u * (lower + upper) - lower) < margin * max(lower + upper, 1e-280):
            raise _InDoubtError
        if upper == 0 or u * (lower + upper) < lower:
            high = middle
        else:
            low, first = middle, first + size
        depth += 1
    return low if kept is None else int(kept[low])


def _check_maximum(maximum: float, logits: Float[np.ndarray, "V"], position: int | None) -> None:
    """Refuse a distribution without a finite greatest logit; NaN anywhere makes the maximum NaN."""
    if math.isfinite(maximum):
        return
    where = "" if position is None else f" for position {position}"
    own = logits.max()
    if not math.isfinite(own):
        raise NumericalError(
            f"the greatest of {len(logits)} logits{where} is {own}, expected a finite number; "
            "check the checkpoint, or try another backend or precision"
        )
    raise InvalidSamplingError(
        f"no token can be drawn{where}: after the penalties and bans the greatest of {len(logits)} logits is "
        f"{maximum}; loosen no_repeat_ngram_size, min_new_tokens or repetition_penalty"
    )
