"""The comparison: engines in processes of their own, interleaved, resumable, checked for right answers."""

import json
import random
import re
import sys
import textwrap

import pytest

from gpt2core import ModelConfig, RequestError
from gpt2core.bench import bandwidth, correctness, engines, plan, rounds, worker
from gpt2core.bench.comparison import comparison_table
from gpt2core.bench.errors import BenchmarkError
from gpt2core.bench.files import read_log
from gpt2core.bench.plan import Comparison, key, planned, weight_nbytes
from gpt2core.bench.worker import Engine, Workload
from gpt2core.cli import main
from gpt2core.testing import VARIANTS, random_checkpoint

CONTEXT = 96
WORKLOAD = Workload.of(257, CONTEXT, new_tokens=8)
ONCE = [(name, None, None, None) for name in plan.ONCE]
CELLS = [
    *ONCE,
    ("prefill_s", None, 32, None),
    ("decode_tok_s", 2, None, None),
    ("step_s", None, None, 10),
]

# An adapter on nothing but the standard library; VARIANT is replaced by what goes wrong.
FAKE = """
import json, os, signal, sys

def load(job):
    VARIANT
    return Engine()

class Engine:
    settings = {"python": sys.executable, "has_gpt2core": "gpt2core" in sys.modules}

    def generate(self, prompts, new_tokens):
        return [[1] * new_tokens for _ in prompts]

    def prefill(self, ids):
        pass
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return random_checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("GPT2CORE_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """Make a peer of this name from the text of an adapter."""

    def make(name="fake", text=FAKE, *, goes_wrong="pass", packages=(), python=None) -> Engine:
        path = tmp_path / f"{name}_adapter.py"
        path.write_text(textwrap.dedent(text).replace("VARIANT", goes_wrong))
        monkeypatch.setitem(engines.PEERS, name, engines.Peer(path, packages, name))
        return Engine.peer(name, python=python)

    return make


def measure(engine, folder, cells=CELLS, timeout_s=120.0):
    found = worker.measure(
        engine, checkpoint=folder, work=folder, cells=cells, workload=WORKLOAD, threads=1, timeout_s=timeout_s
    )
    return {(line["measure"], line["batch"], line["length"], line["position"]): line for line in found}


# ---------------------------------------------------------------------------------- one engine, one process


@pytest.mark.parametrize("name", ["numpy", "torch"])
def test_each_cell_of_an_engine_has_one_plausible_value(folder, name):
    found = measure(Engine.own(name), folder)
    assert list(found) == CELLS
    assert {line["status"] for line in found.values()} == {"ok"}
    value = {cell[0]: line["value"] for cell, line in found.items()}
    assert 0 < value["ttft_s"] < value["start_s"] + value["load_s"] < value["first_token_cold_s"]
    assert value["compile_s"] >= 0
    assert value["peak_memory_nbytes"] > 10_000_000
    decode = found["decode_tok_s", 2, None, None]
    assert decode["tokens"] == 16
    assert value["decode_tok_s"] == pytest.approx(16 / min(decode["samples_s"]))
    assert len(decode["samples_s"]) == worker.REPEATS
    assert value["prefill_s"] == min(found["prefill_s", None, 32, None]["samples_s"])
    assert found["prefill_s", None, 32, None]["tokens"] == 32
    assert decode["settings"]["threads"] == 1


def test_the_units_are_those_of_the_measures(folder):
    units = {cell[0]: line["unit"] for cell, line in measure(Engine.own("numpy"), folder).items()}
    assert units.pop("decode_tok_s") == "tok/s"
    assert units.pop("peak_memory_nbytes") == "bytes"
    assert set(units.values()) == {"s"}


def test_transformers_here_measures_single_steps_too(folder):
    found = measure(
        Engine.peer("transformers"), folder, [("step_s", None, None, 10), ("ttft_s", None, None, None)]
    )
    assert [line["status"] for line in found.values()] == ["ok", "ok"]
    assert set(found["step_s", None, None, 10]["settings"]["versions"]) == {"torch", "transformers"}


def test_an_engine_runs_in_an_interpreter_that_has_no_gpt2core(folder, fake, tmp_path):
    bare = tmp_path / "bare-python"
    bare.write_text(f'#!/bin/sh\nexec {sys.executable} -S -E "$@"\n')
    bare.chmod(0o755)
    check = "import importlib.util\n    assert importlib.util.find_spec('gpt2core') is None"
    found = measure(fake(goes_wrong=check, python=str(bare)), folder)
    assert found["ttft_s", None, None, None]["status"] == "ok"
    assert found["ttft_s", None, None, None]["settings"]["has_gpt2core"] is False


def test_what_an_interface_lacks_is_skipped_with_the_reason(folder, fake):
    line = measure(fake(), folder)["step_s", None, None, 10]
    assert (line["status"], line["value"]) == ("skipped", None)
    assert line["error"] == "its interface has no single decode step"


def test_a_missing_package_is_a_skip_that_says_how_to_get_it(folder, fake):
    found = measure(fake(goes_wrong="import not_there_at_all", packages=("not_there_at_all",)), folder)
    assert {line["status"] for cell, line in found.items() if cell[0] != "start_s"} == {"skipped"}
    assert "not_there_at_all is not installed in " in found["load_s", None, None, None]["error"]
    assert (
        "pip install fake, or name its interpreter with --peer-python"
        in found["load_s", None, None, None]["error"]
    )


def test_a_missing_package_that_is_not_the_engines_own_is_a_failure(folder, fake):
    line = measure(fake(goes_wrong="import not_there_at_all"), folder)["load_s", None, None, None]
    assert (line["status"], line["error"][:19]) == ("failed", "ModuleNotFoundError")


def test_a_crash_keeps_what_was_measured_and_names_the_signal(folder, fake):
    text = FAKE.replace("return [[1]", "os.kill(os.getpid(), signal.SIGKILL); return [[1]")
    found = measure(fake(text=text), folder)
    assert found["ttft_s", None, None, None]["status"] == "ok"
    for cell in CELLS[-3:]:
        assert found[cell]["status"] == "failed"
        assert found[cell]["error"].startswith("its process was killed by SIGKILL")


def test_an_exit_code_comes_with_the_last_words(folder, fake):
    line = measure(fake(goes_wrong="print('no such device'); os._exit(3)"), folder)[
        "load_s", None, None, None
    ]
    said = "its process ended with exit code 3 before it was done; it said: no such device"
    assert (line["status"], line["error"]) == ("failed", said)


def test_a_process_that_hangs_is_stopped(folder, fake):
    found = measure(fake(goes_wrong="import time; time.sleep(60)"), folder, timeout_s=1.0)
    assert (
        found["load_s", None, None, None]["error"] == "its process was stopped after 1 s; allow it more time"
    )


def test_an_interpreter_that_is_not_there_is_a_failure(folder, fake):
    line = measure(fake(python="/not/there"), folder)["load_s", None, None, None]
    assert line["error"] == "its process cannot be started with /not/there: No such file or directory"


def test_too_few_tokens_are_no_speed(folder, fake):
    found = measure(fake(text=FAKE.replace("[1] * new_tokens", "[1]")), folder)
    line = found["decode_tok_s", 2, None, None]
    assert (line["status"], line["value"]) == ("failed", None)
    assert "it generated 2 texts of [1] tokens, asked for 2 of 8" in line["error"]
    assert found["prefill_s", None, 32, None]["status"] == "ok"


def test_a_conversion_is_done_once_and_only_whole(folder, fake, tmp_path):
    text = FAKE + "\ndef prepare(job):\n    open(job['work'] + '/model', 'x').close()\n    VARIANT\n"
    arguments = {"checkpoint": folder, "work": tmp_path / "work/one", "threads": 1, "timeout_s": 60}
    broken = fake(text=text, goes_wrong="raise ValueError('half done')")
    assert worker.prepare(broken, **arguments) == ("failed", "ValueError: half done")
    assert not (tmp_path / "work/one").exists()
    assert worker.prepare(fake(text=text), **arguments) == ("ok", None)
    assert worker.prepare(fake(text=text), **arguments) == ("ok", None)
    assert [path.name for path in (tmp_path / "work").rglob("*")] == ["one", "model"]


@pytest.mark.parametrize("name", engines.PEERS)
def test_every_peer_refuses_a_precision_or_is_not_installed(folder, name, tmp_path):
    unknown = {"llamacpp": "bfloat16", "openvino": "float16"}
    engine = Engine.peer(name, unknown.get(name, "int4"))
    lines, died = worker.run(
        engine,
        {"task": "prepare", "checkpoint": str(folder), "work": str(tmp_path), "threads": 1},
        timeout_s=120,
    )
    (line,) = lines if name != "transformers" else [{"status": "skipped", "error": "is not asked to convert"}]
    assert died is None
    assert line["status"] == "skipped"
    assert " not " in line["error"]


# --------------------------------------------------------------------------------------------- a comparison


def instantly(monkeypatch, calls=None, value=1.0):
    """Let engines and the machine have values at once."""

    def measure(engine, *, cells, **_):
        if calls is not None:
            calls.append(engine.name)
        names = ("measure", "batch", "length", "position")
        return [
            dict(zip(names, cell, strict=True)) | {"status": "ok", "value": value, "unit": "s"}
            for cell in cells
        ]

    monkeypatch.setattr(rounds.worker, "measure", measure)
    monkeypatch.setattr(rounds.worker, "prepare", lambda *_, **__: ("ok", None))
    monkeypatch.setattr(
        rounds.bandwidth, "read_bandwidth", lambda threads: {"value": 1e9, "method": "planted"}
    )


def small(folder, **fields):
    return Comparison(
        **{
            "model": str(folder),
            "backends": ("numpy", "torch"),
            "batches": (1, 2),
            "prefill": (8, 32),
            "rounds": 2,
            "new_tokens": 8,
            **fields,
        }
    )


def test_each_round_begins_with_another_engine(folder, tmp_path, monkeypatch):
    calls = []
    instantly(monkeypatch, calls)
    comparison = small(folder, backends=("numpy", "torch", "onnx"), rounds=4)
    rounds.compare(comparison, tmp_path / "out")
    assert calls == [
        *("numpy", "torch", "onnx"), *("torch", "onnx", "numpy"), *("onnx", "numpy", "torch"),
        *("numpy", "torch", "onnx"),
    ]  # fmt: skip


def test_the_lines_are_those_that_were_planned_with_all_that_a_line_has(folder, tmp_path, monkeypatch):
    instantly(monkeypatch)
    comparison = small(folder)
    lines = rounds.compare(comparison, tmp_path / "out")
    assert read_log(tmp_path / "out/runs.jsonl") == lines
    assert sorted(map(repr, map(key, lines))) == sorted(map(repr, planned(comparison, CONTEXT)))
    names = {
        *(
            "kind",
            "engine",
            "family",
            "precision",
            "round",
            "measure",
            "batch",
            "length",
            "position",
            "value",
        ),
        *("unit", "tokens", "status", "error", "settings", "environment", "started_at"),
    }
    assert all(names <= set(line) for line in lines)
    assert {line["environment"] for line in lines} == {
        json.loads((tmp_path / "out/environment.json").read_text())["id"]
    }


def test_a_comparison_killed_at_20_random_points_and_resumed_has_the_same_lines_and_none_twice(
    folder, tmp_path, monkeypatch
):
    instantly(monkeypatch)
    comparison, draw = small(folder), random.Random(0)
    runs = tmp_path / "out/runs.jsonl"
    rounds.compare(comparison, tmp_path / "out")
    want = sorted(map(repr, planned(comparison, CONTEXT)))
    for _ in range(20):
        content = runs.read_bytes()
        runs.write_bytes(content[: draw.randrange(len(content))])
        rounds.compare(comparison, tmp_path / "out", resume=True)
        assert sorted(map(repr, map(key, read_log(runs)))) == want


def test_an_interrupted_comparison_goes_on_with_what_is_missing(folder, tmp_path, monkeypatch):
    calls = []
    instantly(monkeypatch, calls)
    comparison = small(folder)

    def stop(what):
        if what == "round 1 of 2: torch in float32":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        rounds.compare(comparison, tmp_path / "out", on_progress=stop)
    assert calls == ["numpy"]
    rounds.compare(comparison, tmp_path / "out", resume=True)
    assert calls == ["numpy", "torch", "torch", "numpy"]


def test_other_settings_and_a_full_folder_are_refused(folder, tmp_path, monkeypatch):
    instantly(monkeypatch)
    rounds.compare(small(folder), tmp_path / "out")
    with pytest.raises(BenchmarkError, match="other settings"):
        rounds.compare(small(folder, rounds=3), tmp_path / "out", resume=True)
    with pytest.raises(BenchmarkError, match="--resume"):
        rounds.compare(small(folder), tmp_path / "out")
    before = (tmp_path / "out/runs.jsonl").read_bytes()
    rounds.compare(small(folder), tmp_path / "out", resume=True)
    assert (tmp_path / "out/runs.jsonl").read_bytes() == before


def test_what_cannot_run_is_skipped_with_its_reason_and_the_others_go_on(folder, tmp_path, monkeypatch, fake):
    instantly(monkeypatch)
    fake("broken")
    monkeypatch.setattr(rounds.worker, "prepare", lambda *_, **__: ("failed", "ValueError: no"))
    infos = rounds.available(load_plugins=False)
    gone = type(infos["torch"])("torch", False, None, "install it with: pip install 'gpt2core[torch]'")
    monkeypatch.setattr(rounds, "available", lambda **_: {**infos, "torch": gone})
    comparison = small(
        folder, peers=("broken",), prefill=(32, 4096), check=False, precisions=("float32", "float16")
    )
    lines = rounds.compare(comparison, tmp_path / "out")

    def errors(engine, precision="float32", **which):
        return {
            (line["status"], line["error"])
            for line in lines
            if (line["engine"], line["precision"]) == (engine, precision)
            and line["measure"] != "weight_nbytes"
            if all(line[name] == value for name, value in which.items())
        }

    assert errors("torch", length=None) == {("skipped", gone.reason)}
    assert errors("broken", length=None) == {("failed", "ValueError: no")}
    assert errors("numpy", length=4096) == {("skipped", "the model's context is 96")}
    assert errors("numpy", length=32) == {("ok", None)}
    offers = "gpt2core offers float32, int8, int4, bfloat16, not float16"
    assert errors("numpy", "float16", length=32) == {("skipped", offers)}


def test_a_precision_is_rounded_to_once_and_who_does_not_run_it_says_so(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("GPT2CORE_CACHE", str(tmp_path / "cache"))
    comparison = small(folder, backends=("numpy", "onnx", "jax"), precisions=("int8",))
    lines = rounds.compare(comparison, tmp_path / "out")
    (rounded,) = (tmp_path / "cache" / "bench").glob("*/gpt2core/int8")
    assert "gpt2core_quantization" in (rounded / "config.json").read_text()
    found = {
        name: {
            (line["status"], line["error"])
            for line in lines
            if line["engine"] == name and line["unit"] != "bytes"
        }
        for name in comparison.backends
    }
    assert found["numpy"] == found["onnx"] == {("ok", None)}
    assert found["jax"] == {("skipped", "jax runs float32, not int8")}
    again = rounds.compare(small(rounded, backends=("numpy",), precisions=("int8",)), tmp_path / "again")
    assert {line["error"] for line in again if line["engine"] == "numpy"} == {None}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"backends": ("cuda",)}, "no backend 'cuda'; known are numpy"),
        ({"peers": ("vllm",)}, "no peer 'vllm'; known are transformers"),
        ({"peer_python": {"vllm": "python"}}, "no peer 'vllm'"),
        ({"precisions": ("float7",)}, "no precision 'float7'; known are float32"),
        ({"variants": ("strange",)}, "no variant 'strange'; known are plain"),
        ({"backends": ()}, "needs an engine and a precision"),
        ({"precisions": ()}, "needs an engine and a precision"),
        ({"backends": ("numpy", "numpy")}, "backends names one twice: numpy, numpy"),
        ({"batches": (0,)}, "batch is .*use different whole numbers"),
        ({"prefill": (8, 8)}, "prefill is .*use different whole numbers"),
        ({"rounds": 0}, "rounds is 0; use a whole number"),
        ({"baseline": "onnx"}, "baseline 'onnx' is not compared"),
    ],
)
def test_bad_settings_are_refused_with_the_remedy(fields, message):
    with pytest.raises(RequestError, match=message):
        Comparison(**{"backends": ("numpy",), **fields})


def test_weights_read_per_step_are_all_but_the_embeddings():
    assert weight_nbytes(ModelConfig(), "float32") == 4 * (124_439_808 - 1024 * 768)
    assert weight_nbytes(ModelConfig(), "int4") * 8 == weight_nbytes(ModelConfig(), "float32")
    separate = ModelConfig(tie_word_embeddings=False)
    assert weight_nbytes(separate, "float32") == weight_nbytes(ModelConfig(), "float32")


@pytest.mark.parametrize(("vocab_size", "context"), [(257, 96), (50257, 1024), (3, 2), (7, 5)])
def test_the_workload_fits_any_model(vocab_size, context):
    workload = Workload.of(vocab_size, context)
    assert len(workload.prompt) >= 1
    assert workload.new_tokens >= 1
    assert len(workload.prompt) + workload.new_tokens <= context
    assert max(workload.prompt + workload.long) < vocab_size
    cells = Comparison(backends=("numpy",)).cells(context)
    assert all(0 < cell[3] < context for cell in cells if cell[3] is not None)


def test_the_workload_of_gpt2_is_the_one_that_others_measure():
    workload = Workload.of(50257, 1024)
    assert workload.prompt == worker.PROMPT
    assert workload.new_tokens == 128
    positions = [cell[3] for cell in Comparison(backends=("numpy",)).cells(1024) if cell[0] == "step_s"]
    assert positions == [10, 512, 999]


# ------------------------------------------------------------------------------------------------- bandwidth


def test_the_read_bandwidth_is_that_of_the_fastest_way():
    found = bandwidth.read_bandwidth(1, nbytes=32 << 20)
    assert found["value"] == max(found["by_method"].values()) == found["by_method"][found["method"]]
    assert 1e8 < found["value"] < 1e13
    assert found["buffer_nbytes"] == 32 << 20
    assert (len(found["by_method"]), found["threads"]) == (4, 1)


def test_the_buffer_is_much_larger_than_the_caches(tmp_path, monkeypatch):
    assert bandwidth.buffer_nbytes() >= bandwidth.LEAST_NBYTES
    for number, size in enumerate(["48K", "512000K", "odd"]):
        (tmp_path / f"index{number}").mkdir()
        (tmp_path / f"index{number}/size").write_text(f"{size}\n")
    monkeypatch.setattr(bandwidth, "Path", lambda path: tmp_path)
    assert bandwidth.buffer_nbytes() == 4 * 512000 * 1024


def test_a_failing_measurement_of_the_bandwidth_is_a_line_and_not_the_end(folder, tmp_path, monkeypatch):
    instantly(monkeypatch)

    def fail(threads):
        raise RuntimeError("measuring the read bandwidth failed: MemoryError")

    monkeypatch.setattr(rounds.bandwidth, "read_bandwidth", fail)
    lines = rounds.compare(small(folder, rounds=1), tmp_path / "out")
    (line,) = [one for one in lines if one["engine"] == "machine"]
    assert (line["status"], line["value"]) == ("failed", None)
    assert "MemoryError" in line["error"]


def test_a_bandwidth_process_that_fails_says_its_last_line():
    with pytest.raises(RuntimeError, match=r"measuring the read bandwidth failed: .*Error"):
        bandwidth.read_bandwidth(1, nbytes=1 << 55)


# ----------------------------------------------------------------------------------------------- correctness

SOME = {name: VARIANTS[name] for name in ("plain", "unscaled_attention", "separate_head")}

CHECKED = """
import os, signal
import numpy as np
from gpt2core import GPT2

def load(job):
    return Engine(job)

class Engine:
    settings = {}

    def __init__(self, job):
        self.job, self.name = job, job["checkpoint"].rsplit("/", 1)[1]
        VARIANT
        self.model = GPT2.from_pretrained(job["checkpoint"], backend="numpy")

    def generate(self, prompts, new_tokens):
        out = self.model.generate(prompts, max_new_tokens=new_tokens, min_new_tokens=new_tokens)
        return [one.token_ids for one in out]

    def prefill(self, ids):
        pass

    def logits(self, ids):
        return self.model.logits(ids)
"""


def checked(engine, variants=SOME):
    found = list(correctness.check(engine, threads=1, variants=variants, timeout_s=120))
    assert sorted(one["variant"] for one in found) == sorted(variants)
    return {one["variant"]: one for one in found}


def test_an_engine_that_computes_the_reference_is_right_on_every_variant(fake):
    found = checked(fake(text=CHECKED), VARIANTS)
    assert {(one["status"], one["value"], one["error"]) for one in found.values()} == {("ok", 1.0, None)}
    assert max(one["difference"] for one in found.values()) < 1e-4


def test_transformers_with_the_version_tested_here_is_right(fake):
    found = checked(Engine.peer("transformers"))
    assert {one["value"] for one in found.values()} == {1.0}
    assert found["plain"]["settings"]["versions"]["transformers"] >= "5"


def test_an_engine_that_ignores_a_flag_is_wrong_on_it_and_only_there(fake):
    text = CHECKED.replace(
        "self.model =",
        "path = job['checkpoint'] + '/config.json'; text = open(path).read()\n"
        "        flag = '\"scale_attn_weights\": '\n"
        "        open(path, 'w').write(text.replace(flag + 'false', flag + 'true'))\n"
        "        self.model =",
    ).replace("    def generate", "        open(path, 'w').write(text)\n\n    def generate")
    found = checked(fake(text=text))
    assert {name: one["value"] for name, one in found.items()} == {
        "plain": 1.0,
        "unscaled_attention": 0.0,
        "separate_head": 1.0,
    }
    assert found["unscaled_attention"]["difference"] > 1
    assert "a logit is off by" in found["unscaled_attention"]["error"]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("self.model.logits(ids)", "self.model.logits(ids)[:-1]", r"its logits have the shape \(39, 257\)"),
        ("self.model.logits(ids)", "self.model.logits(ids) * np.nan", "its logits are not finite"),
        ("[one.token_ids for", "[one.token_ids[::-1] for", "greedy token 0 is .* below the largest"),
        (
            "[one.token_ids for",
            "[one.token_ids[:3] for",
            "it generated 3 tokens of the vocabulary, asked for 24",
        ),
        ("[one.token_ids for", "[[999] * 24 for", "it generated 24 tokens of the vocabulary"),
    ],
    ids=["shape", "nan", "tokens", "few", "foreign"],
)
def test_each_kind_of_wrong_answer_is_told(fake, old, new, message):
    (one,) = checked(fake(text=CHECKED.replace(old, new)), {"plain": {}}).values()
    assert one["value"] == 0.0
    assert re.search(message, one["error"]), one["error"]


def test_a_variant_that_kills_the_process_is_a_failure_and_the_others_are_checked(fake):
    dies = "if self.name == 'unscaled_attention': os.kill(os.getpid(), signal.SIGSEGV)"
    found = checked(fake(text=CHECKED, goes_wrong=dies))
    assert {name: one["value"] for name, one in found.items()} == {
        "plain": 1.0, "unscaled_attention": None, "separate_head": 1.0,
    }  # fmt: skip
    assert found["unscaled_attention"]["status"] == "failed"
    assert "killed by SIGSEGV" in found["unscaled_attention"]["error"]


def test_a_variant_that_an_engine_refuses_is_skipped(fake):
    refuses = "if self.name == 'plain': raise NotImplementedError('it has no plain models')"
    found = checked(fake(text=CHECKED, goes_wrong=refuses))
    assert (found["plain"]["status"], found["plain"]["error"]) == ("skipped", "it has no plain models")
    assert found["separate_head"]["value"] == 1.0


def test_an_engine_that_is_not_installed_is_skipped_on_every_variant(fake):
    found = checked(fake(text="import nothing_here\n" + CHECKED, packages=("nothing_here",)))
    assert {one["status"] for one in found.values()} == {"skipped"}
    assert "nothing_here is not installed" in found["plain"]["error"]


def test_a_lossy_precision_is_judged_by_what_it_may_lose(fake):
    noise = "self.model.logits(ids) + np.random.default_rng(0).normal(0, SIZE, (40, 257))"
    values = {}
    for size in ("0.1", "1.0"):
        text = CHECKED.replace("self.model.logits(ids)", noise.replace("SIZE", size))
        fake(text=text)
        for precision in ("float32", "int8"):
            (one,) = checked(Engine.peer("fake", precision), {"plain": {}}).values()
            values[size, precision] = one["value"]
    assert values == {
        ("0.1", "float32"): 0.0,
        ("0.1", "int8"): 1.0,
        ("1.0", "float32"): 0.0,
        ("1.0", "int8"): 0.0,
    }


# ------------------------------------------------------------------------------------------------- the table


def line(engine, number, measure, value, *, family="peer", **more):
    return {
        "kind": "comparison", "engine": engine, "family": family, "precision": "float32", "round": number,
        "measure": measure, "batch": None, "length": None, "position": None, "value": value, "unit": "s",
        "tokens": None, "status": "ok", "error": None, "settings": {}, "environment": "0", "started_at": "",
        **more,
    }  # fmt: skip


def planted():
    lines = [line("machine", i, "read_bandwidth", 1e9, family="machine", precision="") for i in range(3)]
    for i, drift in enumerate((1.0, 2.0, 4.0)):  # the machine slows down; ratios of a round do not
        lines += [
            line("onnx", i, "decode_tok_s", 300 / drift, family="gpt2core", batch=1),
            line("transformers", i, "decode_tok_s", 100 / drift, batch=1),
            line("onnx", i, "prefill_s", 0.5 * drift, family="gpt2core", length=512),
            line("transformers", i, "prefill_s", 1.0 * drift, length=512),
        ]
    lines += [
        line("onnx", 0, "weight_nbytes", 2e6, family="gpt2core"),
        line("transformers", 0, "weight_nbytes", 2e6),
    ]
    wrong = {
        "variant": "unscaled_attention",
        "value": 0.0,
        "error": "a logit is off by 4.7",
        "difference": 4.7,
    }
    right = {"variant": "plain", "difference": 1e-5}
    return [
        *lines,
        line("transformers", 0, "correct", 1.0, **right),
        line("transformers", 0, "correct", **wrong),
        line("llamacpp", 0, "ttft_s", None, status="skipped", error="llama_cpp is not installed"),
    ]


def test_ratios_are_of_pairs_so_that_drift_cancels():
    table = comparison_table(planted())
    onnx, transformers, llamacpp = table.rows
    assert table.baseline == ("transformers", "float32")
    speed, prefill = ("decode_tok_s", 1, None, None), ("prefill_s", None, 512, None)
    for cell, want in ((speed, 3.0), (prefill, 2.0)):
        ratio = onnx.ratios[cell]
        assert (ratio.low, ratio.mid, ratio.high) == pytest.approx((want, want, want))
    assert onnx.values[speed].mid == 150
    assert onnx.values[speed].low < 150 < onnx.values[speed].high
    assert transformers.ratios == {}
    assert llamacpp.reasons == ("llama_cpp is not installed",)
    assert table.cells == (prefill, speed)


def test_the_baseline_may_be_another():
    table = comparison_table(planted(), baseline="onnx")
    assert table.baseline == ("onnx", "float32")
    assert table.rows[1].ratios["decode_tok_s", 1, None, None].mid == pytest.approx(1 / 3)


def test_the_roofline_is_weights_times_steps_over_the_bandwidth():
    table = comparison_table(planted())
    assert table.read_bandwidth.mid == 1e9
    assert table.rows[0].achieved == {1: 150 * 2e6}


def test_a_fast_wrong_answer_is_shown_as_wrong():
    onnx, transformers, _ = comparison_table(planted()).rows
    assert onnx.correct == "-"
    assert transformers.correct == "WRONG on 1 of 2"
    assert transformers.wrong == {"unscaled_attention": "a logit is off by 4.7"}


# ----------------------------------------------------------------------------------------------- the command


def test_the_command_compares_checks_and_writes_everything(folder, tmp_path, capfd, monkeypatch, fake):
    fake("fast", CHECKED.replace("self.model.logits(ids)", "self.model.logits(ids) + 1"))
    fake("gone", "import nothing_here\n", packages=("nothing_here",))
    monkeypatch.setattr(
        rounds.bandwidth, "read_bandwidth", lambda threads: {"value": 1e10, "method": "planted"}
    )
    output = tmp_path / "out"
    args = ["bench", "--model", str(folder), "--backends", "numpy", "--peers", "fast,gone", "--no-report"]
    args += ["--batch", "1,2", "--prefill", "8", "--rounds", "1", "--threads", "1", "--output", str(output)]
    assert main(args) == 0
    out = capfd.readouterr().out
    (fast,) = [row for row in out.splitlines()[:4] if row.startswith("fast")]
    assert f"WRONG on {len(VARIANTS)} of {len(VARIANTS)}" in fast
    assert "fast in float32 is WRONG on plain: a logit is off by 1" in out
    assert "nothing_here is not installed" in out
    assert "times faster than numpy in float32" in out
    lines = read_log(output / "runs.jsonl")
    assert sum(one["measure"] == "correct" for one in lines) == 2 * len(VARIANTS)
    assert main([*args, "--resume"]) == 0
    assert read_log(output / "runs.jsonl") == lines


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--batch", "1,x"), "--batch is '1,x'; give whole numbers"),
        (("--peer-python", "/not/there"), "--peer-python names '/not/there', which is no interpreter"),
        (("--baseline", "onnx"), "baseline 'onnx' is not compared"),
        (("--backends", "cuda"), "there is no backend 'cuda'"),
        (("--peers", "vllm"), "there is no peer 'vllm'"),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_bad_options_get_one_clear_line(tmp_path, capfd, options, message):
    assert main(["bench", "--backends", "numpy", "--output", str(tmp_path / "out"), *options]) == 2
    out, err = capfd.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert message in err
    assert not (tmp_path / "out").exists()
