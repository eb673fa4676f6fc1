"""`POST /tokenize` and `POST /detokenize`, as vLLM has them."""

from fastapi import APIRouter
from fastapi import Request as HttpRequest
from fastapi.responses import Response

from gpt2core import Tokenizer
from gpt2core.serve.answer_schemas import Detokenized, Tokens
from gpt2core.serve.body import read_body
from gpt2core.serve.completions import check_model
from gpt2core.serve.errors import invalid, json_text
from gpt2core.serve.openapi import answers, takes
from gpt2core.serve.schemas import DetokenizeRequest, TokenizeRequest
from gpt2core.serve.service import Service

TOKENIZE_EXAMPLES = {
    "text": {"summary": "A text", "value": {"prompt": "Once upon a time", "return_token_strs": True}}
}
DETOKENIZE_EXAMPLES = {"tokens": {"summary": "Token ids", "value": {"tokens": [72, 105]}}}


def router(service: Service) -> APIRouter:
    """The routes."""
    routes = APIRouter(tags=["tokens"])
    name = service.settings.name

    def find_tokenizer() -> tuple[Tokenizer, int, int]:
        engine = service.driver.engine
        assert engine is not None
        assert engine.tokenizer is not None
        return engine.tokenizer, engine.config.n_positions, engine.config.vocab_size

    @routes.post(
        "/tokenize",
        summary="The token ids of a text",
        openapi_extra=takes(TokenizeRequest, TOKENIZE_EXAMPLES),
        responses=answers(Tokens, takes_body=True, unknown_model=True),
        response_model=None,
    )
    async def tokenize(request: HttpRequest) -> Response:
        """Turn a text into token ids, also one that is longer than the context."""
        asked = await read_body(request, TokenizeRequest, service.settings)
        check_model(asked.model, name)

        def encode() -> bytes:
            tokenizer, context, _ = find_tokenizer()
            special = bool(asked.allow_special)
            ids = tokenizer.encode(asked.prompt, allow_special=special, begin=asked.add_special_tokens)
            spelled = [tokenizer.content(token_id) for token_id in ids] if asked.return_token_strs else None
            return json_text(
                {"count": len(ids), "max_model_len": context, "tokens": ids, "token_strs": spelled}
            )

        async with service.begin_errand(request) as errand:
            return Response(await errand.run(service.threads, encode), media_type="application/json")

    @routes.post(
        "/detokenize",
        summary="The text of token ids",
        openapi_extra=takes(DetokenizeRequest, DETOKENIZE_EXAMPLES),
        responses=answers(Detokenized, takes_body=True, unknown_model=True),
        response_model=None,
    )
    async def detokenize(request: HttpRequest) -> Response:
        """Turn token ids into their text; what is not UTF-8 becomes U+FFFD."""
        asked = await read_body(request, DetokenizeRequest, service.settings)
        check_model(asked.model, name)

        def decode() -> bytes:
            tokenizer, _, vocab_size = find_tokenizer()
            if max(asked.tokens, default=0) >= vocab_size:
                message = (
                    f"tokens holds an id that is not in the vocabulary; ids go from 0 to {vocab_size - 1}"
                )
                raise invalid(message, param="tokens")
            return json_text({"prompt": tokenizer.decode(asked.tokens)})

        async with service.begin_errand(request) as errand:
            return Response(await errand.run(service.threads, decode), media_type="application/json")

    return routes
