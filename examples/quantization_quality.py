"""What fewer bits cost: perplexity, KL divergence and top-1 agreement on a text, per precision and backend.

    python examples/quantization_quality.py TEXT --model demo --backends numpy,onnx

TEXT is UTF-8 that the model has not been trained on; it is read in whole contexts, each from its beginning.
Every row is compared with float32 on NumPy, and with the dequantized weights that the backend should compute
("off by": the logits' root mean square difference from those, over the logits' spread).
"""

import argparse
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gpt2core import GPT2, Checkpoint, RequestError, Tokenizer, open_checkpoint
from gpt2core.backends import create_backend
from gpt2core.quantization.rounding import PRECISIONS, dequantize, quantize
from gpt2core.weights import Weights


@dataclass
class Sums:
    """What is added up over the positions of a text."""

    positions: int = 0
    predicted: int = 0
    loss: float = 0.0
    kl: float = 0.0
    same_top: int = 0
    off_square: float = 0.0
    spread_square: float = 0.0

    def add(self, ids: list[int], got: np.ndarray, want: np.ndarray, should: np.ndarray) -> None:
        """The logits of one window: a backend's, those of float32, those of the dequantized weights."""
        p, q = log_softmax(want), log_softmax(got)
        self.positions += len(ids)
        self.predicted += len(ids) - 1
        self.loss -= float(q[np.arange(len(ids) - 1), ids[1:]].sum())
        self.kl += float((np.exp(p) * (p - q)).sum())
        self.same_top += int((p.argmax(1) == q.argmax(1)).sum())
        self.off_square += float(np.square(got - should).sum())
        self.spread_square += float(np.square(want - want.mean(1, keepdims=True)).sum())


def main() -> None:
    """Print one line per precision and backend, as soon as it is measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("text", type=Path)
    parser.add_argument("--model", default="demo", help="a float checkpoint")
    parser.add_argument("--backends", default="numpy,onnx")
    parser.add_argument("--precisions", default=",".join(PRECISIONS))
    parser.add_argument("--group-size", type=int, default=128, help="of int4")
    parser.add_argument("--tokens", type=int, default=16_384, help="of the text, at most")
    args = parser.parse_args()
    checkpoint = open_checkpoint(args.model)
    windows = windows_of(checkpoint, args.text.read_text(), args.tokens)
    baseline = checkpoint.weights
    print("| precision | backend | perplexity | change | KL (nats) | same top token | off by |")
    print("|---|---|---|---|---|---|---|")
    float_loss = None
    for precision in ("float32", *args.precisions.split(",")):
        weights = baseline
        if precision != "float32":
            weights = quantize(baseline, precision, group_size=args.group_size)
        for backend, result in measure(checkpoint, args.backends.split(","), weights, windows):
            if isinstance(result, RequestError):
                print(f"| {precision} | {backend} | {result} | | | | |", flush=True)
                continue
            loss = result.loss / result.predicted
            float_loss = loss if float_loss is None else float_loss
            change = 100 * np.expm1(loss - float_loss)
            print(
                f"| {precision} | {backend} | {np.exp(loss):.4f} | {change:+.3f} % "
                f"| {result.kl / result.positions:.2e} | {100 * result.same_top / result.positions:.2f} % "
                f"| {np.sqrt(result.off_square / result.spread_square):.2e} |",
                flush=True,
            )


def windows_of(checkpoint: Checkpoint, text: str, most: int) -> list[list[int]]:
    """The text's token ids cut into contexts; the last, shorter one is left out unless it is the only one."""
    ids = Tokenizer.from_folder(checkpoint.folder).encode(text)[:most]
    size = min(checkpoint.config.n_positions, len(ids))
    return [ids[start : start + size] for start in range(0, len(ids) - size + 1, size)]


def measure(
    checkpoint: Checkpoint, names: list[str], weights: Weights, windows: list[list[int]]
) -> list[tuple[str, Sums | RequestError]]:
    """Read every window on every backend, on the dequantized reference and in float32, and compare."""
    results: list[tuple[str, Sums | RequestError]] = []
    tokenizer = Tokenizer.from_folder(checkpoint.folder)
    reference = dequantize(weights)
    with ExitStack() as stack:

        def model(name: str, weights: Weights) -> GPT2:
            return stack.enter_context(GPT2(create_backend(name, weights), tokenizer))

        running: list[tuple[GPT2, Sums]] = []
        for name in names:
            try:
                running.append((model(name, weights), Sums()))
                results.append((name, running[-1][1]))
            except RequestError as error:
                results.append((name, error))
        exact, dequantized = model("numpy", checkpoint.weights), model("numpy", reference)
        for ids in windows:
            want = exact.logits(ids)
            should = want if reference is weights else dequantized.logits(ids)
            for one, sums in running:
                sums.add(ids, one.logits(ids), want, should)
    return results


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """In float64, so that small differences are the backends' own."""
    x = logits.astype(np.float64)
    x -= x.max(1, keepdims=True)
    return x - np.log(np.exp(x).sum(1, keepdims=True))


if __name__ == "__main__":
    main()
