"""Passes of every kind on the native backend, for `scripts/sanitize`: `python sanitized.py [--no-fork]`.

Whatever a sanitizer reports ends the process. Bits are compared too: each row alone, in one pass of one
thread, against the same row beside others, in chunks, by several threads.
"""

import os
import sys
import threading
from dataclasses import replace

import numpy as np

from gpt2core.backends.native import NativeBackend
from gpt2core.batch import Batch
from gpt2core.config import ACTIVATIONS
from gpt2core.quantization.rounding import PRECISIONS, quantize
from gpt2core.testing import random_config, random_weights

SHAPES = (  # in each something is no whole vector, strip or group
    {"n_embd": 144, "n_head": 2, "n_inner": 37, "n_layer": 2, "vocab_size": 263, "n_positions": 70},
    {"n_embd": 35, "n_head": 5, "n_inner": 101, "n_layer": 1, "vocab_size": 97, "n_positions": 33},
    {"n_embd": 4, "n_head": 2, "n_inner": 3, "n_layer": 2, "vocab_size": 13, "n_positions": 17},
)


def main() -> None:
    os.environ.pop("LD_PRELOAD", None)  # this process has it; the compiler must not
    for shape in SHAPES:
        for precision in ("float32", *PRECISIONS):
            weights = random_weights(random_config(**shape))
            check(weights if precision == "float32" else quantize(weights, precision))
            print(*shape.values(), precision, flush=True)
    for name in ACTIVATIONS:
        check(random_weights(random_config(**SHAPES[2], activation_function=name)))
    for precision in ("float32", *PRECISIONS):
        weights = random_weights(random_config(**SHAPES[1]))
        weights = weights if precision == "float32" else quantize(weights, precision)
        weights = replace(weights, wpe=np.where(np.arange(33)[:, None] < 20, weights.wpe, np.float32(np.nan)))
        assert np.isnan(logits(NativeBackend(weights, threads=2), list(range(25)))[20:]).all(), precision
    take_turns(NativeBackend(random_weights(random_config(**SHAPES[1])), threads=3))
    if "--no-fork" not in sys.argv:  # a child of several threads is more than ThreadSanitizer follows
        fork(NativeBackend(random_weights(random_config(**SHAPES[1])), threads=3))


def logits(backend: NativeBackend, tokens: list[int]) -> np.ndarray:
    batch = Batch.of([(tokens, 0, 0)], range(len(tokens)))
    return backend.forward(batch, backend.new_cache(1, len(tokens)))


def check(weights) -> None:
    config = weights.config
    rng = np.random.default_rng(1)
    alone, several = NativeBackend(weights, threads=1), NativeBackend(weights, threads=3)
    texts = [rng.integers(0, config.vocab_size, n).tolist() for n in (config.n_positions, 1, 7, 16)]
    want = [logits(alone, text) for text in texts]
    slots = (2, 0, 5, 3)
    rows = [(text, 0, slot) for text, slot in zip(texts, slots, strict=True)]
    cache = several.new_cache(6, config.n_positions)
    got = several.forward(Batch.of(rows, range(sum(map(len, texts)))), cache)
    np.testing.assert_array_equal(got, np.concatenate(want))
    np.testing.assert_array_equal(several.trace(texts[0]).logits, want[0])
    assert several.forward(Batch.of(rows, []), cache).shape == (0, config.vocab_size)
    start = 0
    for size in (1, 5, config.n_positions - 6):  # rewound, and on in chunks
        got = several.forward(Batch.of([(texts[0][start : start + size], start, 2)]), cache)
        start += size
        np.testing.assert_array_equal(got[0], want[0][start - 1])
    for step in range(7, 10):  # decode beside a row that pauses
        rows = [([texts[3][step]], step, 3), ([texts[0][step]], step, 2)]
        got = several.forward(Batch.of(rows), cache)
        np.testing.assert_array_equal(got, [want[3][step], want[0][step]])
    alone.close(), several.close()


def take_turns(backend: NativeBackend) -> None:
    """Several Python threads, and an end in their midst."""
    from gpt2core.errors import RequestError

    want, rounds = logits(backend, [1, 2, 3]), [0] * 4

    def work(i: int) -> None:
        try:
            while True:
                np.testing.assert_array_equal(logits(backend, [1, 2, 3]), want)
                rounds[i] += 1
        except RequestError:  # it is closed
            rounds[i] = -1

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    while min(rounds) < 3:
        pass
    backend.close()
    for thread in threads:
        thread.join()
    assert rounds == [-1] * 4


def fork(backend: NativeBackend) -> None:
    want = logits(backend, [1, 2, 3])
    if (child := os.fork()) == 0:
        same = np.array_equal(logits(backend, [1, 2, 3]), want)
        backend.close()
        os._exit(0 if same else 1)
    assert os.waitpid(child, 0)[1] == 0
    np.testing.assert_array_equal(logits(backend, [1, 2, 3]), want)


if __name__ == "__main__":
    main()
