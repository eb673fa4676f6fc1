"""A backend of your own, in one file: GPT-2 on OpenVINO, which gpt2core knows nothing of.

    pip install openvino gpt2core
    python examples/custom_backend.py "Once upon a time"

In a package of your own, name the class in pyproject.toml. From then on `backend="openvino"` works wherever
a backend is named, `gpt2core backends` lists it, and nothing in gpt2core has to change:

    [project.entry-points."gpt2core.backends"]
    openvino = "custom_backend:OpenVinoBackend"

Three parts, as in most backends: a cache, the model in the engine's own terms, and `forward`, which turns a
ragged batch into shapes that the engine likes. Here rows of equally many new tokens run together as one
rectangle, and a mask hides what lies beyond each row's own past. The conformance suite says whether it holds:

    from gpt2core.testing import check_backend
    check_backend(OpenVinoBackend)
"""

# N new tokens in all, M wanted logits, D width, H heads, K head width, V vocabulary
# L layers, S cache slots, C cache capacity; a group's rectangle: R rows, Q new tokens each, P past positions

import math
import sys
import threading
from collections.abc import Callable
from typing import Any, final

import numpy as np
import openvino as ov
from openvino import opset13 as op

from gpt2core import BackendError, BackendUnavailableError, Batch, ModelConfig, RequestError, Weights

KEYS_VALUES = ("keys", "values")


@final
class OpenVinoCache:
    """Keys and values as (L, 2, S, C, D): the first P positions of one slot are one piece of memory."""

    def __init__(self, config: ModelConfig, slots: int, capacity: int) -> None:
        self.config, self.slots, self.capacity = config, slots, capacity
        self.kv = np.zeros((config.n_layer, 2, slots, capacity, config.n_embd), np.float32)

    @property
    def nbytes(self) -> int:
        """Bytes that a full cache takes."""
        return self.kv.nbytes


@final
class OpenVinoBackend:
    """GPT-2 in OpenVINO, float32; the engine keeps a copy of the weights in a layout of its own.

    Args:
        weights: float32 weights.
        device: "cpu", or another of OpenVINO's devices in small letters.
        threads: threads of OpenVINO's own pool; None leaves the number to it.

    Raises:
        RequestError: `threads` is not a whole number of 1 or more.
        BackendUnavailableError: OpenVINO does not see the device.
    """

    name = "openvino"

    def __init__(self, weights: Weights, *, device: str = "cpu", threads: int | None = None) -> None:
        if threads is not None and (type(threads) is not int or threads < 1):
            raise RequestError(f"threads is {threads!r}; use None or a whole number of 1 or more")
        core = ov.Core()
        devices = [name.lower() for name in core.available_devices]
        if device not in devices:
            raise BackendUnavailableError(
                f"the openvino backend does not see device {device!r}; there are: {', '.join(devices)}"
            )
        # Without the hint, OpenVINO computes float32 models in bfloat16 where the processor can.
        options: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}
        if threads is not None and device == "cpu":
            options["INFERENCE_NUM_THREADS"] = threads
        self.config = weights.config
        self._compiled: Any = core.compile_model(build_model(weights), device.upper(), options)
        self._running = threading.Lock()  # a compiled model answers one call at a time

    def new_cache(self, slots: int, capacity: int) -> OpenVinoCache:
        """An empty cache for `slots` sequences of up to `capacity` tokens."""
        if slots < 1 or not 1 <= capacity <= self.config.n_positions:
            raise RequestError(
                f"a cache of {slots} slots of {capacity} tokens was asked for; take 1 or more, and at most "
                f"{self.config.n_positions} tokens, this model's context"
            )
        return OpenVinoCache(self.config, slots, capacity)

    def forward(self, batch: Batch, cache: OpenVinoCache) -> np.ndarray:
        """The logits (M, V) at `batch.logits_at`; see `gpt2core.Backend.forward` for the contract."""
        if self._compiled is None:
            raise RequestError("the openvino backend is closed; load the model again")
        if not isinstance(cache, OpenVinoCache) or cache.config != self.config:
            raise RequestError("the cache is of another model or backend; make it with this one's new_cache")
        batch.check(vocab_size=self.config.vocab_size, slots=cache.slots, capacity=cache.capacity)
        logits = np.empty((len(batch.logits_at), self.config.vocab_size), np.float32)
        for length in np.unique(batch.lengths):
            self._run_group(batch, cache, np.flatnonzero(batch.lengths == length), logits)
        return logits

    def _run_group(self, batch: Batch, cache: OpenVinoCache, rows: np.ndarray, logits: np.ndarray) -> None:
        """Run rows of one length as a rectangle, and write their part of `logits`."""
        starts, slots, length = batch.starts[rows], batch.slots[rows], batch.lengths[rows[0]]
        firsts = np.cumsum(batch.lengths) - batch.lengths
        tokens = firsts[rows, None] + np.arange(length)  # (R, Q) indices into the batch's tokens
        place = np.full(len(batch.tokens), -1)
        place[tokens.ravel()] = np.arange(tokens.size)
        place = place[batch.logits_at]  # (M,) where in the rectangle each wanted token is, or -1
        inputs: dict[str, np.ndarray] = {
            "tokens": batch.tokens[tokens],
            "positions": batch.positions[tokens],
            "mask": attention_mask(starts, length),
            "wanted": place[place >= 0],
        }
        for layer in range(self.config.n_layer):
            for kind, name in enumerate(KEYS_VALUES):
                inputs[f"{name}_{layer}"] = past(cache.kv[layer, kind], slots, starts)
        try:
            with self._running:
                found = self._compiled(inputs, share_inputs=True)
        except RuntimeError as error:
            raise BackendError(f"the openvino backend failed: {error}") from error
        logits[place >= 0] = found["logits"]
        positions = starts[:, None] + np.arange(length)  # (R, Q)
        for layer in range(self.config.n_layer):  # last, so that a pass that fails has written nothing
            for kind, name in enumerate(KEYS_VALUES):
                cache.kv[layer, kind, slots[:, None], positions] = found[f"new_{name}_{layer}"]

    def close(self) -> None:
        """Let go of the compiled model."""
        self._compiled = None


def past(kv: np.ndarray, slots: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """Cached keys or values (S, C, D) of a group as (R, P, D): a view for one row, a padded copy for several.

    Positions from a row's start on are zeroed: the mask gives them weight 0, but 0 times the NaN that an
    earlier tenant may have left there is NaN.
    """
    if len(slots) == 1:
        return kv[slots[0] : slots[0] + 1, : starts[0]]
    padded = kv[slots, : starts.max()]
    for row, start in enumerate(starts):
        padded[row, start:] = 0
    return padded


def attention_mask(starts: np.ndarray, length: int) -> np.ndarray:
    """What is added to the scores, (R, 1, Q, P + Q): minus infinity where a query must not look."""
    mask = np.zeros((len(starts), 1, length, starts.max() + length), np.float32)
    for row, start in enumerate(starts):
        mask[row, :, :, start : starts.max()] = -np.inf  # padding of the past
    mask[..., starts.max() :] += np.triu(np.full((length, length), -np.inf, np.float32), 1)  # the future
    return mask


def build_model(weights: Weights) -> ov.Model:
    """One graph for every group: all its dimensions but the model's own are free.

    Inputs: tokens and positions (R, Q), mask (R, 1, Q, P + Q), wanted (M,), keys_i and values_i (R, P, D).
    Outputs: logits (M, V), new_keys_i and new_values_i (R, Q, D).
    """
    config, heads = weights.config, [0, 0, weights.config.n_head, weights.config.head_dim]
    tokens, positions = parameter("tokens", [-1, -1], np.int32), parameter("positions", [-1, -1], np.int32)
    mask, wanted = parameter("mask", [-1, 1, -1, -1], np.float32), parameter("wanted", [-1], np.int64)
    inputs, outputs = [tokens, positions, mask, wanted], []

    def norm(x: ov.Node, part: Any) -> ov.Node:
        x = op.mvn(x, [-1], True, config.layer_norm_epsilon, "inside_sqrt")
        return op.add(op.multiply(x, part.weight), part.bias)

    def linear(x: ov.Node, part: Any) -> ov.Node:
        return op.add(op.matmul(x, part.weight, False, False), part.bias)

    def split_heads(x: ov.Node) -> ov.Node:  # (R, T, D) -> (R, H, T, K)
        return op.transpose(op.reshape(x, heads, special_zero=True), [0, 2, 1, 3])

    head = op.constant(weights.lm_head)
    table = head if weights.lm_head is weights.wte else op.constant(weights.wte)
    x = op.add(op.gather(table, tokens, 0), op.gather(weights.wpe, positions, 0))  # (R, Q, D)
    for i, block in enumerate(weights.blocks):
        q, *new = op.split(linear(norm(x, block.ln_1), block.c_attn), -1, 3).outputs()  # (R, Q, D) each
        old = [parameter(f"{name}_{i}", [-1, -1, config.n_embd], np.float32) for name in KEYS_VALUES]
        k, v = (op.concat(pair, 1) for pair in zip(old, new, strict=True))  # (R, P + Q, D)
        scale = np.float32(config.attention_scale(i))
        y = op.scaled_dot_product_attention(split_heads(q), split_heads(k), split_heads(v), mask, scale)
        y = op.reshape(op.transpose(y, [0, 2, 1, 3]), [0, 0, config.n_embd], special_zero=True)  # (R, Q, D)
        x = op.add(x, linear(y, block.attn_c_proj))
        h = ACTIVATIONS[config.activation_function](linear(norm(x, block.ln_2), block.c_fc))
        x = op.add(x, linear(h, block.mlp_c_proj))
        inputs += old
        outputs += [result(f"new_{name}_{i}", node) for name, node in zip(KEYS_VALUES, new, strict=True)]
    x = op.gather(op.reshape(x, [-1, config.n_embd], False), wanted, 0)  # (M, D)
    logits = op.matmul(norm(x, weights.ln_f), head, False, True)  # (M, V)
    return ov.Model([result("logits", logits), *outputs], inputs, "gpt2")


def parameter(name: str, shape: list[int], dtype: Any) -> ov.Node:
    """An input of the graph; -1 is a free dimension."""
    node = op.parameter(shape, dtype, name)
    node.output(0).set_names({name})
    return node


def result(name: str, node: Any) -> ov.Node:
    """An output of the graph."""
    found = op.result(node)
    found.output(0).set_names({name})
    return found


def _laplace(x: ov.Node) -> ov.Node:
    z = op.divide(op.subtract(x, np.float32(0.707107)), np.float32(0.282095 * math.sqrt(2)))
    return op.multiply(op.add(op.erf(z), np.float32(1)), np.float32(0.5))


ACTIVATIONS: dict[str, Callable[[ov.Node], ov.Node]] = {
    **dict.fromkeys(("gelu", "gelu_python"), lambda x: op.gelu(x, "erf")),
    **dict.fromkeys(
        ("gelu_accurate", "gelu_fast", "gelu_new", "gelu_python_tanh", "gelu_pytorch_tanh"),
        lambda x: op.gelu(x, "tanh"),
    ),
    **dict.fromkeys(("silu", "swish"), lambda x: op.swish(x)),
    "gelu_10": lambda x: op.clamp(op.gelu(x, "erf"), -10.0, 10.0),
    "hardswish": op.hswish,
    "laplace": _laplace,
    "leaky_relu": lambda x: op.prelu(x, np.float32(0.01)),
    "linear": lambda x: x,
    "mish": op.mish,
    "quick_gelu": lambda x: op.swish(x, np.float32(1.702)),
    "relu": op.relu,
    "relu2": lambda x: op.power(op.relu(x), np.float32(2)),
    "relu6": lambda x: op.clamp(x, 0.0, 6.0),
    "sigmoid": op.sigmoid,
    "sqrtsoftplus": lambda x: op.sqrt(op.softplus(x)),
    "tanh": op.tanh,
}


def main() -> None:
    """Run the suite on a small random model, then write on the demo model, as any backend would."""
    from gpt2core import GPT2, Tokenizer, open_checkpoint
    from gpt2core.testing import check_backend

    check_backend(OpenVinoBackend)
    checkpoint = open_checkpoint("demo")
    with GPT2(OpenVinoBackend(checkpoint.weights), Tokenizer.from_folder(checkpoint.folder)) as model:
        print(model.generate(" ".join(sys.argv[1:]) or "Once upon a time", max_new_tokens=60, seed=7).text)


if __name__ == "__main__":
    main()
