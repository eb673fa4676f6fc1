"""From the scheduler's plan to a batch, and from logits to tokens: a sequence's part of a forward pass."""

# n logits rows of one sequence, V vocabulary

from collections import abc
from dataclasses import dataclass

import numpy as np

from gpt2core._shapes import Float32, Int32
from gpt2core.batch import Batch
from gpt2core.sampling import TokenLogprob, sample_token, token_logprobs
from gpt2core.scheduler import Step
from gpt2core.sequence import Sequence


@dataclass(frozen=True, slots=True)
class Row:
    """One sequence's part of a forward pass; its logits are those from `first` to `end` of the batch's."""

    sequence: Sequence
    tokens: int
    first: int
    end: int
    reads_at: int | None = None  # prompt position of the first of its logits, when somebody reads them
    draws: bool = True  # whether its last logits give a token


Drawn = tuple[int, tuple[TokenLogprob, ...]]
"""A token id, and what is known of its probability when that was asked for."""


def decode_batch(
    decode: list[Sequence], ones: Int32[np.ndarray, "S"], indices: Int32[np.ndarray, "S"]
) -> tuple[list[Row], Batch]:
    """One token per sequence. `ones` and `indices` (0, 1, 2...) never change, so the caller keeps them."""
    rows = [Row(sequence, 1, i, i + 1) for i, sequence in enumerate(decode)]
    batch = Batch(
        tokens=np.array([sequence.token_ids[-1] for sequence in decode], np.int32),
        lengths=ones[: len(rows)],
        starts=np.array([sequence.cached for sequence in decode], np.int32),
        slots=np.array([sequence.slot for sequence in decode], np.int32),
        logits_at=indices[: len(rows)],
    )
    return rows, batch


def mixed_batch(step: Step) -> tuple[list[Row], Batch]:
    """The rows that decode, then chunks of prompts."""
    rows = [Row(sequence, 1, i, i + 1) for i, sequence in enumerate(step.decode)]
    tokens = [sequence.token_ids[-1] for sequence in step.decode]
    logits_at = list(range(len(tokens)))
    for sequence, count in step.prefill:
        start, end, first = sequence.cached, sequence.cached + count, len(logits_at)
        at = len(tokens) - start  # where the sequence's position 0 would be among the tokens
        tokens += sequence.token_ids[start:end]
        draws = end == sequence.prompt_tokens and sequence.max_new_tokens > 0
        reads_at = None
        if sequence.logits_from is not None and sequence.logits_from < end:
            reads_at = max(sequence.logits_from, start)
            logits_at += range(at + reads_at, at + end)
        elif draws:
            logits_at.append(at + end - 1)
        rows.append(Row(sequence, count, first, len(logits_at), reads_at, draws))
    batch = Batch(
        tokens=np.array(tokens, np.int32),
        lengths=np.array([row.tokens for row in rows], np.int32),
        starts=np.array([row.sequence.cached for row in rows], np.int32),
        slots=np.array([row.sequence.slot for row in rows], np.int32),
        logits_at=np.array(logits_at, np.int32),
    )
    return rows, batch


def read_row(row: Row, logits: Float32[np.ndarray, "n V"], eos_token_ids: abc.Sequence[int]) -> Drawn | None:
    """Hand the row's logits to who reads them, and draw its token; None in the middle of a prompt."""
    sequence, params = row.sequence, row.sequence.params
    if row.reads_at is not None and sequence.on_logits is not None:
        sequence.on_logits(row.reads_at, logits)
    if not row.draws:
        return None
    token_id = sample_token(
        logits[-1],
        params,
        token_ids=sequence.token_ids,
        prompt_tokens=sequence.prompt_tokens,
        eos_token_ids=eos_token_ids,
        seed=sequence.seed,
        choice=sequence.choice,
    )
    if params.logprobs is None:
        return token_id, ()
    return token_id, (token_logprobs(logits[-1], token_id, params.logprobs),)
