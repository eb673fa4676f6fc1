"""From the scheduler's plan to a batch, and from logits to tokens: a request's part of a forward pass."""

# n logits rows of one request, M of the whole batch, V vocabulary

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from gpt2core._shapes import Float32, Int32
from gpt2core.backends.base import Backend
from gpt2core.batch import Batch
from gpt2core.engine.request import Request
from gpt2core.engine.scheduler import Step
from gpt2core.errors import BackendError, Gpt2CoreError, NumericalError
from gpt2core.sampling.beam_search import Candidates
from gpt2core.sampling.draw import TokenLogprob, sample_token, token_logprobs
from gpt2core.token_scores import TokenQuery, TokenScores, score_logits


@dataclass(frozen=True, slots=True)
class Row:
    """One request's part of a forward pass; its logits are those from `first` to `end` of the batch's."""

    request: Request
    tokens: int
    first: int
    end: int
    reads_at: int | None = None  # prompt position of the first of its logits, when somebody reads them
    draws: bool = True  # whether its last logits give a token
    proposed: Sequence[int] = ()  # the last of its tokens: guesses, kept as far as they are drawn


@dataclass(frozen=True, slots=True)
class RowFailed:
    """What a row gave instead of tokens: its request ends with the error, and the others go on."""

    error: Gpt2CoreError


Drawn = tuple[int, tuple[TokenLogprob, ...], bool]
"""A token id, what is known of its probability when that was asked for, and whether the text ends with it
because its steering says so."""
Result = list[Drawn] | Candidates | RowFailed
"""What a row gave: its tokens, none in the middle of a prompt, or how a beam may go on."""


def build_batch(step: Step, proposals: Mapping[Request, Sequence[int]]) -> tuple[list[Row], Batch]:
    """The rows that decode, each with what is proposed for it, then chunks of prompts."""
    if not step.prefill and not proposals:
        return _build_decode_batch(step.decode)
    rows: list[Row] = []
    tokens: list[int] = []
    for request in step.decode:
        proposed, first = proposals.get(request, ()), len(tokens)
        tokens += (request.token_ids[-1], *proposed)
        rows.append(Row(request, len(tokens) - first, first, len(tokens), proposed=proposed))
    logits_at = list(range(len(tokens)))
    for request, count in sorted(step.prefill, key=_is_scored):  # the scored ones last, else in their order
        start, end, first = request.cached, request.cached + count, len(logits_at)
        at = len(tokens) - start  # where the request's position 0 would be among the tokens
        tokens += request.token_ids[request.first + start : request.first + end]
        draws = end == request.to_read and request.max_new_tokens > 0
        reads_at = None
        if request.logits_from is not None and request.logits_from < end:
            reads_at = max(request.logits_from, start)
            logits_at += range(at + reads_at, at + end)
        elif draws:
            logits_at.append(at + end - 1)
        rows.append(Row(request, count, first, len(logits_at), reads_at, draws))
    batch = Batch(
        tokens=np.array(tokens, np.int32),
        lengths=np.array([row.tokens for row in rows], np.int32),
        starts=np.array([row.request.cached for row in rows], np.int32),
        slots=np.array([row.request.slot for row in rows], np.int32),
        logits_at=np.array(logits_at, np.int32),
    )
    return rows, batch


def _is_scored(prefill: tuple[Request, int]) -> bool:
    return prefill[0].on_scores is not None


def build_query(rows: Sequence[Row]) -> TokenQuery | None:
    """What the scored rows ask together; None where there are none, or they ask of different sets."""
    targets: list[int] = []
    top, members = 0, None
    for row in rows:
        reader = row.request.on_scores
        if reader is None or row.reads_at is None:
            continue
        if members is not None and reader.members is not None and members is not reader.members:
            return None
        targets += reader.targets[row.reads_at : row.reads_at + row.end - row.first]
        top, members = max(top, reader.top), reader.members if members is None else members
    return TokenQuery(np.array(targets, np.int32), top, members) if targets else None


def _build_decode_batch(decode: list[Request]) -> tuple[list[Row], Batch]:
    """One token per request: most steps are so."""
    rows = [Row(request, 1, i, i + 1) for i, request in enumerate(decode)]
    lengths, logits_at = _ones_and_indices(len(decode))
    batch = Batch(
        tokens=np.array([request.token_ids[-1] for request in decode], np.int32),
        lengths=lengths,
        starts=np.array([request.cached for request in decode], np.int32),
        slots=np.array([request.slot for request in decode], np.int32),
        logits_at=logits_at,
    )
    return rows, batch


@lru_cache(256)
def _ones_and_indices(rows: int) -> tuple[Int32[np.ndarray, "B"], Int32[np.ndarray, "B"]]:
    return np.ones(rows, np.int32), np.arange(rows, dtype=np.int32)


def draw_row(
    row: Row,
    logits: Float32[np.ndarray, "N V"],
    scores: TokenScores | None,
    finite: bool,
    backend: Backend,
    step: int,
) -> Result:
    """The row's tokens, none in the middle of a prompt.

    Args:
        logits: of the batch, or of its first rows.
        scores: of the further rows.
        finite: whether all logits are known to be so.
    """
    if row.request.finished:  # cancelled while the backend computed
        return []
    try:
        if scores is not None and row.request.on_scores is not None and row.reads_at is not None:
            own = scores.part(row.first - len(logits), row.end - len(logits))
            if not own.finite:
                return _not_finite(
                    row, row.reads_at + int(np.isfinite(own.entropies).argmin()), backend, step
                )
            row.request.on_scores.read(row.reads_at, own)
            return []
        mine = logits[row.first : row.end]  # (n, V)
        if not finite and len(mine) > 0:
            mine = mine[: _finite_rows(row, mine)]
            if len(mine) == 0:
                return _not_finite(row, row.request.cached + row.tokens - len(row.proposed), backend, step)
        return _read_row(row, mine)
    except Gpt2CoreError as error:
        return RowFailed(error)
    except Exception as error:
        return fail_row(error, backend.name, step)


def _not_finite(row: Row, at: int, backend: Backend, step: int) -> RowFailed:
    return RowFailed(
        NumericalError(
            f"backend {backend.name!r} returned logits that are not finite in step {step} at token {at} of a "
            "request; check the checkpoint with `gpt2core verify`, or take another backend"
        )
    )


def fail_row(error: Exception, backend: str, step: int) -> RowFailed:
    """Wrap an error of the pass anew for each request, since each is raised in its own caller's thread."""
    kind = NumericalError if isinstance(error, NumericalError) else BackendError
    wrapped = kind(
        f"backend {backend!r} failed in step {step}: {type(error).__name__}: {error}; "
        "the requests in that step ended, others go on"
    )
    wrapped.__cause__ = error
    return RowFailed(wrapped)


def count_accepted(row: Row, drawn: list[Drawn]) -> int:
    """How many of the proposed tokens were drawn."""
    return sum(token_id == proposed for (token_id, *_), proposed in zip(drawn, row.proposed, strict=False))


def _finite_rows(row: Row, logits: Float32[np.ndarray, "n V"]) -> int:
    """How many of the row's logits, from the first on, can be used; 0: its request must end.

    Beyond a proposed token that is refused nothing matters, so there what is not finite is only cut off: if
    it stands where the text goes on, the next step meets it first.
    """
    finite = np.isfinite(logits).all(axis=1)  # (n,)
    if finite.all():
        return len(logits)
    return int(finite.argmin()) if row.proposed else 0


def _read_row(row: Row, logits: Float32[np.ndarray, "n V"]) -> list[Drawn] | Candidates:
    """Hand the row's logits to who reads them, and draw its token, or tokens as far as they were proposed.

    None in the middle of a prompt. Each token is drawn as if it were the only one: the proposal decides only
    whether its logits, and those after it, are of this text.
    """
    request = row.request
    if row.reads_at is not None and request.on_logits is not None:
        request.on_logits(row.reads_at, logits)
    if row.reads_at is not None and request.on_scores is not None:
        query = build_query([row])
        assert query is not None
        request.on_scores.read(row.reads_at, score_logits(logits, query))
    if not row.draws:
        return []
    if request.beams is not None:
        return request.beams.find_candidates(request, logits[-1])
    if not row.proposed:
        return [_draw(request, request.token_ids, logits[-1])]
    drawn: list[Drawn] = []
    token_ids = request.token_ids.copy()
    for i, own in enumerate(logits):
        try:
            drawn.append(_draw(request, token_ids, own))
        except Gpt2CoreError:
            if not drawn:
                raise
            break  # the next step meets it first, unless the text has ended by then
        token_id, _, ends = drawn[-1]
        if i == len(row.proposed) or token_id != row.proposed[i] or ends or token_id in request.end_token_ids:
            break
        token_ids.append(token_id)
    return drawn


def _draw(request: Request, token_ids: list[int], logits: Float32[np.ndarray, "V"]) -> Drawn:
    params, steering = request.params, request.steering
    token_id = sample_token(
        logits,
        params,
        token_ids=token_ids,
        prompt_tokens=request.prompt_tokens,
        eos_token_ids=request.end_token_ids,
        seed=request.seed,
        choice=request.choice,
        steer=None if steering is None else steering.edit,
    )
    logprobs = () if params.logprobs is None else (token_logprobs(logits, token_id, params.logprobs),)
    if steering is None or token_id in request.end_token_ids:
        return token_id, logprobs, False
    return token_id, logprobs, steering.ends([*token_ids, token_id])
