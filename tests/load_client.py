"""Many HTTP clients in one thread, cheap enough not to disturb the server that they measure."""

import asyncio
import contextlib
import heapq
import json
import re
import selectors
import socket
import time
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any, cast


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


def insist(
    port: int, data: bytes, *, clients: int, seconds: float, pause_s: float = 0.25
) -> dict[int, list[float]]:
    """So many clients on kept connections, for a while: each asks again, when it is refused after a pause.

    One plain loop, since hundreds of clients that are refused ask a thousand times a second. By status, how
    long the answers took.
    """
    elapsed_s: dict[int, list[float]] = defaultdict(list)
    begun_s: dict[socket.socket, float] = {}
    parts: dict[socket.socket, bytes] = {}
    with contextlib.ExitStack() as stack, selectors.DefaultSelector() as selector:
        now_s = time.perf_counter()
        end_s = now_s + seconds
        due: list[tuple[float, int, socket.socket]] = []
        for i in range(clients):
            connection = stack.enter_context(socket.create_connection(("127.0.0.1", port)))
            selector.register(connection, selectors.EVENT_READ)
            heapq.heappush(due, (now_s + pause_s * i / clients, i, connection))
        while (now_s := time.perf_counter()) < end_s:
            while due and due[0][0] <= now_s:
                _, _, connection = heapq.heappop(due)
                begun_s[connection], parts[connection] = now_s, b""
                connection.sendall(data)
            next_s = min(end_s, due[0][0]) if due else end_s
            for key, _ in selector.select(max(0, next_s - now_s)):
                connection = cast(socket.socket, key.fileobj)
                received = connection.recv(65536)
                assert received, "closed"
                parts[connection] += received
                head, end, body = parts[connection].partition(b"\r\n\r\n")
                if end and len(body) == int(re.findall(rb"(?i)content-length: (\d+)", head)[0]):
                    now_s = time.perf_counter()
                    status = int(head.split(b" ", 2)[1])
                    elapsed_s[status].append(now_s - begun_s[connection])
                    again_s = now_s + (pause_s if status == 429 else 0)
                    heapq.heappush(due, (again_s, connection.fileno(), connection))
    return elapsed_s


def percentile(values: list[float], q: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(q * len(ordered)))]
