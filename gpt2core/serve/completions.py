"""`POST /v1/completions` and `GET /v1/models`, as OpenAI's API has them."""

import codecs
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from fastapi import APIRouter
from fastapi import Request as HttpRequest
from fastapi.responses import Response

from gpt2core import Request, Tokenizer, TokenLogprob, Update, __version__
from gpt2core.serve.answer_schemas import Completion, ModelCard, ModelList
from gpt2core.serve.body import read_body
from gpt2core.serve.errors import Refusal, invalid, json_object, json_response, json_text, to_refusal
from gpt2core.serve.events import EventStream, event
from gpt2core.serve.openapi import answers, takes
from gpt2core.serve.schemas import CompletionRequest, OpenAIOptions
from gpt2core.serve.service import Job, Service
from gpt2core.serve.state import find_state

EXAMPLES = {
    "text": {
        "summary": "One prompt",
        "value": {"model": "demo", "prompt": "Once upon a time", "max_tokens": 20, "seed": 7},
    },
    "score": {
        "summary": "The log probabilities of a given text",
        "value": {
            "model": "demo",
            "prompt": "Once upon a time",
            "max_tokens": 0,
            "echo": True,
            "logprobs": 1,
        },
    },
}


def router(service: Service) -> APIRouter:
    """The routes."""
    routes = APIRouter(prefix="/v1", tags=["OpenAI"])
    name, created = service.settings.name, int(time.time())

    def card() -> dict[str, Any]:
        engine = service.driver.engine
        context = None if engine is None else engine.config.n_positions
        return {
            "id": name,
            "object": "model",
            "created": created,
            "owned_by": "gpt2core",
            "context": context,
        }

    @routes.post(
        "/completions",
        summary="Continue prompts, as OpenAI's API does",
        openapi_extra=takes(CompletionRequest, EXAMPLES),
        responses=answers(Completion, stream=True, bad_parameter=400),
        response_model=None,
    )
    async def completions(request: HttpRequest) -> Response:
        """Continue prompts, given as texts or as token ids; `echo` with `logprobs` scores them."""
        asked = await read_body(request, CompletionRequest, service.settings)
        check_model(asked.model, name)
        with openai_names():
            job = await service.accept(
                request,
                asked.prompts,
                asked.params(),
                stream=bool(asked.stream),
                allow_special=bool(asked.allow_special),
            )
        answer = _Answer(service, job, asked)
        if asked.stream:
            return EventStream(job, answer.chunk, answer.closing, ping_s=service.settings.ping_s)
        try:
            await job.ticket.done()
            body = await service.in_thread(answer.whole) if asked.logprobs is not None else answer.whole()
        finally:
            job.close()
        return Response(body, media_type="application/json", headers=job.headers)

    @routes.get(
        "/models", summary="The model of this server", responses=answers(ModelList), response_model=None
    )
    async def models() -> Response:
        """List the one model of this server."""
        return json_response({"object": "list", "data": [card()]})

    @routes.get(
        "/models/{model:path}",
        summary="One model",
        responses=answers(ModelCard, unknown_model=True),
        response_model=None,
    )
    async def model(model: str) -> Response:
        """Say what a model of this server is."""
        check_model(model, name)
        return json_response(card())

    return routes


class _Answer:
    """The shapes of the answer."""

    def __init__(self, service: Service, job: Job, asked: CompletionRequest) -> None:
        engine = service.driver.engine
        assert engine is not None
        assert engine.tokenizer is not None
        self._job = job
        self._n = asked.n or 1
        self._tokenizer = engine.tokenizer
        self._with_logprobs = asked.logprobs is not None
        self._usage = StreamedUsage(job, asked)
        self._with_token_ids = bool(asked.return_token_ids)
        self._lists: dict[Request, LogprobLists] = {}
        self._begun: set[Request] = set()  # whose stream has told its prompt's token ids
        self._head = answer_head(service, job, "cmpl", "text_completion")

    def chunk(self, update: Update) -> bytes:
        """One event per token that says something."""
        request = update.request
        token_ids = self._with_token_ids and update.token_id is not None
        if not (update.text or update.finish_reason or update.logprobs or token_ids):
            return b""
        logprobs = None
        if self._with_logprobs:
            lists = self._lists.setdefault(request, LogprobLists(self._tokenizer))
            logprobs = lists.take(update.logprobs)
        index = request.prompt * self._n + request.choice
        choice = _choice(update.text, index, logprobs, update.finish_reason)
        if self._with_token_ids:
            first = request not in self._begun
            self._begun.add(request)
            choice["prompt_token_ids"] = request.token_ids[: request.prompt_tokens] if first else None
            choice["token_ids"] = [] if update.token_id is None else [update.token_id]
        return event(self._head | {"choices": [choice]} | self._usage.of_chunk())

    def closing(self) -> list[bytes]:
        """The tokens are counted at the end, where that was asked for."""
        return [event(self._head | {"choices": []} | usage) for usage in self._usage.at_end()]

    def whole(self) -> bytes:
        """The answer without a stream; of `best_of` texts the likeliest per token."""
        choices = []
        for prompt in range(len(self._job.prompt_lengths)):
            requests = [request for request in self._job.requests if request.prompt == prompt]
            if len(requests) > self._n:
                requests = sorted(requests, key=_mean_logprob, reverse=True)[: self._n]
            for i, request in enumerate(requests):
                logprobs = None
                if self._with_logprobs:
                    logprobs = LogprobLists(self._tokenizer).take(request.logprobs)
                choice = _choice(request.text, prompt * self._n + i, logprobs, request.finish_reason)
                if self._with_token_ids:
                    choice["prompt_token_ids"] = request.token_ids[: request.prompt_tokens]
                    choice["token_ids"] = request.generated
                choices.append(json_text(choice))
        usage = self._job.usage(self._job.generated_tokens())
        head = {name: json_text(value) for name, value in self._head.items()}
        return json_object({**head, "choices": choices, "usage": json_text(usage)})


class StreamedUsage:
    """How many tokens a stream has, where and as often as `stream_options` ask for it."""

    def __init__(self, job: Job, asked: OpenAIOptions) -> None:
        options = asked.stream_options
        self._job = job
        self._wanted = options is not None and bool(options.include_usage)
        self._always = options is not None and self._wanted and bool(options.continuous_usage_stats)

    def of_chunk(self) -> dict[str, Any]:
        """What an event with text says of it."""
        if not self._wanted:
            return {}
        return {"usage": self._count() if self._always else None}

    def at_end(self) -> list[dict[str, Any]]:
        """What the event at the end says of it; none where it is not wanted."""
        return [{"usage": self._count()}] if self._wanted else []

    def _count(self) -> dict[str, int]:
        return self._job.usage(self._job.generated_tokens())


class LogprobLists:
    r"""OpenAI's lists side by side, of one text.

    A token that is not UTF-8 by itself is spelled `bytes:\xe2\x82`, so that different tokens differ.
    `text_offset` counts the characters before the token's first, from the beginning of the text returned.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._offset = 0
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def take(self, entries: "tuple[TokenLogprob, ...] | list[TokenLogprob]") -> dict[str, Any]:
        """The lists of the next tokens."""
        tokens, logprobs, offsets = [], [], []
        tops: list[dict[str, float] | None] = []
        for entry in entries:
            token = self.spell(entry.token_id)
            tokens.append(token)
            logprobs.append(entry.logprob)
            offsets.append(self._offset)
            self._offset += len(self._utf8.decode(self._tokenizer.token_bytes(entry.token_id)))
            if entry.logprob is None:
                tops.append(None)
                continue
            top = {self.spell(token_id): logprob for token_id, logprob in entry.top}
            tops.append(top | {token: entry.logprob})  # the token itself too, likely or not
        return {"tokens": tokens, "token_logprobs": logprobs, "top_logprobs": tops, "text_offset": offsets}

    def spell(self, token_id: int) -> str:
        """Write a token as the lists have it."""
        data = self._tokenizer.token_bytes(token_id)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def _choice(text: str, index: int, logprobs: object, reason: str | None) -> dict[str, Any]:
    return {"text": text, "index": index, "logprobs": logprobs, "finish_reason": reason}


def _mean_logprob(request: Request) -> float:
    """Of the generated tokens only: the prompt's are the same for all."""
    count = len(request.token_ids) - request.prompt_tokens
    own = [entry.logprob or 0.0 for entry in request.logprobs[len(request.logprobs) - count :]]
    return sum(own) / max(1, count)


def answer_head(service: Service, job: Job, prefix: str, kind: str) -> dict[str, Any]:
    """What every answer, and every event of a stream, begins with."""
    engine = service.driver.engine
    assert engine is not None
    return {
        "id": f"{prefix}-{find_state(job.request.scope).request_id}",
        "object": kind,
        "created": int(time.time()),
        "model": service.settings.name,
        "system_fingerprint": f"gpt2core-{__version__}-{engine.backend.name}",
    }


def check_model(asked: str | None, name: str) -> None:
    """Refuse another model than the one there is."""
    if asked not in (None, name):
        message = f"this server has no such model; it has {name!r}"
        raise Refusal(404, "not_found_error", "model_not_found", message, param="model")


@contextmanager
def openai_names(prompt: str = "prompt") -> Iterator[None]:
    """Let errors name the parameters as OpenAI's API does, and what is to be continued `prompt`."""
    try:
        yield
    except Exception as error:
        refusal = to_refusal(error)
        if refusal.status != 422:
            raise
        message = refusal.message
        for ours, theirs in (("max_new_tokens", "max_tokens"), ("min_new_tokens", "min_tokens")):
            message = message.replace(ours, theirs)
        param = prompt if refusal.param == "prompt" else refusal.param
        raise invalid(message, param=param, code=refusal.code) from None
