"""What the PyTorch backend notes of a pass for its trace."""

# N tokens, D width, H heads, K head width, L layers

import torch
from torch import Tensor

from gpt2core.trace import Trace


class Notes:
    """Collects a pass over one whole sequence, part by part."""

    def __init__(self) -> None:
        self._hidden_states: list[Tensor] = []  # (N, D) each
        self._attentions: list[Tensor] = []  # (H, N, N) each

    def add_hidden_state(self, x: Tensor) -> None:
        """The residual stream (N, D)."""
        self._hidden_states.append(x)

    def add_attention(self, qkv: Tensor, scale: float) -> None:
        """The map, which the fused attention never holds, of queries, keys and values (N, 3, H, K)."""
        q, k = qkv[:, 0].transpose(0, 1), qkv[:, 1].transpose(0, 1)  # (H, N, K) each
        scores = scale * q @ k.transpose(1, 2)  # (H, N, N)
        beyond = torch.ones(scores.shape[1:], dtype=torch.bool, device=scores.device).triu_(1)
        self._attentions.append(scores.masked_fill_(beyond, -torch.inf).softmax(-1))

    def trace(self, logits: Tensor) -> Trace:
        """All of it as NumPy arrays."""
        return Trace(
            torch.stack(self._hidden_states).cpu().numpy(),
            torch.stack(self._attentions).cpu().numpy(),
            logits.cpu().numpy(),
        )
