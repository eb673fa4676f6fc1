"""Where the time goes: embedding, attention, MLP, head, sampling, tokenizer, the engine's own loop.

Measured on every backend alike, from outside: the same weights are run whole and with parts cut away, and a
part's time is the difference. That is what a part costs in its place, with whatever the backend fuses or
overlaps; it is no profile from inside. It needs a quiet machine.
"""

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

import gpt2core.backends as registry
from gpt2core import (
    Backend,
    BackendUnavailableError,
    Batch,
    Cache,
    Engine,
    SamplingParams,
    Tokenizer,
    Weights,
    open_checkpoint,
)
from gpt2core.bench.statistics import Interval, mean_interval
from gpt2core.bench.store.files import encode_json, write_atomically
from gpt2core.bench.store.records import COMPONENTS
from gpt2core.errors import RequestError

METHOD: Final = (
    "Means of differences, round by round. Head: a pass minus one with a vocabulary of 16. MLP: that "
    "minus one with an MLP of 8 units. Attention (projections, cache and layer norms included): that minus "
    "one with half the layers, per layer, times the layers. Embedding: the two look-ups and their sum, alone "
    "in NumPy. Rest of the pass: what remains. Engine: a decoding step beside its pass, with a vocabulary of "
    "16. Sampling: how much longer that takes with the whole vocabulary at temperature 0.8. Tokenizer: "
    "encoding the prompt, or decoding the new token."
)
_SMALL_VOCABULARY: Final = 16
_SMALL_MLP: Final = 8
_LEAST_S: Final = 0.02  # of repeated calls in one round
_STEPS: Final = 24  # of the engine in one round


@dataclass(frozen=True, slots=True)
class Breakdown:
    """One backend in one phase: seconds by component, each with its 95 % interval."""

    backend: str
    precision: str
    phase: str  # "decode" or "prefill"
    tokens: int  # new ones of the pass
    position: int  # where they begin
    seconds: dict[str, Interval]

    @property
    def total_s(self) -> float:
        """Of all components; one that noise makes negative counts as nothing."""
        return sum(max(value.mid, 0.0) for value in self.seconds.values())


@dataclass(frozen=True, slots=True)
class Components:
    """What was measured, and why some backends were not."""

    model: str
    breakdowns: tuple[Breakdown, ...]
    skipped: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        """For strict JSON."""
        lines = []
        for one in self.breakdowns:
            fields = {
                name: getattr(one, name) for name in ("backend", "precision", "phase", "tokens", "position")
            }
            parts = {name: value.to_dict() for name, value in one.seconds.items()}
            lines.append({**fields, "total_s": one.total_s, "seconds": parts})
        return {
            "kind": "components",
            "model": self.model,
            "method": METHOD,
            "lines": lines,
            "skipped": self.skipped,
        }

    def save(self, folder: str | Path) -> Path:
        """Write components.json into a folder, atomically; the report draws it."""
        path = Path(folder) / COMPONENTS
        write_atomically(path, encode_json(self.to_dict(), indent=1))
        return path


def measure_components(
    model: str | Path = "demo",
    *,
    backends: Sequence[str] | None = None,
    precision: str = "float32",
    threads: int | None = None,
    position: int = 64,
    prefill_tokens: int = 64,
    rounds: int = 7,
    on_progress: Callable[[str], object] | None = None,
) -> Components:
    """Measure on each backend, by default all that are installed.

    Args:
        model: as of `GPT2.from_pretrained`.
        backends: names; one that is not available is listed in `skipped`.
        precision, threads: as of `GPT2.from_pretrained`.
        position: tokens that are cached when a token is decoded.
        prefill_tokens: of the prompt.
        rounds: how often everything is measured, in turn.
        on_progress: is told the name of each backend.

    Raises:
        CheckpointError: the model cannot be read.
        RequestError: `position` or `prefill_tokens` do not fit the model's context.
    """
    checkpoint = open_checkpoint(model)
    context = checkpoint.config.n_positions
    for name, count in (("position", position), ("prefill_tokens", prefill_tokens)):
        if not 1 <= count < context:
            raise RequestError(f"{name} is {count}; it must be at least 1 and below the context of {context}")
    tokenizer = Tokenizer.from_folder(checkpoint.tokenizer_folder)
    names = (
        [name for name, info in registry.available().items() if info.available]
        if backends is None
        else backends
    )
    breakdowns: list[Breakdown] = []
    skipped = {}
    for name in names:
        if on_progress is not None:
            on_progress(name)
        try:
            with _Cuts(checkpoint.weights, name, precision, threads) as cuts:
                for phase, tokens, start in (("decode", 1, position), ("prefill", prefill_tokens, 0)):
                    seconds = _seconds(cuts, tokenizer, tokens, start, rounds)
                    breakdowns.append(Breakdown(name, precision, phase, tokens, start, seconds))
        except BackendUnavailableError as error:
            skipped[name] = str(error)
    return Components(str(model), tuple(breakdowns), skipped)


class _Cuts:
    """One backend on the whole model and on what is left of it after each cut."""

    def __init__(self, weights: Weights, name: str, precision: str, threads: int | None) -> None:
        self.weights = weights
        self.layers = len(weights.blocks)
        self.fewer = max(self.layers // 2, 1) if self.layers > 1 else 2  # one layer is doubled instead
        no_head = _with_vocabulary(weights, _SMALL_VOCABULARY)
        no_mlp = _with_mlp(no_head, _SMALL_MLP)
        parts = {
            "whole": weights,
            "no head": no_head,
            "no MLP": no_mlp,
            "fewer": _with_layers(no_mlp, self.fewer),
        }
        self.backends: dict[str, Backend] = {}
        for part, cut in parts.items():
            self.backends[part] = registry.create_backend(name, cut, threads=threads, precision=precision)

    def __enter__(self) -> "_Cuts":
        return self

    def __exit__(self, *error: object) -> None:
        for backend in self.backends.values():
            backend.close()


def _with_vocabulary(weights: Weights, count: int) -> Weights:
    config = dataclasses.replace(weights.config, vocab_size=count, bos_token_id=None, eos_token_ids=())
    wte = np.asarray(weights.wte)[:count]
    head = wte if weights.lm_head is weights.wte else np.asarray(weights.lm_head)[:count]
    return dataclasses.replace(weights, config=config, wte=wte, lm_head=head)


def _with_mlp(weights: Weights, units: int) -> Weights:
    def narrow(linear: Any, part: Any, bias: np.ndarray) -> Any:
        array = np.ascontiguousarray(linear.weight[part])
        array.flags.writeable = False
        return dataclasses.replace(linear, weight=array, bias=bias)

    blocks = tuple(
        dataclasses.replace(
            block,
            c_fc=narrow(block.c_fc, np.s_[:, :units], block.c_fc.bias[:units]),
            mlp_c_proj=narrow(block.mlp_c_proj, np.s_[:units], block.mlp_c_proj.bias),
        )
        for block in weights.blocks
    )
    return dataclasses.replace(
        weights, config=dataclasses.replace(weights.config, n_inner=units), blocks=blocks
    )


def _with_layers(weights: Weights, count: int) -> Weights:
    blocks = (weights.blocks * count)[:count]
    return dataclasses.replace(
        weights, config=dataclasses.replace(weights.config, n_layer=count), blocks=blocks
    )


def _seconds(cuts: _Cuts, tokenizer: Tokenizer, tokens: int, start: int, rounds: int) -> dict[str, Interval]:
    """Seconds by component; what is subtracted from each other comes from the same round."""
    ids = [1 + i % (_SMALL_VOCABULARY - 1) for i in range(tokens)]
    calls = {part: _pass(backend, ids, start) for part, backend in cuts.backends.items()}
    calls["embedding"] = _look_up(cuts.weights, ids, start)
    if tokens > 1:
        text = _text_of(tokenizer, tokens)
        calls["tokenizer"] = lambda: tokenizer.encode(text)
    whole, small = cuts.backends["whole"], cuts.backends["no head"]
    loops = {
        "engine": _Loop(small, None, 0.0),
        "greedy": _Loop(whole, None, 0.0),
        "sampled": _Loop(whole, None, 0.8),
        "with text": _Loop(whole, tokenizer, 0.0),
    }
    columns: dict[str, list[float]] = {name: [] for name in (*calls, *loops)}
    for call in calls.values():
        call()
        call()
    for _ in range(rounds):
        for name, call in calls.items():
            columns[name].append(_median_s(call))
        for name, loop in loops.items():
            columns[name].append(loop.beside_the_pass_s())
    s = {name: np.array(values) for name, values in columns.items()}
    attention = (s["no MLP"] - s["fewer"]) / (cuts.layers - cuts.fewer) * cuts.layers
    parts = {
        "embedding": s["embedding"],
        "attention": attention,
        "MLP": s["no head"] - s["no MLP"],
        "head": s["whole"] - s["no head"],
        "rest of the pass": s["no MLP"] - attention - s["embedding"],
        "sampling": s["sampled"] - s["engine"],
        "tokenizer": s["tokenizer"] if tokens > 1 else s["with text"] - s["greedy"],
        "engine": s["engine"],
    }
    return {name: mean_interval(values) for name, values in parts.items()}


def _pass(backend: Backend, ids: list[int], start: int) -> Callable[[], object]:
    """A pass over `ids` behind `start` cached tokens; it can be repeated, since it rewinds."""
    cache = backend.new_cache(1, min(start + len(ids) + 1, backend.config.n_positions))
    if start:
        backend.forward(Batch.of([([1] * start, 0, 0)]), cache)
    batch = Batch.of([(ids, start, 0)])
    return lambda: backend.forward(batch, cache)


def _look_up(weights: Weights, ids: list[int], start: int) -> Callable[[], object]:
    tokens, positions = np.array(ids), np.arange(start, start + len(ids))

    def look_up() -> object:
        x = np.asarray(weights.wte)[tokens]
        x += weights.wpe[positions]
        return x

    return look_up


def _text_of(tokenizer: Tokenizer, tokens: int) -> str:
    """English of at least `tokens` tokens, and few more."""
    text = "Once upon a time"
    while len(tokenizer.encode(text)) < tokens:
        text += " there was a little girl who lived in a small house"
    return text


def _median_s(call: Callable[[], object]) -> float:
    taken: list[float] = []
    while sum(taken) < _LEAST_S or len(taken) < 3:
        begin = time.perf_counter()
        call()
        taken.append(time.perf_counter() - begin)
    return float(np.median(taken))


class _Timed:
    """A backend that notes how long its last pass took."""

    def __init__(self, backend: Backend) -> None:
        self.name, self.config = backend.name, backend.config
        self._backend = backend
        self.last_s = 0.0

    def new_cache(self, slots: int, capacity: int) -> Cache:
        return self._backend.new_cache(slots, capacity)

    def forward(self, batch: Batch, cache: Cache) -> np.ndarray:
        begin = time.perf_counter()
        logits = self._backend.forward(batch, cache)
        self.last_s = time.perf_counter() - begin
        return logits

    def close(self) -> None:
        self._backend.close()


class _Loop:
    """An engine that decodes one sequence, and what its steps take beside the backend's pass."""

    def __init__(self, backend: Backend, tokenizer: Tokenizer | None, temperature: float) -> None:
        self._timed = _Timed(backend)
        self._engine = Engine(self._timed, tokenizer, max_slots=1)
        self._params = SamplingParams(
            max_new_tokens=max(1, min(_STEPS, backend.config.n_positions - 8)),
            temperature=temperature,
            seed=1,
        )

    def beside_the_pass_s(self) -> float:
        return float(np.median(list(self._steps())))

    def _steps(self) -> Iterator[float]:
        taken = 0
        while taken < _STEPS:  # a text may end early; then another begins
            [sequence] = self._engine.submit([1, 2, 3], self._params)
            while not sequence.finished:
                begin = time.perf_counter()
                self._engine.step()
                taken += 1
                yield time.perf_counter() - begin - self._timed.last_s
