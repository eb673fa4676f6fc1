"""A server as the target of the benchmark: timed from the request to the last byte of its answer.

It is asked in one of two ways: `/generate`, a prompt and a total length, or OpenAI's `/v1/completions`, a
prompt and a number of new tokens.
"""

import json
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple
from urllib.parse import urlsplit

import httpx2

from gpt2core.bench.errors import BenchmarkError, ServerError
from gpt2core.bench.sweep.model_target import TimedGeneration, check_room, measure_with_retries
from gpt2core.bench.sweep.workload import ClassicSettings, Trial
from gpt2core.errors import Gpt2CoreError, RequestError, in_short

MAX_ANSWER_NBYTES: Final = 16 * 2**20
CONNECT_TIMEOUT_S: Final = 10.0
PASSING: Final = (408, 425, 429, 500, 502, 503, 504)
"""Statuses after which the same request may succeed."""

REFUSED: Final = (400, 422, 501)
"""Statuses of a server that does not know a field of the request."""

FORMS: Final = tuple({"stream": s, "exact": e} for s in (True, False) for e in (True, False))


class Address(NamedTuple):
    """A server's URL, taken apart."""

    url: str  # of the endpoint that generates, user and password included where they were given
    shown: str  # the same without them
    models: str | None  # of the list of models; None for `/generate`
    loopback: bool


def parse_url(url: str) -> Address:
    """Find the endpoint that a URL means.

    Raises:
        RequestError: it is no http or https URL.
    """
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError as error:
        raise RequestError(f"the URL cannot be read: {error}; give it as http://127.0.0.1:8000") from error
    if parts.scheme not in ("http", "https") or not host:
        raise RequestError(f"{in_short(parts.path)} is no URL of a server; give it as http://127.0.0.1:8000")
    path, root = parts.path.rstrip("/"), f"{parts.scheme}://{parts.netloc}"
    models = None
    if path.endswith(("/v1", "/v1/completions")):
        path = path.removesuffix("/completions")
        models, path = f"{root}{path}/models", f"{path}/completions"
    elif not path.endswith("/generate"):
        path += "/generate"
    shown = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{path}"
    loopback = host in ("localhost", "::1") or host.startswith("127.")
    return Address(f"{root}{path}", shown, models, loopback)


class ServerTarget:
    """A running server.

    Before anything is measured, each prompt is sent once: this tells whether the server answers, which fields
    it knows (the best of `FORMS` that it accepts is used throughout), and how many tokens the prompt has for
    it.

    Raises:
        RequestError: the URL is no URL, or a length leaves a prompt no new token.
        BenchmarkError: the server does not answer, or refuses.
    """

    def __init__(self, settings: ClassicSettings) -> None:
        assert settings.url is not None
        self._settings = settings
        self._address = address = parse_url(settings.url)
        self._openai = address.models is not None
        self._name = f"the server at {address.shown}"
        headers = {"authorization": f"Bearer {settings.api_key}"} if settings.api_key else {}
        limits_s = httpx2.Timeout(settings.timeout_s, connect=min(CONNECT_TIMEOUT_S, settings.timeout_s))
        # A proxy of the environment would not find this machine's own servers.
        self._client = httpx2.Client(timeout=limits_s, headers=headers, trust_env=not address.loopback)
        try:
            self._model = settings.model or (self._first_model(address.models) if address.models else None)
            self._form, facts = self._choose_form()
            self._model, self._backend = self._model or facts.get("model"), facts.get("backend")
            self._prompt_tokens = [self._count_tokens(prompt) for prompt in settings.prompts]
            known = [tokens for tokens in self._prompt_tokens if tokens is not None]
            if len(known) == len(settings.prompts):
                check_room(known, settings.lengths)
        except BaseException:
            self._client.close()
            raise

    def describe(self) -> dict[str, Any]:
        """What is measured; `exact_length` tells whether the server knows a least number of new tokens."""
        return {
            "model": self._model,
            "model_id": None,
            "backend": self._backend,
            "precision": None,
            "url": self._address.shown,
            "exact_length": self._form["exact"] and None not in self._prompt_tokens,
            "streamed": self._form["stream"],
        }

    def measure(self, trial: Trial) -> TimedGeneration:
        """Generate once."""
        tokens, settings = self._prompt_tokens[trial.prompt_index], self._settings
        form = self._form | {"exact": self._form["exact"] and tokens is not None}
        prompt, seed = settings.prompts[trial.prompt_index], settings.seed_of(trial.run)
        return self._ask(prompt, trial.length, tokens, seed, **form).measurement(tokens)

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def _choose_form(self) -> tuple[dict[str, bool], dict[str, Any]]:
        refusal = ""
        for form in FORMS:
            try:
                facts = self._probe(self._settings.prompts[0], form)
            except _Refused as error:
                refusal = refusal or str(error)
                continue
            if "prompt_tokens" in facts or not self._openai:
                return form, facts
            refusal = "it does not tell usage.prompt_tokens, without which no total length can be asked for"
        raise BenchmarkError(f"{self._name} cannot be measured: {refusal}")

    def _count_tokens(self, prompt: str) -> int | None:
        try:
            return self._probe(prompt, self._form).get("prompt_tokens")
        except _Refused as error:
            raise BenchmarkError(f"{self._name} refuses prompt {in_short(prompt)}: {error}") from error

    def _probe(self, prompt: str, form: dict[str, bool]) -> dict[str, Any]:
        """The facts of a short answer."""
        facts: dict[str, Any] = {}

        def ask() -> TimedGeneration:
            heard = self._ask(prompt, min(self._settings.lengths), None, self._settings.seed, **form)
            facts.update(heard.facts)
            return heard.measurement(None)

        result, _ = measure_with_retries(self._settings, ask)
        if isinstance(result, Exception):
            raise result if isinstance(result, _Refused) else self._explain(result) from result
        return facts

    def _first_model(self, url: str) -> str:
        deadline_s = time.perf_counter() + self._settings.timeout_s
        try:
            with self._answer("GET", url) as response:
                return str(_parse(self._read(response, deadline_s))["data"][0]["id"])
        except (KeyError, IndexError, TypeError) as error:
            raise BenchmarkError(f"{url} lists no model; name one with --model") from error
        except (Gpt2CoreError, httpx2.HTTPError) as error:
            raise self._explain(error) from error

    def _explain(self, error: Exception) -> BenchmarkError:
        said = str(error) if isinstance(error, Gpt2CoreError) else f"{type(error).__name__}: {error}"
        if isinstance(error, httpx2.ConnectError | httpx2.ConnectTimeout):
            remedy = "start it with `gpt2core serve`, or correct --url"
            return BenchmarkError(f"no server answers at {self._address.shown}: {said}; {remedy}")
        return BenchmarkError(f"{self._name} cannot be measured: {said}")

    def _ask(
        self, prompt: str, length: int, prompt_tokens: int | None, seed: int, *, stream: bool, exact: bool
    ) -> "_Answer":
        """Ask for `length` tokens in all, without `prompt_tokens` for few; and note what comes when."""
        new_tokens = 1 if prompt_tokens is None else length - prompt_tokens
        body = {"prompt": prompt, "temperature": self._settings.temperature, "seed": seed}
        body |= {"stream": True} if stream else {}
        if self._openai:  # `min_tokens` is no field of OpenAI's; several engines have it
            body |= {"model": self._model, "max_tokens": new_tokens}
            body |= {"min_tokens": new_tokens} if exact else {}
            body |= {"stream_options": {"include_usage": True}} if stream else {}
        else:
            body |= {"max_length": length} | ({"min_new_tokens": new_tokens} if exact else {})
        heard = _Answer(self._openai, time.perf_counter())
        deadline_s = heard.start_s + self._settings.timeout_s
        with self._answer("POST", self._address.url, json=body) as response:
            streamed = response.headers.get("content-type", "").startswith("text/event-stream")
            if not streamed:
                heard.add(_parse(self._read(response, deadline_s)), streamed=False)
            for event in httpx2.EventSource(response) if streamed else ():
                self._check_time(deadline_s)
                if event.data == "[DONE]":
                    heard.done = True
                else:
                    heard.add(_parse(event.data.encode()), streamed=True)
        heard.end()
        return heard

    @contextmanager
    def _answer(self, method: str, url: str, **request: Any) -> Iterator[httpx2.Response]:
        with self._client.stream(method, url, **request) as response:
            if response.status_code != 200:
                deadline_s = time.perf_counter() + self._settings.timeout_s
                raise _explain_status(response, self._read(response, deadline_s))
            yield response

    def _read(self, response: httpx2.Response, deadline_s: float) -> bytes:
        data = b""
        for chunk in response.iter_bytes():
            data += chunk
            self._check_time(deadline_s)
            if len(data) > MAX_ANSWER_NBYTES:
                raise ServerError(f"the answer has more than {MAX_ANSWER_NBYTES} bytes", again=False)
        return data

    def _check_time(self, deadline_s: float) -> None:
        """The client's own limit is on the wait for the next bytes; this one is on the whole."""
        if time.perf_counter() > deadline_s:
            raise TimeoutError(f"the answer was not complete after {self._settings.timeout_s:g} s")


class _Refused(ServerError):
    """The server does not know a field of the request, or finds a value wrong."""


@dataclass(slots=True)
class _Answer:
    """What has come of an answer, and when."""

    openai: bool
    start_s: float
    text: str = ""
    facts: dict[str, Any] = field(default_factory=dict)  # finish_reason, token counts, model, backend
    tokens_s: list[float] = field(default_factory=list)  # of events with a token, as far as one can tell
    ends_s: list[float] = field(default_factory=list)  # of others, which may carry a token without any text
    done: bool = False
    elapsed_s: float = 0.0

    def add(self, document: dict[str, Any], *, streamed: bool) -> None:
        """Take in all of an answer, or one event of a stream."""
        now_s = time.perf_counter() - self.start_s
        if error := document.get("error"):
            raise ServerError(f"the server reports: {_message_of(error):.200}", again=True)
        whole = not self.openai and ("generations" in document or "generated_text" in document)
        try:
            if self.openai:  # the usage of a stream comes in an event without choices
                choice = document["choices"][0] if document["choices"] else {}
                found = document | choice | (document.get("usage") or {})
                text = choice.get("text") or ""
            else:
                found = document | (document.get("generations") or [{}])[0]
                text = found.get("text", found.get("generated_text", ""))
        except (KeyError, TypeError, IndexError, AttributeError) as error:
            raise ServerError("the answer has another form than its endpoint promises", again=True) from error
        if not isinstance(text, str):
            raise ServerError("the answer's text is no text", again=True)
        names = ("finish_reason", "prompt_tokens", "completion_tokens", "model", "backend")
        facts = {name: found[name] for name in names if found.get(name) is not None}
        for name, value in facts.items():
            if name.endswith("tokens") and (type(value) is not int or value < 0):
                raise ServerError(f"the answer's {name} is {in_short(value)}", again=True)
        if streamed and not whole:
            has_token = bool(text) or not facts.keys() & {"finish_reason", "prompt_tokens"}
            (self.tokens_s if has_token else self.ends_s).append(now_s)
        self.text = text if not streamed or (whole and text) else self.text + text
        self.facts |= facts
        self.done = self.done or not streamed

    def end(self) -> None:
        self.elapsed_s = time.perf_counter() - self.start_s
        if not self.done and "finish_reason" not in self.facts:
            raise ServerError("the stream ended before the text did", again=True)

    def measurement(self, prompt_tokens: int | None) -> TimedGeneration:
        """Times per token only where there is exactly one event for each: a server may send several."""
        count = self.facts.get("completion_tokens")
        series = (self.tokens_s, self.tokens_s + self.ends_s[:1])
        return TimedGeneration(
            elapsed_s=self.elapsed_s,
            ttft_s=self.tokens_s[0] if self.tokens_s else None,
            token_times_s=next((times for times in series if len(times) == count), []),
            prompt_tokens=self.facts.get("prompt_tokens", prompt_tokens),
            completion_tokens=count,
            finish_reason=self.facts.get("finish_reason"),
            text=self.text,
        )


def _parse(data: bytes) -> dict[str, Any]:
    try:
        document = json.loads(data.decode())
    except (ValueError, RecursionError):
        document = None
    if not isinstance(document, dict):
        raise ServerError(f"the answer is no JSON object: {data[:40]!r}", again=True)
    return document


def _message_of(error: Any) -> str:
    return str(error.get("message", error) if isinstance(error, dict) else error)


def _explain_status(response: httpx2.Response, data: bytes) -> ServerError:
    try:
        detail = _message_of(_parse(data)["error"])
    except (ServerError, KeyError):
        detail = data[:200].decode(errors="replace")
    message = f"status {response.status_code} {response.reason_phrase}: {detail:.200}".rstrip(": ")
    if response.status_code in REFUSED:
        return _Refused(message, again=False)
    try:
        asked_s = float(response.headers.get("retry-after", ""))
    except ValueError:  # none, or a date
        asked_s = math.nan
    wait_s = asked_s if 0 <= asked_s < math.inf else None
    return ServerError(message, again=response.status_code in PASSING, retry_after_s=wait_s)
