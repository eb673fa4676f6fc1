"""`POST /v1/chat/completions`, as OpenAI has it: messages become a prompt by the model's chat template."""

import dataclasses
from typing import Any

from fastapi import APIRouter
from fastapi import Request as HttpRequest
from fastapi.responses import Response

from gpt2core import ChatTemplate, ContextLengthError, Request, RequestError, Tokenizer, TokenLogprob, Update
from gpt2core.serve.answer_schemas import ChatCompletion
from gpt2core.serve.body import read_body
from gpt2core.serve.completions import StreamedUsage, answer_head, check_model, openai_names
from gpt2core.serve.errors import Refusal, invalid, json_object, json_text
from gpt2core.serve.events import EventStream, event
from gpt2core.serve.openapi import answers, takes
from gpt2core.serve.schemas import ChatRequest
from gpt2core.serve.service import Job, Service

EXAMPLES = {
    "chat": {
        "summary": "One question",
        "value": {
            "model": "demo",
            "messages": [{"role": "user", "content": "Does money buy happiness?"}],
            "max_tokens": 40,
        },
    }
}


def router(service: Service) -> APIRouter:
    """The route.

    Raises:
        RequestError: the chat template of the settings cannot be read.
    """
    routes = APIRouter(prefix="/v1", tags=["OpenAI"])
    name = service.settings.name
    template_for = ChatTemplate.find(service.settings.chat_template)

    @routes.post(
        "/chat/completions",
        summary="Continue a chat, as OpenAI's API does",
        openapi_extra=takes(ChatRequest, EXAMPLES),
        responses=answers(ChatCompletion, stream=True, bad_parameter=400),
        response_model=None,
    )
    async def chat(request: HttpRequest) -> Response:
        """Say what the assistant says next. With `"stream": true` as server-sent events."""
        asked = await read_body(request, ChatRequest, service.settings)
        check_model(asked.model, name)
        service.driver.check_ready()
        engine = service.driver.engine
        assert engine is not None
        assert engine.tokenizer is not None
        tokenizer, context = engine.tokenizer, engine.config.n_positions
        template = template_for(tokenizer)
        if template is None:
            raise _no_template()

        def encode() -> list[int]:
            try:
                return template.encode(
                    [message.spelled() for message in asked.messages],
                    tokenizer,
                    context=context if params.overflow == "error" else None,
                    add_generation_prompt=asked.add_generation_prompt is not False,
                )
            except ContextLengthError:
                raise
            except RequestError as error:
                raise invalid(str(error), param="messages") from None

        with openai_names("messages"):
            params = asked.params(context)
            params = dataclasses.replace(params, stop=(*params.stop, *template.stop))
            job = await service.accept(request, [encode], params, stream=bool(asked.stream))
        answer = _Answer(service, job, asked, tokenizer)
        if asked.stream:
            return EventStream(job, answer.chunk, answer.closing, ping_s=service.settings.ping_s)
        try:
            await job.ticket.done()
            body = await service.in_thread(answer.whole) if asked.logprobs else answer.whole()
        finally:
            job.close()
        return Response(body, media_type="application/json", headers=job.headers)

    return routes


class _Answer:
    """The shapes of the answer."""

    def __init__(self, service: Service, job: Job, asked: ChatRequest, tokenizer: Tokenizer) -> None:
        self._job = job
        self._tokenizer = tokenizer
        self._with_logprobs = bool(asked.logprobs)
        self._with_token_ids = bool(asked.return_token_ids)
        self._usage = StreamedUsage(job, asked)
        self._begun: set[Request] = set()  # whose stream has said that the assistant speaks
        kind = "chat.completion.chunk" if asked.stream else "chat.completion"
        self._head = answer_head(service, job, "chatcmpl", kind)

    def chunk(self, update: Update) -> bytes:
        """One event per token that says something, and one before a choice's first."""
        request, parts = update.request, []
        if request not in self._begun:
            self._begun.add(request)
            parts.append(self._event(request, {"role": "assistant", "content": ""}, first=True))
        token_ids = self._with_token_ids and update.token_id is not None
        if update.text or update.finish_reason or update.logprobs or token_ids:
            delta = {"content": update.text} if update.text else {}
            parts.append(self._event(request, delta, update))
        return b"".join(parts)

    def closing(self) -> list[bytes]:
        """The tokens are counted at the end, where that was asked for."""
        return [event(self._head | {"choices": []} | usage) for usage in self._usage.at_end()]

    def whole(self) -> bytes:
        """The answer without a stream."""
        choices = []
        for request in self._job.requests:
            message = {"role": "assistant", "content": request.text, "refusal": None}
            choice = {"index": request.choice, "message": message, "finish_reason": request.finish_reason}
            choice["logprobs"] = self._logprobs(request.logprobs)
            if self._with_token_ids:
                choice["token_ids"] = request.generated
            choices.append(json_text(choice))
        head = {name: json_text(value) for name, value in self._head.items()}
        if self._with_token_ids:
            head["prompt_token_ids"] = json_text(_prompt_ids(self._job.requests[0]))
        usage = self._job.usage(self._job.generated_tokens())
        return json_object({**head, "choices": choices, "usage": json_text(usage)})

    def _event(
        self, request: Request, delta: dict[str, Any], update: Update | None = None, *, first: bool = False
    ) -> bytes:
        choice = {"index": request.choice, "delta": delta, "logprobs": None, "finish_reason": None}
        extra: dict[str, Any] = {}
        if update is not None:
            choice["logprobs"] = self._logprobs(update.logprobs)
            choice["finish_reason"] = update.finish_reason
            if self._with_token_ids:
                choice["token_ids"] = [] if update.token_id is None else [update.token_id]
        elif first and self._with_token_ids:
            extra["prompt_token_ids"] = _prompt_ids(request)
        return event(self._head | extra | {"choices": [choice]} | self._usage.of_chunk())

    def _logprobs(self, entries: "tuple[TokenLogprob, ...] | list[TokenLogprob]") -> dict[str, Any] | None:
        if not self._with_logprobs:
            return None
        content = []
        for entry in entries:
            top = [self._token(token_id, logprob) for token_id, logprob in entry.top]
            content.append({**self._token(entry.token_id, entry.logprob), "top_logprobs": top})
        return {"content": content, "refusal": None}

    def _token(self, token_id: int, logprob: float | None) -> dict[str, Any]:
        data = self._tokenizer.token_bytes(token_id)
        return {"token": data.decode("utf-8", "replace"), "logprob": logprob, "bytes": list(data)}


def _prompt_ids(request: Request) -> list[int]:
    return request.token_ids[: request.prompt_tokens]


def _no_template() -> Refusal:
    """The model cannot chat."""
    return invalid(
        "this model has no chat template; ask /v1/completions, or start the server with --chat-template "
        "(a file, dialogpt or plain)",
        param="messages",
        code="no_chat_template",
    )
