"""Many HTTP clients in one thread, cheap enough not to disturb the server that they measure."""

import asyncio
import json
import time
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Answer:
    """What one request got."""

    status: int = 0
    elapsed_s: float = 0.0
    ttft_s: float = 0.0  # until the first event, of a stream
    events: int = 0
    body: bytes = b""
    clean: bool = False  # whether the answer came to its end
    gaps_s: list[float] = field(default_factory=list)  # between the chunks of a stream


def request(path: str, body: Any, *, keep: bool = False) -> bytes:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    head = (
        f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
        f"Connection: {'keep-alive' if keep else 'close'}\r\nContent-Length: {len(data)}\r\n\r\n"
    )
    return head.encode() + data


async def ask(port: int, data: bytes, *, leave_after_s: float | None = None) -> Answer:
    """One request on a connection of its own; `leave_after_s`: hang up then, whatever has come."""
    begun_s = time.perf_counter()
    answer = Answer()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(data)
        await writer.drain()
        parts: list[bytes] = []
        last_s = begun_s
        async with asyncio.timeout(leave_after_s):
            while chunk := await reader.read(65536):
                now_s = time.perf_counter()
                if parts:
                    answer.gaps_s.append(now_s - last_s)
                last_s = now_s
                events = chunk.count(b"data: ")
                if events and not answer.events:
                    answer.ttft_s = now_s - begun_s
                answer.events += events
                parts.append(chunk)
        whole = b"".join(parts)
        answer.status = int(whole.split(b" ", 2)[1])
        answer.body = whole.partition(b"\r\n\r\n")[2]
        answer.clean = b"chunked" not in whole[:2000] or whole.endswith(b"0\r\n\r\n")
    except TimeoutError:
        answer.status = -1
    finally:
        writer.close()
    answer.elapsed_s = time.perf_counter() - begun_s
    return answer


def ask_all(port: int, requests: list[bytes], *, clients: int) -> list[Answer]:
    """All requests, by so many clients at the same time, each as soon as it is free."""

    async def run() -> list[Answer]:
        waiting = iter(enumerate(requests))
        answers: list[Answer] = [Answer()] * len(requests)

        async def client() -> None:
            for i, data in waiting:
                answers[i] = await ask(port, data)

        await asyncio.gather(*(client() for _ in range(clients)))
        return answers

    return asyncio.run(run())


def percentile(values: list[float], q: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(q * len(ordered)))]
