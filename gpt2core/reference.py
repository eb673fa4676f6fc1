"""GPT-2 once more, as plainly as it can be written, in float64: the reference that backends are held to.

No cache, no batch, no blocks: one sequence in, the logits at every position out. Slow on purpose.
After Radford et al. 2019, "Language Models are Unsupervised Multitask Learners", section 2.3, with the
variants of Hugging Face's GPT2Config.
"""

# T tokens, D width, H heads, V vocabulary

import math
from collections.abc import Callable, Sequence

import numpy as np

from gpt2core._shapes import Float
from gpt2core.trace import Trace
from gpt2core.weights import LayerNorm, Linear, Weights, as_array, look_up

Array = Float[np.ndarray, "..."]

_erf: Callable[[Array], Array] = np.vectorize(math.erf, otypes=[float])
_ROOT_2_OVER_PI = math.sqrt(2 / math.pi)


def _sigmoid(x: Array) -> Array:
    return 0.5 * (1 + np.tanh(0.5 * x))


def _softplus(x: Array) -> Array:
    return np.logaddexp(0, x)


def _gelu_exact(x: Array) -> Array:
    return 0.5 * x * (1 + _erf(x / math.sqrt(2)))


def _gelu_tanh(x: Array) -> Array:
    return 0.5 * x * (1 + np.tanh(_ROOT_2_OVER_PI * (x + 0.044715 * x**3)))


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": _gelu_exact,
    "gelu_10": lambda x: np.clip(_gelu_exact(x), -10, 10),
    "gelu_accurate": _gelu_tanh,
    "gelu_fast": _gelu_tanh,
    "gelu_new": _gelu_tanh,
    "gelu_python": _gelu_exact,
    "gelu_python_tanh": _gelu_tanh,
    "gelu_pytorch_tanh": _gelu_tanh,
    "hardswish": lambda x: x * np.clip(x + 3, 0, 6) / 6,
    "laplace": lambda x: 0.5 * (1 + _erf((x - 0.707107) / (0.282095 * math.sqrt(2)))),
    "leaky_relu": lambda x: np.where(x >= 0, x, 0.01 * x),
    "linear": lambda x: x,
    "mish": lambda x: x * np.tanh(_softplus(x)),
    "quick_gelu": lambda x: x * _sigmoid(1.702 * x),
    "relu": lambda x: np.maximum(x, 0),
    "relu2": lambda x: np.maximum(x, 0) ** 2,
    "relu6": lambda x: np.clip(x, 0, 6),
    "sigmoid": _sigmoid,
    "silu": lambda x: x * _sigmoid(x),
    "sqrtsoftplus": lambda x: np.sqrt(_softplus(x)),
    "swish": lambda x: x * _sigmoid(x),
    "tanh": np.tanh,
}


def layer_norm(x: Array, ln: LayerNorm, epsilon: float) -> Array:
    """Normalise the last axis to mean 0 and variance 1, then scale and shift."""
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + epsilon) * ln.weight + ln.bias


def linear(x: Array, layer: Linear) -> Array:
    """Multiply by the weight, which lies (in, out), and add the bias."""
    return x @ as_array(layer.weight).astype(np.float64) + layer.bias


def attention(qkv: Array, heads: int, scale: float) -> tuple[Array, Array]:
    """Causal self-attention over queries, keys and values that lie side by side, (T, 3 D) -> (T, D).

    The second result is the attention map, (H, T, T).
    """
    t = len(qkv)
    q, k, v = qkv.reshape(t, 3, heads, -1).transpose(1, 2, 0, 3)  # (H, T, D/H) each
    scores = scale * q @ k.transpose(0, 2, 1)  # (H, T, T)
    scores += np.triu(np.full((t, t), -np.inf), 1)  # nobody sees the future
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    return (weights @ v).transpose(1, 0, 2).reshape(t, -1), weights


def reference_logits(weights: Weights, token_ids: Sequence[int]) -> Float[np.ndarray, "T V"]:
    """Logits at every position of one sequence, float64.

    Shapes: `token_ids` (T,), result (T, V).
    """
    return _logits(weights, token_ids, lambda hidden_state, attention_map: None)


def reference_trace(weights: Weights, token_ids: Sequence[int]) -> Trace:
    """Hidden states, attention maps and logits of one sequence, float64; `token_ids` (T,)."""
    hidden_states: list[Array] = []
    maps: list[Array] = []

    def note(hidden_state: Array, attention_map: Array | None) -> None:
        hidden_states.append(hidden_state)
        if attention_map is not None:
            maps.append(attention_map)

    logits = _logits(weights, token_ids, note)
    return Trace(np.stack(hidden_states), np.stack(maps), logits)


def _logits(weights: Weights, token_ids: Sequence[int], note: Callable[[Array, Array | None], None]) -> Array:
    """The forward pass; `note` is shown each hidden state, and the attention map that went into it."""
    config = weights.config
    act, epsilon = ACTIVATIONS[config.activation_function], config.layer_norm_epsilon
    ids = np.asarray(token_ids)
    x = look_up(weights.wte, ids).astype(np.float64) + weights.wpe[: len(ids)]  # (T, D)
    note(x, None)
    for i, block in enumerate(weights.blocks):
        qkv = linear(layer_norm(x, block.ln_1, epsilon), block.c_attn)  # (T, 3 D)
        y, attention_map = attention(qkv, config.n_head, config.attention_scale(i))  # (T, D), (H, T, T)
        x = x + linear(y, block.attn_c_proj)
        note(x, attention_map)
        x = x + linear(act(linear(layer_norm(x, block.ln_2, epsilon), block.c_fc)), block.mlp_c_proj)
        note(x, None)
    return layer_norm(x, weights.ln_f, epsilon) @ as_array(weights.lm_head).astype(np.float64).T
