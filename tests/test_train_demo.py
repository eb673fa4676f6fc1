"""The training script: any text folder in, a checkpoint out, the same one after an interruption."""

import gzip
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from gpt2core import GPT2

SCRIPT = Path(__file__).parents[1] / "examples" / "train_demo.py"


@pytest.fixture(scope="module")
def train_demo():
    spec = importlib.util.spec_from_file_location("train_demo", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["train_demo"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    sentences = "The fox ran to the hill. A king sat under the tree. Nobody knew his name. "
    book = "\n\n".join(f"STORY {i}\n\n{sentences * 20}\n\n{sentences * (i + 1)}" for i in range(9))
    (folder / "first.txt").write_text(book)
    (folder / "second.txt.gz").write_bytes(gzip.compress(book.replace("fox", "wolf").encode()))
    (folder / "kept-out.txt").write_text(book.replace("fox", "bear"))
    return folder


def arguments(texts, out):
    # 12 steps of 2 windows; the last steps with windows of 512
    return [
        sys.executable, SCRIPT, texts, out, "--tokens", str(12 * 512), "--rows", "2", "--eval-every", "4",
        "--held-out-book", "kept-out", "--threads", "1",
    ]  # fmt: skip


def test_an_interrupted_run_ends_with_the_same_model_and_the_model_runs(texts, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    subprocess.run(arguments(texts, whole), check=True, capture_output=True)

    first = subprocess.Popen(arguments(texts, parts), stdout=subprocess.PIPE, text=True)
    for line in first.stdout:
        if '"step": 4' in line:
            break
    while not (parts / "resume.pt").exists():  # it is written right after that line
        assert first.poll() is None
    first.kill()
    first.wait()
    first.stdout.close()
    assert not (parts / "model.safetensors").exists()
    second = subprocess.run(arguments(texts, parts), check=True, capture_output=True, text=True)
    assert re.search(r"resuming at step (4|8) of 12", second.stdout)
    assert (parts / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()

    log = [json.loads(line) for line in (whole / "training_log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in log[:-1]] == [4, 8, 12]
    assert log[2]["train_loss"] < log[0]["train_loss"]
    figures = log[-1]["final_bits_per_byte"]
    assert set(figures) == {"tails", "books"}
    with GPT2.from_pretrained(whole) as model:
        assert len(model.generate("The fox", max_new_tokens=5).token_ids) == 5
        assert (model.config.vocab_size, model.config.n_positions) == (4096, 512)


def test_an_empty_folder_and_an_unknown_book_are_said(texts, tmp_path):
    for arg, text in ((tmp_path, "holds no *.txt"), (texts, "no such book to hold out: nobody")):
        command = [sys.executable, SCRIPT, arg, tmp_path / "out", "--held-out-book", "nobody"]
        run = subprocess.run(
            command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )
        assert run.returncode == 1
        assert text in run.stderr
        assert "Traceback" not in run.stderr


def test_stories_are_cut_at_headings_and_headings_dropped(train_demo):
    book = "THE FOX\n\nA fox\nran.\n\nHe fell.\n\nII.\n\nTHE KING'S 3 SONS\n\nA king sat.\n"
    assert train_demo.split_stories(book) == ["A fox\nran.\n\nHe fell.", "A king sat."]


def test_the_held_out_tail_is_the_end_and_nothing_is_lost_or_in_both(train_demo):
    stories = ["One. " * 50 + "End.", "Two. " * 50 + "End.", "Short."]
    kept, held = train_demo.hold_out_tail(stories, 0.2)
    total = sum(map(len, stories))
    assert 0.2 * total <= sum(map(len, held)) <= 0.2 * total + 10
    assert kept[0] == stories[0]
    assert " ".join([*kept[1:], *held]) == " ".join(stories[1:])


def test_every_window_of_an_epoch_is_seen_once_and_steps_repeat_exactly(train_demo):
    import torch

    tokens = torch.arange(256 * 43 + 700)
    tokens[tokens % 900 == 0] = 0
    windows = train_demo.Windows(tokens, 0, seed=3)
    per_epoch = (len(tokens) - 512) // 256
    inputs, targets = windows.batch(0, per_epoch, 256)
    again, _ = train_demo.Windows(tokens, 0, seed=3).batch(0, per_epoch, 256)
    assert torch.equal(inputs, again)
    assert torch.equal(inputs[:, 1:], targets[:, :-1])
    regular = [row for i, row in enumerate(inputs[:, 5].tolist()) if i % 16]
    assert len(set(regular)) == len(regular)
    starts = [row for i, row in enumerate(inputs[:, 0].tolist()) if i % 16 == 0]
    assert all(start % 900 == 1 for start in starts)
