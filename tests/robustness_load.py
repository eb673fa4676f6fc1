"""Long forms: throughput, latency and fairness under load."""

import argparse
import asyncio
import json
import re
import time
from collections import Counter

from load_client import Answer, ask, ask_all, insist, percentile, request
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


def refusals(args: argparse.Namespace, tiny: str) -> None:
    """What those that are refused and ask again cost the others: 96 clients and 256, in interleaved pairs."""
    body = {"prompt": "Once upon a time", "max_new_tokens": 64, "temperature": 0.8}
    data = request("/generate", body, keep=True)
    environment = {"GPT2CORE_CLIENT_SHARE": "1", "GPT2CORE_DEADLINE_S": "600"}
    with process("--model", "demo", "--threads", "1", **environment) as (_, url):

        def generate(count: int) -> tuple[float, dict[int, list[float]]]:
            time.sleep(1)  # those of the round before are gone
            before, begun_s = generated(get(f"{url}/metrics")), time.perf_counter()
            answers = insist(port_of(url), data, clients=count, seconds=args.seconds)
            tokens, elapsed_s = generated(get(f"{url}/metrics")) - before, time.perf_counter() - begun_s
            return tokens / elapsed_s, answers

        generate(96)
        pairs = []
        for _ in range(args.rounds):
            (alone, few), (beside, many) = generate(96), generate(256)
            pairs.append((alone, beside))
            must("refusals", "only 200 and 429", {*few, *many} <= {200, 429})
        refused_s = many[429]
    ratios = [beside / alone for alone, beside in pairs]
    ratio = percentile(ratios, 0.5)
    report(
        "refusals",
        tokens_per_s=[[round(rate) for rate in pair] for pair in pairs],
        ratios=ratios,
        ratio=ratio,
        refused_per_s=len(refused_s) / args.seconds,
        refused_p95_s=percentile(refused_s, 0.95),
    )
    must("refusals", "at least 0.85 of the tok/s without them", ratio >= 0.85)


def generated(metrics: str) -> float:
    return float(re.findall(r"^gpt2core_generated_tokens_total (\S+)$", metrics, re.MULTILINE)[0])


def stutter(args: argparse.Namespace, small: str) -> None:
    """16 streams while a prompt of 900 tokens is read: the longest gap between two tokens, in medians."""
    options = {"max_new_tokens": 400, "ignore_eos": True, "stream": True}
    streams = [request("/generate", {"prompt": f"Client {i}", **options}) for i in range(16)]
    long = request("/v1/completions", {"prompt": [7] * 900, "max_tokens": 1})
    wait_s = 3.0
    with process("--model", small, "--backend", args.backend, "--threads", str(args.threads)) as (_, url):

        async def beside() -> tuple[list[Answer], Answer, bool]:
            jobs = [asyncio.create_task(ask(port_of(url), data)) for data in streams]
            await asyncio.sleep(wait_s)
            answer = await ask(port_of(url), long)
            ended = any(job.done() for job in jobs)
            return [await job for job in jobs], answer, ended

        worst: list[float] = []
        without: list[float] = []
        for _ in range(args.rounds):
            answers, answer, ended = asyncio.run(beside())
            medians_s = [percentile(one.gaps_s, 0.5) for one in answers]
            halves = [split_gaps(one, wait_s, wait_s + answer.elapsed_s) for one in answers]
            for gaps, half in zip((worst, without), zip(*halves, strict=True), strict=True):
                gaps.append(max(max(one) / median_s for one, median_s in zip(half, medians_s, strict=True)))
            must("stutter", "all answered, the streams last", answer.status == 200 and not ended)
    report(
        "stutter",
        median_gap_s=percentile(medians_s, 0.5),
        worst_gap_in_medians=worst,
        worst_gap_without_the_prompt=without,
        long_prompt_s=answer.elapsed_s,
    )
    must("stutter", "no gap beyond 3 medians", max(worst) <= 3)


def split_gaps(answer: Answer, begin_s: float, end_s: float) -> tuple[list[float], list[float]]:
    """A stream's gaps that ended in a time after its begin, and of the rest, but its first second."""
    inside, outside = [], []
    passed_s = answer.ttft_s
    for gap_s in answer.gaps_s:
        passed_s += gap_s
        if begin_s <= passed_s <= end_s + gap_s:
            inside.append(gap_s)
        elif passed_s > answer.ttft_s + 1:
            outside.append(gap_s)
    return inside, outside


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
