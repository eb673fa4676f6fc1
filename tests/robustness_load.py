"""Long forms: throughput, latency and fairness under load."""

import argparse
import asyncio
import json
import time
from collections import Counter

from load_client import Answer, ask, ask_all, percentile, request
from robustness_report import get, lag_p99_s, must, port_of, report
from serving import process

from gpt2core import GPT2


def load(args: argparse.Namespace, small: str) -> None:
    """32 streaming clients against the library in one process, and against one client at a time."""
    prompts = [f"Client {i} asks for a story about number {i * i}." for i in range(32)]
    options = {"max_new_tokens": args.tokens, "temperature": 0.8}
    with GPT2.from_pretrained(small, backend=args.backend, threads=args.threads) as model:
        model.generate(prompts, max_new_tokens=2)
        rates = []
        for _ in range(args.rounds):
            begun_s = time.perf_counter()
            done = model.generate(prompts, **options, seed=1)
            rates.append(sum(len(one.token_ids) for one in done) / (time.perf_counter() - begun_s))
    inside = max(rates)
    report("load", what="in-process, batch of 32", tokens_per_s=inside, rounds=rates)
    with process("--model", small, "--backend", args.backend, "--threads", str(args.threads)) as (_, url):
        bodies = [request("/generate", {"prompt": p, **options, "seed": 1, "stream": True}) for p in prompts]
        ask_all(port_of(url), bodies[:2], clients=2)
        rates = []
        before = get(f"{url}/metrics")
        for _ in range(args.rounds):
            begun_s = time.perf_counter()
            answers = ask_all(port_of(url), bodies, clients=32)
            rates.append(tokens_of(answers) / (time.perf_counter() - begun_s))
        lag_s = lag_p99_s(before, get(f"{url}/metrics"))
        outside = max(rates)
        begun_s = time.perf_counter()
        alone = tokens_of(ask_all(port_of(url), bodies[:4], clients=1)) / (time.perf_counter() - begun_s)
        report(
            "load",
            what="32 streaming clients",
            tokens_per_s=outside,
            rounds=rates,
            of_in_process=outside / inside,
            one_client_tokens_per_s=alone,
            times_one_client=outside / alone,
            lag_p99_s=lag_s,
            ttft_p50_s=percentile([a.ttft_s for a in answers], 0.5),
        )
        must("load", "at least 0.9 of the in-process throughput", outside >= 0.9 * inside)
        must("load", "at least 3 times one client's", outside >= 3 * alone)
        must("load", "event loop lag p99 of at most 50 ms", lag_s <= 0.05)


def tokens_of(answers: list[Answer]) -> int:
    """Of streams: their events, without the summary and the end."""
    assert all(a.status == 200 and a.clean for a in answers), Counter((a.status, a.clean) for a in answers)
    return sum(a.events - 2 for a in answers)


def clients(args: argparse.Namespace, tiny: str) -> None:
    """1, 8, 32 and 128 clients: every request is answered, or refused at once."""
    with process("--model", tiny) as (_, url):
        for count in (1, 8, 32, 128):
            bodies = [
                request("/generate", {"prompt": f"{i}", "max_new_tokens": 64}) for i in range(count * 8)
            ]
            answers = ask_all(port_of(url), bodies, clients=count)
            statuses = Counter(a.status for a in answers)
            refused_s = [a.elapsed_s for a in answers if a.status == 429]
            report(
                "clients",
                clients=count,
                statuses=dict(statuses),
                p50_s=percentile([a.elapsed_s for a in answers if a.status == 200], 0.5),
                p95_s=percentile([a.elapsed_s for a in answers if a.status == 200], 0.95),
                refused_max_s=max(refused_s, default=None),
            )
            must("clients", f"{count}: only 200 and 429", set(statuses) <= {200, 429})
            must("clients", f"{count}: 429 within 250 ms", max(refused_s, default=0) <= 0.25)


def overhead(args: argparse.Namespace, tiny: str) -> None:
    """What the server adds to one greedy token, on a connection that is kept."""
    from http.client import HTTPConnection

    with GPT2.from_pretrained(tiny) as model:
        inside = []
        for _ in range(500):
            begun_s = time.perf_counter()
            model.generate("ab", max_new_tokens=1)
            inside.append(time.perf_counter() - begun_s)
    with process("--model", tiny) as (_, url):
        connection = HTTPConnection("127.0.0.1", port_of(url))
        body = json.dumps({"prompt": "ab", "max_new_tokens": 1})
        outside = []
        for _ in range(500):
            begun_s = time.perf_counter()
            connection.request("POST", "/generate", body, {"Content-Type": "application/json"})
            assert connection.getresponse().read()
            outside.append(time.perf_counter() - begun_s)
        connection.close()
    added_s = percentile(outside, 0.5) - percentile(inside, 0.5)
    report(
        "overhead",
        in_process_p50_s=percentile(inside, 0.5),
        server_p50_s=percentile(outside, 0.5),
        added_p50_s=added_s,
        server_p95_s=percentile(outside, 0.95),
    )
    must("overhead", "at most 5 ms at the median", added_s <= 0.005)


def fairness(args: argparse.Namespace, small: str) -> None:
    """Short requests alone, and beside one of 1000 tokens."""
    with process(
        "--model", small, "--backend", args.backend, "--threads", str(args.threads), GPT2CORE_DEADLINE_S="600"
    ) as (_, url):
        port = port_of(url)
        short = [request("/generate", {"prompt": f"Short {i}", "max_new_tokens": 8}) for i in range(20)]
        long = request("/generate", {"prompt": "Long", "max_new_tokens": 1000, "stream": True})
        ask_all(port, short, clients=1)  # what is slow the first time is slow
        alone = [a.elapsed_s for a in ask_all(port, short, clients=1)]

        async def beside() -> tuple[list[float], bool]:
            job = asyncio.create_task(ask(port, long))
            await asyncio.sleep(1)
            elapsed_s = [(await ask(port, data)).elapsed_s for data in short]
            ended = job.done()
            job.cancel()
            return elapsed_s, ended

        shared, ended = asyncio.run(beside())
        p95, p95_alone = percentile(shared, 0.95), percentile(alone, 0.95)
        report("fairness", alone_p95_s=p95_alone, beside_p95_s=p95, ratio=p95 / p95_alone, long_ended=ended)
        must("fairness", "p95 of at most 5 times that alone", p95 <= 5 * p95_alone)
        must("fairness", "the long request was still running", not ended)
