"""A server as the target of the benchmark: timed from the request to the last byte of its answer."""

import json
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final

import httpx2

from gpt2core.bench.errors import BenchmarkError, ServerError
from gpt2core.bench.sweep.model_target import TimedGeneration, check_room
from gpt2core.bench.sweep.retries import measure_with_retries
from gpt2core.bench.sweep.server_apis import Api, Completions, Generate, Part, parse_url
from gpt2core.bench.sweep.workload import ClassicSettings, Trial
from gpt2core.errors import Gpt2CoreError

MAX_ANSWER_NBYTES: Final = 16 * 2**20
CONNECT_TIMEOUT_S: Final = 10.0
PASSING: Final = (408, 425, 429, 500, 502, 503, 504)
"""Statuses after which the same request may succeed."""

REFUSED: Final = (400, 422, 501)
"""Statuses of a server that does not know a field of the request."""

FORMS: Final = tuple(
    {"stream": stream, "exact": exact} for stream in (True, False) for exact in (True, False)
)


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
        address = parse_url(settings.url)
        self._shown = address.shown
        headers = {"authorization": f"Bearer {settings.api_key}"} if settings.api_key else {}
        limits_s = httpx2.Timeout(settings.timeout_s, connect=min(CONNECT_TIMEOUT_S, settings.timeout_s))
        # A proxy of the environment would not find this machine's own servers.
        self._client = httpx2.Client(timeout=limits_s, headers=headers, trust_env=not address.loopback)
        try:
            self._model = settings.model
            self._api: Api = Generate(address.url)
            if address.models is not None:
                self._model = self._model or self._first_model(address.models)
                self._api = Completions(address.url, self._model)
            self._form, heard = self._probe_form()
            self._model, self._backend = self._model or heard.model, heard.backend
            self._prompt_tokens = [self._probe(prompt, **self._form) for prompt in settings.prompts]
            if all(tokens is not None for tokens in self._prompt_tokens):
                check_room([tokens for tokens in self._prompt_tokens if tokens is not None], settings.lengths)
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
            "url": self._shown,
            "exact_length": self._form["exact"] and None not in self._prompt_tokens,
            "streamed": self._form["stream"],
        }

    def measure(self, trial: Trial) -> TimedGeneration:
        """Generate once."""
        prompt_tokens = self._prompt_tokens[trial.prompt_index]
        body = self._api.body(
            self._settings.prompts[trial.prompt_index],
            trial.length,
            prompt_tokens,
            exact=self._form["exact"] and prompt_tokens is not None,
        )
        heard = self._ask(body, self._settings.seed_of(trial.run), stream=self._form["stream"])
        return heard.measurement(prompt_tokens)

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def _probe_form(self) -> tuple[dict[str, bool], "_Heard"]:
        prompt, refusal = self._settings.prompts[0], ""
        for form in FORMS:
            try:
                heard = self._probed(prompt, **form)
            except _Refused as error:
                refusal = refusal or str(error)
                continue
            if heard.prompt_tokens is not None or not self._api.needs_prompt_tokens:
                return form, heard
            refusal = "it does not tell usage.prompt_tokens, without which no total length can be asked for"
        raise BenchmarkError(f"the server at {self._shown} cannot be measured: {refusal}")

    def _probe(self, prompt: str, *, stream: bool, exact: bool) -> int | None:
        try:
            return self._probed(prompt, stream=stream, exact=exact).prompt_tokens
        except _Refused as error:
            raise BenchmarkError(
                f"the server at {self._shown} refuses prompt {prompt!r:.40}: {error}"
            ) from error

    def _probed(self, prompt: str, *, stream: bool, exact: bool) -> "_Heard":
        body = self._api.body(prompt, min(self._settings.lengths), None, exact=exact)
        heard: list[_Heard] = []

        def ask() -> TimedGeneration:
            heard.append(self._ask(body, self._settings.seed, stream=stream))
            return heard[0].measurement(None)

        result, _ = measure_with_retries(self._settings, ask)
        if isinstance(result, _Refused):
            raise result
        if isinstance(result, Exception):
            raise self._explained(result) from result
        return heard[0]

    def _first_model(self, url: str) -> str:
        try:
            with self._answer("GET", url) as response:
                return str(_parsed(self._read(response, self._deadline()))["data"][0]["id"])
        except (KeyError, IndexError, TypeError) as error:
            raise BenchmarkError(f"{url} lists no model; name one with --model") from error
        except (Gpt2CoreError, httpx2.HTTPError) as error:
            raise self._explained(error) from error

    def _explained(self, error: Exception) -> BenchmarkError:
        if isinstance(error, httpx2.ConnectError | httpx2.ConnectTimeout):
            return BenchmarkError(
                f"no server answers at {self._shown}: {error or type(error).__name__}; start it with "
                "`gpt2core serve`, or correct --url"
            )
        return BenchmarkError(f"the server at {self._shown} cannot be measured: {_shown(error)}")

    def _deadline(self) -> float:
        return time.perf_counter() + self._settings.timeout_s

    def _ask(self, body: dict[str, Any], seed: int, *, stream: bool) -> "_Heard":
        body = body | {"temperature": self._settings.temperature, "seed": seed}
        if stream:
            body |= {"stream": True}
            if isinstance(self._api, Completions):
                body |= {"stream_options": {"include_usage": True}}
        heard = _Heard(start_s=time.perf_counter())
        deadline_s = heard.start_s + self._settings.timeout_s
        with self._answer("POST", self._api.url, json=body) as response:
            streamed = response.headers.get("content-type", "").startswith("text/event-stream")
            if not streamed:
                heard.add(self._understood(_parsed(self._read(response, deadline_s))), streamed=False)
            for event in httpx2.EventSource(response) if streamed else ():
                self._check_time(deadline_s)
                if event.data == "[DONE]":
                    heard.done = True
                else:
                    heard.add(self._understood(_parsed(event.data.encode())), streamed=True)
        heard.end()
        return heard

    @contextmanager
    def _answer(self, method: str, url: str, **request: Any) -> Iterator[httpx2.Response]:
        with self._client.stream(method, url, **request) as response:
            if response.status_code != 200:
                raise _failure(response, self._read(response, self._deadline()))
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

    def _understood(self, document: Mapping[str, Any]) -> Part:
        if error := document.get("error"):
            message = error.get("message") if isinstance(error, dict) else error
            raise ServerError(f"the server reports: {message!s:.200}", again=True)
        try:
            return self._api.read(document)
        except (KeyError, TypeError, IndexError, AttributeError) as error:
            raise ServerError(
                f"the answer has another form than {self._shown} promises", again=True
            ) from error


class _Refused(ServerError):
    """The server does not know a field of the request, or finds a value wrong."""


@dataclass(slots=True)
class _Heard:
    """What has come of an answer, and when."""

    start_s: float
    text: str = ""
    tokens_s: list[float] = field(
        default_factory=list
    )  # when events with a token came, as far as one can tell
    ends_s: list[float] = field(default_factory=list)  # of others, which may carry a token without any text
    finish_reason: str | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    model: str | None = None
    backend: str | None = None
    done: bool = False
    elapsed_s: float = 0.0

    def add(self, part: Part, *, streamed: bool) -> None:
        now_s = time.perf_counter() - self.start_s
        if streamed and not part.whole:
            has_token = bool(part.text) or (part.finish_reason is None and part.prompt_tokens is None)
            (self.tokens_s if has_token else self.ends_s).append(now_s)
        if not streamed or (part.whole and part.text):
            self.text = part.text
        else:
            self.text += part.text
        self.finish_reason = part.finish_reason or self.finish_reason
        for name in ("prompt_tokens", "completion_tokens"):
            value = getattr(part, name)
            if value is not None:
                if not isinstance(value, int) or isinstance(value, bool) or value < 0:
                    raise ServerError(f"the answer's {name} is {value!r:.40}", again=True)
                setattr(self, name, value)
        self.model, self.backend = part.model or self.model, part.backend or self.backend
        self.done = self.done or not streamed

    def end(self) -> None:
        self.elapsed_s = time.perf_counter() - self.start_s
        if not self.done and self.finish_reason is None:
            raise ServerError("the stream ended before the text did", again=True)

    def measurement(self, prompt_tokens: int | None) -> TimedGeneration:
        """Times per token only where there is exactly one event for each: a server may send several."""
        times_s: list[float] = []
        for times in (self.tokens_s, self.tokens_s + self.ends_s[:1]):
            if len(times) == self.completion_tokens:
                times_s = times
                break
        return TimedGeneration(
            elapsed_s=self.elapsed_s,
            ttft_s=self.tokens_s[0] if self.tokens_s else None,
            token_times_s=tuple(times_s),
            prompt_tokens=self.prompt_tokens if self.prompt_tokens is not None else prompt_tokens,
            completion_tokens=self.completion_tokens,
            finish_reason=self.finish_reason,
            text=self.text,
        )


def _parsed(data: bytes) -> dict[str, Any]:
    try:
        document = json.loads(data.decode())
    except (ValueError, RecursionError):
        document = None
    if not isinstance(document, dict):
        raise ServerError(f"the answer is no JSON object: {data[:40]!r}", again=True)
    return document


def _failure(response: httpx2.Response, data: bytes) -> ServerError:
    try:
        error = _parsed(data)["error"]
        detail = error["message"] if isinstance(error, dict) else error
    except (ServerError, KeyError):
        detail = data[:200].decode(errors="replace")
    message = f"status {response.status_code} {response.reason_phrase}: {detail!s:.200}".rstrip(": ")
    if response.status_code in REFUSED:
        return _Refused(message, again=False)
    try:
        asked_s: float | None = float(response.headers.get("retry-after", ""))
    except ValueError:  # none, or a date
        asked_s = None
    if asked_s is not None and not (math.isfinite(asked_s) and asked_s >= 0):
        asked_s = None
    return ServerError(message, again=response.status_code in PASSING, retry_after_s=asked_s)


def _shown(error: Exception) -> str:
    return str(error) if isinstance(error, Gpt2CoreError) else f"{type(error).__name__}: {error}"
