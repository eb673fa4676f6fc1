"""What a comparison measures: checked when it is made, known line by line before it runs."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

from gpt2core import ModelConfig, RequestError
from gpt2core.backends import available
from gpt2core.bench.compare import worker
from gpt2core.bench.compare.worker import EngineSetup
from gpt2core.bench.engines import PRECISIONS, find_peer
from gpt2core.bench.records import Cell
from gpt2core.testing import VARIANTS

BANDWIDTH: Final = Cell("read_bandwidth")
OTHERS: Final = Cell("others_cores")
STEAL: Final = Cell("steal_share")
CORRECT: Final = Cell("correct")
WEIGHT: Final = Cell("weight_nbytes")
BUILD: Final = Cell("build_s")
MACHINE: Final = "machine"
DEFAULT_ROUNDS: Final = 5
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
        precisions: of the weights; an engine that does not offer one is skipped. "auto" is that of the
            checkpoint.
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
    precisions: tuple[str, ...] = ("auto",)
    batches: tuple[int, ...] = (1, 8, 32)
    prefill: tuple[int, ...] = (32, 128, 512)
    rounds: int = DEFAULT_ROUNDS
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
            find_peer(name)
        for name in self.precisions:
            if name not in ("auto", *PRECISIONS):
                raise RequestError(f"there is no precision {name!r}; known are auto, {', '.join(PRECISIONS)}")
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

    def engines(self) -> list[EngineSetup]:
        """Every engine in every precision."""
        own = [EngineSetup.own(name, precision) for precision in self.precisions for name in self.backends]
        python = self.peer_python
        return own + [
            EngineSetup.peer(name, precision, python.get(name, python.get("")))
            for precision in self.precisions
            for name in self.peers
        ]

    def cells(self, context: int) -> list[Cell]:
        """What each engine measures in a round, for a model with this context."""
        late = context - context // 40  # 1000 of 1024
        positions = sorted({min(EARLIEST_POSITION, context - 1), context // 2, min(late, context - 1)})
        return [
            *map(Cell, ONCE),
            *(Cell("prefill_s", length=length) for length in self.prefill),
            *(Cell("decode_tok_s", batch=batch) for batch in self.batches),
            *(Cell("step_s", position=position) for position in positions),
        ]


def weight_nbytes(config: ModelConfig, precision: str) -> int:
    """Bytes of weights that one decode step reads at least: all but the embeddings, of which it reads a row.

    A tied head is the token embedding and is read whole. Scales of quantized weights are not counted.
    """
    rows = 0 if config.tie_word_embeddings else config.vocab_size
    read = config.parameters - (config.n_positions + rows) * config.n_embd
    return read * BITS[precision] // 8


class LineKey(NamedTuple):
    """What makes a line one of its kind: no two lines of a comparison have the same."""

    engine: str
    precision: str
    round: int
    cell: Cell
    variant: str | None = None


def key_of(line: Mapping[str, Any]) -> LineKey:
    """The key of a line of runs.jsonl."""
    cell = Cell(line["measure"], line["batch"], line["length"], line["position"])
    return LineKey(line["engine"], line["precision"], line["round"], cell, line.get("variant"))


def plan_lines(comparison: Comparison, context: int) -> Iterator[LineKey]:
    """The keys of all lines that a comparison has when it is done."""
    built = set()
    for engine in comparison.engines():
        name, precision = engine.name, engine.precision
        if engine.family == "peer" and comparison.check:
            for variant in comparison.variants:
                yield LineKey(name, precision, 0, CORRECT, variant)
        if engine.builds and name not in built:
            built.add(name)
            yield LineKey(name, precision, 0, BUILD)
        yield LineKey(name, precision, 0, WEIGHT)
        for number in range(comparison.rounds):
            for cell in comparison.cells(context):
                yield LineKey(name, precision, number, cell)
    for number in range(comparison.rounds):
        for cell in (BANDWIDTH, OTHERS, STEAL):
            yield LineKey(MACHINE, "", number, cell)
