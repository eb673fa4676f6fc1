"""`POST /generate`: this library's own way of asking, with the names of `SamplingParams`."""

import time
from typing import Any

from fastapi import APIRouter
from fastapi import Request as HttpRequest
from fastapi.responses import Response

from gpt2core import Request, Tokenizer, TokenLogprob, Update
from gpt2core.serve.answer_schemas import GenerateResponse
from gpt2core.serve.body import read_body
from gpt2core.serve.errors import json_object, json_text
from gpt2core.serve.events import EventStream, event
from gpt2core.serve.openapi import answers, takes
from gpt2core.serve.schemas import GenerateRequest
from gpt2core.serve.service import Job, Service

EXAMPLES = {
    "one": {
        "summary": "One prompt",
        "value": {"prompt": "Once upon a time", "max_length": 50, "temperature": 0.8, "seed": 7},
    },
    "batch": {
        "summary": "Two prompts as one batch",
        "value": {"prompt": ["Once upon a time", "One day"], "max_new_tokens": 20},
    },
    "stream": {
        "summary": "Streamed, with probabilities",
        "value": {"prompt": "Once", "max_new_tokens": 20, "logprobs": 5, "stream": True},
    },
}


def router(service: Service) -> APIRouter:
    """The route."""
    routes = APIRouter(tags=["generate"])

    @routes.post(
        "/generate",
        summary="Continue one prompt or several",
        openapi_extra=takes(GenerateRequest, EXAMPLES),
        responses=answers(GenerateResponse, stream=True),
        response_model=None,
    )
    async def generate(request: HttpRequest) -> Response:
        """Continue a prompt, or several as one batch. With `"stream": true` as server-sent events."""
        asked = await read_body(request, GenerateRequest, service.settings)
        job = await service.accept(
            request,
            list(asked.prompts),
            asked.params(),
            stream=asked.stream,
            allow_special=asked.allow_special,
        )
        answer = _Answer(service, job)
        if asked.stream:
            return EventStream(job, answer.piece, answer.closing, ping_s=service.settings.ping_s)
        try:
            await job.ticket.done()
            body = await service.in_thread(answer.whole) if asked.logprobs is not None else answer.whole()
        finally:
            job.close()
        return Response(body, media_type="application/json", headers=job.headers)

    return routes


class _Answer:
    """The shapes of the answer."""

    def __init__(self, service: Service, job: Job) -> None:
        engine = service.driver.engine
        assert engine is not None
        assert engine.tokenizer is not None
        self._job = job
        self._tokenizer = engine.tokenizer
        self._model, self._backend = service.settings.name, engine.backend.name
        self._logprobs = job.params.logprobs is not None

    def piece(self, update: Update) -> bytes:
        """One event per token."""
        piece: dict[str, Any] = {
            "index": update.request.prompt,
            "choice": update.request.choice,
            "text": update.text,
            "token_id": update.token_id,
        }
        if self._logprobs:
            tokens = [describe_token(self._tokenizer, entry) for entry in update.logprobs]
            if update.token_id is None:  # the echoed prompt
                piece |= {"token": None, "logprob": None, "top_logprobs": [], "prompt_logprobs": tokens}
            else:
                piece |= tokens[0]
        return event(piece | {"finish_reason": update.finish_reason})

    def closing(self) -> tuple[bytes]:
        """The last event: the same as the answer without a stream."""
        return (b"data: " + self.whole() + b"\n\n",)

    def whole(self) -> bytes:
        """The answer without a stream."""
        job, requests = self._job, self._job.requests
        elapsed_s = round(time.perf_counter() - job.ticket.begun_s, 6)
        return json_object(
            {
                "generated_text": json_text(requests[0].text),
                "generations": (json_text(self._generation(request)) for request in requests),
                "model": json_text(self._model),
                "backend": json_text(self._backend),
                "seed": json_text(requests[0].seed),
                "elapsed_s": json_text(elapsed_s),
                "usage": json_text(job.usage(job.generated_tokens())),
            }
        )

    def _generation(self, request: Request) -> dict[str, Any]:
        result: dict[str, Any] = {
            "text": request.text,
            "finish_reason": request.finish_reason,
            "prompt_tokens": request.read_prompt_tokens,
            "completion_tokens": len(request.token_ids) - request.prompt_tokens,
            "index": request.prompt,
            "choice": request.choice,
            "seed": request.seed,
        }
        if self._job.params.overflow != "error":
            result["truncated_tokens"] = request.truncated_tokens
        if self._logprobs:
            result["logprobs"] = [describe_token(self._tokenizer, entry) for entry in request.logprobs]
        return result


def describe_token(tokenizer: Tokenizer, entry: TokenLogprob) -> dict[str, Any]:
    """One token with its probability and the likeliest others."""
    return {
        "token": tokenizer.token_text(entry.token_id),
        "token_id": entry.token_id,
        "logprob": entry.logprob,
        "top_logprobs": [
            {"token": tokenizer.token_text(token_id), "token_id": token_id, "logprob": logprob}
            for token_id, logprob in entry.top
        ],
    }
