"""From logits to a token: what may be asked (`params`), how logits are edited (`transforms`), the `draw`."""
