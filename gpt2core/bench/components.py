"""Where the time goes: attention, MLP, head, sampling, tokenizer; measured, tabulated and drawn.

Measured on every backend alike, from outside: the same weights are run whole and with parts cut away, and a
part's time is the difference. That is what a part costs in its place, with whatever the backend fuses or
overlaps; it is no profile from inside. It needs a quiet machine.
"""

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

import gpt2core
import gpt2core.backends as registry
from gpt2core import Backend, Batch, Cache, Engine, Tokenizer, Weights
from gpt2core.bench.records import COMPONENTS
from gpt2core.bench.statistics import mean_interval
from gpt2core.bench.tables import Table, fitting_unit, show
from gpt2core.errors import RequestError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

METHOD: Final = (
    "Means of differences, round by round. Head: a pass minus one with a vocabulary of 16. MLP: that minus "
    "one with an MLP of 8 units. Attention (projections, cache and layer norms included): that minus one "
    "with half the layers, per layer, times the layers. Sampling and engine: a decoding step at temperature "
    "0.8 beside its pass. Tokenizer: encoding the prompt, or decoding the new token."
)
_LEAST_S: Final = 0.02  # of repeated calls in one round
_STEPS: Final = 24  # of the engine in one round


def measure_components(
    model: str | Path = "demo",
    *,
    backends: Sequence[str] | None = None,
    precision: str = "auto",
    threads: int | None = None,
    position: int = 64,
    prefill_tokens: int = 64,
    rounds: int = 7,
    on_progress: Callable[[str], object] | None = None,
) -> dict[str, Any]:
    """Measure on each backend, by default all that are installed; returns what components.json holds.

    Args:
        model, precision, threads: as of `GPT2.from_pretrained`.
        backends: names; one that is not available is listed in "skipped".
        position: tokens that are cached when a token is decoded.
        prefill_tokens: of the prompt.
        rounds: how often everything is measured, in turn.
        on_progress: is told the name of each backend.

    Raises:
        CheckpointError: the model cannot be read.
        RequestError: `position` or `prefill_tokens` do not fit the model's context.
    """
    checkpoint = gpt2core.open_checkpoint(model)
    precision, context = (
        registry.resolve_precision(checkpoint.stored, precision),
        checkpoint.config.n_positions,
    )
    for name, count in (("position", position), ("prefill_tokens", prefill_tokens)):
        if not 1 <= count < context:
            raise RequestError(f"{name} is {count}; it must be at least 1 and below the context of {context}")
    tokenizer, cuts = Tokenizer.from_folder(checkpoint.tokenizer_folder), _cut(checkpoint.weights)
    installed = [name for name, info in registry.available().items() if info.available]
    lines, skipped = list[dict[str, Any]](), {}
    for name in installed if backends is None else backends:
        if on_progress is not None:
            on_progress(name)
        made: dict[str, Backend] = {}
        with ExitStack() as stack:
            try:
                for part, weights in cuts.items():
                    made[part] = registry.create_backend(name, weights, threads=threads, precision=precision)
                    stack.callback(made[part].close)
            except gpt2core.BackendUnavailableError as error:
                skipped[name] = str(error)
                continue
            for phase, tokens, start in (("decode", 1, position), ("prefill", prefill_tokens, 0)):
                times_s = _measure(made, tokenizer, tokens, start, rounds)
                seconds = {part: mean_interval(values) for part, values in times_s.items()}
                about = {"backend": name, "precision": precision, "phase": phase, "tokens": tokens}
                total_s = sum(max(value.mid, 0.0) for value in seconds.values())  # noise may go below 0
                parts = {part: asdict(value) for part, value in seconds.items()}
                lines.append({**about, "position": start, "total_s": total_s, "seconds": parts})
    return {"kind": "components", "model": str(model), "method": METHOD, "lines": lines, "skipped": skipped}


def _cut(whole: Weights) -> dict[str, Weights]:
    """The model, and what is left of it after each cut."""
    config = replace(whole.config, vocab_size=16, bos_token_id=None, eos_token_ids=())
    wte = np.asarray(whole.wte)[:16]
    head = wte if whole.lm_head is whole.wte else np.asarray(whole.lm_head)[:16]
    no_head = replace(whole, config=config, wte=wte, lm_head=head)

    def narrow(linear: Any, part: Any, bias: np.ndarray) -> Any:
        array = np.ascontiguousarray(linear.weight[part])
        array.flags.writeable = False
        return replace(linear, weight=array, bias=bias)

    blocks = tuple(
        replace(
            block,
            c_fc=narrow(block.c_fc, np.s_[:, :8], block.c_fc.bias[:8]),
            mlp_c_proj=narrow(block.mlp_c_proj, np.s_[:8], block.mlp_c_proj.bias),
        )
        for block in whole.blocks
    )
    no_mlp = replace(no_head, config=replace(config, n_inner=8), blocks=blocks)
    fewer = len(blocks) // 2 or 2  # one layer is doubled instead
    few = replace(no_mlp, config=replace(no_mlp.config, n_layer=fewer), blocks=(blocks * fewer)[:fewer])
    return {"whole": whole, "no head": no_head, "no MLP": no_mlp, "fewer": few}


def _measure(
    backends: dict[str, Backend], tokenizer: Tokenizer, tokens: int, start: int, rounds: int
) -> dict[str, np.ndarray]:
    """Seconds by component, (rounds,); what is subtracted from each other comes from the same round."""
    ids, text = [1 + i % 15 for i in range(tokens)], "Once upon a time"
    while len(tokenizer.encode(text)) < tokens:
        text += " there was a little girl who lived in a small house"
    calls = {part: _repeat(_pass(backend, ids, start)) for part, backend in backends.items()}
    calls["engine"] = _step_engine(backends["whole"], None)
    calls["text"] = _step_engine(backends["whole"], tokenizer) if tokens == 1 else lambda: 0.0
    calls["encode"] = _repeat(lambda: tokenizer.encode(text))
    taken_s = [[call() for call in calls.values()] for _ in range(rounds + 1)]
    s = dict(zip(calls, np.array(taken_s[1:]).T, strict=True))  # the first round warms up
    layers, fewer = (backends[part].config.n_layer for part in ("no MLP", "fewer"))
    attention = (s["no MLP"] - s["fewer"]) / (layers - fewer) * layers
    return {
        "attention": attention,
        "MLP": s["no head"] - s["no MLP"],
        "head": s["whole"] - s["no head"],
        "rest of the pass": s["no MLP"] - attention,
        "sampling and engine": s["engine"],
        "tokenizer": s["encode"] if tokens > 1 else s["text"] - s["engine"],
    }


def _pass(backend: Backend, ids: list[int], start: int) -> Callable[[], object]:
    """A pass over `ids` behind `start` cached tokens; it can be repeated, since it rewinds."""
    cache = backend.new_cache(1, min(start + len(ids) + 1, backend.config.n_positions))
    if start:
        backend.forward(Batch.of([([1] * start, 0, 0)]), cache)
    batch = Batch.of([(ids, start, 0)])
    return lambda: backend.forward(batch, cache)


def _repeat(call: Callable[[], object]) -> Callable[[], float]:
    """What measures the median time of several calls."""

    def measure() -> float:
        taken_s: list[float] = []
        while sum(taken_s) < _LEAST_S or len(taken_s) < 3:
            begin_s = time.perf_counter()
            call()
            taken_s.append(time.perf_counter() - begin_s)
        return float(np.median(taken_s))

    return measure


class _Timed:
    """A backend that notes how long its last pass took."""

    def __init__(self, backend: Backend) -> None:
        self._backend, self.last_s = backend, 0.0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)

    def forward(self, batch: Batch, cache: Cache) -> np.ndarray:
        begin_s = time.perf_counter()
        logits = self._backend.forward(batch, cache)
        self.last_s = time.perf_counter() - begin_s
        return logits


def _step_engine(backend: Backend, tokenizer: Tokenizer | None) -> Callable[[], float]:
    """What measures the median of what an engine's steps take beside the backend's pass."""
    timed: Any = _Timed(backend)
    engine = Engine(timed, tokenizer, max_slots=1)
    count = max(1, min(_STEPS, backend.config.n_positions - 8))
    params = gpt2core.SamplingParams(max_new_tokens=count, temperature=0.8, seed=1)

    def measure() -> float:
        taken_s: list[float] = []
        while len(taken_s) < _STEPS:  # a text may end early; then another begins
            [request] = engine.submit([1, 2, 3], params)
            while not request.finished:
                begin_s = time.perf_counter()
                engine.step()
                taken_s.append(time.perf_counter() - begin_s - timed.last_s)
        return float(np.median(taken_s))

    return measure


def _read_bars(components: dict[str, Any]) -> list[tuple[str, dict[str, float], float]]:
    """Name, seconds by component and their sum, of each line of components.json; decoding first."""
    try:
        return [
            (
                f"{line['backend']}, {line['phase']}",
                {name: float(value["mid"]) for name, value in line["seconds"].items()},
                float(line["total_s"]),
            )
            for line in sorted(components["lines"], key=lambda line: line["phase"])
        ]
    except (KeyError, TypeError, ValueError) as error:
        raise RequestError(f"{COMPONENTS} is not what it should be ({error!r}); measure it again") from error


def breakdown_tables(components: dict[str, Any]) -> list[Table]:
    """Time by component, a row for each backend and phase; no table where nothing was measured.

    Raises:
        RequestError: `components` is not what `measure_components` returns.
    """
    bars = _read_bars(components) if components else []
    names = list(dict.fromkeys(name for _, seconds, _ in bars for name in seconds))
    rows = []
    for label, seconds, total_s in bars:
        unit = fitting_unit("s", [total_s])
        times = [unit.number(seconds[name]) if name in seconds else "-" for name in names]
        rows.append((f"{label} ({unit.name})", *times, unit.number(total_s)))
    columns, note = ("backend, phase", *names, "all"), str(components.get("method", ""))
    return [Table("Time by component", columns, tuple(rows), note)] if rows else []


def component_figure(components: dict[str, Any]) -> "Figure":
    """`gpt2_components.png`: a stacked bar for each backend and phase."""
    from gpt2core.bench.report import drawing  # loads matplotlib, so only now

    bars = _read_bars(components)
    names = list(dict.fromkeys(name for _, seconds, _ in bars for name in seconds))
    figure, [ax] = drawing.new_figure(9, 1.8 + 0.5 * len(bars))
    left = np.zeros(len(bars))
    for name, color in zip(names, drawing.COLORS, strict=False):
        shares = np.array([100 * max(s.get(name, 0.0), 0.0) / total_s for _, s, total_s in bars])
        drawn = ax.barh(range(len(bars)), shares, 0.7, left=left, color=color, label=name)
        ax.bar_label(drawn, [f"{x:.0f} %" if x >= 6 else "" for x in shares], label_type="center", fontsize=8)
        left += shares
    for row, (_, _, total_s) in enumerate(bars):
        drawing.write_beside(ax, row, show("s", total_s))
    ax.set_xlim(0, 100)
    ax.set_xlabel("share of the time (%); at the end the whole", color=drawing.INK)
    drawing.name_rows(ax, [name for name, _, _ in bars])
    figure.legend(loc="outside right upper", frameon=False, fontsize=9)
    name, seconds, total_s = bars[0]
    most = max(seconds, key=seconds.__getitem__)
    title = f"{most} takes the most: {seconds[most] / total_s:.0%} of {name}"
    return drawing.finish(figure, title, [str(components.get("method", ""))])
