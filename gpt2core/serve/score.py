"""`POST /score`: how well the model predicts texts, as `GPT2.score` has it."""

import itertools
import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

from fastapi import APIRouter
from fastapi import Request as HttpRequest
from fastapi.responses import Response

from gpt2core import RequestError, Score
from gpt2core.serve.body import read_body
from gpt2core.serve.errors import invalid, json_object, json_text
from gpt2core.serve.openapi import answers, takes
from gpt2core.serve.score_schemas import ScoreRequest, ScoreResponse
from gpt2core.serve.service import Service
from gpt2core.serve.state import find_state

SLICE: Final = 64
"""Texts that are scored before it is looked whether anybody still waits for them."""
EXAMPLES = {
    "words": {
        "summary": "Two texts, by word",
        "value": {"text": ["Once upon a time.", "The end."], "bos": "eos", "by": "word", "corrected": True},
    },
    "tokens": {
        "summary": "One text, by token, with alternatives",
        "value": {"text": "Once upon a time.", "by": "token", "top": 3, "entropy": True},
    },
}


def router(service: Service) -> APIRouter:
    """The route."""
    routes = APIRouter(tags=["generate"])
    # One, since passes are one at a time; others' texts shall not wait for a thread behind it.
    threads = ThreadPoolExecutor(1, thread_name_prefix="gpt2core-score")

    @routes.post(
        "/score",
        summary="How well the model predicts texts",
        openapi_extra=takes(ScoreRequest, EXAMPLES),
        responses=answers(ScoreResponse, takes_body=True),
        response_model=None,
    )
    async def score(request: HttpRequest) -> Response:
        """Score one text or several, of any length: probabilities, ranks and entropies of what is there."""
        asked = await read_body(request, ScoreRequest, service.settings)
        if asked.corrected and asked.by != "word":
            raise invalid("corrected is about words; give by: word", param="corrected")
        async with service.begin_errand(request) as errand:
            model = service.driver.model
            assert model is not None
            try:
                scores = model.score_iter(asked.texts, errors="return", **asked.choices())
            except RequestError as error:
                raise invalid(str(error)) from None
            items: list[bytes] = []
            tokens = 0
            while part := await errand.run(threads, lambda: list(itertools.islice(scores, SLICE))):
                for found in part:
                    if isinstance(found, RequestError):
                        where = f"text {len(items)} of the list: " if len(asked.texts) > 1 else ""
                        raise invalid(f"{where}{found}", param="text")
                    tokens += len(found.token_ids)
                    items.append(_text(asked, len(items), found))
        find_state(request.scope).log_fields |= {"inputs": len(items), "prompt_tokens": tokens}
        head = {
            "model": json_text(service.settings.name),
            "backend": json_text(model.backend.name),
            "usage": json_text({"prompt_tokens": tokens, "total_tokens": tokens}),
        }
        return Response(json_object({**head, "scores": items}), media_type="application/json")

    return routes


def _text(asked: ScoreRequest, index: int, score: Score) -> bytes:
    base = 2 if asked.base == "2" else math.e
    document = {
        "index": index,
        "token_count": len(score.token_ids),
        "scored_tokens": len(score.logprobs),
        "logprob": score.logprob,
        "surprisal": float(score.surprisals(base).sum()),
        "perplexity": _finite(score.perplexity),
        "word_perplexity": _finite(score.word_perplexity),
        "byte_perplexity": _finite(score.byte_perplexity),
        "bits_per_byte": _finite(score.bits_per_byte),
        "tokens": list(_tokens(score, base)) if asked.by == "token" else None,
        "words": list(_words(asked, score, base)) if asked.by == "word" else None,
    }
    return json_text(document)


def _tokens(score: Score, base: float) -> Iterator[dict[str, Any]]:
    for token in score.by_token(base):
        top = token.top
        yield {
            "text": token.text,
            "token_id": token.token_id,
            "start": token.start,
            "end": token.end,
            "logprob": token.logprob,
            "surprisal": token.surprisal,
            "rank": token.rank,
            "entropy": token.entropy,
            "top": None if top is None else [[one.token_id, one.text, one.logprob] for one in top],
        }


def _words(asked: ScoreRequest, score: Score, base: float) -> Iterator[dict[str, Any]]:
    for word in score.words(corrected=asked.corrected, base=base):
        yield {
            "text": word.text,
            "start": word.start,
            "end": word.end,
            "logprob": word.logprob,
            "surprisal": word.surprisal,
            "exact": word.exact,
        }


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
