"""What the server counts and by when a request must end, as numbers."""

import asyncio
import re
import time

from engines import make_engine, run

from gpt2core.sampling.params import SamplingParams
from gpt2core.serve.metrics import Metrics
from gpt2core.serve.ticket import Ticket


def value(metrics: Metrics, name: str) -> float:
    found = re.search(rf"^{re.escape(name)} (\S+)$", metrics.text().decode(), re.MULTILINE)
    assert found, name
    return float(found[1])


def test_a_step_counts_its_rows_and_its_tokens_each_by_itself():
    metrics = Metrics()
    metrics.count_step(rows=2, tokens=7)
    metrics.count_step(rows=1, tokens=1)
    assert value(metrics, "gpt2core_batch_rows_sum") == 3
    assert value(metrics, "gpt2core_batch_rows_count") == 2
    assert value(metrics, "gpt2core_generated_tokens_total") == 8


def test_the_time_per_token_is_that_of_the_tokens_after_the_first():
    engine = make_engine()
    [request] = engine.submit([1, 2, 3], SamplingParams(max_new_tokens=5))
    run(engine)
    request.first_token_s, request.last_token_s = 10.0, 18.0
    metrics = Metrics()
    metrics.count_text(request, "/generate")
    assert value(metrics, 'gpt2core_time_per_token_seconds_sum{route="/generate"}') == 2.0
    assert value(metrics, "gpt2core_prompt_tokens_total") == 3


def test_a_deadline_counts_from_the_requests_first_byte():
    async def left_s(begun_s: float) -> float:
        ticket = Ticket(1, begun_s=begun_s, deadline_s=10, release=lambda ticket: None)
        ticket.close()
        return ticket.deadline - asyncio.get_running_loop().time()

    assert asyncio.run(left_s(time.perf_counter() - 4)) <= 6
    assert asyncio.run(left_s(time.perf_counter() - 11)) <= -1
