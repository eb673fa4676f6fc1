"""What the classic benchmark runs: prompts x total lengths x runs, and in which order."""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, NamedTuple

from gpt2core import SamplingParams
from gpt2core.errors import RequestError

DEFAULT_PROMPTS: Final = (
    "Once upon a time",
    "In a galaxy far, far away",
    "The king said to his daughter",
    "Why is the sky blue? The short answer is",
    "def fibonacci(n):",
    "It was late in the evening when the old man came home from the forest, tired and hungry, and found the "
    "door of his house wide open.",
)
"""Stories, a question, code; from 4 to some 30 tokens with GPT-2's tokenizer."""

DEFAULT_LENGTHS: Final = (50, 100, 200)
DEFAULT_RUNS: Final = 5
WARM_UP: Final = -1
"""The run that is not counted: it meets cold caches, and compilers."""

MAX_PROMPTS: Final = 1000
MAX_PROMPTS_NBYTES: Final = 2**20
MAX_RUNS: Final = 10_000


class Trial(NamedTuple):
    """One generation of the benchmark: the entry "cell" of its line."""

    prompt_index: int
    length: int  # tokens in all, prompt and new
    run: int  # from 0, or WARM_UP

    @property
    def is_warm_up(self) -> bool:
        """Whether it is run before the others and not counted."""
        return self.run == WARM_UP


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassicSettings:
    """What the classic benchmark measures. Validated when made.

    Attributes:
        model: "demo", a folder or a hub id; with `url` the name that is sent to the server. None for "demo",
            or for what the server names first.
        backend, precision, device, threads, revision, local_files_only: as of `GPT2.from_pretrained`; with
            `url` they have no effect.
        url: a server instead of a model in this process; its `/generate`, or an OpenAI-style completions
            endpoint if it ends in `/v1` or `/v1/completions`.
        prompts: at least one, each once.
        lengths: total lengths in tokens, prompt and new; each once.
        runs: how often each prompt and length is measured.
        seed: run i draws with `seed + i`, so that its text can be made again.
        temperature: 0 = greedy.
        timeout_s: limit for one attempt, seconds.
        retries: how often a failed attempt is repeated before the cell counts as failed.
        backoff_s: wait before the first repetition, doubled for each further one, at most 30 s.
        api_key: for a server that asks for one; is written nowhere.

    Raises:
        RequestError: a value is out of its range.
        InvalidSamplingError: `temperature` or `seed` is.
    """

    model: str | None = None
    backend: str = "auto"
    precision: str = "auto"
    device: str = "cpu"
    threads: int | None = None
    revision: str | None = None
    local_files_only: bool = False
    url: str | None = None
    prompts: tuple[str, ...] = DEFAULT_PROMPTS
    lengths: tuple[int, ...] = DEFAULT_LENGTHS
    runs: int = DEFAULT_RUNS
    seed: int = 0
    temperature: float = 0.8
    timeout_s: float = 300.0
    retries: int = 2
    backoff_s: float = 0.5
    api_key: str | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        SamplingParams(temperature=self.temperature, seed=self.seed)
        _check_prompts(self.prompts)
        if not self.lengths:
            raise RequestError("there are no lengths; give at least one, as 50,100,200")
        for length in self.lengths:
            if not 2 <= length < 2**31:
                raise RequestError(f"length {length} is not possible; prompt and new tokens are at least 2")
        if len(set(self.lengths)) < len(self.lengths):
            raise RequestError(f"lengths are {', '.join(map(str, self.lengths))}; give each length once")
        most_seed = 2**63 - 1 - self.runs
        for name, holds, needed in (
            ("runs", 1 <= self.runs <= MAX_RUNS, f"it must be from 1 to {MAX_RUNS}"),
            ("seed", self.seed <= most_seed, f"with {self.runs} runs at most {most_seed}"),
            ("timeout_s", self.timeout_s > 0 and math.isfinite(self.timeout_s), "it must be above 0"),
            ("retries", self.retries >= 0, "it must be at least 0"),
            ("backoff_s", self.backoff_s >= 0 and math.isfinite(self.backoff_s), "it must be at least 0"),
        ):
            if not holds:
                raise RequestError(f"{name} is {getattr(self, name)}; {needed}")
        if self.api_key is not None and not (self.api_key.isascii() and self.api_key.isprintable()):
            raise RequestError("api_key has characters that no header may have; use printable ASCII")

    def seed_of(self, run: int) -> int:
        """The seed of a run; the warm-up draws what run 0 draws."""
        return self.seed + max(run, 0)

    def trials(self) -> list[Trial]:
        """All generations in the order in which they are run.

        Run after run, so that a machine that becomes slower does so for every prompt and length. Within a run
        the order is shuffled, by a generator that only `seed` and the run determine: what one meets in the
        caches is then not always what the same neighbour left there.
        """
        found = []
        for run in range(WARM_UP, self.runs):
            trials = [Trial(i, length, run) for i in range(len(self.prompts)) for length in self.lengths]
            random.Random(f"{self.seed}/{run}").shuffle(trials)
            found += trials
        return found

    def document(self) -> dict[str, Any]:
        """What settings.json says of them."""
        own = ("device", "threads", "revision")
        common = ("prompts", "lengths", "runs", "seed", "temperature", "timeout_s", "retries")
        document: dict[str, Any] = {"kind": "classic"}
        document |= {name: None if self.url else getattr(self, name) for name in own}
        document |= {name: getattr(self, name) for name in common}
        floats = {name: float(document[name]) for name in ("temperature", "timeout_s")}
        return document | {name: list(document[name]) for name in ("prompts", "lengths")} | floats


def read_prompts(path: Path) -> tuple[str, ...]:
    """One prompt a line; lines of white space only are left out.

    Raises:
        RequestError: the file cannot be read, is not UTF-8, too large, or holds no prompt.
    """
    try:
        with path.open("rb") as file:
            data = file.read(MAX_PROMPTS_NBYTES + 1)
    except OSError as error:
        raise RequestError(f"prompt file {path} cannot be read: {error.strerror}") from error
    if len(data) > MAX_PROMPTS_NBYTES:
        raise RequestError(f"prompt file {path} has more than {MAX_PROMPTS_NBYTES} bytes; shorten it")
    try:
        lines = data.decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise RequestError(f"prompt file {path} is not UTF-8 at byte {error.start}; convert it") from error
    prompts = tuple(line for line in lines if line.strip())
    if not prompts:
        raise RequestError(f"prompt file {path} holds no prompt; write one prompt a line")
    return prompts


def _check_prompts(prompts: Sequence[str]) -> None:
    if not 1 <= len(prompts) <= MAX_PROMPTS:
        raise RequestError(f"there are {len(prompts)} prompts; give 1 to {MAX_PROMPTS}")
    seen: dict[str, int] = {}
    for i, prompt in enumerate(prompts):
        if not prompt:
            raise RequestError(f"prompt {i} is empty; give at least one character")
        try:
            prompt.encode()
        except UnicodeEncodeError as error:
            raise RequestError(f"prompt {i} holds a lone surrogate at character {error.start}") from error
        if prompt in seen:
            raise RequestError(f"prompts {seen[prompt]} and {i} are the same; leave one of them out")
        seen[prompt] = i
