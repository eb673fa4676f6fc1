"""One engine of the comparison in a process of its own, and how it may die."""

import sys
import time
from types import SimpleNamespace
from typing import ClassVar

import pytest
from bench_fakes import FAKE, fake_peers

from gpt2core.bench import engines
from gpt2core.bench.compare import plan, worker
from gpt2core.bench.compare.worker import EngineSetup, Workload
from gpt2core.bench.engines import engine_process
from gpt2core.bench.records import Cell
from gpt2core.testing import random_checkpoint

CONTEXT = 96
WORKLOAD = Workload.for_model(257, CONTEXT, new_tokens=8)
ONCE = list(map(Cell, plan.ONCE))
CELLS = [
    *ONCE,
    Cell("prefill_s", length=32),
    Cell("decode_tok_s", batch=2),
    Cell("step_s", position=10),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return random_checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def fake(tmp_path, monkeypatch):
    return fake_peers(tmp_path, monkeypatch)


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("GPT2CORE_CACHE", str(tmp_path / "cache"))


def measure(engine, folder, cells=CELLS, timeout_s=120.0):
    found = worker.measure(
        engine, checkpoint=folder, work=folder, cells=cells, workload=WORKLOAD, threads=1, timeout_s=timeout_s
    )
    return {Cell(line["measure"], line["batch"], line["length"], line["position"]): line for line in found}


# ---------------------------------------------------------------------------------- one engine, one process


@pytest.mark.parametrize("name", ["numpy", "torch"])
def test_each_cell_of_an_engine_has_one_plausible_value(folder, name):
    found = measure(EngineSetup.own(name), folder)
    assert list(found) == CELLS
    assert {line["status"] for line in found.values()} == {"ok"}
    value = {cell.measure: line["value"] for cell, line in found.items()}
    assert 0 < value["ttft_s"] < value["start_s"] + value["load_s"] < value["first_token_cold_s"]
    assert 0 <= value["compile_s"] < value["first_token_cold_s"]  # its own arithmetic: the next test
    assert value["peak_memory_nbytes"] > 10_000_000
    decode = found[Cell("decode_tok_s", batch=2)]
    assert decode["tokens"] == 16
    assert value["decode_tok_s"] == pytest.approx(16 / min(decode["samples_s"]))
    assert len(decode["samples_s"]) == worker.REPEATS
    assert value["prefill_s"] == min(found[Cell("prefill_s", length=32)]["samples_s"])
    assert found[Cell("prefill_s", length=32)]["tokens"] == 32
    assert decode["settings"]["threads"] == 1


def test_compiling_is_what_the_first_call_takes_beyond_a_warm_one():
    class Engine:
        settings: ClassVar = {}
        calls = 0

        def prefill(self, ids):
            self.calls += 1
            if self.calls == 1:
                time.sleep(0.2)

    lines = []
    job = {"prompt": [1], "packages": [], "cells": [{"measure": "compile_s"}]}
    engine_process.measure(
        SimpleNamespace(load=lambda _: Engine()), job, lambda **line: lines.append(line), time.monotonic()
    )
    (value,) = [line["value"] for line in lines if line.get("measure") == "compile_s"]
    assert value > 0.19


def test_the_units_are_those_of_the_measures(folder):
    units = {cell.measure: line["unit"] for cell, line in measure(EngineSetup.own("numpy"), folder).items()}
    assert units.pop("decode_tok_s") == "tok/s"
    assert units.pop("peak_memory_nbytes") == "bytes"
    assert set(units.values()) == {"s"}


def test_transformers_here_measures_single_steps_too(folder):
    found = measure(EngineSetup.peer("transformers"), folder, [Cell("step_s", position=10), Cell("ttft_s")])
    assert [line["status"] for line in found.values()] == ["ok", "ok"]
    assert set(found[Cell("step_s", position=10)]["settings"]["versions"]) == {"torch", "transformers"}


def test_an_engine_runs_in_an_interpreter_that_has_no_gpt2core(folder, fake, tmp_path):
    bare = tmp_path / "bare-python"
    bare.write_text(f'#!/bin/sh\nexec {sys.executable} -S -E "$@"\n')
    bare.chmod(0o755)
    check = "import importlib.util\n    assert importlib.util.find_spec('gpt2core') is None"
    found = measure(fake(goes_wrong=check, python=str(bare)), folder)
    assert found[Cell("ttft_s")]["status"] == "ok"
    assert found[Cell("ttft_s")]["settings"]["has_gpt2core"] is False


def test_what_an_interface_lacks_is_skipped_with_the_reason(folder, fake):
    line = measure(fake(), folder)[Cell("step_s", position=10)]
    assert (line["status"], line["value"]) == ("skipped", None)
    assert line["error"] == "its interface has no single decode step"


def test_a_missing_package_is_a_skip_that_says_how_to_get_it(folder, fake):
    found = measure(fake(goes_wrong="import not_there_at_all", packages=("not_there_at_all",)), folder)
    assert {line["status"] for cell, line in found.items() if cell.measure != "start_s"} == {"skipped"}
    assert "not_there_at_all is not installed in " in found[Cell("load_s")]["error"]
    assert "pip install fake, or name its interpreter with --peer-python" in found[Cell("load_s")]["error"]


def test_a_missing_package_that_is_not_the_engines_own_is_a_failure(folder, fake):
    line = measure(fake(goes_wrong="import not_there_at_all"), folder)[Cell("load_s")]
    assert (line["status"], line["error"][:19]) == ("failed", "ModuleNotFoundError")


def test_a_crash_keeps_what_was_measured_and_names_the_signal(folder, fake):
    text = FAKE.replace("return [[1]", "os.kill(os.getpid(), signal.SIGKILL); return [[1]")
    found = measure(fake(text=text), folder)
    assert found[Cell("ttft_s")]["status"] == "ok"
    for cell in CELLS[-3:]:
        assert found[cell]["status"] == "failed"
        assert found[cell]["error"].startswith("its process was killed by SIGKILL")


def test_an_exit_code_comes_with_the_last_words(folder, fake):
    line = measure(fake(goes_wrong="print('no such device'); os._exit(3)"), folder)[Cell("load_s")]
    said = "its process ended with exit code 3 and was not done; it said: no such device"
    assert (line["status"], line["error"]) == ("failed", said)


def test_a_process_that_hangs_is_stopped(folder, fake):
    found = measure(fake(goes_wrong="import time; time.sleep(60)"), folder, timeout_s=1.0)
    assert found[Cell("load_s")]["error"] == "its process was stopped after 1 s; allow it more time"


def test_an_interpreter_that_is_not_there_is_a_failure(folder, fake):
    line = measure(fake(python="/not/there"), folder)[Cell("load_s")]
    assert line["error"] == "its process cannot be started with /not/there: No such file or directory"


def test_too_few_tokens_are_no_speed(folder, fake):
    found = measure(fake(text=FAKE.replace("[1] * new_tokens", "[1]")), folder)
    line = found[Cell("decode_tok_s", batch=2)]
    assert (line["status"], line["value"]) == ("failed", None)
    assert "it generated 2 texts of [1] tokens, asked for 2 of 8" in line["error"]
    assert found[Cell("prefill_s", length=32)]["status"] == "ok"


def test_a_conversion_is_done_once_and_only_whole(folder, fake, tmp_path):
    text = FAKE + "\ndef prepare(job):\n    open(job['work'] + '/model', 'x').close()\n    VARIANT\n"
    arguments = {"checkpoint": folder, "work": tmp_path / "work/one", "threads": 1, "timeout_s": 60}
    broken = fake(text=text, goes_wrong="raise ValueError('half done')")
    assert worker.prepare(broken, **arguments) == {"status": "failed", "error": "ValueError: half done"}
    assert not (tmp_path / "work/one").exists()
    for _ in range(2):
        assert worker.prepare(fake(text=text), **arguments) == {"status": "ok", "error": None}
    assert [path.name for path in (tmp_path / "work").rglob("*")] == ["one", "model"]


@pytest.mark.parametrize("name", engines.PEERS)
def test_every_peer_refuses_a_precision_or_is_not_installed(folder, name, tmp_path):
    unknown = {"llamacpp": "bfloat16", "openvino": "float16"}
    engine = EngineSetup.peer(name, unknown.get(name, "int4"))
    lines, died = worker.run_engine(
        engine,
        {"task": "prepare", "checkpoint": str(folder), "work": str(tmp_path), "threads": 1},
        timeout_s=120,
    )
    (line,) = lines
    assert died is None
    assert line["status"] == "skipped"
    assert " not " in line["error"]


def test_native_is_built_before_it_is_timed(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("GPT2CORE_CACHE", str(tmp_path / "empty"))
    first, again = (worker.build(EngineSetup.own("native"), timeout_s=300) for _ in range(2))
    assert (first["status"], again["status"]) == ("ok", "ok")
    assert again["value"] < first["value"]
    assert list((tmp_path / "empty/native").glob("*.so"))
    assert worker.build(EngineSetup.own("numpy"), timeout_s=300)["status"] == "skipped"
