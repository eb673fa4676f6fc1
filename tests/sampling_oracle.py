"""From logits to a token by the documentation alone, token by token: shares no code with `gpt2core.sampling`.

Penalties, bans and filters as Hugging Face's `GenerationConfig` and OpenAI's API document them; numbers are
decimals of 40 digits, random numbers are `numpy.random.Philox`'s.
"""

from decimal import Context, Decimal, localcontext

import numpy as np

BORDER = Decimal("1e-9")  # nearer to a border rounding may decide


class BorderlineError(Exception):
    """The definition itself is exact, but no program in float64 could be asked to agree."""


def edit(logits, token_ids, prompt_tokens, eos, settings):
    """The logits before the temperature, as decimals; None stands for a ban."""
    text = token_ids[prompt_tokens:]
    edited = []
    for token, logit in enumerate(logits):
        value = Decimal(float(logit)) + Decimal(settings["logit_bias"].get(token, 0))
        if token in token_ids:
            penalty = Decimal(settings["repetition_penalty"])
            value = value * penalty if value < 0 else value / penalty
        if token in text:
            value -= Decimal(settings["presence_penalty"])
            value -= Decimal(settings["frequency_penalty"]) * text.count(token)
        size = settings["no_repeat_ngram_size"]
        if size and contains((*token_ids[len(token_ids) - size + 1 :], token), token_ids, size):
            value = None
        if token in eos and len(text) < settings["min_new_tokens"]:
            value = None
        edited.append(value)
    return edited


def contains(ngram, token_ids, size):
    """Whether the tokens so far hold this n-gram."""
    return len(ngram) == size and any(
        tuple(token_ids[i : i + size]) == ngram for i in range(len(token_ids) - size + 1)
    )


def weigh(edited, settings):
    """Token -> its probability up to a factor, of those that may be drawn."""
    allowed = {token: value for token, value in enumerate(edited) if value is not None}
    top_k = settings["top_k"]
    if top_k:
        kth = sorted(allowed.values(), reverse=True)[:top_k][-1]
        allowed = {token: value for token, value in allowed.items() if value >= kth}
    greatest = max(allowed.values())
    temperature = Decimal(settings["temperature"])
    weights = {token: ((value - greatest) / temperature).exp() for token, value in allowed.items()}
    if settings["top_p"] < 1:
        goal, covered, nucleus = Decimal(settings["top_p"]) * sum(weights.values()), Decimal(0), {}
        for token in sorted(weights, key=lambda token: (-weights[token], token)):
            if abs(covered - goal) < BORDER * goal:
                raise BorderlineError
            if covered >= goal:
                break
            nucleus[token] = weights[token]
            covered += weights[token]
        weights = nucleus
    min_p = Decimal(settings["min_p"])
    if any(weight != 1 and abs(weight - min_p) < BORDER for weight in weights.values()) and min_p:
        raise BorderlineError
    return {token: weight for token, weight in weights.items() if weight >= min_p}


def draw(weights, vocab_size, seed, choice, position):
    """Halve the vocabulary, padded to a power of two, until one token is left."""
    start, size, depth = 0, 1, 0
    while size < vocab_size:
        size *= 2
    while size > 1:
        size //= 2
        lower = sum((w for token, w in weights.items() if start <= token < start + size), Decimal(0))
        upper = sum(
            (w for token, w in weights.items() if start + size <= token < start + 2 * size), Decimal(0)
        )
        if lower == 0 or (upper != 0 and is_upper(lower / (lower + upper), seed, choice, position, depth)):
            start += size
        depth += 1
    return start


def is_upper(share, seed, choice, position, depth):
    """Whether the random number of this depth is not below the lower half's share."""
    key, counter = np.array([seed, choice], np.uint64), np.array([position, depth // 4, 0, 0], np.uint64)
    u = np.random.Generator(np.random.Philox(key=key, counter=counter)).random(4)[depth % 4]
    if abs(Decimal(float(u)) - share) < BORDER:
        raise BorderlineError
    return Decimal(float(u)) >= share


def sample(logits, token_ids, prompt_tokens, eos, settings, seed, choice):
    """The token and, unless the draw is greedy, the set of those that could have been drawn.

    None where everything is banned.
    """
    with localcontext(Context(prec=40)):
        edited = edit(logits, token_ids, prompt_tokens, eos, settings)
        best = max((value for value in edited if value is not None), default=None)
        if best is None:
            return None
        if settings["temperature"] == 0:
            return edited.index(best), {token for token, value in enumerate(edited) if value is not None}
        weights = weigh(edited, settings)
        return draw(weights, len(logits), seed, choice, len(token_ids)), set(weights)
