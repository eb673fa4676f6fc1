"""Beam search: several continuations side by side, of which the likeliest go on. Pure functions of logits.

The algorithm, its scores and its ends are those of Hugging Face's `GenerationMixin._beam_search`
(transformers 5.23), so that both give the same texts. It keeps the `num_beams` likeliest texts that run, and
the `num_beams` best of those that have ended.
"""

# V vocabulary, K candidates

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from gpt2core._shapes import Float32, Float64, Int
from gpt2core.errors import InvalidSamplingError
from gpt2core.sampling import transforms
from gpt2core.sampling.draw import TokenLogprob, token_logprobs
from gpt2core.sampling.params import SamplingParams


class Candidates(NamedTuple):
    """How one beam may go on.

    Attributes:
        token_ids: (K,) the likeliest next tokens, ascending.
        logprobs: (K,) the logarithms of their probabilities, after penalties and bans.
        logits: (V,) the model's own, where they are reported; else None.
    """

    token_ids: Int[np.ndarray, "K"]
    logprobs: Float64[np.ndarray, "K"]
    logits: Float32[np.ndarray, "V"] | None


@dataclass(frozen=True, slots=True)
class Beam:
    """A text that runs.

    Attributes:
        token_ids: what was generated.
        total: the sum of its tokens' logprobs.
        parent: which of the beams before it goes on, by rank.
        logprobs: what is reported of its tokens.
    """

    token_ids: tuple[int, ...]
    total: float
    parent: int
    logprobs: tuple[TokenLogprob, ...]


@dataclass(frozen=True, slots=True)
class EndedBeam:
    """A text that has ended; its score is the sum of its logprobs by its length to `length_penalty`."""

    token_ids: tuple[int, ...]
    score: float
    reason: Literal["stop", "length"]
    logprobs: tuple[TokenLogprob, ...]


def candidates_per_beam(params: SamplingParams, end_token_ids: Collection[int]) -> int:
    """So many that `num_beams` of them do not end, if all that can do."""
    return max(2, 1 + len(end_token_ids)) * params.num_beams


def find_candidates(
    logits: Float32[np.ndarray, "V"],
    params: SamplingParams,
    *,
    token_ids: Sequence[int],
    prompt_tokens: int,
    eos_token_ids: Collection[int],
) -> Candidates:
    """The likeliest next tokens of one beam, none that is banned: arguments as of `draw.transform_logits`.

    As in transformers it is the logprobs, not the logits, that `logit_bias`, penalties and bans change, and
    they are not normalized again.
    """
    history = transforms.History(params, token_ids, prompt_tokens, eos_token_ids)
    edited = transforms.edit(transforms.log_softmax(logits), history)
    count = min(candidates_per_beam(params, eos_token_ids), len(edited))
    least = np.partition(edited, len(edited) - count)[len(edited) - count]
    best = np.flatnonzero(edited >= max(least, np.finfo(np.float64).min))  # those that tie with the last too
    if len(best) > count:
        best = np.sort(best[np.argsort(-edited[best], kind="stable")][:count])
    return Candidates(best, edited[best], None if params.logprobs is None else logits.copy())


class BeamSearch:
    """The search for the continuations of one prompt.

    Args:
        params: what ends it, and how texts of different lengths compare.
        max_new_tokens: at most so many.
        end_token_ids: each ends a text.
        stops: whether a text of these tokens has come to a stop string.

    Attributes:
        running: the texts that go on, likeliest first; at the beginning the prompt alone.
        ended: the best of those that have ended, best first; at the end of the search its result.
        over: whether nothing is left to do.
    """

    def __init__(
        self,
        params: SamplingParams,
        max_new_tokens: int,
        end_token_ids: Collection[int],
        stops: Callable[[Sequence[int]], bool],
    ) -> None:
        self._params = params
        self._max_new_tokens = max_new_tokens
        self._end_token_ids = end_token_ids
        self._stops = stops
        self._length = 0
        self.running = [Beam((), 0.0, 0, ())]
        self.ended: list[EndedBeam] = []
        self.over = False

    def advance(self, candidates: Sequence[Candidates]) -> None:
        """Take one step: `candidates` are those of each running text, in its order."""
        params, beams = self._params, self._params.num_beams
        totals = np.concatenate(
            [beam.total + own.logprobs for beam, own in zip(self.running, candidates, strict=True)]
        )
        token_ids = np.concatenate([own.token_ids for own in candidates])
        parents = np.repeat(np.arange(len(candidates)), [len(own.token_ids) for own in candidates])
        self._length += 1
        running: list[Beam] = []
        best = np.argsort(-totals, kind="stable")[: candidates_per_beam(params, self._end_token_ids)]
        for rank, i in enumerate(best.tolist()):
            parent, token_id, total = int(parents[i]), int(token_ids[i]), float(totals[i])
            before = self.running[parent]
            ids = (*before.token_ids, token_id)
            stops = token_id in self._end_token_ids or self._stops(ids)
            if stops or self._length >= self._max_new_tokens:
                if rank < beams:  # the others were only looked at so that enough go on
                    score = total / self._length**params.length_penalty
                    logprobs = self._report(before, token_id, candidates[parent])
                    self.ended.append(EndedBeam(ids, score, "stop" if stops else "length", logprobs))
            elif len(running) < beams:
                logprobs = self._report(before, token_id, candidates[parent])
                running.append(Beam(ids, total, parent, logprobs))
        self.ended.sort(key=lambda ended: -ended.score)  # stable: of equals the first to end
        del self.ended[beams:]
        self.running = running
        self.over = not running or self._is_decided(running[0].total)
        if self.over and len(self.ended) < params.n:
            raise InvalidSamplingError(
                f"only {len(self.ended)} of {params.n} texts are left of {beams} beams: penalties and bans "
                "forbid all others; loosen them, or ask for fewer"
            )

    def _is_decided(self, best_total: float) -> bool:
        """Whether the result is full, and what runs cannot, or by the heuristic will not, improve it."""
        params = self._params
        if len(self.ended) < params.num_beams:
            return False
        if params.early_stopping is True:
            return True
        # "never" allows for what a longer text may gain by its length.
        longest = params.early_stopping == "never" and params.length_penalty > 0
        length = self._max_new_tokens if longest else self._length
        return best_total / length**params.length_penalty <= self.ended[-1].score

    def _report(self, before: Beam, token_id: int, own: Candidates) -> tuple[TokenLogprob, ...]:
        if own.logits is None or self._params.logprobs is None:
            return ()
        return (*before.logprobs, token_logprobs(own.logits, token_id, self._params.logprobs))
