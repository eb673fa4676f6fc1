"""GPT-2 as a Flax NNX module: it holds the parameters, and its forward pass takes attention as an argument.

Usable by itself (`examples/flax_module.py`). The backend's compiled steps run the same module with an
attention that reads and writes a cache.
"""

# N tokens or any leading axes "...", T positions, D width, H heads, K head width, V vocabulary, M mlp width

from collections.abc import Callable
from typing import Any, Final

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from gpt2core.config import ModelConfig
from gpt2core.weights import Block as BlockWeights
from gpt2core.weights import LayerNorm as NormWeights
from gpt2core.weights import Linear as LinearWeights
from gpt2core.weights import Weights, as_array

Place = Callable[[np.ndarray, tuple[str | None, ...]], Array]
"""Puts an array on its devices; the tuple names the mesh axis over which each of its axes may be cut."""

Attend = Callable[[int, Array], Array]
"""(layer, qkv (..., 3, H, K)) -> attended values (..., H, K)."""

MODEL_AXIS: Final = "model"


def _laplace(x: Array) -> Array:
    return 0.5 * (1 + jax.scipy.special.erf((x - 0.707107) / (0.282095 * 2**0.5)))


def _gelu(x: Array) -> Array:
    return jax.nn.gelu(x, approximate=False)


def _gelu_tanh(x: Array) -> Array:
    return jax.nn.gelu(x, approximate=True)


def _silu(x: Array) -> Array:
    return x * jax.nn.sigmoid(x)


ACTIVATIONS: Final[dict[str, Callable[[Array], Array]]] = {
    "gelu": _gelu,
    "gelu_10": lambda x: jnp.clip(_gelu(x), -10, 10),
    "gelu_accurate": _gelu_tanh,
    "gelu_fast": _gelu_tanh,
    "gelu_new": _gelu_tanh,
    "gelu_python": _gelu,
    "gelu_python_tanh": _gelu_tanh,
    "gelu_pytorch_tanh": _gelu_tanh,
    "hardswish": lambda x: x * jnp.clip(x + 3, 0, 6) / 6,
    "laplace": _laplace,
    "leaky_relu": lambda x: jnp.where(x >= 0, x, 0.01 * x),
    "linear": lambda x: x,
    "mish": lambda x: x * jnp.tanh(jax.nn.softplus(x)),
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "relu": lambda x: jnp.maximum(x, 0),
    "relu2": lambda x: jnp.square(jnp.maximum(x, 0)),
    "relu6": lambda x: jnp.clip(x, 0, 6),
    "sigmoid": lambda x: jax.nn.sigmoid(x),
    "silu": _silu,
    "sqrtsoftplus": lambda x: jnp.sqrt(jax.nn.softplus(x)),
    "swish": _silu,
    "tanh": jnp.tanh,
}


def plain_activation(name: str) -> str:
    """The first of the names under which `ACTIVATIONS` holds the same function."""
    return next(other for other, function in ACTIVATIONS.items() if function is ACTIVATIONS[name])


class LayerNorm(nnx.Module):
    """Scale and shift after normalising to mean 0 and variance 1."""

    def __init__(self, weights: NormWeights, epsilon: float, place: Place) -> None:
        self.weight = nnx.Param(place(weights.weight, (None,)))  # (D,)
        self.bias = nnx.Param(place(weights.bias, (None,)))  # (D,)
        self.epsilon = epsilon

    def __call__(self, x: Array) -> Array:
        """(..., D) -> (..., D)."""
        centred = x - x.mean(-1, keepdims=True)
        variance = jnp.square(centred).mean(-1, keepdims=True)
        return centred * jax.lax.rsqrt(variance + self.epsilon) * self.weight[...] + self.bias[...]


class Linear(nnx.Module):
    """A product over the trailing axes of the input, plus a bias.

    The weight has the axes (inputs..., outputs...): heads keep an axis of their own, so that a mesh can cut
    the matrices by heads.
    """

    def __init__(
        self,
        weights: LinearWeights,
        inputs: tuple[int, ...],
        outputs: tuple[int, ...],
        cut: tuple[str | None, ...],
        place: Place,
    ) -> None:
        self.weight = nnx.Param(place(as_array(weights.weight).reshape(*inputs, *outputs), cut))
        self.bias = nnx.Param(place(weights.bias.reshape(outputs), cut[len(inputs) :]))
        self.contracted = len(inputs)

    def __call__(self, x: Array) -> Array:
        """(..., inputs) -> (..., outputs)."""
        return jnp.tensordot(x, self.weight[...], self.contracted) + self.bias[...]


class Block(nnx.Module):
    """One transformer block."""

    def __init__(self, weights: BlockWeights, config: ModelConfig, place: Place) -> None:
        d, h, k, m = config.n_embd, config.n_head, config.head_dim, config.mlp_dim
        self.ln_1 = LayerNorm(weights.ln_1, config.layer_norm_epsilon, place)
        self.c_attn = Linear(weights.c_attn, (d,), (3, h, k), (None, None, MODEL_AXIS, None), place)
        self.attn_c_proj = Linear(weights.attn_c_proj, (h, k), (d,), (MODEL_AXIS, None, None), place)
        self.ln_2 = LayerNorm(weights.ln_2, config.layer_norm_epsilon, place)
        self.c_fc = Linear(weights.c_fc, (d,), (m,), (None, MODEL_AXIS), place)
        self.mlp_c_proj = Linear(weights.mlp_c_proj, (m,), (d,), (MODEL_AXIS, None), place)
        self.activation = config.activation_function

    def mlp(self, x: Array) -> Array:
        """The second half: (..., D) -> (..., D)."""
        return self.mlp_c_proj(ACTIVATIONS[self.activation](self.c_fc(self.ln_2(x))))


class Gpt2Module(nnx.Module):
    """A GPT-2 whose parameters are `nnx.Param`; `wte` is the head too where the head is tied.

    Args:
        weights: copied to JAX's memory, on the CPU too unless an array happens to be aligned to 64 bytes.
        place: where to put arrays; by default JAX's default device.
    """

    def __init__(self, weights: Weights, place: Place | None = None) -> None:
        place = place or (lambda array, cut: jnp.asarray(array))
        config = weights.config
        self.config = config
        self.wte = nnx.Param(place(as_array(weights.wte), (None, MODEL_AXIS)))  # (V, D)
        self.wpe = nnx.Param(place(weights.wpe, (None, MODEL_AXIS)))  # (P, D)
        self.blocks = nnx.List([Block(block, config, place) for block in weights.blocks])
        self.ln_f = LayerNorm(weights.ln_f, config.layer_norm_epsilon, place)
        if weights.lm_head is not weights.wte:
            self.lm_head = nnx.Param(place(as_array(weights.lm_head), (None, MODEL_AXIS)))  # (V, D)

    def __call__(self, token_ids: Any) -> Array:
        """Logits at every position: (..., T) ids -> (..., T, V) float32; nothing is cached."""
        token_ids = jnp.asarray(token_ids)
        positions = jnp.arange(token_ids.shape[-1])
        return self.logits(self.hidden(self.embed(token_ids, positions), self.attend_to_all))

    def embed(self, token_ids: Array, positions: Array) -> Array:
        """(...) ids and (...) positions -> (..., D); ids and positions must lie in range."""
        return self.wte[...][token_ids] + self.wpe[...][positions]

    def hidden(
        self,
        x: Array,
        attend: Attend,
        *,
        pick: Callable[[Array], Array] = lambda x: x,
        record: Callable[[Array], None] = lambda x: None,
    ) -> Array:
        """The residual stream after all blocks: (..., D) -> (..., D), or what `pick` leaves of it.

        Args:
            x: embedded tokens.
            attend: see `Attend`.
            pick: applied after the last block's attention, from where on tokens no longer meet.
            record: is given the stream after each attention and after each MLP.
        """
        # Unrolled: lax.scan over stacked blocks must cut each layer's weights out of the stack. At GPT-2
        # small's shape on 2 cores it compiled in 0.5 s instead of 1.5 s, but a decode step took 27 ms instead
        # of 23 ms at batch 1 and 64 ms instead of 46 ms at batch 8 (medians, 128 positions read).
        for i, block in enumerate(self.blocks):
            y = attend(i, block.c_attn(block.ln_1(x)))  # (..., H, K)
            if i == self.config.n_layer - 1:
                x, y = pick(x), pick(y)
            x = x + block.attn_c_proj(y)
            record(x)
            x = x + block.mlp(x)
            record(x)
        return x

    def logits(self, x: Array) -> Array:
        """(..., D) -> (..., V)."""
        head = self.lm_head if hasattr(self, "lm_head") else self.wte
        return jnp.einsum("...d,vd->...v", self.ln_f(x), head[...])

    def attention_weights(self, i: int, q: Array, k: Array) -> Array:
        """Causal weights of layer `i` among T tokens: (..., T, H, K) twice -> (..., H, T, T)."""
        t = q.shape[-3]
        scores = jnp.einsum("...shk,...thk->...hst", q, k) * self.config.attention_scale(i)
        return jax.nn.softmax(jnp.where(jnp.tri(t, dtype=bool), scores, -jnp.inf), axis=-1)

    def attend_to_all(self, i: int, qkv: Array) -> Array:
        """Causal attention among the given tokens alone: (..., T, 3, H, K) -> (..., T, H, K)."""
        q, k, v = (qkv[..., part, :, :] for part in range(3))  # (..., T, H, K) each
        return jnp.einsum("...hst,...thk->...shk", self.attention_weights(i, q, k), v)
