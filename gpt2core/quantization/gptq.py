"""4-bit rounding that makes up for its own errors: GPTQ (Frantar et al. 2022), layer after layer.

The inputs whose products should stay what they are come from a pass over token ids; random ones do nearly as
well as text, since what matters is which inputs are large and which go together.
"""

# B texts, T tokens of each, N = B T, D width, H heads, K head width
# I inputs, O outputs, G groups, S inputs per group

from typing import Final

import numpy as np

from gpt2core._shapes import Float32, Int
from gpt2core.backends.numpy import kernels
from gpt2core.quantization.encodings import Int4, QuantizedBlock, QuantizedLinear, pack_nibbles
from gpt2core.quantization.rounding import best_rounding, read_only
from gpt2core.weights import LayerNorm, Linear, Weights

TEXTS: Final = 16
_LONGEST: Final = 256  # tokens of a text
_DAMPING: Final = 0.01  # of the mean squared input, added to each: keeps rare inputs from being sacrificed


def random_texts(weights: Weights) -> Int[np.ndarray, "B T"]:
    """Token ids to calibrate on where there is no text."""
    shape = TEXTS, min(_LONGEST, weights.config.n_positions)
    return np.random.default_rng(0).integers(0, weights.config.vocab_size, shape)


def quantize_blocks(
    weights: Weights, texts: Int[np.ndarray, "B T"], group_size: int
) -> tuple[QuantizedBlock, ...]:
    """All blocks, each rounded for the inputs that the rounded ones before it produce."""
    config, count = weights.config, texts.shape[1]
    x = (weights.wte[texts] + weights.wpe[:count]).reshape(-1, config.n_embd)  # (N, D)
    blocks = []
    for i, block in enumerate(weights.blocks):
        c_attn, qkv = _rounded(block.c_attn, _norm(x, block.ln_1, weights), group_size)
        y = _attention(qkv, count, weights, i)
        attn_c_proj, y = _rounded(block.attn_c_proj, y, group_size)
        x += y
        c_fc, h = _rounded(block.c_fc, _norm(x, block.ln_2, weights), group_size)
        kernels.activate(h, config.activation_function)
        mlp_c_proj, y = _rounded(block.mlp_c_proj, h, group_size)
        x += y
        blocks.append(QuantizedBlock(block.ln_1, c_attn, attn_c_proj, block.ln_2, c_fc, mlp_c_proj))
    return tuple(blocks)


def _rounded(
    layer: Linear, x: Float32[np.ndarray, "N I"], group_size: int
) -> tuple[QuantizedLinear, Float32[np.ndarray, "N O"]]:
    """The layer in 4 bits, and what that makes of its inputs."""
    weight = round_for_inputs(layer.weight, x, group_size)
    return QuantizedLinear(weight, layer.bias), kernels.linear(x, weight.float32(), layer.bias)


def round_for_inputs(
    weight: Float32[np.ndarray, "I O"], x: Float32[np.ndarray, "N I"], group_size: int
) -> Int4:
    """Round so that `x @ weight` changes little: the error of each input is made up for by those after it.

    Frantar et al. 2022, "GPTQ", algorithm 1, with the inputs in their own order and a group's scale and zero
    chosen when its turn comes.
    """
    inputs, outputs = weight.shape
    groups = -(-inputs // group_size)
    rest = np.ascontiguousarray(weight.T)  # (O, I): what is not yet rounded, as the errors so far ask for
    feedback = _feedback(x)  # (I, I)
    values = np.zeros((outputs, groups * group_size), np.uint8)
    scale = np.empty((outputs, groups), np.float32)
    zero = np.empty((outputs, groups), np.uint8)
    for g in range(groups):
        first, last = g * group_size, min((g + 1) * group_size, inputs)
        part = rest[:, first:last].copy()
        _, scale[:, g], zero[:, g] = best_rounding(part)
        below, above = -zero[:, g].astype(np.float32), 15 - zero[:, g].astype(np.float32)
        errors = np.empty_like(part)
        for j in range(last - first):
            at = first + j
            steps = np.clip(np.rint(part[:, j] / scale[:, g]), below, above)
            values[:, at] = steps - below
            errors[:, j] = (part[:, j] - steps * scale[:, g]) / feedback[at, at]
            part[:, j + 1 :] -= errors[:, j, None] * feedback[at, at + 1 : last]
        rest[:, last:] -= errors @ feedback[first:last, last:]
        values[:, last : (g + 1) * group_size] = zero[:, g, None]  # padding
    return Int4(read_only(pack_nibbles(values)), read_only(scale), read_only(pack_nibbles(zero)), inputs)


def _feedback(x: Float32[np.ndarray, "N I"]) -> Float32[np.ndarray, "I I"]:
    """The upper Cholesky factor of the inverse of `x.T @ x`: how an error is spread over later inputs."""
    hessian = (x.T @ x).astype(np.float64)
    hessian[np.diag_indices_from(hessian)] += max(_DAMPING * float(np.diag(hessian).mean()), 1e-12)
    return np.linalg.cholesky(np.linalg.inv(hessian)).T.astype(np.float32)


def _norm(x: Float32[np.ndarray, "N D"], norm: LayerNorm, weights: Weights) -> Float32[np.ndarray, "N D"]:
    return kernels.layer_norm(x, norm.weight, norm.bias, weights.config.layer_norm_epsilon)


def _attention(
    qkv: Float32[np.ndarray, "N D3"], count: int, weights: Weights, layer: int
) -> Float32[np.ndarray, "N D"]:
    """Each text's causal attention; `count` is T."""
    config = weights.config
    heads = qkv.reshape(-1, count, 3, config.n_head, config.head_dim)  # (B, T, 3, H, K)
    scale = config.attention_scale(layer)
    y = [
        kernels.attend_causal(text[:, 0], text[:, 1].swapaxes(0, 1), text[:, 2].swapaxes(0, 1), scale)
        for text in heads
    ]  # (T, H, K) each
    return np.concatenate(y).reshape(len(qkv), -1)
