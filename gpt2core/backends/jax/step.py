"""One compiled step as a pure function of the module's state: tokens into the cache, logits out."""

# R rows, N new tokens per row, T cached positions that are read, M wanted logits, V vocabulary
# L layers, S cache slots, H heads, C cache capacity, K head width, D width

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from gpt2core.backends.jax.module import Gpt2Module

Leaves = tuple[Array, ...]
Step = Callable[[Leaves, Array, Array, Array], tuple[Array, Array]]


def make_step(graph: Any, treedef: Any, read: int) -> Step:
    """The step over the first `read` cached positions.

    The function it returns takes the module's parameters as flat leaves, the cache (L, 2, S, H, C, K), which
    it may overwrite, `rows` (R, 3 + N) int32 with slot, start and length of each row and then its tokens, and
    `wanted` (M,) int32, indices into the R N tokens. It returns logits (M, V) and the cache. A row that is
    padding names slot S: it writes nothing. A row's padding tokens write behind the row's end only, if
    anywhere.
    """

    def step(leaves: Leaves, kv: Array, rows: Array, wanted: Array) -> tuple[Array, Array]:
        model: Gpt2Module = nnx.merge(graph, jax.tree.unflatten(treedef, leaves))
        slots, starts, lengths, tokens = rows[:, 0], rows[:, 1], rows[:, 2], rows[:, 3:]
        count, new = tokens.shape
        positions = starts[:, None] + jnp.arange(new, dtype=jnp.int32)  # (R, N)
        there = jnp.arange(read, dtype=jnp.int32)
        seen = there <= positions[:, :, None]  # (R, N, T)
        filled = there < (starts + lengths)[:, None]  # (R, T)
        x = model.embed(tokens, jnp.minimum(positions, model.config.n_positions - 1))  # (R, N, D)

        def attend(i: int, qkv: Array) -> Array:
            nonlocal kv
            new_kv = qkv[:, :, 1:]  # (R, N, 2, H, K)
            kv = kv.at[i, :, slots[:, None], :, positions].set(new_kv, mode="drop")
            past = kv[i, :, :, :, :read].at[:, slots].get(mode="clip")  # (2, R, H, T, K)
            # Weight 0 times NaN is NaN: what earlier tenants left is zeroed in the values as well.
            v = jnp.where(filled[:, None, :, None], past[1], 0)
            scores = jnp.einsum("rnhk,rhtk->rhnt", qkv[:, :, 0], past[0]) * model.config.attention_scale(i)
            weights = jax.nn.softmax(jnp.where(seen[:, None], scores, -jnp.inf), axis=-1)
            return jnp.einsum("rhnt,rhtk->rnhk", weights, v)

        def pick(x: Array) -> Array:
            return x.reshape(count * new, *x.shape[2:])[wanted]  # (M, ...)

        return model.logits(model.hidden(x, attend, pick=pick)), kv  # (M, V)

    return step


def copy_positions(kv: Array, source: Array, target: Array, start: Array, end: Array) -> Array:
    """The cache (L, 2, S, H, C, K), which may be overwritten, with a part of one slot copied to another."""
    there = jnp.arange(kv.shape[4], dtype=jnp.int32)[:, None]  # (C, 1)
    copied, kept = (jax.lax.dynamic_index_in_dim(kv, slot, 2) for slot in (source, target))
    mixed = jnp.where((there >= start) & (there < end), copied, kept)  # (L, 2, 1, H, C, K)
    return jax.lax.dynamic_update_index_in_dim(kv, mixed, target, 2)


def make_trace(graph: Any, treedef: Any) -> Callable[[Leaves, Array, Array], tuple[Array, Array, Array]]:
    """A function of leaves, T tokens and their positions: what `gpt2core.trace.Trace` holds."""

    def trace(leaves: Leaves, tokens: Array, positions: Array) -> tuple[Array, Array, Array]:
        model: Gpt2Module = nnx.merge(graph, jax.tree.unflatten(treedef, leaves))
        attentions: list[Array] = []

        def attend(i: int, qkv: Array) -> Array:
            weights = model.attention_weights(i, qkv[:, 0], qkv[:, 1])  # (H, T, T)
            attentions.append(weights)
            return jnp.einsum("hst,thk->shk", weights, qkv[:, 2])

        x = model.embed(tokens, positions)  # (T, D)
        hidden = [x]
        logits = model.logits(model.hidden(x, attend, record=hidden.append))
        return jnp.stack(hidden), jnp.stack(attentions), logits

    return trace
