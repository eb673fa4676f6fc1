"""Two ways to say attention: ONNX Runtime's own operator, and those of the ONNX standard alone."""

# R rows, S new tokens per row, P past positions, T = P + S, H heads, K head width, E = H K

import math
from typing import Final, final

from gpt2core.backends.onnx.nodes import Graph
from gpt2core.config import ModelConfig

MICROSOFT: Final = "com.microsoft"
_HEAD_MULTIPLE: Final = 8  # GroupQueryAttention refuses other head widths
_AFTER_SOFTMAX: Final = 2  # what its attribute qk_output calls the attention probabilities


def padded_head_dim(config: ModelConfig) -> int:
    """The head width of `Fused`, the configuration's rounded up to what the operator takes."""
    return -(-config.head_dim // _HEAD_MULTIPLE) * _HEAD_MULTIPLE


@final
class Fused:
    """ONNX Runtime's own operator.

    `GroupQueryAttention` takes queries, keys and values side by side, appends to the cache in place and
    attends to each row's own length.

    Args:
        config: what the model computes.
        seqlens_k: names an int32 (R,): positions that each row sees, less one.
        total: names an int32 (): the most positions that a row sees.
        probabilities: also give out attention probabilities (R, H, S, T), as "attention_probabilities_i".
    """

    def __init__(
        self, config: ModelConfig, *, seqlens_k: str, total: str, probabilities: bool = False
    ) -> None:
        self.head_dim = padded_head_dim(config)
        self._lengths = seqlens_k, total
        self._probabilities = probabilities

    def attention(self, g: Graph, layer: int, qkv: str) -> str:
        """See `Operators`."""
        outputs = [f"attention_{layer}", f"present_key_{layer}", f"present_value_{layer}"]
        qk_output = {}
        if self._probabilities:
            outputs.append(f"attention_probabilities_{layer}")
            qk_output = {"qk_output": _AFTER_SOFTMAX}
        return g.ops(
            "GroupQueryAttention",
            (qkv, "", "", f"past_key_{layer}", f"past_value_{layer}", *self._lengths),
            outputs,
            MICROSOFT,
            num_heads=g.config.n_head,
            kv_num_heads=g.config.n_head,
            scale=g.config.attention_scale(layer),
            **qk_output,
        )[0]


@final
class Standard:
    """Operators of the ONNX standard only; the cache grows by concatenation.

    Args:
        config: what the model computes.
        mask: names a bool (S, T): which positions each new token sees.
    """

    def __init__(self, config: ModelConfig, *, mask: str) -> None:
        self.head_dim = config.head_dim
        self._mask = mask

    def attention(self, g: Graph, layer: int, qkv: str) -> str:
        """See `Operators`."""
        heads = g.constant([0, 0, 3, g.config.n_head, self.head_dim])
        parts = g.op("Transpose", g.op("Reshape", qkv, heads), perm=[2, 0, 3, 1, 4])  # (3, R, H, S, K)
        q, k, v = (g.op("Gather", parts, g.constant(i), axis=0) for i in range(3))  # (R, H, S, K) each
        k, v = (
            g.ops("Concat", (f"past_{kind}_{layer}", new), [f"present_{kind}_{layer}"], axis=2)[0]
            for kind, new in (("key", k), ("value", v))
        )  # (R, H, T, K) each
        q = g.op("Mul", q, g.constant(float(g.config.attention_scale(layer))))
        scores = g.op("MatMul", q, g.op("Transpose", k, perm=[0, 1, 3, 2]))  # (R, H, S, T)
        scores = g.op("Where", self._mask, scores, g.constant(-math.inf))
        y = g.op("MatMul", g.op("Softmax", scores, axis=-1), v)  # (R, H, S, K)
        merged = g.constant([0, 0, g.config.n_head * self.head_dim])
        return g.op("Reshape", g.op("Transpose", y, perm=[0, 2, 1, 3]), merged)  # (R, S, E)
