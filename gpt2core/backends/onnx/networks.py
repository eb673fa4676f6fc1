"""Which session runs what: one for float32, and for quantized weights what is fastest for each shape.

Reading the weights is what takes time where tokens are few, and multiplying where they are many, so ONNX
Runtime has two operators for quantized weights, each with a layout of its own: see `products`.
"""

# R rows of a run, S new tokens per row, N = R S, M wanted logits, D width, V vocabulary

import threading
from contextlib import AbstractContextManager
from typing import Any, Final, final

import numpy as np

from gpt2core._shapes import Float32
from gpt2core.backends._shared.memory import giving_back
from gpt2core.backends.onnx.graph import Part, build_model, graph_weights
from gpt2core.backends.onnx.passes import Heads, OnnxCache, Passes, Settings, start
from gpt2core.backends.onnx.products import ByPass, ByToken, QuantizedProducts
from gpt2core.backends.onnx.runs import Run
from gpt2core.weights import Weights

_FEW_TOKENS: Final = 4  # beyond these `ByPass` is faster
_FEW_TOKENS_OF_ONE: Final = 16  # a text alone: its guesses and short prompts are computed as its steps are
_FEW_LOGITS: Final = 7  # the same of the head


@final
class Whole:
    """float32: one session of the whole graph."""

    def __init__(self, weights: Weights, settings: Settings) -> None:
        with _mapped_pages_given_back(weights):
            self._passes = Passes(*_model(weights, None, "whole"), settings)

    def run(
        self,
        run: Run,
        cache: OnnxCache,
        embedded: Float32[np.ndarray, "R S D"],
        wanted: np.ndarray,
        logits: Float32[np.ndarray, "M V"],
    ) -> None:
        """Append the run's tokens to the cache; the logits are those of the tokens `wanted` (M,)."""
        self._passes.run(run, cache, embedded, wanted, logits)


@final
class Quantized:
    """int8 and int4: a session for few and one for many tokens, and the same for the head."""

    def __init__(self, weights: Weights, settings: Settings) -> None:
        self._weights, self._settings = weights, settings
        self._products: dict[bool, QuantizedProducts] = {True: ByToken(weights), False: ByPass(weights)}
        self._bodies: dict[bool, Passes] = {}
        self._heads: dict[bool, Heads] = {}
        self._starting = threading.Lock()  # two callers must not start the same session at once
        self._body(few=True)  # what is wrong with the weights or the settings shows now

    def run(
        self,
        run: Run,
        cache: OnnxCache,
        embedded: Float32[np.ndarray, "R S D"],
        wanted: np.ndarray,
        logits: Float32[np.ndarray, "M V"],
    ) -> None:
        """See `Whole.run`."""
        rows, new = run.tokens.shape
        few = rows * new <= (_FEW_TOKENS if rows > 1 else _FEW_TOKENS_OF_ONE)
        hidden = np.empty((len(wanted), self._weights.config.n_embd), np.float32)
        self._body(few=few).run(run, cache, embedded, wanted, hidden)
        if len(wanted):
            self._head(few=few or len(wanted) <= _FEW_LOGITS).run(hidden, logits)
            sick = ~np.isfinite(hidden).all(1)
            if sick.any():
                logits[sick] = np.nan  # rounding to whole numbers has hidden it

    def _body(self, *, few: bool) -> Passes:
        with self._starting:
            if few not in self._bodies:
                with _mapped_pages_given_back(self._weights):
                    model = _model(self._weights, self._products[few], "body")
                    self._bodies[few] = Passes(*model, self._settings)
            return self._bodies[few]

    def _head(self, *, few: bool) -> Heads:
        with self._starting:
            if few not in self._heads:
                with _mapped_pages_given_back(self._weights):
                    model = _model(self._weights, self._products[few], "head")
                    self._heads[few] = Heads(*model, self._settings)
            return self._heads[few]


def start_tracer(weights: Weights, settings: Settings) -> tuple[Any, Any]:
    """A session that shows what happens inside, and what has to live as long."""
    products = ByToken(weights) if weights.precision != "float32" else None
    model, arrays = _model(weights, products, "whole", trace=True)
    return start(model, arrays, settings, packed=False)


def _mapped_pages_given_back(weights: Weights) -> AbstractContextManager[None]:
    return giving_back(array for _, array in weights.named())


def _model(
    weights: Weights,
    products: QuantizedProducts | None,
    part: Part,
    *,
    trace: bool = False,
) -> tuple[Any, dict[str, np.ndarray]]:
    arrays = dict(graph_weights(weights, products, part=part))
    return build_model(weights.config, arrays, products, part=part, trace=trace), arrays
