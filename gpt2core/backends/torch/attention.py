"""Attention of the PyTorch backend: write a layer's keys and values into the cache, then attend."""

# N new tokens in all, R rows of a run, H heads, K head width, T cached positions
# S cache slots, C cache capacity, n tokens of a row or of a block

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from gpt2core.backends._shared.ragged import DecodeRun, PrefillRow

_BLOCK: Final = 64
"""Tokens of a prompt that attend at once, so that their scores stay in the processor's cache."""


@dataclass(frozen=True, slots=True)
class Places:
    """A run with what is the same for all layers."""

    run: DecodeRun
    slots: Tensor  # (R,)
    last: Tensor  # (R,) each row's newest position
    seen: Tensor | None  # (R, 1, 1, T) of the positions that each row sees, or None where all see all


def places_of(run: DecodeRun, device: torch.device) -> Places:
    """Where a run's rows lie, on the device."""
    seen = None
    if run.ends.min() != run.longest:
        seen = torch.from_numpy(np.arange(run.longest) < run.ends[:, None, None, None]).to(device)
    slots = torch.arange(run.slots.start, run.slots.stop, device=device)
    return Places(run, slots, torch.from_numpy(run.ends - 1).to(device), seen)


def attend(
    qkv: Tensor, kv: Tensor, decode: Sequence[Places], prefill: Sequence[PrefillRow], scale: float
) -> Tensor:
    """Write keys and values (N, 3, H, K) into a layer's cache (2, S, H, C, K), then attend: (N, H K)."""
    n, _, heads, width = qkv.shape
    y = torch.empty(n, heads, width, device=qkv.device)
    for places in decode:
        run = places.run
        q = qkv[run.tokens, 0, :, None]  # (R, H, 1, K)
        if len(run.ends) == 1:
            kv[:, run.slots.start, :, run.longest - 1] = qkv[run.tokens, 1:][0]
        else:
            kv[:, places.slots, :, places.last] = qkv[run.tokens, 1:]
        k, v = kv[:, run.slots, :, : run.longest]  # (R, H, T, K) each
        attended = F.scaled_dot_product_attention(q, k, v, places.seen, scale=scale)
        y[run.tokens] = attended[:, :, 0]
    for row in prefill:
        kv[:, row.slot, :, row.start : row.end] = qkv[row.tokens, 1:].permute(1, 2, 0, 3)
        q = qkv[row.tokens, 0].transpose(0, 1)  # (H, n, K)
        k, v = kv[:, row.slot, :, : row.end]  # (H, T, K) each
        if qkv.device.type == "cpu" and row.end - row.start >= _BLOCK:
            _attend_by_blocks(q, k, v, row.start, scale, y[row.tokens])
            continue
        seen = None
        if row.start:
            seen = torch.ones(row.end - row.start, row.end, dtype=torch.bool, device=qkv.device)
            seen = seen.tril_(row.start)
        attended = F.scaled_dot_product_attention(
            q[None], k[None], v[None], seen, is_causal=seen is None, scale=scale
        )
        y[row.tokens] = attended[0].transpose(0, 1)
    return y.view(n, heads * width)


def _attend_by_blocks(q: Tensor, k: Tensor, v: Tensor, start: int, scale: float, y: Tensor) -> None:
    """Causal attention of q (H, n, K), of positions from `start`, over k and v (H, T, K) into y (n, H, K).

    By blocks of tokens, each over the positions that it may see: on the CPU this takes two thirds of the time
    of PyTorch's fused attention.
    """
    q = q * scale
    later = torch.ones(_BLOCK, _BLOCK, dtype=torch.bool).triu_(1)
    for first in range(0, q.shape[1], _BLOCK):
        last = min(first + _BLOCK, q.shape[1])
        n, end = last - first, start + last
        scores = torch.bmm(q[:, first:last], k[:, :end].transpose(1, 2))  # (H, n, end)
        scores[:, :, end - n :].masked_fill_(later[:n, :n], -torch.inf)
        y[first:last] = torch.bmm(scores.softmax(-1), v[:, :end]).transpose(0, 1)
