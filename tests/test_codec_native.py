"""The codec on the demo model: sizes, the same bytes from every build, and the command line."""

import io
import math
import platform
import random
import subprocess
import sys

import numpy as np
import pytest
from expand_golden import PRECISIONS, STORY, golden, load_demo

from gpt2core import GPT2
from gpt2core.codec import compress, expand
from gpt2core.codec.container import Reader
from gpt2core.testing import random_checkpoint

BUILDS = {
    "gcc": ("-O1 -mno-avx512f", "-O1 -march=x86-64", "-O1 -march=haswell -DGPT2CORE_SCALAR"),
    "clang": ("-O1",),
}
if platform.machine() != "x86_64":
    BUILDS = {"cc": ("-O1", "-O1 -DGPT2CORE_SCALAR")}


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_golden_file_is_made_and_read_here(precision):
    with load_demo(precision) as model:
        assert expand(golden(precision), model) == STORY
        assert compress(STORY, model) == golden(precision)


@pytest.mark.parametrize(
    ("compiler", "flags"),
    [(compiler, flags) for compiler, all_flags in BUILDS.items() for flags in all_flags],
)
def test_code_for_other_processors_and_compilers_expands_the_golden_files(compiler, flags, monkeypatch):
    monkeypatch.setenv("GPT2CORE_CC", compiler)
    monkeypatch.setenv("GPT2CORE_CFLAGS", flags)
    for precision in PRECISIONS:
        with load_demo(precision) as model:
            assert expand(golden(precision), model) == STORY


@pytest.mark.parametrize("level", [1, 4, 9])
def test_threads_and_levels_change_nothing_that_comes_back(level):
    data = STORY + "ÄÖÜ\n".encode() + STORY + bytes(range(256)) * 3
    blobs = []
    for threads in (1, 2):
        with load_demo(threads=threads) as model:
            blobs.append(compress(data, model, level=level))
            assert expand(blobs[0], model) == data
    assert blobs[0] == blobs[1]


def test_the_size_is_that_of_the_score():
    text = STORY.decode().replace("king", "queen")
    with load_demo() as model:
        score = model.score(text)
        ids = model.tokenizer.encode(text)
        assert len(ids) < model.config.n_positions
        first = model.logits([model.config.eos_token_ids[0], *ids])[:-1]  # (T, V)
        top = first.max(axis=1)
        log_sums = np.log(np.exp((first - top[:, None]).astype(np.float64)).sum(axis=1)) + top
        bits = (log_sums - first[np.arange(len(ids)), ids]).sum() / math.log(2)
        nbytes = len(compress(text.encode(), model, level=9))
    assert abs(8 * nbytes - bits) <= 0.005 * bits + 8 * 64
    assert 8 * nbytes > -sum(score.logprobs) / math.log(2) * 0.9


def test_a_model_whose_vocabulary_has_ids_without_tokens(tmp_path):
    folder = random_checkpoint(tmp_path / "padded", vocab_size=300, n_positions=32)
    with GPT2.from_pretrained(folder, backend="native") as model:
        data = STORY[:200]
        assert expand(compress(data, model), model) == data


def run(*args, data=None, cwd=None):
    return subprocess.run(
        [sys.executable, "-m", "gpt2core", *map(str, args)],
        input=data,
        capture_output=True,
        cwd=cwd,
        timeout=120,
    )


def test_the_command_line_goes_there_and_back(tmp_path):
    story = tmp_path / "story.txt"
    story.write_bytes(STORY)
    made = run("compress", story, "--level", 2)
    assert made.returncode == 0, made.stderr
    assert made.stdout == b""
    assert b"story.txt.g2c" in made.stderr
    packed = tmp_path / "story.txt.g2c"
    assert len(packed.read_bytes()) < 0.5 * len(STORY)
    again = run("expand", packed)
    assert again.returncode == 2
    assert b"exists" in again.stderr
    story.unlink()
    assert run("expand", packed).returncode == 0
    assert story.read_bytes() == STORY
    piped = run("compress", "-", "--precision", "int8", data=STORY)
    assert Reader(io.BytesIO(piped.stdout)).read_header().precision == "int8"
    assert run("expand", "-", "--precision", "int8", data=piped.stdout).stdout == STORY


def test_a_damaged_file_leaves_no_result_unless_it_is_salvaged(tmp_path):
    packed = tmp_path / "story.g2c"
    with load_demo() as model:
        blob = bytearray(compress(random.Random(0).randbytes(150_000), model))
    blob[len(blob) // 2] ^= 1  # in the second of three blocks
    packed.write_bytes(blob)
    broken = run("expand", packed)
    assert broken.returncode == 1
    assert b"segment" in broken.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["story.g2c"]
    salvaged = run("expand", packed, "--salvage")
    assert salvaged.returncode == 1
    assert b"lost: segment" in salvaged.stderr
    assert 150_000 - 2**16 <= len((tmp_path / "story").read_bytes()) < 150_000 - 2**15


def test_a_name_without_the_suffix_needs_an_output(tmp_path):
    (tmp_path / "story").write_bytes(b"")
    done = run("expand", tmp_path / "story")
    assert done.returncode == 2
    assert b"--output" in done.stderr
