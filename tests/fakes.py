"""A scripted backend and a tokenizer of single bytes, for tests of everything above the backend.

The backend computes nothing: its logits are a function of the row's whole history, which it reads from its
own cache. So a mixed-up slot, a wrong start or a chunk out of order shows in the tokens.
"""

# V vocabulary, M wanted logits

import zlib
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Inner

from gpt2core.batch import Batch
from gpt2core.config import ModelConfig
from gpt2core.tokenizer.tokenizer import Tokenizer

END = 256
LogitsOf = Callable[[tuple[int, ...], int], np.ndarray]


def config(context: int = 64, *, vocab_size: int = 257, eos: tuple[int, ...] = (END,)) -> ModelConfig:
    return ModelConfig(
        vocab_size=vocab_size, n_positions=context, n_embd=4, n_layer=1, n_head=1, eos_token_ids=eos
    )


def byte_tokenizer() -> Tokenizer:
    """Token id = byte; 256 is `<|endoftext|>`."""
    spelling = [chr(b) for b in range(256)]
    others = iter(range(256, 1000))
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    for b in range(256):
        if b not in printable:  # as GPT-2 spells bytes that are no printable character of Latin-1
            spelling[b] = chr(next(others))
    inner = Inner(models.BPE({token: b for b, token in enumerate(spelling)}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens([AddedToken("<|endoftext|>", special=True, normalized=False)])
    return Tokenizer(inner)


def hashed(history: tuple[int, ...], vocab_size: int) -> np.ndarray:
    """Logits that depend on every token of the history and on nothing else."""
    rng = np.random.default_rng(zlib.crc32(np.array(history, np.int32).tobytes()))
    return 3 * rng.standard_normal(vocab_size, np.float32)


def endless(history: tuple[int, ...], vocab_size: int) -> np.ndarray:
    """`hashed`, without the end of text."""
    logits = hashed(history, vocab_size)
    logits[END] = -100
    return logits


def scripted(continuations: Mapping[Sequence[int], Sequence[int]]) -> LogitsOf:
    """After a prompt comes its continuation, with near certainty; after that the end of text."""
    scripts = {tuple(prompt): tuple(tokens) for prompt, tokens in continuations.items()}

    def logits_of(history: tuple[int, ...], vocab_size: int) -> np.ndarray:
        logits = np.zeros(vocab_size, np.float32)
        for prompt, tokens in scripts.items():
            if history[: len(prompt)] == prompt:
                done = len(history) - len(prompt)
                logits[tokens[done] if done < len(tokens) else END] = 50
        return logits

    return logits_of


class FakeCache:
    def __init__(self, slots: int, capacity: int) -> None:
        self.slots = slots
        self.capacity = capacity
        self.nbytes = 0
        self.histories: list[list[int]] = [[] for _ in range(slots)]


class FakeBackend:
    """Satisfies `Backend`.

    Args:
        config: what it pretends to be.
        logits_of: history, vocabulary size -> (V,) logits.
        before: is called with each batch before anything is committed; may raise, wait, or cancel somebody.
        after: is called with each batch and its logits, (M, V), and may change them.
    """

    name = "fake"

    def __init__(
        self,
        config: ModelConfig,
        logits_of: LogitsOf = hashed,
        *,
        before: Callable[[Batch], None] | None = None,
        after: Callable[[Batch, np.ndarray], None] | None = None,
    ) -> None:
        self.config = config
        self.logits_of = logits_of
        self.before = before
        self.after = after
        self.batches: list[Batch] = []
        self.caches: list[FakeCache] = []
        self.closed = 0

    def new_cache(self, slots: int, capacity: int) -> FakeCache:
        self.caches.append(FakeCache(slots, capacity))
        return self.caches[-1]

    def forward(self, batch: Batch, cache: FakeCache) -> np.ndarray:
        self.batches.append(batch)
        batch.check(vocab_size=self.config.vocab_size, slots=cache.slots, capacity=cache.capacity)
        if self.before is not None:
            self.before(batch)
        tokens = batch.tokens.tolist()
        histories, owners, first = [], [], 0
        for length, start, slot in zip(batch.lengths, batch.starts, batch.slots, strict=True):
            cached = cache.histories[slot]
            assert start <= len(cached), f"slot {slot} holds {len(cached)} tokens, the row starts at {start}"
            histories.append([*cached[:start], *tokens[first : first + length]])
            owners += [(len(histories) - 1, start + i + 1) for i in range(length)]
            first += length
        logits = np.empty((len(batch.logits_at), self.config.vocab_size), np.float32)
        for m, at in enumerate(batch.logits_at):
            row, seen = owners[at]
            logits[m] = self.logits_of(tuple(histories[row][:seen]), self.config.vocab_size)
        if self.after is not None:
            self.after(batch, logits)
        for slot, history in zip(batch.slots, histories, strict=True):
            cache.histories[slot] = history
        return logits

    def close(self) -> None:
        self.closed += 1
