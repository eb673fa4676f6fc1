"""Bits per byte and speed of the codec beside other compressors, as a table.

    python examples/codec_figures.py BOOK.txt --levels 1,6,9 --precision float32,int8

Others are run as programs, those that are installed. "with the model" counts the model's weights too, as
its checkpoint holds them: what a file costs whose reader does not have the model yet. Every file is expanded
again and compared.
"""

import argparse
import shutil
import subprocess
import sys
import time
from pathlib import Path

from gpt2core import GPT2, codec, open_checkpoint

OTHERS = {
    "xz -9e": ["xz", "-9e", "--stdout"],
    "zstd --ultra -22": ["zstd", "--ultra", "-22", "--stdout", "--quiet"],
    "brotli -q 11": ["brotli", "-q", "11", "-w", "24", "--stdout"],
    "bzip3": ["bzip3", "--encode", "--stdout"],
}


def run_other(command: list[str], path: Path) -> tuple[int, float]:
    """Bytes of the result, and seconds."""
    began_s = time.perf_counter()
    done = subprocess.run([*command, str(path)], capture_output=True, check=True)
    return len(done.stdout), time.perf_counter() - began_s


def show(name: str, size: int, nbytes: int, encode_s: float, decode_s: float | None, weights: int) -> None:
    """One line of the table; sizes in bytes."""
    expanded = "" if decode_s is None else f"{nbytes / decode_s / 1e3:.1f}"
    together = f"{8 * (size + weights) / nbytes:.3f}"
    print(
        f"| {name} | {8 * size / nbytes:.3f} | {together} | {nbytes / encode_s / 1e3:.1f} | {expanded} |",
        flush=True,
    )


def main() -> None:
    """Measure each file and print its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--precision", default="float32,int8")
    parser.add_argument("--levels", default="1,6,9")
    parser.add_argument("--threads", type=int)
    args = parser.parse_args()
    weights = (open_checkpoint(args.model).folder / "model.safetensors").stat().st_size
    for path in args.files:
        data = path.read_bytes()
        print(f"\n{path.name}, {len(data)} bytes:\n")
        print("| compressor | bits per byte | with the model | compressed, kB/s | expanded, kB/s |")
        print("|---|---|---|---|---|")
        for name, command in OTHERS.items():
            if shutil.which(command[0]):
                size, encode_s = run_other(command, path)
                show(name, size, len(data), encode_s, None, 0)
        for precision in args.precision.split(","):
            with GPT2.from_pretrained(
                args.model, backend="native", precision=precision, threads=args.threads
            ) as model:
                for level in map(int, args.levels.split(",")):
                    began_s = time.perf_counter()
                    blob = codec.compress(data, model, level=level)
                    compressed_s = time.perf_counter()
                    if codec.expand(blob, model) != data:
                        sys.exit(f"{path}: other bytes came back")
                    took = compressed_s - began_s, time.perf_counter() - compressed_s
                    show(
                        f"gpt2core {args.model}, {precision}, level {level}",
                        len(blob),
                        len(data),
                        *took,
                        weights,
                    )


if __name__ == "__main__":
    main()
