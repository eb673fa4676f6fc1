"""Long forms: clients that leave, leaks, malformed requests, faults and signals."""

import argparse
import asyncio
import itertools
import random
import signal
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import psutil
from exit_program import ENDS, WAYS, exit_code
from load_client import ask, ask_all, request
from malformed import malformed_requests
from robustness_report import get, must, port_of, report
from serving import Fake, process, serving, until


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
    from fuzz_schema import fuzz_schema  # the rest of this module runs without schemathesis

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
