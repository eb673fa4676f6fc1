"""Trace: what one forward pass computes on the way, for comparing backends and for looking inside."""

# T tokens, D width, H heads, V vocabulary, L layers, S = 2 L + 1 states

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from gpt2core._shapes import Float


@dataclass(frozen=True, slots=True)
class Trace:
    """One sequence's hidden states, attention maps and logits."""

    hidden_states: Float[np.ndarray, "S T D"]  # embedding; then, per layer, after attention and after MLP
    attentions: Float[np.ndarray, "L H T T"]  # probabilities: row t sums to 1 over positions 0 to t
    logits: Float[np.ndarray, "T V"]

    def parts(self) -> Iterator[tuple[str, Float[np.ndarray, "..."]]]:
        """Name and array of each part, in the order in which a pass computes them."""
        yield "embedding", self.hidden_states[0]
        for i, attention in enumerate(self.attentions):
            yield f"layer {i} attention map", attention
            yield f"layer {i} attention", self.hidden_states[2 * i + 1]
            yield f"layer {i} MLP", self.hidden_states[2 * i + 2]
        yield "logits", self.logits
