"""Requests that no well-behaved client sends: broken HTTP, broken JSON, broken values."""

import json
import random
from collections.abc import Iterator
from typing import Any

VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2**31, 2**63, -(2**63), 10**400, 0.5, -0.0, 1e308, 1e-320, "", "a", " "),
    *("\ud800", "\udfff", "\0", "\ufeff", "a" * 5000, [], [[]], [None], ["a", 1], {}, {"a": {}}, ["a"] * 50),
    *([0], [-1], [2**40], [[1], []], {"1": 1e9}, {"x": 1}, float("nan"), float("inf"), float("-inf")),
)
FIELDS = (
    *(
        "prompt",
        "max_new_tokens",
        "max_length",
        "temperature",
        "top_p",
        "top_k",
        "min_p",
        "n",
        "seed",
        "stop",
    ),
    *("logprobs", "logit_bias", "echo", "stream", "model", "max_tokens", "best_of", "suffix", "user"),
    *("stream_options", "presence_penalty", "frequency_penalty", "repetition_penalty", "\ud83d", "__proto__"),
)
PATHS = ("/generate", "/v1/completions", "/v1/models", "/readyz", "/docs", "/nope", "/%00", "/" + "a" * 300)
HEADERS = (
    *("", "Transfer-Encoding: chunked\r\n", "Content-Encoding: gzip\r\n", "Expect: 100-continue\r\n"),
    *(
        "Origin: null\r\n",
        "Content-Length: -1\r\n",
        "X: " + "y" * 9000 + "\r\n",
        "Authorization: Bearer \xff\r\n",
    ),
    *(
        "X-Request-ID: \t\r\n",
        "Upgrade: websocket\r\nConnection: Upgrade\r\n",
        ": empty\r\n",
        "Bad Name: x\r\n",
    ),
)


def malformed_requests(count: int, *, seed: int) -> Iterator[bytes]:
    """`count` requests, the same for the same seed."""
    rng = random.Random(seed)
    for _ in range(count):
        yield one_request(rng)


def one_request(rng: random.Random) -> bytes:
    body = one_body(rng)
    method = "POST" if rng.random() < 0.9 else rng.choice(("GET", "PUT", "BREW", "\x00", "post"))
    path = rng.choice(PATHS[:2]) if rng.random() < 0.8 else rng.choice(PATHS)
    version = "1.1" if rng.random() < 0.95 else rng.choice(("1.0", "2.0", "x"))
    host = "localhost" if rng.random() < 0.95 else rng.choice(("", "a b", "evil"))
    kind = "application/json" if rng.random() < 0.95 else rng.choice(("text/plain", "\x01"))
    extra = rng.choice(HEADERS) if rng.random() < 0.3 else ""
    head = (
        f"{method} {path} HTTP/{version}\r\nHost: {host}\r\nContent-Type: {kind}\r\nConnection: close\r\n"
        f"Content-Length: {len(body)}\r\n{extra}\r\n"
    ).encode("latin-1")
    return mutated(rng, head + body) if rng.random() < 0.2 else head + body


def one_body(rng: random.Random) -> bytes:
    fields = {"prompt": "a", "max_new_tokens": 1} if rng.random() < 0.5 else {"model": "m", "prompt": [1, 2]}
    for _ in range(rng.randrange(1, 4)):
        fields[rng.choice(FIELDS)] = rng.choice(VALUES)
    body = json.dumps(fields).encode()
    kind = rng.random()
    if kind < 0.1:
        return mutated(rng, body)
    if kind < 0.15:
        return rng.choice((b"[", b'{"a":', b"[[], ")) * rng.randrange(1, 30_000)
    if kind < 0.2:
        return b"\xef\xbb\xbf" + body
    if kind < 0.25:
        return rng.randbytes(rng.randrange(200))
    if kind < 0.3:
        return body.replace(b'"prompt"', b'"prompt": "b", "prompt"')
    return body


def mutated(rng: random.Random, data: bytes) -> bytes:
    """Some bytes changed, left out or doubled, or the end cut off."""
    changed = bytearray(data)
    for _ in range(rng.randrange(1, 6)):
        at = rng.randrange(len(changed) + 1)
        match rng.randrange(4):
            case 0:
                changed[at:at] = rng.randbytes(rng.randrange(1, 4))
            case 1:
                del changed[at : at + rng.randrange(1, 8)]
            case 2:
                changed[at : at + 1] = rng.randbytes(1)
            case _:
                changed = changed[: max(1, at)] if rng.random() < 0.3 else changed
    return bytes(changed) or b"\r"
