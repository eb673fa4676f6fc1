"""What the long forms of the server's tests share: figures, what must hold, looks at a server."""

import json
import re
import sys
import urllib.request
from typing import Any

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
