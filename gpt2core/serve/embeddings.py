"""`POST /v1/embeddings`, as OpenAI's API has it."""

import base64
from collections.abc import Mapping
from typing import Final, Literal

from fastapi import APIRouter
from fastapi import Request as HttpRequest
from fastapi.responses import Response

from gpt2core import GPT2, BackendError, NumericalError, RequestError
from gpt2core.serve.answer_schemas import EmbeddingList
from gpt2core.serve.body import read_body
from gpt2core.serve.completions import check_model, openai_names
from gpt2core.serve.errors import json_object, json_text
from gpt2core.serve.metrics import Metrics
from gpt2core.serve.openapi import answers, takes
from gpt2core.serve.schemas import EmbeddingRequest
from gpt2core.serve.service import Service
from gpt2core.serve.state import find_state

POOLING: Final[Mapping[str, Literal["mean", "last"]]] = {"MEAN": "mean", "LAST": "last"}
EXAMPLES = {
    "texts": {
        "summary": "Two texts",
        "value": {"model": "demo", "input": ["Once upon a time", "One day"]},
    }
}


def router(service: Service, metrics: Metrics) -> APIRouter:
    """The route."""
    routes = APIRouter(prefix="/v1", tags=["OpenAI"])
    name = service.settings.name

    @routes.post(
        "/embeddings",
        summary="Embeddings of texts, as OpenAI's API has them",
        openapi_extra=takes(EmbeddingRequest, EXAMPLES),
        responses=answers(EmbeddingList, takes_body=True, bad_parameter=400),
        response_model=None,
    )
    async def embeddings(request: HttpRequest) -> Response:
        """Turn texts, or token ids, into a vector each: the mean of its hidden states, or the last."""
        asked = await read_body(request, EmbeddingRequest, service.settings)
        check_model(asked.model, name)
        async with service.begin_errand(request) as errand:
            model = service.driver.model
            assert model is not None
            with openai_names("input"):
                texts = await errand.run(service.threads, lambda: service.encode(asked.inputs))
                items = []
                for i, ids in enumerate(texts):  # each by itself: between two of them others have their turn
                    embedding = _Embedding(model, asked, i, ids)
                    try:
                        items.append(await errand.run(service.embedder, embedding.compute))
                    except BackendError as error:
                        if not isinstance(error, NumericalError):
                            service.driver.fail(error)
                        raise
        tokens = sum(map(len, texts))
        find_state(request.scope).log_fields |= {"inputs": len(texts), "prompt_tokens": tokens}
        metrics.count_prompt(tokens)
        usage = {"prompt_tokens": tokens, "total_tokens": tokens}
        head = {"object": json_text("list"), "model": json_text(name), "usage": json_text(usage)}
        return Response(json_object({**head, "data": items}), media_type="application/json")

    return routes


class _Embedding:
    """What one text becomes."""

    def __init__(self, model: GPT2, asked: EmbeddingRequest, index: int, token_ids: list[int]) -> None:
        self._model = model
        self._asked = asked
        self._index = index
        self._token_ids = token_ids

    def compute(self) -> bytes:
        """As the answer has it.

        Raises:
            RequestError: the backend has no embeddings, or is closed.
            BackendError: the backend failed.
        """
        asked = self._asked
        try:
            vector = self._model.embed(
                self._token_ids, pooling=POOLING[asked.pooling_type], normalize=asked.normalize
            )
        except (RequestError, BackendError):
            raise
        except Exception as error:  # of whatever type a backend raises
            raise BackendError(f"backend {self._model.backend.name!r} failed: {error!r}") from error
        numbers: list[float] | str = vector.tolist()
        if asked.encoding_format == "base64":
            numbers = base64.b64encode(vector.astype("<f4").tobytes()).decode()
        return json_text({"object": "embedding", "index": self._index, "embedding": numbers})
