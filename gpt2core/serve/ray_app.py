"""The same server as a Ray Serve deployment: several replicas, on one machine or on a cluster.

    serve run gpt2core.serve.ray_app:build model=demo max_replicas=4 cpus=2

Each replica is the whole app of `create_app` with an engine of its own. On one host they share one
checkpoint: its file is memory-mapped, and the system keeps one copy of its pages for all of them. Needs the
extra `ray`.
"""

import asyncio
import os
from typing import Any, Final, Self

from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from starlette.types import Message, Receive, Scope, Send

from gpt2core import BackendError, BackendUnavailableError, RequestError
from gpt2core.serve import logs
from gpt2core.serve.app import create_app
from gpt2core.serve.ray_proxy import IMPORT_PATH, VARIABLE
from gpt2core.serve.settings import LOOPBACK_HOSTS, Settings, describe_faults

try:
    from ray import serve
except ModuleNotFoundError as error:
    raise BackendUnavailableError(
        "gpt2core.serve.ray_app needs Ray; install it with: pip install 'gpt2core[ray]'"
    ) from error

SPARE: Final = 16
"""Requests that Ray hands to a replica beyond those it takes, so that it refuses them itself (429)."""
SHUTDOWN_GRACE_S: Final = 5.0
LOADING_LOOK_S: Final = 0.02
_OF_THE_PROXY: Final = ("host", "port")


class Arguments(BaseModel):
    """What `serve run` and a config file may give: these, and every field of `Settings` beside them.

    `max_replicas` above `min_replicas` lets Ray add replicas while more requests than
    `target_ongoing_requests` are with each of them (by default `max_batch`: while texts would wait for a
    slot), and remove them later.
    """

    model_config = ConfigDict(extra="allow", frozen=True)

    name: str = Field(default="gpt2core", description="The deployment's name in Ray.")
    min_replicas: int = Field(default=1, ge=1, description="Replicas that always run.")
    max_replicas: int | None = Field(default=None, ge=1, description="Most replicas; unset: `min_replicas`.")
    target_ongoing_requests: float | None = Field(default=None, gt=0, description="Per replica.")
    upscale_delay_s: float = Field(default=5.0, ge=0, description="How long it must be exceeded.")
    downscale_delay_s: float = Field(default=120.0, ge=0, description="How long less must be enough.")
    cpus: float = Field(default=1.0, ge=0, description="CPUs reserved for a replica; also its threads.")
    gpus: float = Field(default=0.0, ge=0, description="GPUs reserved for a replica.")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.max_replicas is not None and self.max_replicas < self.min_replicas:
            raise ValueError(
                f"max_replicas {self.max_replicas} is less than min_replicas {self.min_replicas}; raise it"
            )
        return self

    def settings(self) -> Settings:
        """The server's settings, made where `build` runs, from what is given and from its environment.

        Raises:
            RequestError: one of them is unknown or out of its range.
        """
        given = dict(self.model_extra or {})
        for name in _OF_THE_PROXY:
            if name in given:
                raise RequestError(f"{name} is Ray's: its proxy listens; set it in http_options of Ray Serve")
        given.setdefault("threads", max(1, int(self.cpus)))
        try:
            settings = Settings(**given)
        except ValidationError as error:
            raise RequestError(describe_faults(error, {name: name for name in given})) from None
        beyond = set(settings.allowed_hosts) - set(LOOPBACK_HOSTS)
        if beyond and not settings.api_keys and not settings.insecure_no_auth:
            raise RequestError(
                f"allowed_hosts names {', '.join(sorted(beyond))}, so others may reach the server, and there "
                "is no API key; set api_key_file or GPT2CORE_API_KEY, or insecure_no_auth=true if something "
                "else guards it"
            )
        return settings


class ReadyApp:
    """The app, started only once its model is loaded: Ray sends a replica nothing before that.

    A model that cannot be loaded makes the replica's start fail, with the reason in Ray's status.
    """

    def __init__(self, settings: Settings) -> None:
        logs.configure(settings.log_level)
        self._app: FastAPI = create_app(settings)
        self._driver = self._app.state.driver

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or start and stop the app."""

        async def send_when_loaded(message: Message) -> None:
            if message["type"] == "lifespan.startup.complete":
                while self._driver.state == "loading":
                    await asyncio.sleep(LOADING_LOOK_S)
                if self._driver.state == "failed":
                    message = {"type": "lifespan.startup.failed", "message": str(self._driver.failure)}
            await send(message)

        await self._app(scope, receive, send_when_loaded if scope["type"] == "lifespan" else send)

    def check(self) -> None:
        """Let Ray replace the replica.

        Raises:
            BackendError: its engine has failed.
        """
        if self._driver.state == "failed":
            raise BackendError(f"the engine has failed: {self._driver.failure}")


class Replica:
    """What Ray asks of a replica beside HTTP; the app is mixed in by `serve.ingress`."""

    app: Any

    async def check_health(self) -> None:
        """Ray calls this again and again, and replaces the replica when it raises."""
        if isinstance(self.app, ReadyApp):
            self.app.check()


def build(args: Arguments) -> Any:
    """The application, for `serve run`, `serve build` and `serve deploy`, or for `serve.run` in Python.

    Lets a Ray that this process starts later say the errors of its proxy as the API does (`ray_proxy`).

    Raises:
        RequestError: a setting is wrong.
    """
    settings = args.settings()
    os.environ.setdefault(VARIABLE, IMPORT_PATH)

    def app() -> ReadyApp:  # runs in each replica
        return ReadyApp(settings)

    most_texts = settings.max_batch + settings.max_queue
    deployed: Any = serve.deployment(
        name=args.name,
        ray_actor_options={"num_cpus": args.cpus, "num_gpus": args.gpus},
        max_ongoing_requests=most_texts + SPARE,
        graceful_shutdown_timeout_s=settings.drain_s + SHUTDOWN_GRACE_S,
        graceful_shutdown_wait_loop_s=0.5,
        health_check_period_s=5,
        autoscaling_config={
            "min_replicas": args.min_replicas,
            "max_replicas": args.max_replicas or args.min_replicas,
            "target_ongoing_requests": args.target_ongoing_requests or settings.max_batch,
            "upscale_delay_s": args.upscale_delay_s,
            "downscale_delay_s": args.downscale_delay_s,
        },
    )
    return deployed(serve.ingress(app)(Replica)).bind()
