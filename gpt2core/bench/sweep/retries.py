"""Trying again what may succeed later, with growing waits."""

import time
from collections.abc import Callable
from typing import Final

from gpt2core.bench.errors import ServerError
from gpt2core.bench.sweep.model_target import TimedGeneration
from gpt2core.bench.sweep.workload import ClassicSettings
from gpt2core.errors import RequestError

MAX_WAIT_S: Final = 30.0


def measure_with_retries(
    settings: ClassicSettings, measure: Callable[[], TimedGeneration]
) -> tuple[TimedGeneration | Exception, int]:
    """Measure until it succeeds, or fails for good or too often; also how many attempts it took."""
    tries, wait_s = 0, settings.backoff_s
    while True:
        tries += 1
        try:
            return measure(), tries
        except Exception as error:  # whatever a framework or a network raises is this cell's result
            if tries > settings.retries or not _may_succeed_later(error):
                return error, tries
            asked_s = error.retry_after_s if isinstance(error, ServerError) else None
        time.sleep(min(wait_s if asked_s is None else asked_s, MAX_WAIT_S))
        wait_s *= 2


def _may_succeed_later(error: Exception) -> bool:
    return error.again if isinstance(error, ServerError) else not isinstance(error, RequestError)
