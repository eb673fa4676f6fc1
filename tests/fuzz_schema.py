"""schemathesis against a running server: cases that its own description allows, and such that it forbids."""

import warnings
from collections import Counter
from typing import Any

import hypothesis
import schemathesis
from hypothesis import HealthCheck, Phase
from schemathesis.checks import not_a_server_error
from schemathesis.generation import GenerationMode
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]


def fuzz_schema(url: str, count: int, *, seed: int = 1) -> Counter[int]:
    """About `count` cases, most of them for the routes that take a body; what was answered.

    Raises:
        Exception: schemathesis' failure, when an answer is a server error or not as described.
    """
    schema = schemathesis.openapi.from_url(f"{url}/openapi.json")
    statuses: Counter[int] = Counter()
    operations = [found.ok() for found in schema.get_all_operations()]
    bodies = [one for one in operations if one.method == "post"]
    for operation in operations:
        share = count // (2 * len(bodies)) if operation in bodies else 10
        for mode in GenerationMode:
            _run(operation, mode, share, seed, statuses)
    return statuses


def _run(operation: Any, mode: GenerationMode, count: int, seed: int, statuses: Counter[int]) -> None:
    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=count,
        database=None,
        deadline=None,
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @hypothesis.given(case=operation.as_strategy(generation_mode=mode))
    def check(case: Any) -> None:
        response = case.call()
        statuses[response.status_code] += 1
        case.validate_response(response, checks=CHECKS)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            check()
        except hypothesis.errors.Unsatisfiable:  # nothing about a route without parameters can be wrong
            assert mode is GenerationMode.NEGATIVE, operation.label
