"""What a comparison measures: checked when it is made, known line by line before it runs."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Final, NamedTuple

from gpt2core import ModelConfig, RequestError
from gpt2core.backends import available
from gpt2core.bench.compare import worker
from gpt2core.bench.compare.worker import EngineSetup
from gpt2core.bench.engines import PEERS, PRECISIONS
from gpt2core.bench.records import Cell, LineKey
from gpt2core.testing import VARIANTS

BANDWIDTH: Final = Cell("read_bandwidth")
OTHERS: Final = Cell("others_cores")
STEAL: Final = Cell("steal_share")
WEIGHT: Final = Cell("weight_nbytes")
MACHINE: Final = "machine"
ONCE: Final = ("start_s", "load_s", "first_token_cold_s", "compile_s", "ttft_s", "peak_memory_nbytes")
"""The measures that an engine has once a round."""

BITS: Final = {"float32": 32, "float16": 16, "bfloat16": 16, "int8": 8, "int4": 4}
EARLIEST_POSITION: Final = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """What is compared, checked when it is made.

    Raises:
        RequestError: something is unknown or out of its range.
    """

    model: str = "demo"  # a folder or a hub id
    backends: tuple[str, ...] = ()  # unknown names are refused, what is not installed is skipped
    peers: tuple[str, ...] = ()
    precisions: tuple[str, ...] = ("auto",)  # who does not offer one is skipped; auto: the checkpoint's
    batches: tuple[int, ...] = (1, 8, 32)  # texts that are decoded at once
    prefill: tuple[int, ...] = (32, 128, 512)  # lengths of prompts
    rounds: int = 5  # how often everything is measured
    threads: int = 1  # of every engine
    new_tokens: int = worker.NEW_TOKENS
    peer_python: Mapping[str, str] = field(default_factory=dict)  # interpreters; "" is for the unnamed peers
    check: bool = True  # whether peers are checked for right answers first
    variants: tuple[str, ...] = tuple(VARIANTS)  # of the family, on which they are checked
    baseline: str | None = None  # that ratios are over; None for transformers, or else the first engine
    revision: str | None = None  # of a model on the hub
    timeout_s: float = 1800.0  # for each process

    def __post_init__(self) -> None:
        known = {
            "backend": (self.backends, list(available(load_plugins=False))),
            "peer": ((*self.peers, *filter(None, self.peer_python)), list(PEERS)),
            "precision": (self.precisions, ["auto", *PRECISIONS]),
            "variant": (self.variants, list(VARIANTS)),
        }
        for kind, (names, allowed) in known.items():
            for name in names:
                if name not in allowed:
                    raise RequestError(f"there is no {kind} {name!r}; known are {', '.join(allowed)}")
        if not (self.backends or self.peers) or not self.precisions:
            raise RequestError(
                "a comparison needs an engine and a precision; name some with --backends or --peers"
            )
        for option in ("backends", "peers", "precisions", "variants"):
            names = getattr(self, option)
            if len(set(names)) < len(names):
                raise RequestError(f"{option} names one twice: {', '.join(names)}")
        for option, values in (("batch", self.batches), ("prefill", self.prefill)):
            if any(value < 1 for value in values) or len(set(values)) < len(values):
                raise RequestError(f"{option} is {values}; use different whole numbers of 1 or more")
        if self.baseline is not None and self.baseline not in (*self.backends, *self.peers):
            raise RequestError(f"baseline {self.baseline!r} is not compared; name one of those that are")
        for option in ("rounds", "threads", "new_tokens"):
            if getattr(self, option) < 1:
                raise RequestError(f"{option} is {getattr(self, option)}; use a whole number of 1 or more")

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

    def steps(self, context: int) -> Iterator["Step"]:
        """All that is done, in order: each engine is checked and built, then all are measured in rounds."""
        engines, cells, built = self.engines(), self.cells(context), set()
        for engine in engines:
            of_engine = partial(LineKey, engine.name, engine.precision, 0)
            if engine.family == "peer" and self.check:
                keys = tuple(of_engine(Cell("correct"), name) for name in self.variants)
                yield Step(f"checking {engine.name} on {len(keys)} variants", "check", engine, keys)
            if engine.family == "gpt2core" and engine.name not in built:  # asked to compile what it keeps
                built.add(engine.name)
                yield Step(f"building {engine.name}", "build", engine, (of_engine(Cell("build_s")),))
        for number in range(self.rounds):
            name = f"round {number + 1} of {self.rounds}"
            speed, *other = (LineKey(MACHINE, "", number, cell) for cell in (BANDWIDTH, OTHERS, STEAL))
            yield Step(f"{name}: the read bandwidth", "measure_bandwidth", None, (speed, *other))
            first = number % len(engines)
            for engine in engines[first:] + engines[:first]:
                mine = cells if number else [WEIGHT, *cells]
                keys = tuple(LineKey(engine.name, engine.precision, number, cell) for cell in mine)
                yield Step(f"{name}: {engine.name} in {engine.precision}", "measure", engine, keys)
            yield Step(f"{name}: other work", "note_other_work", None, tuple(other))


def weight_nbytes(config: ModelConfig, precision: str) -> int:
    """Bytes of weights that one decode step reads at least: all but the embeddings, of which it reads a row.

    A tied head is the token embedding and is read whole. Scales of quantized weights are not counted.
    """
    rows = 0 if config.tie_word_embeddings else config.vocab_size
    read = config.parameters - (config.n_positions + rows) * config.n_embd
    return read * BITS[precision] // 8


class Step(NamedTuple):
    """What is done at once, as often as lines of it are missing."""

    what: str  # its name for a reader
    task: str  # the method of `rounds` that does it
    engine: EngineSetup | None  # None for the machine
    keys: tuple[LineKey, ...]  # of the lines that it writes
