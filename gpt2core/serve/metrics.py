"""Prometheus metrics, in a registry of each app's own; labels are route templates and statuses only."""

from collections.abc import Callable, Iterable, Sequence
from typing import Final, NamedTuple

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    Info,
    ProcessCollector,
    generate_latest,
)

from gpt2core import Request

SECONDS: Final = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
TOKEN_SECONDS: Final = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)
LAG_SECONDS: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.2, 0.5, 1)
ROWS: Final = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128)


GAP_SECONDS: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1, 2.5)


class RouteMetrics(NamedTuple):
    """What is measured of the texts that one route is asked for."""

    queue_s: Histogram
    ttft_s: Histogram
    gap_s: Histogram
    token_s: Histogram


class Metrics:
    """What the server counts."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        labels = ("method", "route", "status")
        # Exposed as gpt2core_requests_total.
        self._requests = Counter("gpt2core_requests", "Requests answered.", labels, registry=self.registry)
        self._request_s = self._histogram(
            "gpt2core_request_seconds",
            "Time from a request's first byte to its answer's last.",
            SECONDS,
            ("route",),
        )
        self._rows = self._histogram("gpt2core_batch_rows", "Texts that advanced in one engine step.", ROWS)
        self._queue_s = self._histogram(
            "gpt2core_queue_seconds", "From a request's arrival to its first slot.", SECONDS, ("route",)
        )
        self._ttft_s = self._histogram(
            "gpt2core_time_to_first_token_seconds",
            "From a request's arrival to its first token.",
            SECONDS,
            ("route",),
        )
        self._gap_s = self._histogram(
            "gpt2core_inter_token_seconds",
            "Between one token of a text and its next.",
            GAP_SECONDS,
            ("route",),
        )
        self._token_s = self._histogram(
            "gpt2core_time_per_token_seconds",
            "Of one text, between tokens after the first, on average.",
            TOKEN_SECONDS,
            ("route",),
        )
        self._lag_s = self._histogram(
            "gpt2core_event_loop_lag_seconds", "How late the event loop woke up.", LAG_SECONDS
        )
        self._prompt = Counter("gpt2core_prompt_tokens", "Prompt tokens.", registry=self.registry)
        self._generated = Counter("gpt2core_generated_tokens", "Tokens generated.", registry=self.registry)
        self._hits = Counter(
            "gpt2core_prefix_cache_hits",
            "Texts whose prompt was not read from its beginning.",
            registry=self.registry,
        )
        self._saved = Counter(
            "gpt2core_prefix_cache_saved_tokens",
            "Prompt tokens that were not read.",
            registry=self.registry,
        )
        # Exposed as gpt2core_server_info.
        self._server = Info("gpt2core_server", "What answers.", registry=self.registry)
        self._of_route: dict[str, RouteMetrics] = {}
        self._counted: dict[tuple[str, str, int], tuple[Counter, Histogram]] = {}
        ProcessCollector(registry=self.registry)

    def of_route(self, route: str) -> RouteMetrics:
        """What is measured of the texts of one route."""
        if route not in self._of_route:
            histograms = (self._queue_s, self._ttft_s, self._gap_s, self._token_s)
            self._of_route[route] = RouteMetrics(*(histogram.labels(route) for histogram in histograms))
        return self._of_route[route]

    def describe_server(self, **labels: str) -> None:
        """Say what answers: model, backend, precision, version."""
        self._server.info(labels)

    def _histogram(
        self, name: str, text: str, buckets: Iterable[float], labels: Sequence[str] = ()
    ) -> Histogram:
        return Histogram(name, text, labels, buckets=tuple(buckets), registry=self.registry)

    def gauge(self, name: str, text: str, read: Callable[[], float]) -> None:
        """Add a gauge that is read when somebody asks."""
        Gauge(name, text, registry=self.registry).set_function(read)

    def count_request(self, method: str, route: str, status: int, elapsed_s: float) -> None:
        """Count a request that was answered."""
        counted = self._counted.get((method, route, status))
        if counted is None:  # prometheus_client's own look-up takes as long as a refusal
            counted = self._requests.labels(method, route, str(status)), self._request_s.labels(route)
            self._counted[method, route, status] = counted
        counted[0].inc()
        counted[1].observe(elapsed_s)

    def count_step(self, rows: int, tokens: int) -> None:
        """Count a step of the engine."""
        self._rows.observe(rows)
        self._generated.inc(tokens)

    def count_prompt(self, tokens: int) -> None:
        """Count the tokens of a text that was read and not continued."""
        self._prompt.inc(tokens)

    def count_text(self, request: Request, route: str) -> None:
        """Count a text that is complete."""
        self._prompt.inc(request.read_prompt_tokens)
        if request.reused:
            self._hits.inc()
            self._saved.inc(request.reused)
        later = len(request.token_ids) - request.prompt_tokens - 1
        if later > 0 and request.first_token_s is not None and request.last_token_s is not None:
            self.of_route(route).token_s.observe((request.last_token_s - request.first_token_s) / later)

    def observe_lag(self, lag_s: float) -> None:
        """Note how late the event loop woke up."""
        self._lag_s.observe(lag_s)

    def text(self) -> bytes:
        """All of them, in Prometheus' text format."""
        return generate_latest(self.registry)
