"""What is measured: a model in this process. `server_target` measures a server instead.

Both have `describe()`, which says what they are, `measure(trial)`, which generates once, and `close()`.
"""

import time
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any, Final, cast

from gpt2core import GPT2, Piece, SamplingParams, open_checkpoint
from gpt2core.backends import resolve_precision
from gpt2core.bench.errors import ServerError
from gpt2core.bench.store import model_id
from gpt2core.bench.sweep.workload import ClassicSettings, Trial
from gpt2core.errors import ContextLengthError, RequestError

MAX_WAIT_S: Final = 30.0


@dataclass(frozen=True, slots=True)
class TimedGeneration:
    """One generation that succeeded. Times are seconds from its start."""

    elapsed_s: float  # until its end
    ttft_s: float | None  # until its first token; None where only the whole answer was seen
    token_times_s: list[float]  # when each generated token came; empty where that was not seen
    prompt_tokens: int | None  # None where a server does not tell
    completion_tokens: int | None
    finish_reason: str | None  # "length", or "stop" where an end-of-text token ended it early
    text: str  # what was generated, without the prompt


class ModelTarget:
    """A model in this process.

    Each generation has exactly the length that was asked for: the end-of-text token is not drawn before.

    Raises:
        CheckpointError, BackendUnavailableError: as of `GPT2.from_pretrained`.
        RequestError: a prompt and a length do not fit together, or not into the model.
    """

    def __init__(self, settings: ClassicSettings) -> None:
        self._settings, name = settings, settings.model or "demo"
        source: dict[str, Any] = {key: getattr(settings, key) for key in ("revision", "local_files_only")}
        checkpoint = open_checkpoint(name, progress=False, **source)
        folder = checkpoint.folder
        precision = resolve_precision(checkpoint.stored, settings.precision)
        del checkpoint  # what it maps would count twice
        identity = model_id(folder)
        engine = {key: getattr(settings, key) for key in ("backend", "device", "threads")}
        self._model = GPT2.from_pretrained(folder, precision=precision, **engine)
        self._facts: dict[str, Any] = {
            "model": name,
            "model_id": identity,
            "backend": self._model.backend.name,
        }
        self._facts |= {"precision": precision, "url": None, "exact_length": True}
        try:
            context, longest = self._model.config.n_positions, max(settings.lengths)
            if longest > context:
                raise ContextLengthError(
                    f"length {longest} exceeds this model's context of {context}; "
                    f"give --lengths of at most {context}"
                )
            self._prompt_tokens = [len(self._model.tokenizer.encode(prompt)) for prompt in settings.prompts]
            check_room(self._prompt_tokens, settings.lengths)
        except BaseException:
            self._model.close()
            raise

    def describe(self) -> dict[str, Any]:
        """What is measured: model, model_id, backend, precision, url, exact_length."""
        return self._facts

    def measure(self, trial: Trial) -> TimedGeneration:
        """Generate once, token by token.

        Raises:
            TimeoutError: the limit of time, which is looked at after each token, was exceeded.
            Exception: whatever else went wrong.
        """
        settings, prompt_tokens = self._settings, self._prompt_tokens[trial.prompt_index]
        params = SamplingParams(
            max_length=trial.length,
            min_new_tokens=trial.length - prompt_tokens,
            temperature=settings.temperature,
            seed=settings.seed_of(trial.run),
        )
        times_s: list[float] = []
        texts: list[str] = []
        finish_reason: str | None = None
        start_s = time.perf_counter()
        pieces = self._model.stream(settings.prompts[trial.prompt_index], params)
        with closing(cast("Generator[Piece]", pieces)):
            for piece in pieces:
                now_s = time.perf_counter() - start_s
                if piece.token_id is not None:
                    times_s.append(now_s)
                texts.append(piece.text)
                finish_reason = piece.finish_reason or finish_reason
                if now_s > settings.timeout_s:
                    raise TimeoutError(f"not done after {settings.timeout_s:g} s, {len(times_s)} tokens")
        elapsed_s, first_s = time.perf_counter() - start_s, times_s[0] if times_s else None
        return TimedGeneration(
            elapsed_s, first_s, times_s, prompt_tokens, len(times_s), finish_reason, "".join(texts)
        )

    def close(self) -> None:
        """Free the model."""
        self._model.close()


def check_room(prompt_tokens: Sequence[int], lengths: Sequence[int]) -> None:
    """Refuse a length that leaves a prompt no new token.

    Raises:
        RequestError: naming the longest prompt and the shortest length.
    """
    longest = max(prompt_tokens)
    if longest >= min(lengths):
        raise RequestError(
            f"prompt {prompt_tokens.index(longest)} has {longest} tokens; total length {min(lengths)} leaves "
            f"it no new token; shorten it or give --lengths of {longest + 1} or more"
        )


def measure_with_retries(
    settings: ClassicSettings, measure: Callable[[], TimedGeneration]
) -> tuple[TimedGeneration | Exception, int]:
    """Measure until it succeeds, or fails for good or too often; also how many attempts it took."""
    tries, wait_s = 0, settings.backoff_s
    while True:
        tries += 1
        try:
            return measure(), tries
        except Exception as error:  # whatever a framework or a network raises is this cell's result
            server = error if isinstance(error, ServerError) else None
            again = server.again if server else not isinstance(error, RequestError)
            if tries > settings.retries or not again:
                return error, tries
            asked_s = server.retry_after_s if server else None
        time.sleep(min(wait_s if asked_s is None else asked_s, MAX_WAIT_S))
        wait_s *= 2
