"""Train a small GPT-2 on a folder of stories: the script that made the bundled demo model.

    pip install -c constraints.txt "gpt2core[torch]"
    python examples/train_demo.py TEXT_FOLDER OUT_FOLDER --tokens 20e6

TEXT_FOLDER holds one book a file (`*.txt` or `*.txt.gz`, UTF-8). OUT_FOLDER receives a checkpoint in Hugging
Face layout (`config.json`, `model.safetensors` in float16, `tokenizer.json`), `training_log.jsonl` and
`resume.pt`. Run the same command again after an interruption: it goes on from the last saved step and ends
with the same model.

What it does, and why:

- A *story* is the text between two headings (lines without lower-case letters). Headings are dropped and
  `<|endoftext|>` closes every story, so that the model learns to begin with a first sentence and to end.
- Held out, and never trained on: the last 1 % of every book, and the whole books named by `--held-out-book`.
- Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/) for the blocks' matrices, AdamW for
  embeddings, norms and biases; warm-up, then linear decay to zero.
- bfloat16 products where the processor has them (`--dtype`), float32 weights and sums.
- Windows of 256 tokens for most of the run, then of 512, so that late positions are trained too. One window
  in sixteen starts at the first word of a story, where a user's prompt starts.
"""

# N batch, T tokens, D width, H heads, V vocabulary

import argparse
import gzip
import json
import math
import os
import pathlib
import re
import time
from dataclasses import asdict, dataclass

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor, nn

END_OF_TEXT = "<|endoftext|>"


@dataclass(frozen=True)
class Shape:
    """The model's size, in the words of Hugging Face's `config.json`."""

    vocab_size: int = 4096
    n_positions: int = 512
    n_embd: int = 256
    n_layer: int = 6
    n_head: int = 4


# ---------------------------------------------------------------------------------------------------- text

HEADING = re.compile(r"^[^a-z\n]*[A-Z][^a-z\n]*$")


def read_books(folder: pathlib.Path) -> dict[str, list[str]]:
    """Each file's stories, in order, keyed by the file's name without its endings."""
    books = {}
    for path in sorted([*folder.glob("*.txt"), *folder.glob("*.txt.gz")]):
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        books[path.name.split(".txt")[0]] = split_stories(raw.decode("utf-8"))
    if not books:
        raise SystemExit(f"{folder} holds no *.txt or *.txt.gz file")
    return books


def split_stories(book: str) -> list[str]:
    """Cut a book at its headings; verse in capitals inside a story is rare enough to be cut too."""
    stories: list[list[str]] = [[]]
    for paragraph in re.split(r"\n\s*\n", book.strip()):
        if HEADING.match(paragraph.strip()):
            if stories[-1]:
                stories.append([])
        else:
            stories[-1].append(paragraph.strip())
    return ["\n\n".join(story) for story in stories if story]


def hold_out_tail(stories: list[str], fraction: float) -> tuple[list[str], list[str]]:
    """Split one book's stories so that the last `fraction` of its characters is held out."""
    kept, held, left = list(stories), [], round(fraction * sum(map(len, stories)))
    while left > 0 and kept:
        story = kept.pop()
        cut = max(0, len(story) - left)
        cut = story.rfind(". ", 0, cut) + 2 if cut else 0  # at a sentence's end
        held.insert(0, story[cut:])
        left -= len(story) - cut
        if cut:
            kept.append(story[:cut].rstrip())
    return kept, held


def train_tokenizer(stories: list[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE, the same construction as GPT-2's."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(stories, trainer)
    return tokenizer


def to_tokens(tokenizer: Tokenizer, stories: list[str]) -> Tensor:
    """All stories as one row of token ids, each closed by the end-of-text token."""
    end = tokenizer.token_to_id(END_OF_TEXT)
    encodings = tokenizer.encode_batch(stories, add_special_tokens=False)
    return torch.tensor([i for e in encodings for i in (*e.ids, end)], dtype=torch.int64)


class Windows:
    """Training windows, a pure function of (seed, step), so that a resumed run sees the same ones."""

    def __init__(self, tokens: Tensor, end: int, seed: int) -> None:
        self.tokens, self.seed = tokens, seed
        starts = torch.nonzero(tokens[:-1024] == end).flatten() + 1
        self.story_starts = starts.numpy()

    def batch(self, first: int, rows: int, length: int) -> tuple[Tensor, Tensor]:
        """Rows `first ... first + rows` of an endless shuffled walk: inputs and targets (N, T)."""
        per_epoch = (len(self.tokens) - 2 * length) // length
        offsets = []
        for row in range(first, first + rows):
            epoch, index = divmod(row, per_epoch)
            rng = np.random.default_rng((self.seed, length, epoch))
            shift = int(rng.integers(length))  # another cut of the text in each epoch
            if row % 16 == 0:
                offset = int(np.random.default_rng((self.seed, row)).choice(self.story_starts))
            else:
                offset = shift + length * int(self._order(epoch, length, per_epoch)[index])
            offsets.append(offset)
        window = torch.stack([self.tokens[o : o + length + 1] for o in offsets])
        return window[:, :-1].contiguous(), window[:, 1:].contiguous()

    def _order(self, epoch: int, length: int, per_epoch: int) -> np.ndarray:
        key = (epoch, length)
        if getattr(self, "_key", None) != key:
            self._key = key
            self._permutation = np.random.default_rng((self.seed, length, epoch, 1)).permutation(per_epoch)
        return self._permutation


# --------------------------------------------------------------------------------------------------- model


class Conv1D(nn.Module):
    """Hugging Face's name for GPT-2's linear layer: the weight lies (in, out)."""

    def __init__(self, inputs: int, outputs: int, std: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inputs, outputs) * std)
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """(N, T, inputs) -> (N, T, outputs)."""
        return x @ self.weight + self.bias


class Block(nn.Module):
    """One transformer block, with the parameter names of Hugging Face's GPT-2."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        d, small = shape.n_embd, 0.02 / math.sqrt(2 * shape.n_layer)
        self.heads = shape.n_head
        self.ln_1 = nn.LayerNorm(d)
        self.attn = nn.ModuleDict({"c_attn": Conv1D(d, 3 * d, 0.02), "c_proj": Conv1D(d, d, small)})
        self.ln_2 = nn.LayerNorm(d)
        self.mlp = nn.ModuleDict({"c_fc": Conv1D(d, 4 * d, 0.02), "c_proj": Conv1D(4 * d, d, small)})

    def forward(self, x: Tensor) -> Tensor:
        """(N, T, D) -> (N, T, D)."""
        n, t, d = x.shape
        qkv = self.attn["c_attn"](self.ln_1(x)).view(n, t, 3, self.heads, d // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (N, H, T, D/H) each
        scores = q @ k.mT / math.sqrt(d // self.heads)  # (N, H, T, T)
        future = torch.full((t, t), -torch.inf, dtype=scores.dtype).triu(1)
        y = (scores + future).softmax(-1).to(v.dtype) @ v  # on a CPU in bfloat16 faster than the fused kernel
        x = x + self.attn["c_proj"](y.transpose(1, 2).reshape(n, t, d))
        return x + self.mlp["c_proj"](F.gelu(self.mlp["c_fc"](self.ln_2(x)), approximate="tanh"))


class GPT2(nn.Module):
    """GPT-2 with a tied head; `state_dict()` has Hugging Face's keys, without the `transformer.` prefix."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.wte = nn.Embedding(shape.vocab_size, shape.n_embd)
        self.wpe = nn.Embedding(shape.n_positions, shape.n_embd)
        nn.init.normal_(self.wte.weight, std=0.02)
        nn.init.normal_(self.wpe.weight, std=0.01)
        self.h = nn.ModuleList(Block(shape) for _ in range(shape.n_layer))
        self.ln_f = nn.LayerNorm(shape.n_embd)

    def forward(self, tokens: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
        """Cross-entropy of `targets` (N, T) in nats: their mean, or each of them with reduction="none"."""
        x = self.wte(tokens) + self.wpe.weight[: tokens.shape[1]]  # (N, T, D)
        for block in self.h:
            x = block(x)
        logits = self.ln_f(x) @ self.wte.weight.T  # (N, T, V)
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction=reduction)


# ------------------------------------------------------------------------------------------------ training


def make_optimizers(model: GPT2, args: argparse.Namespace) -> list[torch.optim.Optimizer]:
    """Muon for the blocks' matrices, AdamW for the rest."""
    matrices = [p for p in model.h.parameters() if p.ndim == 2]
    chosen = set(map(id, matrices))
    rest = [p for p in model.parameters() if id(p) not in chosen]
    muon = torch.optim.Muon(
        matrices, lr=args.lr, weight_decay=args.weight_decay, adjust_lr_fn="match_rms_adamw", nesterov=True
    )
    adamw = torch.optim.AdamW(rest, lr=args.lr, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    return [muon, adamw]


@torch.no_grad()
def bits_per_byte(
    model: nn.Module, tokens: Tensor, text_bytes: int, length: int, autocast: torch.autocast
) -> float:
    """Bits per UTF-8 byte of `tokens`, windows of `length` that overlap by half: each token has context."""
    model.eval()
    total, stride = 0.0, length // 2
    for start in range(0, len(tokens) - 1, stride):
        window = tokens[max(0, start - stride) : start + stride + 1]
        fresh = min(stride, len(tokens) - 1 - start)
        with autocast:
            losses = model(window[None, :-1], window[None, 1:], reduction="none")
        total += float(losses[-fresh:].double().sum())
    model.train()
    return total / math.log(2) / text_bytes


def save_checkpoint(
    folder: pathlib.Path, state: dict[str, Tensor], shape: Shape, tokenizer: Tokenizer
) -> None:
    """Write Hugging Face's layout, float16."""
    end = tokenizer.token_to_id(END_OF_TEXT)
    config = {
        "architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", **asdict(shape), "n_inner": None,
        "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5, "scale_attn_weights": True,
        "tie_word_embeddings": True, "bos_token_id": end, "eos_token_id": end, "dtype": "float16",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": shape.n_positions,
        "bos_token": END_OF_TEXT, "eos_token": END_OF_TEXT, "clean_up_tokenization_spaces": False,
    }  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    half = {f"transformer.{name}": t.detach().to(torch.float16).contiguous() for name, t in state.items()}
    save_file(half, folder / "model.safetensors", metadata={"format": "pt"})


def main() -> None:
    """Train, log, save."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("texts", type=pathlib.Path)
    parser.add_argument("out", type=pathlib.Path)
    parser.add_argument("--tokens", type=float, default=20e6, help="tokens to train on, in all")
    parser.add_argument("--rows", type=int, default=8, help="windows of 256 tokens per step")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--weight-decay", type=float, default=0.05)
    parser.add_argument("--late", type=float, default=0.15, help="share of the tokens in windows of 512")
    parser.add_argument("--held-out-book", action="append", default=[], help="a file's name without endings")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    parser.add_argument(
        "--compile", action="store_true", help="torch.compile the model (needs a C++ compiler)"
    )
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--eval-every", type=int, default=500, help="steps")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    args.out.mkdir(parents=True, exist_ok=True)

    books, shape = read_books(args.texts), Shape()
    unknown = set(args.held_out_book) - set(books)
    if unknown:
        raise SystemExit(f"no such book to hold out: {', '.join(sorted(unknown))}")
    whole = [story for name in args.held_out_book for story in books.pop(name)]
    split = [hold_out_tail(stories, 0.01) for stories in books.values()]
    kept = [story for stories, _ in split for story in stories]
    held = {"tails": [story for _, tail in split for story in tail], "books": whole}

    tokenizer_file = args.out / "tokenizer.json"
    if not tokenizer_file.exists():
        train_tokenizer(kept, shape.vocab_size).save(str(tokenizer_file))
    tokenizer = Tokenizer.from_file(str(tokenizer_file))
    tokens = to_tokens(tokenizer, kept)
    held_tokens = {k: to_tokens(tokenizer, v) for k, v in held.items() if v}
    held_bytes = {k: sum(len(s.encode()) for s in v) for k, v in held.items()}
    windows = Windows(tokens, tokenizer.token_to_id(END_OF_TEXT), args.seed)
    print(
        f"{len(kept)} stories, {len(tokens):,} tokens to train on; held out: {held_bytes} bytes", flush=True
    )

    model = GPT2(shape)
    optimizers = make_optimizers(model, args)
    step_tokens = args.rows * 256
    steps = int(args.tokens // step_tokens)
    late_from, step = int(steps * (1 - args.late)), 0
    resume_file = args.out / "resume.pt"
    if resume_file.exists():
        saved = torch.load(resume_file, weights_only=True)
        model.load_state_dict(saved["model"])
        for optimizer, state in zip(optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        step = saved["step"]
        print(f"resuming at step {step} of {steps}", flush=True)
    run = torch.compile(model, dynamic=False) if args.compile else model
    autocast = torch.autocast("cpu", dtype=torch.bfloat16, enabled=args.dtype == "bfloat16")

    def evaluate(name: str, length: int, precision: torch.autocast) -> float:
        return bits_per_byte(model, held_tokens[name], held_bytes[name], length, precision)

    def save_resume() -> None:
        state = {"model": model.state_dict(), "optimizers": [o.state_dict() for o in optimizers],
                 "step": step}  # fmt: skip
        torch.save(state, resume_file.with_suffix(".tmp"))
        os.replace(resume_file.with_suffix(".tmp"), resume_file)

    log = (args.out / "training_log.jsonl").open("a")
    began, began_step, recent = time.perf_counter(), step, []
    while step < steps:
        warm = min(1.0, (step + 1) / 200)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = args.lr * warm * (1 - step / steps)
        length = 256 if step < late_from else 512
        rows = step_tokens // length
        inputs, targets = windows.batch(step * rows, rows, length)
        with autocast:
            loss = run(inputs, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        step += 1
        recent.append(loss.item())
        if step % args.eval_every == 0 or step == steps:
            speed = (step - began_step) * step_tokens / (time.perf_counter() - began)
            row = {"step": step, "tokens": step * step_tokens, "train_loss": round(float(np.mean(recent)), 4),
                   "bits_per_byte": round(evaluate("tails", length, autocast), 4),
                   "tokens_per_s": round(speed)}  # fmt: skip
            print(json.dumps(row), flush=True)
            print(json.dumps(row), file=log, flush=True)
            save_resume()
            recent = []

    rounded = {name: value.to(torch.float16).float() for name, value in model.state_dict().items()}
    model.load_state_dict(rounded)
    exact = torch.autocast("cpu", enabled=False)
    figures = {name: round(evaluate(name, shape.n_positions, exact), 4) for name in held_tokens}
    print(json.dumps({"final_bits_per_byte": figures}), flush=True)
    print(json.dumps({"final_bits_per_byte": figures}), file=log, flush=True)
    save_checkpoint(args.out, rounded, shape, tokenizer)


if __name__ == "__main__":
    main()
