"""What the prefix cache gains where prompts begin alike, and what it costs where they do not.

    python examples/prefix_cache.py FOLDER --threads 2

Three figures, of pairs of runs one after the other, with and without the cache: requests a second where all
prompts begin with the same tokens; the same where no two begin alike; and the time from a loaded session to
its first token, beside that of the same tokens read anew.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np

from gpt2core import GPT2


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="a folder, a hub id or demo")
    parser.add_argument("--backend", default="native")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--shared", type=int, default=900, help="tokens that all prompts begin with")
    parser.add_argument("--requests", type=int, default=100)
    parser.add_argument("--new", type=int, default=20, help="tokens to generate for each")
    parser.add_argument("--pairs", type=int, default=1)
    given = parser.parse_args()

    def load(*, prefix_cache: bool) -> GPT2:
        return GPT2.from_pretrained(
            given.model, backend=given.backend, threads=given.threads, prefix_cache=prefix_cache
        )

    rng = np.random.default_rng(0)
    with load(prefix_cache=True) as model:
        vocab_size = model.config.vocab_size
    head = rng.integers(0, vocab_size, given.shared).tolist()
    shared = [[*head, *rng.integers(0, vocab_size, 10).tolist()] for _ in range(given.requests)]
    others = [rng.integers(0, vocab_size, 100).tolist() for _ in range(given.requests)]

    for name, prompts in (("one beginning", shared), ("no beginning in common", others)):
        ratios = []
        for pair in range(given.pairs):
            rates = {}
            for warm in (False, True) if pair % 2 else (True, False):
                with load(prefix_cache=warm) as model:
                    model.generate([1], max_new_tokens=2)
                    begun_s = time.perf_counter()
                    model.generate(prompts, max_new_tokens=given.new, ignore_eos=True)
                    rates[warm] = len(prompts) / (time.perf_counter() - begun_s)
            ratios.append(rates[True] / rates[False])
            print(f"{name}: {rates[True]:.2f} requests/s, {rates[False]:.2f} without, {ratios[-1]:.3f} times")
        print(f"{name}: median {statistics.median(ratios):.3f} times")

    with tempfile.TemporaryDirectory() as folder, load(prefix_cache=True) as model:
        path = Path(folder) / "session"
        begun_s = time.perf_counter()
        session = model.session(head)
        session.generate(max_new_tokens=1)
        cold_s = time.perf_counter() - begun_s
        session.save(path)
        for _ in range(3):
            begun_s = time.perf_counter()
            session = model.load_session(path)
            loaded_s = time.perf_counter()
            session.generate(max_new_tokens=1)
            first_s = time.perf_counter() - loaded_s
            print(
                f"a session of {given.shared} tokens: loaded in {1e3 * (loaded_s - begun_s):.0f} ms, first "
                f"token after {1e3 * first_s:.1f} ms; read anew: {1e3 * cold_s:.0f} ms"
            )


if __name__ == "__main__":
    main()
