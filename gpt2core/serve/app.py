"""`create_app`: the parts put together."""

import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from fastapi import Depends, FastAPI
from pydantic import ValidationError
from starlette.exceptions import HTTPException

from gpt2core import GPT2, Gpt2CoreError, RequestError
from gpt2core.serve import apidocs, chat, completions, embeddings, generate, logs, playground, score, tokens
from gpt2core.serve.auth import require_key
from gpt2core.serve.doorkeeper import Doorkeeper
from gpt2core.serve.driver import Driver
from gpt2core.serve.errors import Disconnected, Refusal, answer_error
from gpt2core.serve.guard import Guard
from gpt2core.serve.head import AnswerHead
from gpt2core.serve.health import health_router, metrics_router, version_router
from gpt2core.serve.metrics import Metrics
from gpt2core.serve.openapi import describe
from gpt2core.serve.service import Service
from gpt2core.serve.settings import Settings, describe_faults, find_typos


def load_model(settings: Settings) -> GPT2:
    """Load the model that the settings name, with their limits.

    Raises:
        RequestError: it has no tokenizer, and a server answers with text.
    """
    model = GPT2.from_pretrained(
        settings.model,
        backend=settings.backend,
        precision=settings.precision,
        device=settings.device,
        threads=settings.threads,
        revision=settings.revision,
        local_files_only=settings.offline,
        max_batch=settings.max_batch,
        cache_nbytes=settings.cache_nbytes,
        speculation=settings.speculation,
        draft_model=settings.draft_model,
        prefix_cache=False if settings.prefix_cache == "off" else None,
    )
    try:
        _ = model.tokenizer
    except BaseException:
        model.close()
        raise
    return model


def read_environment() -> Settings:
    """The settings that the environment holds.

    Raises:
        RequestError: one of them is wrong.
    """
    try:
        return Settings()
    except ValidationError as error:
        raise RequestError(describe_faults(error, {})) from None


def warn_of_typos() -> None:
    """Log each variable that looks like a setting and is none."""
    for name, near in find_typos(os.environ).items():
        logs.event("warning", "unknown_setting", variable=name, did_you_mean=near)


def create_app(settings: Settings | None = None, *, load: Callable[[Settings], GPT2] = load_model) -> FastAPI:
    """The server as an ASGI app; the model is loaded in the background when the app starts.

    Args:
        settings: None takes them from the environment, and lets the logs go to stderr.
        load: loads the model, which belongs to the app then.

    Raises:
        RequestError: the API keys or the chat template cannot be read, or a variable of the environment is
            wrong.
    """
    if settings is None:
        settings = read_environment()
        logs.configure(settings.log_level)
        warn_of_typos()
    metrics = Metrics()
    driver = Driver(lambda: load(settings), settings, metrics)
    service = Service(driver, settings)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        driver.start()
        try:
            yield
        finally:
            await driver.close()
            service.close()

    app = FastAPI(lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False)
    app.state.driver = driver
    app.state.doorkeeper = Doorkeeper(driver, metrics)
    description: dict[str, Any] = {}

    def describe_once() -> dict[str, Any]:
        if not description:
            description.update(describe(app, settings))
        return description

    app.openapi = describe_once  # type: ignore[method-assign]
    keyed = [Depends(require_key(settings))]
    app.include_router(health_router(driver))
    app.include_router(metrics_router(metrics), dependencies=keyed)
    app.include_router(generate.router(service), dependencies=keyed)
    app.include_router(completions.router(service), dependencies=keyed)
    app.include_router(chat.router(service), dependencies=keyed)
    app.include_router(embeddings.router(service, metrics), dependencies=keyed)
    app.include_router(tokens.router(service), dependencies=keyed)
    app.include_router(version_router(), dependencies=keyed)
    app.include_router(score.router(service), dependencies=keyed)
    app.include_router(apidocs.router(describe_once), dependencies=keyed)
    if settings.playground:
        app.include_router(playground.router(driver, settings), dependencies=keyed)

    for kind in (Refusal, Disconnected, Gpt2CoreError, HTTPException):
        app.add_exception_handler(kind, answer_error)
    app.add_middleware(AnswerHead)
    app.add_middleware(Guard, settings=settings, metrics=metrics, driver=driver)
    metrics.gauge("gpt2core_requests_running", "Requests that hold a place.", lambda: driver.requests)
    metrics.gauge("gpt2core_queue_depth", "Texts that wait for a slot.", lambda: driver.waiting)
    metrics.gauge("gpt2core_cache_use", "Part of the KV cache that holds tokens.", lambda: driver.cache_use)
    return app
