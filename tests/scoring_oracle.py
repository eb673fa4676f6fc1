"""Scores by a float64 loop over transformers, one position at a time, written to be read."""

# T tokens of a sequence, V vocabulary

import numpy as np
import torch
from transformers import GPT2LMHeadModel


def load_oracle(folder) -> GPT2LMHeadModel:
    return GPT2LMHeadModel.from_pretrained(folder, attn_implementation="eager", dtype=torch.float64).eval()


def log_softmax(oracle: GPT2LMHeadModel, ids: list[int]) -> np.ndarray:
    """(V,) of what follows `ids`, in float64."""
    with torch.inference_mode():
        logits = oracle(torch.tensor([ids])).logits[0, -1].double()
        return torch.log_softmax(logits, -1).numpy()


def score_by_hand(
    oracle: GPT2LMHeadModel, sequence: list[int], first: int, context: int, stride: int, top: int = 0
) -> list[dict]:
    """What each token of the sequence from `first` on is predicted with.

    A token sees what its window holds: the first window begins at 0, each further one `stride` later, and a
    token is scored in the first window that reads the token before it.
    """
    found = []
    for t in range(first, len(sequence)):
        begin = 0
        while t - 1 >= begin + context:
            begin += stride
        logprobs = log_softmax(oracle, sequence[begin:t])
        order = np.argsort(-logprobs, kind="stable")[:top]
        found.append(
            {
                "logprob": logprobs[sequence[t]],
                "rank": int((logprobs > logprobs[sequence[t]]).sum()) + 1,
                "entropy": float(-(np.exp(logprobs) * logprobs).sum()),
                "top": order.tolist(),
                "distribution": logprobs,
            }
        )
    return found
