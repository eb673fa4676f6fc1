"""The long forms of the server's tests, with figures: `scripts/robustness [PART...]`.

Each part starts `gpt2core serve` as a process of its own, prints what it measured as one line of JSON per
figure, and fails where something that must hold does not.
"""

import argparse
import sys
import tempfile
from pathlib import Path

from robustness_abuse import disconnects, exits, faults, fuzz, leaks
from robustness_load import clients, fairness, load, overhead, refusals, stutter
from robustness_report import FAILED
from robustness_texts import determinism, prompts, threads

from gpt2core.testing import random_checkpoint

PARTS = {
    "exit": (exits, "tiny"),
    "determinism": (determinism, "tiny"),
    "threads": (threads, "tiny"),
    "prompts": (prompts, "small"),
    "faults": (faults, "tiny"),
    "overhead": (overhead, "tiny"),
    "clients": (clients, "tiny"),
    "refusals": (refusals, "tiny"),
    "stutter": (stutter, "small"),
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
    parser.add_argument("--rounds", type=int, default=3, help="of `load`, `refusals` and `stutter`")
    parser.add_argument("--seconds", type=float, default=10, help="of each half of a pair of `refusals`")
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
