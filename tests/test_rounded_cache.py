"""What is rounded on loading is kept, and nothing that is damaged, cut short or foreign is ever taken."""

import errno
import json
import os
import re
import subprocess
import sys
import time

import numpy as np
import pytest

from gpt2core import GPT2, CheckpointWarning
from gpt2core.checkpoint import open as opening
from gpt2core.checkpoint import rounded
from gpt2core.checkpoint.rounded import round_or_read
from gpt2core.cli import main
from gpt2core.quantization import rounding
from gpt2core.testing import random_checkpoint, random_config, random_weights

WEIGHTS = random_weights(random_config())


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("GPT2CORE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(rounded, "KEEP_FROM_S", 0.0)
    return tmp_path / "cache" / "rounded"


@pytest.fixture
def counted(monkeypatch):
    calls = []
    whole = rounding.quantize

    def quantize(weights, precision, **options):
        calls.append(precision)
        return whole(weights, precision, **options)

    monkeypatch.setattr(rounding, "quantize", quantize)
    return calls


def assert_equal(got, want):
    assert got.precision == want.precision
    assert got.config == want.config
    for (name, a), (other, b) in zip(got.named(), want.named(), strict=True):
        assert (name, a.dtype) == (other, b.dtype)
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("precision", rounding.PRECISIONS)
def test_the_second_time_reads_the_numbers_of_the_first(cache, counted, precision):
    want = rounding.quantize(WEIGHTS, precision)
    counted.clear()
    for _ in range(2):
        assert_equal(round_or_read(WEIGHTS, precision), want)
    assert counted == [precision]
    [folder] = cache.iterdir()
    assert sorted(path.name for path in folder.iterdir()) == [
        "config.json",
        "digests.json",
        "model.safetensors",
    ]
    assert folder.stat().st_mode & 0o077 == 0


def test_other_weights_configurations_precisions_and_versions_are_kept_apart(cache, counted, monkeypatch):
    import dataclasses

    other_bits = WEIGHTS.wte.copy()
    other_bits[0, 0] = np.nextafter(other_bits[0, 0], np.float32(9))
    round_or_read(WEIGHTS, "int8")
    round_or_read(dataclasses.replace(WEIGHTS, wte=other_bits, lm_head=other_bits), "int8")
    round_or_read(
        dataclasses.replace(WEIGHTS, config=dataclasses.replace(WEIGHTS.config, layer_norm_epsilon=1e-3)),
        "int8",
    )
    round_or_read(WEIGHTS, "bfloat16")
    monkeypatch.setattr(rounding, "VERSION", rounding.VERSION + 1)
    round_or_read(WEIGHTS, "int8")
    assert len(counted) == len(list(cache.iterdir())) == 5


def test_a_model_is_rounded_once_and_its_text_stays(cache, counted, tmp_path):
    folder = random_checkpoint(tmp_path / "model")
    texts = []
    for _ in range(2):
        with GPT2.from_pretrained(folder, precision="int4", backend="numpy") as model:
            texts.append(model.generate("Once", max_new_tokens=8).token_ids)
    assert texts[0] == texts[1]
    assert counted == ["int4"]


def test_what_is_rounded_at_once_is_not_kept(cache, counted, monkeypatch):
    monkeypatch.setattr(rounded, "KEEP_FROM_S", 60.0)
    round_or_read(WEIGHTS, "int8")
    assert not cache.exists()


def test_a_cache_that_may_only_be_read_is_read(cache, counted, monkeypatch):
    def refuse(*args):
        raise PermissionError(errno.EROFS, os.strerror(errno.EROFS))

    round_or_read(WEIGHTS, "int8")
    monkeypatch.setattr(os, "utime", refuse)
    round_or_read(WEIGHTS, "int8")
    assert counted == ["int8"]


# Damage


def damage(what, folder):
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    match what:
        case "a bit":
            data[-5] ^= 1
            path.write_bytes(data)
        case "cut short":
            path.write_bytes(data[: len(data) // 2])
        case "empty":
            path.write_bytes(b"")
        case "gone":
            path.unlink()
        case "no digests":
            (folder / "digests.json").write_text("{")
        case "another config":
            config = json.loads((folder / "config.json").read_text())
            (folder / "config.json").write_text(json.dumps(config | {"n_head": 1}))
        case "others may write":
            folder.chmod(0o777)


@pytest.mark.parametrize(
    "what", ["a bit", "cut short", "empty", "gone", "no digests", "another config", "others may write"]
)
def test_what_is_damaged_is_rounded_anew_and_mended(cache, counted, what):
    want = round_or_read(WEIGHTS, "int8")
    [folder] = cache.iterdir()
    want = rounding.quantize(WEIGHTS, "int8")  # not mapped from what is damaged below
    counted.clear()
    damage(what, folder)
    for _ in range(2):
        assert_equal(round_or_read(WEIGHTS, "int8"), want)
    assert counted == ["int8"]
    assert [path.name for path in cache.iterdir()] == [folder.name]


def test_a_full_disk_costs_a_warning_and_leaves_nothing(cache, monkeypatch):
    def full(*args, **options):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(rounded, "save_checkpoint", full)
    with pytest.warns(
        CheckpointWarning, match=r"not kept for the next time: .*No space left on device; make"
    ):
        got = round_or_read(WEIGHTS, "int8")
    assert_equal(got, rounding.quantize(WEIGHTS, "int8"))
    assert list(cache.iterdir()) == []


def test_a_disk_that_fills_while_writing_leaves_no_half_of_a_model(cache, monkeypatch):
    writing = opening.write_safetensors

    def half(file, tensors):
        writing(file, dict(list(tensors.items())[:3]))
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(opening, "write_safetensors", half)
    with pytest.warns(CheckpointWarning, match="not kept"):
        round_or_read(WEIGHTS, "int8")
    assert list(cache.iterdir()) == []


def test_a_cache_folder_that_is_a_file_costs_a_warning(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("GPT2CORE_CACHE", str(tmp_path / "file"))
    monkeypatch.setattr(rounded, "KEEP_FROM_S", 0.0)
    with pytest.warns(CheckpointWarning, match="not kept"):
        assert round_or_read(WEIGHTS, "int8").precision == "int8"


def test_only_the_last_used_are_kept_and_what_was_abandoned_is_removed(cache, monkeypatch):
    monkeypatch.setattr(rounded, "MOST_KEPT", 2)
    models = [random_weights(random_config(), seed=seed) for seed in range(3)]
    folders = [cache / rounded._key(weights, "int8") for weights in models]
    for i in range(2):
        round_or_read(models[i], "int8")
        os.utime(folders[i], (i, i))
    round_or_read(models[0], "int8")  # used again: now the younger
    for name, changed_s in ((".old.1", 0), (".fresh.1", time.time())):
        (cache / name).mkdir()
        os.utime(cache / name, (changed_s, changed_s))
    round_or_read(models[2], "int8")
    assert set(cache.iterdir()) == {folders[0], folders[2], cache / ".fresh.1"}


# Processes


CODE = """
import sys, time
from gpt2core import GPT2
from gpt2core.checkpoint import rounded
rounded.KEEP_FROM_S = 0.0
while not __import__("os").path.exists(sys.argv[2]):
    time.sleep(0.001)
with GPT2.from_pretrained(sys.argv[1], precision="int4", backend="numpy") as model:
    print(model.generate("Once", max_new_tokens=12).token_ids)
"""


def test_processes_at_once_give_one_model_and_the_same_text(cache, tmp_path):
    folder = random_checkpoint(tmp_path / "model")
    go = tmp_path / "go"
    running = [
        subprocess.Popen(
            [sys.executable, "-c", CODE, str(folder), str(go)], stdout=subprocess.PIPE, text=True
        )
        for _ in range(4)
    ]
    time.sleep(1)
    go.touch()
    texts = [process.communicate(timeout=120)[0] for process in running]
    assert [process.returncode for process in running] == [0] * 4
    assert len(set(texts)) == 1
    assert len(list(cache.iterdir())) == 1


def test_a_process_that_is_killed_while_it_writes_spoils_nothing(cache, tmp_path):
    folder = random_checkpoint(tmp_path / "model")
    go = tmp_path / "go"
    go.touch()
    killing = CODE.replace(
        "rounded.KEEP_FROM_S = 0.0",
        "rounded.KEEP_FROM_S = 0.0\nimport os, signal\n"
        "rounded._digest = lambda path: os.kill(os.getpid(), signal.SIGKILL)",
    )
    died = subprocess.run([sys.executable, "-c", killing, str(folder), str(go)], capture_output=True)
    assert died.returncode == -9
    [left] = cache.iterdir()
    assert left.name.startswith(".")
    done = subprocess.run([sys.executable, "-c", CODE, str(folder), str(go)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len([path for path in cache.iterdir() if not path.name.startswith(".")]) == 1


def test_the_command_shows_the_cache_and_clears_it(cache, capsys):
    round_or_read(WEIGHTS, "int8")
    (cache.parent / "chat").mkdir()
    (cache.parent / "chat/history").write_text("Hi\n")
    assert main(["cache", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["folder"] == str(cache.parent)
    assert document["nbytes"]["rounded"] > 1000
    assert document["nbytes"]["chat"] == 3
    assert main(["cache", "--clear", "rounded"]) == 0
    assert re.search(r"^rounded +0 bytes ", capsys.readouterr().out, re.MULTILINE)
    assert not cache.exists()
    assert (cache.parent / "chat/history").exists()
    assert main(["cache", "--clear", "all"]) == 0
    assert not (cache.parent / "chat").exists()
    assert main(["cache", "--clear", "rounds"]) == 2
    assert "did you mean 'rounded'?" in capsys.readouterr().err


def test_every_part_of_the_cache_that_the_library_uses_is_shown():
    from pathlib import Path

    import gpt2core
    from gpt2core.backends.recommendation import FOLDER
    from gpt2core.cli.cache import PARTS

    texts = [path.read_text() for path in Path(gpt2core.__file__).parent.rglob("*.py")]
    used = {name for text in texts for name in re.findall(r"cache_folder\(\"(\w+)\"\)", text)}
    assert used | {rounded.PART, FOLDER} == set(PARTS)
