"""Long forms: the same texts whatever runs beside them, and prompts that are much too long."""

import argparse
import asyncio
import json
import random
import re
from concurrent.futures import ThreadPoolExecutor

from load_client import ask, ask_all, request
from robustness_report import get, lag_p99_s, must, port_of, report
from serving import process

from gpt2core import GPT2


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
