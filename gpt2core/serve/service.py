"""What the routes share: a request becomes token ids off the event loop, then a ticket of the engine."""

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final, TypeVar

from starlette.requests import Request as HttpRequest

from gpt2core import BackendUnavailableError, Request, RequestError, SamplingParams
from gpt2core.serve.driver import Driver
from gpt2core.serve.errand import Errand, watch_client
from gpt2core.serve.errors import Disconnected, invalid, to_refusal
from gpt2core.serve.settings import Settings
from gpt2core.serve.state import find_state
from gpt2core.serve.ticket import Ticket

Prompt = str | list[int] | Callable[[], list[int]]
"""A text, its token ids, or what gives them and may take long."""
T = TypeVar("T")
TOKENIZER_THREADS = 2
_READ_ONLY: Final = SamplingParams(max_new_tokens=0)


class Service:
    """The engine as the routes see it."""

    def __init__(self, driver: Driver, settings: Settings) -> None:
        self.driver = driver
        self.settings = settings
        self.threads = ThreadPoolExecutor(TOKENIZER_THREADS, thread_name_prefix="gpt2core-text")
        # One, since the engine computes one at a time, and not of those above: these shall not wait for it.
        self.embedder = ThreadPoolExecutor(1, thread_name_prefix="gpt2core-embed")

    async def accept(
        self,
        request: HttpRequest,
        prompts: Sequence[Prompt],
        params: SamplingParams,
        *,
        stream: bool,
        allow_special: bool = False,
    ) -> "Job":
        """Begin a request; the caller must close the job.

        Raises:
            Refusal: it cannot run.
        """
        ticket = self._reserve(request, len(prompts) * params.n)
        try:
            ids = await self.in_thread(lambda: self.encode(prompts, params, allow_special))
            self.driver.submit(ticket, ids, params, stream=stream)
        except BaseException:
            ticket.close()
            raise
        skipped = [params.fit(len(prompt), self.context).skipped for prompt in ids]
        lengths = [len(prompt) - left_out for prompt, left_out in zip(ids, skipped, strict=True)]
        job = Job(ticket, params, lengths, sum(skipped), request)
        job.log_fields |= {"prompts": len(prompts), "n": params.n}
        job.log_fields |= {"prompt_tokens": job.prompt_tokens, "stream": stream}
        return job

    def begin_errand(self, request: HttpRequest) -> Errand:
        """Begin a request that needs no slot; it holds one place.

        Raises:
            Refusal: it cannot run.
        """
        return Errand(self._reserve(request, 1), request)

    def _reserve(self, request: HttpRequest, count: int) -> Ticket:
        state = find_state(request.scope)
        return self.driver.reserve(state.client, count, state.begun_s, request.scope["route"].path)

    @property
    def context(self) -> int:
        """The model's, in tokens."""
        assert self.driver.engine is not None
        return self.driver.engine.config.n_positions

    async def in_thread(self, work: Callable[[], T]) -> T:
        """Run what takes long, and holds no lock, beside the event loop."""
        return await asyncio.get_running_loop().run_in_executor(self.threads, work)

    def close(self) -> None:
        """Let go of the threads."""
        for threads in (self.threads, self.embedder):
            threads.shutdown(wait=False, cancel_futures=True)

    def encode(
        self, prompts: Sequence[Prompt], params: SamplingParams = _READ_ONLY, special: bool = False
    ) -> list[list[int]]:
        """The token ids of each prompt; takes long.

        Raises:
            Refusal: one of them cannot run.
        """
        engine = self.driver.engine
        assert engine is not None
        result = []
        for i, prompt in enumerate(prompts):
            try:
                given = prompt() if callable(prompt) else prompt
                result.append(engine.encode(given, params, allow_special=special))
            except BackendUnavailableError as error:  # the package that constraints need
                raise invalid(str(error)) from None
            except RequestError as error:
                refusal = to_refusal(error)
                where = f"prompt {i} of the list: " if len(prompts) > 1 else ""
                raise invalid(where + refusal.message, param=refusal.param, code=refusal.code) from None
        return result


@dataclass(eq=False)
class Job:
    """One request that runs."""

    ticket: Ticket
    params: SamplingParams
    prompt_lengths: list[int]  # of what is read
    truncated_tokens: int  # of all prompts
    request: HttpRequest

    def __post_init__(self) -> None:
        self.log_fields = find_state(self.request.scope).log_fields
        self._watch = asyncio.create_task(watch_client(self.request, self.ticket))

    @property
    def headers(self) -> dict[str, str]:
        """What every answer says, streamed or not."""
        if self.params.overflow == "error":
            return {}
        return {"X-Truncated-Tokens": str(self.truncated_tokens)}

    @property
    def prompt_tokens(self) -> int:
        """Of all prompts, as far as they are read."""
        return sum(self.prompt_lengths)

    @property
    def requests(self) -> list[Request]:
        """By prompt, then by choice."""
        return self.ticket.requests

    def usage(self, completion_tokens: int) -> dict[str, int]:
        """As OpenAI counts."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": self.prompt_tokens + completion_tokens,
        }

    def generated_tokens(self) -> int:
        """So far, of all choices."""
        return sum(len(request.token_ids) - request.prompt_tokens for request in self.requests)

    def close(self) -> None:
        """Free what it holds; what still runs is cancelled."""
        self._watch.cancel()
        self.ticket.close()
        self.log_fields["completion_tokens"] = self.generated_tokens()
        if self.ticket.error is not None:
            self.log_fields["outcome"] = name_outcome(self.ticket.error)


def name_outcome(error: BaseException) -> str:
    """How a request ended, for the log."""
    return "disconnected" if isinstance(error, Disconnected) else to_refusal(error).code
