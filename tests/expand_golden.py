"""Expand the codec's golden files here and make them again: `./scripts/aarch64 tests/expand_golden.py`."""

import pathlib
import platform

from gpt2core import GPT2, codec

GOLDEN = pathlib.Path(__file__).parent / "golden"
PRECISIONS = ("float32", "bfloat16", "int8")
STORY = (
    b"Once upon a time there lived a king who had three daughters, and the youngest of them was so beautiful "
    b"that the sun himself, who has seen so much, was amazed whenever he shone upon her face.\n\n"
    b'"What shall I do?" said she. "If only my mother were here!"\n\n'
)


def load_demo(precision: str = "float32", *, threads: int | None = None) -> GPT2:
    return GPT2.from_pretrained("demo", backend="native", precision=precision, threads=threads)


def golden(precision: str) -> bytes:
    """Of `STORY`, made by an AVX-512 build at the default level."""
    return (GOLDEN / f"codec-{precision}.g2c").read_bytes()


if __name__ == "__main__":
    for name in PRECISIONS:
        with load_demo(name, threads=1) as model:
            assert codec.expand(golden(name), model) == STORY
            assert name == "float32" or codec.compress(STORY, model) == golden(name)
        print(f"{platform.machine()}: the golden file in {name} holds the very bytes")
