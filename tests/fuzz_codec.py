"""Damaged compressed files: an error or the exact bytes. Long form: `python tests/fuzz_codec.py 20000`."""

import random
import sys
from collections import Counter

from codec_models import TALE, fake_model

from gpt2core.codec import CodecError, compress, expand

TEXT = TALE[:90].encode() + b"\xff\xfe" + TALE[40:80].encode() + bytes(range(256))


def damage_files(count: int, seed: int) -> Counter[str]:
    """How many of `count` damaged files were an "error", the "same" bytes, or "wrong" ones."""
    rng = random.Random(seed)
    model = fake_model(16)
    blobs = [
        compress(TEXT[:length], model, level=level) for length in (0, 40, len(TEXT)) for level in (1, 4, 9)
    ]
    texts = [TEXT[:length] for length in (0, 40, len(TEXT)) for _ in range(3)]
    outcomes: Counter[str] = Counter()
    for _ in range(count):
        i = rng.randrange(len(blobs))
        try:
            got = expand(damage(blobs[i], rng), model)
        except CodecError:
            outcomes["error"] += 1
        else:
            outcomes["same" if got == texts[i] else "wrong"] += 1
    return outcomes


def damage(blob: bytes, rng: random.Random) -> bytes:
    data = bytearray(blob)
    for _ in range(rng.choice([1, 1, 1, 2, 5])):
        at = rng.randrange(len(data)) if data else 0
        match rng.randrange(6):
            case 0 if data:
                data[at] ^= 1 << rng.randrange(8)
            case 1 if data:
                data[at] = rng.randrange(256)
            case 2:
                del data[at : at + rng.randrange(1, 9)]
            case 3:
                data[at:at] = rng.randbytes(rng.randrange(1, 9))
            case 4:
                del data[at:]
            case _:
                other = rng.randrange(len(data)) if data else 0
                data[at : at + 6] = data[other : other + 6]
    return bytes(data)


if __name__ == "__main__":
    print(dict(damage_files(int(sys.argv[1]), seed=0)))
