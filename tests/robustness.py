"""The long forms of the server's tests, with figures: `scripts/robustness [PART...]`.

Each part starts `gpt2core serve` as a process of its own, prints what it measured as one line of JSON per
figure, and fails where something that must hold does not.
"""

import argparse
import asyncio
import itertools
import json
import random
import re
import signal
import sys
import tempfile
import time
import urllib.request
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
from exit_program import ENDS, WAYS, exit_code
from fuzz_schema import fuzz_schema
from load_client import Answer, ask, ask_all, percentile, request
from malformed import malformed_requests
from serving import Fake, process, serving, until

from gpt2core import GPT2
from gpt2core.testing import random_checkpoint

FAILED: list[str] = []


def report(part: str, **figures: Any) -> None:
    rounded = {k: round(v, 4) if isinstance(v, float) else v for k, v in figures.items()}
    print(json.dumps({"part": part, **rounded}), flush=True)


def must(part: str, what: str, holds: bool) -> None:
    if not holds:
        FAILED.append(f"{part}: {what}")
        print(f"FAILED {part}: {what}", file=sys.stderr, flush=True)


def get(url: str) -> str:
    with urllib.request.urlopen(url, timeout=20) as answer:
        return answer.read().decode()


def port_of(url: str) -> int:
    return int(url.rpartition(":")[2])


def lag_p99_s(before: str, after: str) -> float:
    """The smallest bucket of the event loop's lag that holds 99 % of what came between two looks."""

    def buckets(text: str) -> dict[float, float]:
        found = re.findall(r'event_loop_lag_seconds_bucket\{le="(.+?)"\} (\S+)', text)
        return {float(le): float(count) for le, count in found}

    old, new = buckets(before), buckets(after)
    counts = {le: new[le] - old[le] for le in new}
    return min(le for le, count in counts.items() if count >= 0.99 * counts[float("inf")])


# Load


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


# Clients that leave


def disconnects(args: argparse.Namespace, tiny: str) -> None:
    """200 clients that leave at a random moment; then every slot and place is free within a second."""
    with process("--model", tiny, "--max-batch", "4") as (_, url):
        rng = random.Random(1)
        freed = []

        async def leave(stream: bool) -> None:
            body = {"prompt": "ab", "max_new_tokens": 400, "n": 1, "stream": stream}
            await ask(port_of(url), request("/generate", body), leave_after_s=rng.uniform(0.001, 0.3))

        async def burst(count: int) -> None:
            await asyncio.gather(*(leave(i % 2 == 0) for i in range(count)))

        for _ in range(200 // 20):
            asyncio.run(burst(20))
            begun_s = time.perf_counter()
            while "gpt2core_requests_running 0.0" not in get(f"{url}/metrics"):
                time.sleep(0.005)
            freed.append(time.perf_counter() - begun_s)
            [after] = ask_all(
                port_of(url), [request("/generate", {"prompt": "a", "max_new_tokens": 4})], clients=1
            )
            must("disconnects", "the next request is unharmed", after.status == 200)
        report("disconnects", clients=200, freed_max_s=max(freed))
        must("disconnects", "free within 1 s", max(freed) <= 1)


# Leaks


def leaks(args: argparse.Namespace, tiny: str) -> None:
    """Many requests, a fifth of them cancelled and a tenth invalid; memory, threads and descriptors."""
    with process("--model", tiny) as (running, url):
        figures = asyncio.run(soak(port_of(url), running.pid, args.requests))
    report("leaks", **figures)
    must("leaks", "memory slope of at most 1 KiB a request", figures["slope_nbytes"] <= 1024)
    must("leaks", "no thread left", figures["threads"][1] <= figures["threads"][0])
    must("leaks", "no descriptor left", figures["descriptors"][1] <= figures["descriptors"][0])


async def soak(port: int, pid: int, count: int) -> dict[str, Any]:
    """Send `count` requests; the slope is that of the second half, when caches are full."""
    watched = psutil.Process(pid)
    rng = random.Random(7)
    sizes: list[tuple[int, int]] = []
    done = 0
    statuses: Counter[int] = Counter()

    async def one(i: int) -> None:
        body: dict[str, Any] = {"prompt": f"Request {i} " + "x" * rng.randrange(50), "max_new_tokens": 8}
        body["stream"] = i % 3 == 0
        if i % 10 == 1:
            body["n"] = 99
        leave_s = rng.uniform(0.001, 0.02) if i % 5 == 0 else None
        if leave_s is not None:
            body["max_new_tokens"] = 400
        statuses[(await ask(port, request("/generate", body), leave_after_s=leave_s)).status] += 1

    async def client(numbers: Any) -> None:
        nonlocal done
        for i in numbers:
            await one(i)
            done += 1
            if done % max(1, count // 100) == 0:
                sizes.append((done, watched.memory_info().rss))

    warm = iter(range(max(64, count // 10)))  # what is made once is made
    await asyncio.gather(*(client(warm) for _ in range(16)))
    done = 0
    sizes.clear()
    statuses.clear()
    before = watched.num_threads(), watched.num_fds()
    numbers = iter(range(count))
    await asyncio.gather(*(client(numbers) for _ in range(16)))
    await asyncio.sleep(1)
    after = watched.num_threads(), watched.num_fds()
    later = sizes[len(sizes) // 2 :]
    return {
        "requests": count,
        "statuses": dict(statuses),
        "slope_nbytes": slope(later),
        "resident_nbytes": (sizes[0][1], sizes[-1][1]),
        "threads": (before[0], after[0]),
        "descriptors": (before[1], after[1]),
    }


def slope(points: list[tuple[int, int]]) -> float:
    """Least squares."""
    n = len(points)
    mean_x, mean_y = sum(x for x, _ in points) / n, sum(y for _, y in points) / n
    above = sum((x - mean_x) * (y - mean_y) for x, y in points)
    return above / sum((x - mean_x) ** 2 for x, _ in points)


# Fuzz


def fuzz(args: argparse.Namespace, short: str) -> None:
    """Raw malformed requests and schemathesis; no 5xx, and alive afterwards."""
    with process("--model", short, GPT2CORE_RECEIPT_S="0.5") as (running, url):
        statuses = asyncio.run(send_malformed(port_of(url), args.cases // 2, seed=args.seed))
        report("fuzz", what="raw malformed requests", cases=sum(statuses.values()), statuses=dict(statuses))
        must("fuzz", "no 5xx", not [s for s in statuses if s >= 500])
        found = fuzz_schema(url, args.cases - args.cases // 2, seed=args.seed)
        report("fuzz", what="schemathesis", cases=sum(found.values()), statuses=dict(found))
        must("fuzz", "no 5xx of schemathesis", not [s for s in found if s >= 500])
        [after] = ask_all(
            port_of(url), [request("/generate", {"prompt": "a", "max_new_tokens": 4})], clients=1
        )
        must("fuzz", "alive after", after.status == 200 and running.poll() is None)


async def send_malformed(port: int, count: int, *, seed: int) -> Counter[int]:
    """The statuses that malformed requests got; 0 is a connection that was closed without an answer."""
    statuses: Counter[int] = Counter()
    cases = malformed_requests(count, seed=seed)

    async def client() -> None:
        for data in cases:
            statuses[await send_raw(port, data)] += 1

    await asyncio.gather(*(client() for _ in range(16)))
    return statuses


async def send_raw(port: int, data: bytes) -> int:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(data)
        async with asyncio.timeout(10):
            received = await reader.read(65536)
        return int(received.split(b" ", 2)[1]) if received.startswith(b"HTTP/1.1 ") else 0
    except (ConnectionError, TimeoutError):
        return 0
    finally:
        writer.close()


# Determinism


def determinism(args: argparse.Namespace, tiny: str) -> None:
    """Prompts x temperatures x numbers of clients x orders, beside neighbours that leave: the same texts."""
    prompts = ["Once upon a time", "The king said", "One day a fox", "In a far country there"] * 4
    cases = [(p, t, seed) for seed, p in enumerate(prompts) for t in (0.0, 0.7, 1.0, 1.5)]
    with GPT2.from_pretrained("demo") as model:
        expected = {
            case: model.generate(case[0], temperature=case[1], seed=case[2], max_new_tokens=40).text
            for case in cases
        }
    rng = random.Random(args.seed)
    compared = differing = 0
    with process("--model", "demo") as (_, url):
        for count in (1, 3, 8, 32):
            rng.shuffle(cases)
            options = {"max_new_tokens": 40, "stream": count % 2 == 0}
            bodies = [
                request("/generate", {"prompt": p, "temperature": t, "seed": seed, **options})
                for p, t, seed in cases
            ]
            for case, text in zip(cases, asyncio.run(texts_beside(port_of(url), bodies, count)), strict=True):
                compared += 1
                differing += text != expected[case]
    report("determinism", texts=compared, tokens_each=40, differing=differing)
    must("determinism", "no text differs", differing == 0)


async def texts_beside(port: int, bodies: list[bytes], clients: int) -> list[str]:
    """The texts, while others come and leave."""
    texts = [""] * len(bodies)
    waiting = iter(enumerate(bodies))
    neighbour = request("/generate", {"prompt": "A neighbour", "max_new_tokens": 200, "stream": True})

    async def client() -> None:
        for i, data in waiting:
            body = (await ask(port, data)).body
            found = [json.loads(line) for line in re.findall(rb'\{"generated_text".*\}', body)]
            texts[i] = found[0]["generated_text"]

    async def neighbours() -> None:
        while True:
            await ask(port, neighbour, leave_after_s=0.05)

    others = [asyncio.create_task(neighbours()) for _ in range(3)]
    await asyncio.gather(*(client() for _ in range(clients)))
    for one in others:
        one.cancel()
    await asyncio.gather(*others, return_exceptions=True)
    return texts


def threads(args: argparse.Namespace, tiny: str) -> None:
    """16 threads x 1,000 calls on one model in one process: what the same calls give one after the other."""
    with GPT2.from_pretrained(tiny) as model:

        def call(i: int) -> list[int]:
            return model.generate(f"call {i % 50}", max_new_tokens=3, temperature=1, seed=i % 50).token_ids

        serial = [call(i) for i in range(50)]
        with ThreadPoolExecutor(16) as pool:
            results = list(pool.map(call, range(16_000)))
    differing = sum(tokens != serial[i % 50] for i, tokens in enumerate(results))
    report("threads", calls=len(results), differing=differing)
    must("threads", "equal to serial calls", differing == 0)


# Prompts that are much too long


def prompts(args: argparse.Namespace, small: str) -> None:
    """A megabyte, and 128 KiB of one character; while the event loop answers others."""
    with process("--model", small, "--backend", args.backend) as (_, url):
        before = get(f"{url}/metrics")
        for name, text in {
            "1 MB": "a" * 2**20,
            "128 KiB of a": "a" * 2**17,
            "128 KiB of spaces": " " * 2**17,
            "128 KiB of emoji": "\U0001f600" * 2**15,
            "128 KiB of words": "word " * (2**17 // 5),
        }.items():
            data = json.dumps({"prompt": text, "max_new_tokens": 1}, ensure_ascii=False).encode()
            answers = ask_all(port_of(url), [request("/generate", data)] * 8, clients=4)
            slowest_s = max(a.elapsed_s for a in answers)
            statuses = {a.status for a in answers}
            report("prompts", what=name, statuses=sorted(statuses), slowest_s=slowest_s)
            must("prompts", f"{name}: refused, within 1 s", statuses <= {413, 422} and slowest_s <= 1)
        lag_s = lag_p99_s(before, get(f"{url}/metrics"))
    report("prompts", what="event loop", lag_p99_s=lag_s)
    must("prompts", "event loop lag p99 of at most 200 ms", lag_s <= 0.2)


# Faults and signals


def faults(args: argparse.Namespace, tiny: str) -> None:
    """How fast every waiter learns that the engine has failed, and how fast signals work."""
    for name, error in (("exception in a step", RuntimeError("broken")), ("thread ends", SystemExit())):
        fake = Fake()
        with serving(fake.load, max_batch=8) as server, ThreadPoolExecutor(24) as pool:
            fake.gate.clear()
            asked = [
                pool.submit(server.generate, "ab", max_new_tokens=9, stream=i % 2 == 0) for i in range(24)
            ]
            until(lambda one=server: one.driver.requests == 24)
            fake.raises = error
            begun_s = time.perf_counter()
            fake.gate.set()
            failed = sum("engine_failed" in one.result().text for one in asked)
            elapsed_s = time.perf_counter() - begun_s
            ready = server.client.get("/readyz").status_code
        report("faults", what=name, waiters=24, failed=failed, all_told_s=elapsed_s, readyz=ready)
        must("faults", f"{name}: all told within 1 s", failed == 24 and elapsed_s <= 1 and ready == 503)
    body = {"prompt": "ab", "max_new_tokens": 400}
    with process("--model", tiny) as (running, url), ThreadPoolExecutor(1) as pool:
        bodies = [request("/generate", {**body, "stream": i % 2 == 0}) for i in range(10)]
        asked_all = pool.submit(ask_all, port_of(url), bodies, clients=10)
        until(lambda: "gpt2core_requests_running 10.0" in get(f"{url}/metrics"))
        begun_s = time.perf_counter()
        running.send_signal(signal.SIGTERM)
        answers = asked_all.result()
        code = running.wait(40)
        elapsed_s = time.perf_counter() - begun_s
    complete = sum(a.status == 200 and a.clean and b"generated_text" in a.body for a in answers)
    report("faults", what="SIGTERM with 10 in flight", complete=complete, exit_code=code, ended_s=elapsed_s)
    must("faults", "none lost, exit 0", complete == 10 and code == 0)
    with process("--model", tiny) as (running, url), ThreadPoolExecutor(1) as pool:
        asked_all = pool.submit(
            ask_all, port_of(url), [request("/generate", {**body, "n": 4})] * 8, clients=8
        )
        until(lambda: "gpt2core_requests_running 8.0" in get(f"{url}/metrics"))
        running.send_signal(signal.SIGTERM)
        time.sleep(0.2)
        begun_s = time.perf_counter()
        running.send_signal(signal.SIGTERM)
        code = running.wait(40)
        elapsed_s = time.perf_counter() - begun_s
        asked_all.exception()
    report("faults", what="second signal", ended_s=elapsed_s, exit_code=code)
    must("faults", "ended within 4 s of the second signal", elapsed_s <= 4)


def exits(args: argparse.Namespace, tiny: str) -> None:
    """Programs that end while daemon threads compute: with their own exit code, within 5 s."""
    for way, end in itertools.product(WAYS, ENDS):
        codes = Counter(exit_code(args.backend, way, end, tiny) for _ in range(args.exits))
        report("exit", way=way, end=end, want=ENDS[end], codes=dict(codes))
        must("exit", f"{way}, {end}: exit code {ENDS[end]}", set(codes) == {ENDS[end]})


PARTS = {
    "exit": (exits, "tiny"),
    "determinism": (determinism, "tiny"),
    "threads": (threads, "tiny"),
    "prompts": (prompts, "small"),
    "faults": (faults, "tiny"),
    "overhead": (overhead, "tiny"),
    "clients": (clients, "tiny"),
    "disconnects": (disconnects, "tiny"),
    "fuzz": (fuzz, "short"),
    "leaks": (leaks, "tiny"),
    "fairness": (fairness, "small"),
    "load": (load, "small"),
}


def main() -> int:
    parser = argparse.ArgumentParser(description="Measure what must hold of the server.")
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(PARTS)}; by default all")
    parser.add_argument("--small", help="checkpoint of GPT-2 small's shape; by default a random one is made")
    parser.add_argument("--backend", default="onnx")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=64, help="new tokens per client of `load`")
    parser.add_argument("--rounds", type=int, default=3, help="of `load`; the best counts")
    parser.add_argument("--requests", type=int, default=10_000, help="of `leaks`")
    parser.add_argument("--cases", type=int, default=20_000, help="of `fuzz`")
    parser.add_argument("--exits", type=int, default=10, help="of `exit`, in each of its ten ways")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    if unknown := set(args.parts) - set(PARTS):
        parser.error(f"unknown: {', '.join(unknown)}")
    with tempfile.TemporaryDirectory() as scratch:
        folders = {
            "tiny": str(random_checkpoint(Path(scratch) / "tiny", n_positions=512)),
            "short": str(random_checkpoint(Path(scratch) / "short", n_positions=32)),
        }
        if args.small is not None:
            folders["small"] = args.small
        for name in args.parts or PARTS:
            part, size = PARTS[name]
            if size not in folders:
                folders[size] = str(random_checkpoint(Path(scratch) / size, size))
            part(args, folders[size])
    print(f"{len(FAILED)} failed" if FAILED else "all hold")
    return 1 if FAILED else 0


if __name__ == "__main__":
    sys.exit(main())
