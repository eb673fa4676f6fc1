"""`/livez`, `/readyz`, `/health`, `/version` and `/metrics`."""

from fastapi import APIRouter
from fastapi.responses import PlainTextResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST

from gpt2core import __version__
from gpt2core.serve.answer_schemas import Health, Version
from gpt2core.serve.driver import Driver
from gpt2core.serve.errors import engine_failed, json_response
from gpt2core.serve.metrics import Metrics
from gpt2core.serve.openapi import answers


def health_router(driver: Driver) -> APIRouter:
    """The routes that need no key."""
    routes = APIRouter(tags=["health"])
    responses = {**answers(Health, open_to_all=True), 503: answers(Health, stream=True)[503]}

    @routes.get("/livez", summary="Is the process worth keeping?", responses=responses, response_model=None)
    async def livez() -> Response:
        """Say 503 when only a restart helps, else 200: also while the model is being loaded."""
        if driver.state == "failed":
            raise engine_failed()
        return json_response({"status": "live"})

    @routes.get("/readyz", summary="Can it take requests?", responses=responses, response_model=None)
    async def readyz() -> Response:
        """Say 503 while the model is being loaded, while the server stops, and when the engine has failed."""
        driver.check_staying()
        return json_response({"status": "ready"})

    @routes.get("/health", summary="Does it answer requests now?", responses=responses, response_model=None)
    async def health() -> Response:
        """As llama-server and vLLM have it: 200 as soon as the model is loaded, also as a lame duck."""
        driver.check_ready()
        return json_response({"status": "ok"})

    return routes


def version_router() -> APIRouter:
    """Which version answers."""
    routes = APIRouter(tags=["health"])

    @routes.get("/version", summary="This server's version", responses=answers(Version), response_model=None)
    async def version() -> Response:
        """Of gpt2core."""
        return json_response({"version": __version__})

    return routes


def metrics_router(metrics: Metrics) -> APIRouter:
    """What Prometheus reads."""
    routes = APIRouter(tags=["health"])

    refusals = {status: answer for status, answer in answers(Health).items() if status != 200}

    @routes.get(
        "/metrics",
        summary="Metrics for Prometheus",
        response_class=PlainTextResponse,
        responses=refusals,
        response_model=None,
    )
    async def read() -> Response:
        """In Prometheus' text format."""
        return Response(metrics.text(), media_type=CONTENT_TYPE_LATEST)

    return routes
