"""What `generate` returns: Generation, with its Timing."""

from dataclasses import dataclass

from gpt2core.engine.request import FinishReason, Request
from gpt2core.sampling.draw import TokenLogprob


@dataclass(frozen=True, slots=True)
class Timing:
    """How long one generation took, in wall-clock seconds from the moment when it was submitted.

    Attributes:
        ttft_s: until its first token was drawn, waiting for a slot included; None when none was.
        elapsed_s: until it ended.
        tokens_per_s: decoding speed: the tokens after the first, divided by the time from the first to the
            last; None with fewer than two tokens. In a batch each generation has its own.
        proposed_tokens: how many tokens speculation proposed for it; 0 without speculation.
        accepted_tokens: how many of these were drawn, so that no pass of their own was needed.
    """

    ttft_s: float | None
    elapsed_s: float
    tokens_per_s: float | None
    proposed_tokens: int = 0
    accepted_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Generation:
    """One text that was generated.

    Attributes:
        text: what was generated, without the prompt (with `echo=True`: after it), cut before a stop string.
        token_ids: what was generated, always without the prompt; the end-of-text token or the tokens of a
            stop string that ended it are included.
        finish_reason: "stop" at an end-of-text token or stop string, "length" at the last token allowed,
            "cancelled" when the model was closed meanwhile.
        prompt_tokens: how many tokens of the prompt were read.
        logprobs: one entry per token, when asked for; with `echo=True` the prompt's come first, and the very
            first has `logprob=None`.
        seed: the seed that gives this text again (with the same `choice`).
        choice: which of the `n` choices this is, from 0.
        timing: how long it took.
        truncated_tokens: how many of the prompt's first tokens were not read, with `overflow` other than
            "error".
        score: of a beam search: the sum of its tokens' log probabilities, after penalties and bans, divided
            by its length to the power of `length_penalty`.
    """

    text: str
    token_ids: list[int]
    finish_reason: FinishReason
    prompt_tokens: int
    logprobs: list[TokenLogprob] | None
    seed: int
    choice: int
    timing: Timing
    truncated_tokens: int = 0
    score: float | None = None


def make_generation(done: Request) -> Generation:
    """Sum up a request that has ended well."""
    assert done.finish_reason is not None
    assert done.finished_s is not None
    ttft_s = tokens_per_s = None
    token_ids = done.generated
    if done.first_token_s is not None and done.last_token_s is not None:
        ttft_s = done.first_token_s - done.submitted_s
        if len(token_ids) > 1 and done.last_token_s > done.first_token_s:
            tokens_per_s = (len(token_ids) - 1) / (done.last_token_s - done.first_token_s)
    return Generation(
        text=done.text,
        token_ids=token_ids,
        finish_reason=done.finish_reason,
        prompt_tokens=done.read_prompt_tokens,
        logprobs=None if done.params.logprobs is None else done.logprobs.copy(),
        seed=done.seed,
        choice=done.choice,
        timing=Timing(ttft_s, done.finished_s - done.submitted_s, tokens_per_s, done.proposed, done.accepted),
        truncated_tokens=done.truncated_tokens,
        score=done.score,
    )
