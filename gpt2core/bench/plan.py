"""What a comparison measures: checked when it is made, known line by line before it runs."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from gpt2core import ModelConfig, RequestError
from gpt2core.backends import available
from gpt2core.bench import worker
from gpt2core.bench.engines import PRECISIONS, peer
from gpt2core.bench.worker import Cell, Engine
from gpt2core.testing import VARIANTS

BANDWIDTH: Final[Cell] = ("read_bandwidth", None, None, None)
CORRECT: Final[Cell] = ("correct", None, None, None)
WEIGHT: Final[Cell] = ("weight_nbytes", None, None, None)
ONCE: Final = ("start_s", "load_s", "first_token_cold_s", "compile_s", "ttft_s", "peak_memory_nbytes")
"""The measures that an engine has once a round."""

BITS: Final = {"float32": 32, "float16": 16, "bfloat16": 16, "int8": 8, "int4": 4}
EARLIEST_POSITION: Final = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """What is compared, checked when it is made.

    Attributes:
        model: "demo", a folder or a hub id.
        backends, peers: names; unknown ones are refused, those that are not installed are skipped.
        precisions: of the weights; an engine that does not offer one is skipped.
        batches: texts that are decoded at once.
        prefill: lengths of prompts.
        rounds: how often everything is measured.
        threads: of every engine.
        peer_python: the interpreters of peers by name; "" is for all that are not named.
        check: whether peers are checked for right answers first.
        variants: of the family, on which they are checked.
        baseline: the engine that ratios are over; None for transformers, or else the first engine.
        revision: of a model on the hub.
        timeout_s: for each process.

    Raises:
        RequestError: something is unknown or out of its range.
    """

    model: str = "demo"
    backends: tuple[str, ...] = ()
    peers: tuple[str, ...] = ()
    precisions: tuple[str, ...] = ("float32",)
    batches: tuple[int, ...] = (1, 8, 32)
    prefill: tuple[int, ...] = (32, 128, 512)
    rounds: int = 3
    threads: int = 1
    new_tokens: int = worker.NEW_TOKENS
    peer_python: Mapping[str, str] = field(default_factory=dict)
    check: bool = True
    variants: tuple[str, ...] = tuple(VARIANTS)
    baseline: str | None = None
    revision: str | None = None
    timeout_s: float = 1800.0

    def __post_init__(self) -> None:
        known = available(load_plugins=False)
        for name in self.backends:
            if name not in known:
                raise RequestError(f"there is no backend {name!r}; known are {', '.join(known)}")
        for name in [*self.peers, *filter(None, self.peer_python)]:
            peer(name)
        for name in self.precisions:
            if name not in PRECISIONS:
                raise RequestError(f"there is no precision {name!r}; known are {', '.join(PRECISIONS)}")
        for name in self.variants:
            if name not in VARIANTS:
                raise RequestError(f"there is no variant {name!r}; known are {', '.join(VARIANTS)}")
        if not (self.backends or self.peers) or not self.precisions:
            raise RequestError(
                "a comparison needs an engine and a precision; name some with --backends or --peers"
            )
        for name in ("backends", "peers", "precisions", "variants"):
            names = getattr(self, name)
            if len(set(names)) < len(names):
                raise RequestError(f"{name} names one twice: {', '.join(names)}")
        for name, values in (("batch", self.batches), ("prefill", self.prefill)):
            if any(value < 1 for value in values) or len(set(values)) < len(values):
                raise RequestError(f"{name} is {values}; use different whole numbers of 1 or more")
        if self.baseline is not None and self.baseline not in (*self.backends, *self.peers):
            raise RequestError(f"baseline {self.baseline!r} is not compared; name one of those that are")
        for name in ("rounds", "threads", "new_tokens"):
            if getattr(self, name) < 1:
                raise RequestError(f"{name} is {getattr(self, name)}; use a whole number of 1 or more")

    def engines(self) -> list[Engine]:
        """Every engine in every precision."""
        own = [Engine.own(name, precision) for precision in self.precisions for name in self.backends]
        python = self.peer_python
        return own + [
            Engine.peer(name, precision, python.get(name, python.get("")))
            for precision in self.precisions
            for name in self.peers
        ]

    def cells(self, context: int) -> list[Cell]:
        """What each engine measures in a round, for a model with this context."""
        late = context - context // 40  # 1000 of 1024
        once: list[Cell] = [(name, None, None, None) for name in ONCE]
        prefill: list[Cell] = [("prefill_s", None, length, None) for length in self.prefill]
        decode: list[Cell] = [("decode_tok_s", batch, None, None) for batch in self.batches]
        positions = sorted({min(EARLIEST_POSITION, context - 1), context // 2, min(late, context - 1)})
        return [*once, *prefill, *decode, *(("step_s", None, None, position) for position in positions)]


def weight_nbytes(config: ModelConfig, precision: str) -> int:
    """Bytes of weights that one decode step reads at least: all but the embeddings, of which it reads a row.

    A tied head is the token embedding and is read whole. Scales of quantized weights are not counted.
    """
    rows = 0 if config.tie_word_embeddings else config.vocab_size
    read = config.parameters - (config.n_positions + rows) * config.n_embd
    return read * BITS[precision] // 8


def planned(comparison: Comparison, context: int) -> Iterator[tuple[Any, ...]]:
    """The keys of all lines that a comparison has when it is done."""
    for engine in comparison.engines():
        if engine.family == "peer" and comparison.check:
            for name in comparison.variants:
                yield key_of(engine, 0, CORRECT, name)
        yield key_of(engine, 0, WEIGHT)
        for number in range(comparison.rounds):
            for cell in comparison.cells(context):
                yield key_of(engine, number, cell)
    for number in range(comparison.rounds):
        yield ("machine", "", number, "read_bandwidth", None, None, None, None)


def key(line: Mapping[str, Any]) -> tuple[Any, ...]:
    """What makes a line one of its kind: no two lines of a comparison have the same."""
    names = ("engine", "precision", "round", "measure", "batch", "length", "position")
    return (*(line[name] for name in names), line.get("variant"))


def key_of(engine: Engine, number: int, cell: Cell, variant: str | None = None) -> tuple[Any, ...]:
    """The key that a line will have."""
    return (engine.name, engine.precision, number, *cell, variant)
