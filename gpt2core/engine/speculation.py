"""Speculative decoding: several tokens of one text in one pass, and exactly the text of one token a pass.

Somebody cheap proposes how a text goes on; the model reads all of the proposal in one forward pass, which
takes little longer than reading one token while the weights have to come from memory. Then the token of each
position is drawn as it always is, from the model's own logits with the random number of that position
(`gpt2core.sampling.draw`), and the proposal holds as far as it equals what was drawn. Every pass yields at
least one token. Rejected guesses are overwritten in the cache.

Rejection sampling (Leviathan et al. 2023, "Fast Inference from Transformers via Speculative Decoding"; Chen
et al. 2023, "Accelerating Large Language Model Decoding with Speculative Sampling") keeps the distribution.
This keeps the very tokens: a seed gives the same text with and without, at every temperature and with every
transform, and therefore also the distribution. For a proposal that is not random it costs nothing: both
accept token x with the probability p(x). A draft model draws its proposal with the random numbers that the
model will use, so that the two mostly agree where their distributions do; there, rejection sampling would
accept a little more, and give another text for the same seed.

Here: who is proposed to, and how much (`Speculation`), and prompt lookup; the other source is
`gpt2core.engine.draft`.
"""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, Literal, Protocol
from weakref import WeakKeyDictionary

from gpt2core.engine.request import Request
from gpt2core.engine.scheduler import Step
from gpt2core.errors import RequestError

SpeculationMode = Literal["off", "prompt_lookup"]
MODES: Final[tuple[SpeculationMode, ...]] = ("off", "prompt_lookup")

LENGTHS: Final = (3, 7, 15)
"""Tokens of a proposal. Few and fixed, since a backend may compile or plan for each number of tokens."""

MOST_TOKENS: Final = 32
"""Tokens of one step, proposals included, beyond which nothing is proposed."""

ALLOWANCE: Final = 0.04
"""The share of a text's passes that refused proposals may cost, beyond one first attempt."""

NGRAM: Final = 3
"""So many tokens must have occurred before for what followed them to be proposed."""


def check_mode(mode: object, *, with_draft: bool) -> None:
    """Check that the mode is known and that there is one source of proposals at most.

    Raises:
        RequestError: the mode is unknown, or a mode and a draft model are both given.
    """
    if mode not in MODES:
        raise RequestError(f"speculation is {mode!r}; it must be {' or '.join(map(repr, MODES))}")
    if with_draft and mode != "off":
        raise RequestError(
            f"speculation is {mode!r} and a draft model is given; only one can propose, leave one of them out"
        )


def guess_extra_tokens_cost(tokens: int, rows: int) -> float:
    """What stands in for `EstimatesCost.extra_tokens_cost` where a backend has none."""
    return 0.2 * tokens


class Source(Protocol):
    """Who proposes."""

    @property
    def token_cost(self) -> float:
        """What guessing one token costs, in the model's passes of one token."""
        ...

    def propose(self, wants: Sequence[tuple[Request, int]]) -> list[list[int]]:
        """At most so many tokens for each request; none where there is nothing to say."""
        ...


class PromptLookup:
    """Proposes what followed when the last tokens occurred before, in prompt or text.

    After Saxena 2023, "Prompt Lookup Decoding" (github.com/apoorvumang/prompt-lookup-decoding), with the
    latest occurrence, found in an index that grows with the text. Where the proposal reaches the end of the
    text it goes on with itself, as a copy in LZ77 does, so that a short period gives a long proposal.
    """

    token_cost = 0.0

    def __init__(self) -> None:
        self._indices: WeakKeyDictionary[Request, _Index] = WeakKeyDictionary()

    def propose(self, wants: Sequence[tuple[Request, int]]) -> list[list[int]]:
        """See `Source.propose`."""
        proposals = []
        for request, count in wants:
            index = self._indices.get(request)
            if index is None:
                index = self._indices[request] = _Index({}, NGRAM)
            proposals.append(index.propose(request.token_ids, count))
        return proposals


@dataclass(slots=True)
class _Index:
    """Where each n-gram of one text was last followed by something."""

    after: dict[tuple[int, ...], int]
    end: int  # tokens before this one are done

    def propose(self, tokens: list[int], count: int) -> list[int]:
        for end in range(self.end, len(tokens)):
            self.after[tuple(tokens[end - NGRAM : end])] = end
        self.end = max(self.end, len(tokens))
        at = self.after.get(tuple(tokens[-NGRAM:]))
        if at is None:
            return []
        proposal = tokens[at : at + count]
        period = len(tokens) - at
        while len(proposal) < count:
            proposal.append(proposal[-period])
        return proposal


@dataclass(slots=True)
class _Account:
    """What one request may still spend on proposals, in passes of one token.

    Each pass earns `ALLOWANCE`, each accepted token 1, and each proposal costs; so refused proposals can
    never cost more than that share, whatever the text does. A text that accepts lives off what it earns.
    """

    credit: float
    level: int = 0  # how many of the lengths beyond the least may be proposed, if the credit reaches

    def length(self, costs: dict[int, float]) -> int:
        affordable = [n for n in list(costs)[: self.level + 1] if costs[n] <= self.credit + 1e-9]
        return max(affordable, default=0)

    def settle(self, proposed: int, accepted: int) -> None:
        self.credit += accepted
        if accepted == proposed:
            self.level = min(self.level + 1, len(LENGTHS) - 1)
        elif 2 * accepted < proposed:
            self.level = max(self.level - 1, 0)


class Speculation:
    """Decides in each step who is proposed to, and keeps count.

    A refused proposal delays every row of the step, and what one row gains is its own. So a proposal is
    charged to its request once per row, and none is made that could not pay even if all of it were accepted,
    nor beyond `MOST_TOKENS`, nor beyond the step's budget, of which prompts come first.

    Args:
        source: who proposes.
        estimate: `EstimatesCost.extra_tokens_cost` of the model's backend.
        step_tokens: the step's budget.
    """

    def __init__(self, source: Source, estimate: Callable[[int, int], float], step_tokens: int) -> None:
        self._source: Source | None = source
        self._estimate = estimate
        self._most_tokens = min(MOST_TOKENS, step_tokens)
        self._accounts: WeakKeyDictionary[Request, _Account] = WeakKeyDictionary()
        self._costs: dict[int, dict[int, float]] = {}  # by the number of rows: what may pay, and its cost
        self.proposed = 0
        self.accepted = 0

    def propose(self, step: Step) -> dict[Request, list[int]]:
        """Proposals for some of the requests that decode in this step, none of them empty.

        A source that fails is given up with a warning: the texts do not depend on it.
        """
        source, rows = self._source, len(step.decode) + len(step.prefill)
        if source is None or not step.decode:
            return {}
        costs = self._costs.get(rows)
        if costs is None:
            costs = {n: cost for n in LENGTHS if (cost := self._cost(source, n, rows)) < n}
            self._costs[rows] = costs
        if not costs:
            return {}
        least, most = min(costs.values()), max(costs.values())
        room = self._most_tokens - len(step.decode) - sum(count for _, count in step.prefill)
        wants: list[tuple[Request, int]] = []
        for request in step.decode:
            account = self._accounts.get(request)
            if account is None:
                account = self._accounts[request] = _Account(least)  # one attempt is free
            account.credit = min(account.credit + ALLOWANCE, most)
            # The pass itself gives one token, which is the last one allowed at the latest.
            length = min(account.length(costs), request.tokens_after_next, room)
            if length > 0 and (length in costs or self._cost(source, length, rows) < length):
                wants.append((request, length))
                room -= length
        if not wants:
            return {}
        try:
            found = source.propose(wants)
        except Exception as error:  # of whatever type a backend raises
            self._source = None
            warnings.warn(
                f"speculation is off from here on, since its draft model failed: {error!r}",
                RuntimeWarning,
                stacklevel=2,
            )
            return {}
        proposals = {}
        for (request, _), proposal in zip(wants, found, strict=True):
            if request.steering is not None:
                proposal = request.steering.admit(request.token_ids, proposal)
            if proposal:
                proposals[request] = proposal
                self._accounts[request].credit -= self._cost(source, len(proposal), rows)
        return proposals

    def _cost(self, source: Source, tokens: int, rows: int) -> float:
        return rows * (self._estimate(tokens, rows) + source.token_cost * tokens)

    def close(self) -> None:
        """Propose nothing any more, and let go of the source."""
        self._source = None

    def settle(self, request: Request, proposed: int, accepted: int) -> None:
        """A proposal was read, and so many of its tokens were what the model itself drew."""
        self.proposed += proposed
        self.accepted += accepted
        request.proposed += proposed
        request.accepted += accepted
        self._accounts[request].settle(proposed, accepted)
