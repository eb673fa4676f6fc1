"""A program that ends while threads compute: `python exit_program.py BACKEND WAY END CHECKPOINT`.

It prints "busy" once all its daemon threads are within passes, and then ends as END says.
"""

import os
import signal
import subprocess
import sys
import threading
import time

from gpt2core import GPT2
from gpt2core.backends import create_backend
from gpt2core.batch import Batch
from gpt2core.testing import random_config, random_weights

ENDS = {"return": 0, "sys.exit": 3, "os._exit": 4, "SIGTERM": -signal.SIGTERM, "exception": 1}
"""What the program is told, and the exit code that it must end with."""
WAYS = ("forward", "generate")
THREADS = 3


ENDED_S = 5
"""Within this time a process that ends has ended."""


def exit_code(backend: str, way: str, end: str, checkpoint: object) -> int | None:
    """Of this program in a process of its own; None where it did not end in time."""
    command = [sys.executable, __file__, backend, way, end, str(checkpoint)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as running:
        try:
            assert running.stdout is not None
            assert running.stdout.readline() == "busy\n"
            return running.wait(ENDED_S)
        except subprocess.TimeoutExpired:
            return None
        finally:
            running.kill()


def main(backend: str, way: str, end: str, checkpoint: str) -> None:
    rounds = [0] * THREADS
    work = forwards(backend, rounds) if way == "forward" else generates(backend, rounds, checkpoint)
    for i in range(THREADS):
        threading.Thread(target=work, args=(i,), daemon=True).start()
    while min(rounds) < 2:
        time.sleep(0.001)
    print("busy", flush=True)
    time.sleep(os.getpid() % 7 / 1000)  # not always at the same moment of a pass
    if end == "SIGTERM":
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)
    elif end == "os._exit":
        os._exit(ENDS[end])
    elif end == "sys.exit":
        sys.exit(ENDS[end])
    elif end == "exception":
        raise SystemExit("the end")


def forwards(name, rounds):
    """One backend, whose threads take turns, with a cache for each."""
    config = random_config(n_embd=96, n_layer=4, n_positions=512, vocab_size=4000)
    backend = create_backend(name, random_weights(config), threads=2)
    batch = Batch.of([(range(400), 0, 0)])

    def work(i):
        cache = backend.new_cache(1, 512)
        while True:
            backend.forward(batch, cache)
            rounds[i] += 1

    return work


def generates(name, rounds, checkpoint):
    model = GPT2.from_pretrained(checkpoint, backend=name, threads=2)

    def work(i):
        while True:
            for _ in model.stream("Once upon a time", max_new_tokens=200, seed=i):
                rounds[i] += 1

    return work


if __name__ == "__main__":
    main(*sys.argv[1:])
