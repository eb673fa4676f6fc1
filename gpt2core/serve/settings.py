"""Every limit and option of the server; each is also an environment variable, `GPT2CORE_` and its name."""

import difflib
import ipaddress
import os
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, SecretStr, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from gpt2core.errors import RequestError

LOOPBACK_HOSTS = ("127.0.0.1", "localhost", "[::1]")
Names = Annotated[tuple[str, ...], NoDecode]


class Settings(BaseSettings):
    """How the server runs. Given arguments go before the environment, and the environment before defaults."""

    model_config = SettingsConfigDict(env_prefix="GPT2CORE_", env_ignore_empty=True, frozen=True)

    model: str = Field(default="demo", description="`demo`, a folder, or an id on the hub.")
    revision: str | None = Field(default=None, description="Branch, tag or commit of a model on the hub.")
    offline: bool = Field(default=False, description="Use local files only; never ask the hub.")
    backend: str = Field(default="auto", description="Engine; see `gpt2core backends`.")
    precision: str = Field(
        default="auto", description="Of the weights; `auto`: as the checkpoint holds them."
    )
    device: str = Field(default="cpu", description="Where the engine computes.")
    threads: int | None = Field(
        default=None, ge=1, description="CPU threads of the engine; unset: it decides."
    )
    speculation: Literal["off", "prompt_lookup"] = Field(
        default="off", description="`prompt_lookup`: faster where few texts run and repeat themselves."
    )
    draft_model: str | None = Field(
        default=None, description="A small model of the same vocabulary that makes the model faster."
    )
    prefix_cache: Literal["off", "per-key", "shared"] = Field(
        default="per-key",
        description="Whom prompts that begin alike are read once for: nobody, each key (or address), all.",
    )
    served_name: str | None = Field(
        default=None,
        pattern=r"^[\w./:-]{1,128}$",
        description="The model's name in the API; unset: from `model`.",
    )
    chat_template: str | None = Field(
        default=None, description="Of chats: a file, `dialogpt` or `plain`; unset: the checkpoint's own."
    )

    host: str = Field(default="127.0.0.1", description="Address to listen on.")
    port: int = Field(default=8000, ge=0, le=65535, description="Port to listen on; 0 takes a free one.")
    api_key: SecretStr | None = Field(default=None, description="The key that every request must bring.")
    api_key_file: Path | None = Field(default=None, description="A file with such keys, one a line.")
    insecure_no_auth: bool = Field(
        default=False, description="Listen beyond this machine although there is no key."
    )
    allowed_hosts: Names = Field(
        default=LOOPBACK_HOSTS, description="Accepted `Host` names, with commas between; `*` accepts all."
    )
    allowed_origins: Names = Field(
        default=(), description="Foreign origins whose pages may call (CORS), with commas between."
    )

    max_connections: int = Field(
        default=4096, ge=1, description="Most connections; fewer where the system allows fewer open files."
    )
    max_header_nbytes: int = Field(
        default=32 * 1024, ge=1024, le=2**20, description="Longest headers of a request."
    )
    max_headers: int = Field(default=100, ge=8, le=10_000, description="Most header lines of a request.")
    max_body_nbytes: int = Field(default=256 * 1024, ge=1, description="Largest request body.")
    max_json_depth: int = Field(default=32, ge=1, le=200, description="Deepest nesting of a request's JSON.")
    max_prompts: int = Field(default=64, ge=1, description="Most prompts of one request.")
    max_inputs: int = Field(default=2048, ge=1, description="Most texts of one request for embeddings.")
    max_n: int = Field(default=4, ge=1, le=128, description="Most choices per prompt, `best_of` included.")
    max_stops: int = Field(default=4, ge=0, le=16, description="Most stop strings.")
    max_stop_nbytes: int = Field(
        default=64, ge=1, le=1024, description="Longest stop string, bytes of UTF-8."
    )
    max_logprobs: int = Field(default=5, ge=0, le=20, description="Most alternatives reported per token.")
    max_logit_bias: int = Field(default=300, ge=0, le=1024, description="Most entries of `logit_bias`.")
    max_constraint_nbytes: int = Field(
        default=16 * 1024, ge=1, le=64 * 1024, description="Longest schema, regular expression or grammar."
    )
    max_batch: int = Field(default=32, ge=1, description="Most texts that are generated at once.")
    max_queue: int = Field(default=64, ge=0, description="Most texts that wait for their turn.")
    client_share: float = Field(
        default=0.5,
        gt=0,
        le=1,
        description="Part of all places that one client (address and key) may hold, running and waiting.",
    )
    max_stretch: float = Field(
        default=1.75,
        gt=1,
        le=1000,
        description="How many times longer prompts may make a step for the texts that are written.",
    )
    cache_nbytes: int = Field(
        default=4 * 2**30, ge=1, description="Limit on the KV cache; may lower `max_batch`."
    )
    deadline_s: float = Field(default=120, gt=0, le=86400, description="Longest time for one request.")
    receipt_s: float = Field(
        default=15, gt=0, le=3600, description="Longest time in which a request must arrive."
    )
    stall_s: float = Field(
        default=15, gt=0, le=3600, description="Longest time in which a client may leave its answer unread."
    )
    ping_s: float = Field(
        default=15, gt=0, le=3600, description="How long a stream may be silent until a comment is sent."
    )
    keep_alive_s: float = Field(
        default=5, gt=0, le=3600, description="How long a connection is kept without a request."
    )
    lame_duck_s: float = Field(
        default=0,
        ge=0,
        le=3600,
        description="After SIGTERM, how long requests are still taken while `/readyz` says 503.",
    )
    drain_s: float = Field(default=30, ge=0, le=3600, description="Time for running requests after SIGTERM.")
    playground: bool = Field(default=True, description="Serve the playground page at `/`.")
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        default="info", description="Least level logged."
    )

    @field_validator("allowed_hosts", "allowed_origins", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        if isinstance(value, str):
            return tuple(name.strip() for name in value.split(",") if name.strip())
        return value

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        given = "max_prompts" in self.model_fields_set  # else fewer are taken, without a word
        if given and self.max_prompts > self.max_batch + self.max_queue:
            raise ValueError(
                f"max_prompts {self.max_prompts} is more than max_batch {self.max_batch} and max_queue "
                f"{self.max_queue} together, so the largest request could never run; raise max_queue or "
                "lower max_prompts"
            )
        return self

    @property
    def name(self) -> str:
        """The model's name in the API: of a folder only its last part, which says nothing of the machine."""
        if self.served_name is not None:
            return self.served_name
        return os.path.basename(os.path.abspath(self.model)) if os.path.isdir(self.model) else self.model

    @cached_property
    def api_keys(self) -> tuple[bytes, ...]:
        """The accepted keys; none of them: no key is asked for.

        Raises:
            RequestError: the file cannot be read, holds no key, or a key holds white space or is not ASCII.
        """
        keys = [] if self.api_key is None else [self.api_key.get_secret_value()]
        if self.api_key_file is not None:
            try:
                lines = self.api_key_file.read_text("ascii").splitlines()
            except (OSError, UnicodeDecodeError) as error:
                raise RequestError(f"the API key file {self.api_key_file} cannot be read: {error}") from error
            lines = [line.strip() for line in lines if line.strip()]
            if not lines:
                raise RequestError(f"the API key file {self.api_key_file} holds no key; write one a line")
            keys += lines
        if any(not key.isascii() or not key.isprintable() or " " in key or not key for key in keys):
            raise RequestError("an API key is empty, not ASCII or holds white space; take letters and digits")
        return tuple(key.encode() for key in keys)

    @property
    def host_names(self) -> frozenset[str]:
        """`allowed_hosts`, and the name that the server listens on."""
        own = f"[{self.host}]" if ":" in self.host else self.host
        return frozenset(name.lower() for name in (*self.allowed_hosts, own))

    def check_exposure(self) -> None:
        """Refuse to listen beyond this machine without a key.

        Raises:
            RequestError: others could reach the server without a key, and `insecure_no_auth` is not set; or
                the keys are broken.
        """
        if self.api_keys or self.insecure_no_auth or is_loopback(self.host):
            return
        raise RequestError(
            f"host is {self.host!r}, which others can reach, and there is no API key; give --api-key-file "
            "(or GPT2CORE_API_KEY), or --insecure-no-auth if something else guards the port"
        )


LIBRARY_VARIABLES = frozenset(
    (
        *(
            "AARCH64",
            "CACHE",
            "CC",
            "CFLAGS",
            "DEBUG",
            "MUSL",
            "NATIVE",
            "NO_SKIPS",
            "ONNX_SPINNING",
            "PEERS",
        ),
        *("TORCH_COMPILE", "VENV", "WHEEL"),
    )
)
"""Other variables of this project, which are no settings of the server."""


def find_typos(environment: Mapping[str, str]) -> dict[str, str | None]:
    """Variables that look like settings and are none -> the setting that may be meant."""
    prefix = str(Settings.model_config["env_prefix"])
    known = [prefix + name.upper() for name in Settings.model_fields]
    others = {prefix + name for name in LIBRARY_VARIABLES}
    found: dict[str, str | None] = {}
    for name in environment:
        if name.upper().startswith(prefix) and name.upper() not in others and name.upper() not in known:
            found[name] = next(iter(difflib.get_close_matches(name.upper(), known, n=1)), None)
    return found


def describe_faults(error: ValidationError, given: Mapping[str, str]) -> str:
    """What is wrong with settings, each by the name under which it came.

    Args:
        error: what making `Settings` raised.
        given: the settings that came otherwise than by their variables -> how they are called there.
    """
    faults = []
    for fault in error.errors(include_url=False):
        name = ".".join(map(str, fault["loc"]))
        message = fault["msg"].removeprefix("Value error, ")
        if not name:  # of several together
            faults.append(message)
            continue
        value = "" if name == "api_key" else f" is {fault['input']!r}"
        known = name in Settings.model_fields and name not in given
        name = f"GPT2CORE_{name.upper()}" if known else given.get(name, name)
        faults.append(f"{name}{value}: {message}")
    return "; ".join(faults)


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches `host`."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
