"""GPT-2 as a Flax NNX module, without the rest of the library: token ids in, logits out.

    pip install -c constraints.txt "gpt2core[jax]"
    python examples/flax_module.py "Once upon a time"

The module's parameters are ordinary `nnx.Param`: `nnx.split`, `jax.grad` and `jax.jit` work as usual.
"""

import sys

import jax
import jax.numpy as jnp
from flax import nnx

from gpt2core import GPT2
from gpt2core.backends.jax import Gpt2Module
from gpt2core.checkpoint.open import open_checkpoint


def main(prompt: str) -> None:
    """Print the likeliest next tokens, and how far from certain the module is about the prompt."""
    tokenizer = GPT2.from_pretrained("demo", backend="numpy").tokenizer
    module = Gpt2Module(open_checkpoint("demo").weights)
    token_ids = jnp.array(tokenizer.encode(prompt))  # (T,)

    logits = nnx.jit(lambda module, ids: module(ids))(module, token_ids)  # (T, V)
    probabilities = jax.nn.softmax(logits[-1])
    for token in jnp.argsort(-probabilities)[:5].tolist():
        print(f"{probabilities[token]:6.1%}  {tokenizer.decode([token])!r}")

    graph, state = nnx.split(module)

    def loss(state: nnx.State) -> jax.Array:
        logprobs = jax.nn.log_softmax(nnx.merge(graph, state)(token_ids[:-1]))
        return -jnp.take_along_axis(logprobs, token_ids[1:, None], axis=1).mean()

    value, gradients = jax.value_and_grad(loss)(state)
    largest = max(float(jnp.abs(g).max()) for g in jax.tree.leaves(gradients))
    print(f"loss {value:.3f} per token, largest gradient {largest:.3f}")


if __name__ == "__main__":
    main(" ".join(sys.argv[1:]) or "Once upon a time")
