"""What the classic benchmark runs: prompts x total lengths x runs, and in which order."""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
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

WARM_UP: Final = -1
"""The run that is not counted: it meets cold caches, and compilers."""

MAX_PROMPTS: Final = 1000
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

    `backend`, `precision`, `device`, `threads`, `revision` and `local_files_only` are those of
    `GPT2.from_pretrained`; with `url` they have no effect.

    Raises:
        RequestError: a value is out of its range.
        InvalidSamplingError: `temperature` or `seed` is.
    """

    model: str | None = None  # "demo" if None; with `url` the name sent, or what the server names first
    backend: str = "auto"
    precision: str = "auto"
    device: str = "cpu"
    threads: int | None = None
    revision: str | None = None
    local_files_only: bool = False
    url: str | None = None  # a server's `/generate`, or OpenAI-style if it ends in `/v1[/completions]`
    prompts: tuple[str, ...] = DEFAULT_PROMPTS  # at least one, each once
    lengths: tuple[int, ...] = (50, 100, 200)  # total lengths in tokens, prompt and new; each once
    runs: int = 5  # how often each prompt and length is measured
    seed: int = 0  # run i draws with `seed + i`, so that its text can be made again
    temperature: float = 0.8  # 0 = greedy
    timeout_s: float = 300.0  # limit for one attempt
    retries: int = 2  # how often a failed attempt is repeated before the cell counts as failed
    backoff_s: float = 0.5  # wait before the first repetition, doubled for each further one, at most 30 s
    api_key: str | None = field(default=None, repr=False)  # for a server that asks; is written nowhere

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
        return {
            "kind": "classic",
            **{name: None if self.url else getattr(self, name) for name in own},
            **{name: list(getattr(self, name)) for name in ("prompts", "lengths")},
            **{name: getattr(self, name) for name in ("runs", "seed", "retries")},
            **{name: float(getattr(self, name)) for name in ("temperature", "timeout_s")},
        }


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
