"""The comparison: engines interleaved round by round, resumable, and one analysis of what they say."""

import html
import json
import random
import re
from dataclasses import asdict

import pytest
from bench_fakes import CHECKED, fake_peers

from gpt2core import ModelConfig, RequestError
from gpt2core.bench import analyse
from gpt2core.bench.compare import plan, rounds, worker
from gpt2core.bench.compare.plan import Comparison, weight_nbytes
from gpt2core.bench.compare.worker import Workload
from gpt2core.bench.errors import BenchmarkError
from gpt2core.bench.records import Cell, key_of
from gpt2core.bench.statistics import Interval
from gpt2core.bench.store import read_log
from gpt2core.bench.tables import PLAIN
from gpt2core.cli import main
from gpt2core.testing import VARIANTS, random_checkpoint

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


# --------------------------------------------------------------------------------------------- a comparison


def _unit(cell):
    return {"decode_tok_s": "tok/s", "peak_memory_nbytes": "bytes"}.get(cell.measure, "s")


def instantly(monkeypatch, calls=None, value=lambda: 1.0):
    """Let engines and the machine have values at once."""

    def measure(engine, *, cells, **_):
        if calls is not None:
            calls.append(engine.name)
        return [asdict(cell) | {"status": "ok", "value": value(), "unit": _unit(cell)} for cell in cells]

    monkeypatch.setattr(rounds.worker, "measure", measure)
    monkeypatch.setattr(rounds.worker, "prepare", lambda *_, **__: {"status": "ok", "error": None})
    built = {"status": "ok", "value": 30.0, "unit": "s"}
    monkeypatch.setattr(rounds.worker, "build", lambda *_, **__: built)
    monkeypatch.setattr(
        rounds.bandwidth, "read_bandwidth", lambda threads: {"value": 1e9, "method": "planted"}
    )


def small(folder, **fields):
    return Comparison(
        **{
            "model": str(folder),
            "backends": ("numpy", "torch"),
            "precisions": ("float32",),
            "batches": (1, 2),
            "prefill": (8, 32),
            "rounds": 2,
            "new_tokens": 8,
            **fields,
        }
    )


def plan_lines(comparison, context):
    """The keys of all lines that a comparison has when it is done; each of one step, but for other work."""
    return {key for step in comparison.steps(context) for key in step.keys}


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
    assert sorted(map(repr, map(key_of, lines))) == sorted(map(repr, plan_lines(comparison, CONTEXT)))
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
    want = sorted(map(repr, plan_lines(comparison, CONTEXT)))
    for _ in range(20):
        content = runs.read_bytes()
        runs.write_bytes(content[: draw.randrange(len(content))])
        rounds.compare(comparison, tmp_path / "out", resume=True)
        assert sorted(map(repr, map(key_of, read_log(runs)))) == want


def test_an_interrupted_comparison_goes_on_with_what_is_missing(folder, tmp_path, monkeypatch):
    calls = []
    instantly(monkeypatch, calls)
    comparison = small(folder)

    def stop(progress):
        if progress.what == "round 1 of 2: torch in float32":
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
        rounds.compare(small(folder, batches=(1,)), tmp_path / "out", resume=True)
    with pytest.raises(BenchmarkError, match="--resume"):
        rounds.compare(small(folder), tmp_path / "out")
    before = (tmp_path / "out/runs.jsonl").read_bytes()
    rounds.compare(small(folder), tmp_path / "out", resume=True)
    assert (tmp_path / "out/runs.jsonl").read_bytes() == before


def test_what_cannot_run_is_skipped_with_its_reason_and_the_others_go_on(folder, tmp_path, monkeypatch, fake):
    instantly(monkeypatch)
    fake("broken")
    failure = {"status": "failed", "error": "ValueError: no"}
    monkeypatch.setattr(rounds.worker, "prepare", lambda *_, **__: failure)
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
            and line["measure"] not in ("weight_nbytes", "build_s")
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
            if line["engine"] == name and line["unit"] != "bytes" and line["measure"] != "build_s"
        }
        for name in comparison.backends
    }
    assert found["numpy"] == found["onnx"] == {("ok", None)}
    assert found["jax"] == {("skipped", "jax runs float32, not int8")}
    again = rounds.compare(small(rounded, backends=("numpy",), precisions=("int8",)), tmp_path / "again")
    assert {
        line["error"] for line in again if line["engine"] == "numpy" and line["measure"] != "build_s"
    } == {None}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"backends": ("cuda",)}, "no backend 'cuda'; known are numpy"),
        ({"peers": ("vllm",)}, "no peer 'vllm'; known are transformers"),
        ({"peer_python": {"vllm": "python"}}, "no peer 'vllm'"),
        ({"precisions": ("float7",)}, "no precision 'float7'; known are auto, float32"),
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


@pytest.mark.parametrize(
    ("precision", "bits"), [("float32", 32), ("float16", 16), ("bfloat16", 16), ("int8", 8), ("int4", 4)]
)
def test_weights_read_per_step_are_all_but_the_embeddings_in_the_bits_of_the_precision(precision, bits):
    assert weight_nbytes(ModelConfig(), precision) == (124_439_808 - 1024 * 768) * bits // 8
    separate = ModelConfig(tie_word_embeddings=False)
    assert weight_nbytes(separate, "float32") == weight_nbytes(ModelConfig(), "float32")


@pytest.mark.parametrize(("vocab_size", "context"), [(257, 96), (50257, 1024), (3, 2), (7, 5)])
def test_the_workload_fits_any_model(vocab_size, context):
    workload = Workload.for_model(vocab_size, context)
    assert len(workload.prompt) >= 1
    assert workload.new_tokens >= 1
    assert len(workload.prompt) + workload.new_tokens <= context
    assert max(workload.prompt + workload.long) < vocab_size
    cells = Comparison(backends=("numpy",)).cells(context)
    assert all(0 < cell.position < context for cell in cells if cell.position is not None)


def test_the_workload_of_gpt2_is_the_one_that_others_measure():
    workload = Workload.for_model(50257, 1024)
    assert workload.prompt == worker.PROMPT
    assert workload.new_tokens == 128
    cells = Comparison(backends=("numpy",)).cells(1024)
    positions = [cell.position for cell in cells if cell.measure == "step_s"]
    assert positions == [10, 512, 999]


def test_a_failing_measurement_of_the_bandwidth_is_a_line_and_not_the_end(folder, tmp_path, monkeypatch):
    instantly(monkeypatch)

    def fail(threads):
        raise RuntimeError("measuring the read bandwidth failed: MemoryError")

    monkeypatch.setattr(rounds.bandwidth, "read_bandwidth", fail)
    lines = rounds.compare(small(folder, rounds=1), tmp_path / "out")
    (line,) = [one for one in lines if one["measure"] == "read_bandwidth"]
    assert (line["status"], line["value"]) == ("failed", None)
    assert "MemoryError" in line["error"]


# ----------------------------------------------------------------------------------------------- the command


def test_the_command_compares_checks_and_writes_everything(folder, tmp_path, capfd, monkeypatch, fake):
    fake("fast", CHECKED.replace("self.model.logits(ids)", "self.model.logits(ids) + 1"))
    fake("gone", "import nothing_here\n", packages=("nothing_here",))
    monkeypatch.setattr(
        rounds.bandwidth, "read_bandwidth", lambda threads: {"value": 1e10, "method": "planted"}
    )
    output = tmp_path / "out"
    args = [
        "bench",
        "compare",
        "--model",
        str(folder),
        "--backends",
        "numpy",
        "--peers",
        "fast,gone",
        "--no-report",
    ]
    args += ["--batch", "1,2", "--prefill", "8", "--rounds", "1", "--threads", "1", "--output", str(output)]
    assert main(args) == 0
    out = capfd.readouterr().out
    assert "  fast (WRONG)" in out
    said = " ".join(out.split())
    for variant in VARIANTS:
        assert f"fast is WRONG on {variant}: a logit is off by 1" in said
    assert "gone was skipped: nothing_here is not installed" in said
    assert "Times as fast as numpy" in out
    assert max(map(len, out.splitlines()[:-1])) <= 100
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


def test_terminal_json_and_report_tell_the_same(folder, tmp_path, capfd, monkeypatch):
    values = iter(range(1, 10_000))
    instantly(monkeypatch, value=lambda: 1.0 + next(values) % 7 / 10)
    output = tmp_path / "out"
    args = ["bench", "compare", "--model", str(folder), "--backends", "numpy,torch", "--batch", "1,2"]
    args += ["--prefill", "8", "--rounds", "3", "--threads", "1", "--output", str(output)]
    assert main(args) == 0
    terminal = capfd.readouterr().out
    assert main([*args, "--resume", "--json"]) == 0
    document = json.loads(capfd.readouterr().out)
    assert document == json.loads((output / "analysis.json").read_text())
    page = html.unescape((output / "report.html").read_text())
    analysis = analyse(output)
    for table in analysis.tables:
        for row in table.rows:
            for cell in row[1:]:
                assert cell in terminal
                assert f"<td>{cell}</td>" in page
    for finding in analysis.findings:
        assert finding in page
        assert finding in " ".join(terminal.split())
    ratios = [p["ratio"] for p in document["points"] if p["measure"] == "peak_memory_nbytes" and p["ratio"]]
    assert [PLAIN.numbers(Interval(**ratio)) for ratio in ratios] == [
        row[1]
        for table in analysis.tables
        if table.title.startswith("Times the memory")
        for row in table.rows
    ]


def test_an_unmeasured_baseline_ends_no_run(folder, tmp_path, capfd, monkeypatch, fake):
    fake("gone", "import nothing_here\n", packages=("nothing_here",))
    instantly(monkeypatch)
    skip = {"status": "skipped", "error": "it is not installed"}
    monkeypatch.setattr(rounds.worker, "prepare", lambda *_, **__: skip)
    args = ["bench", "--model", str(folder), "--backends", "numpy", "--peers", "gone", "--baseline", "gone"]
    args += ["--no-check", "--rounds", "1", "--output", str(tmp_path / "out")]
    assert main(args) == 0  # as before `compare` had a name
    out = " ".join(capfd.readouterr().out.split())
    assert "Decoding: tok/s, by batch" in out
    assert "The baseline gone was not measured; ratios are over numpy." in out


def test_a_failed_measurement_is_told_and_the_exit_code_is_1(folder, tmp_path, capfd, monkeypatch):
    instantly(monkeypatch)
    measured = rounds.worker.measure

    def fail(engine, *, cells, **how):
        lines = measured(engine, cells=cells, **how)
        return [line | ({"status": "failed", "value": None, "error": "it fell over"} if i else {})
                for i, line in enumerate(lines)]  # fmt: skip

    monkeypatch.setattr(rounds.worker, "measure", fail)
    args = [
        "bench",
        "compare",
        "--model",
        str(folder),
        "--backends",
        "numpy",
        "--rounds",
        "1",
        "--batch",
        "1",
    ]
    assert main([*args, "--prefill", "8", "--no-report", "--output", str(tmp_path / "out")]) == 1
    out = " ".join(capfd.readouterr().out.split())
    assert "numpy failed 10 x: load_s, first_token_cold_s, compile_s and 5 more: it fell over" in out


def test_the_first_build_is_a_measure_of_its_own_and_in_no_round(folder, tmp_path, monkeypatch):
    instantly(monkeypatch)
    lines = rounds.compare(small(folder), tmp_path / "out")
    built = [line for line in lines if line["measure"] == "build_s"]
    assert [(line["engine"], line["round"], line["value"]) for line in built] == [
        ("numpy", 0, 30.0), ("torch", 0, 30.0),
    ]  # fmt: skip
    first = next(i for i, line in enumerate(lines) if line["measure"] == "start_s")
    assert max(lines.index(line) for line in built) < first
    analysis = analyse(tmp_path / "out")
    assert [(p.value.mid, p.rounds) for p in analysis.points_of("build_s")] == [(30.0, 1)] * 2
    assert {p.value.mid for m in ("start_s", "load_s") for p in analysis.points_of(m)} == {1.0}


def test_other_work_is_watched_in_every_round(folder, tmp_path, monkeypatch):
    instantly(monkeypatch)
    lines = rounds.compare(small(folder), tmp_path / "out")
    found = {(line["measure"], line["round"]) for line in lines if line["engine"] == "machine"}
    assert found == {(m, i) for m in ("read_bandwidth", "others_cores", "steal_share") for i in (0, 1)}


def test_progress_and_the_time_left_are_told_also_on_a_pipe(folder, tmp_path, capfd, monkeypatch):
    instantly(monkeypatch)
    monkeypatch.setattr("gpt2core.cli.progress.PIPE_DELAY_S", 0.0)
    monkeypatch.setattr("gpt2core.cli.progress.PIPE_INTERVAL_S", 0.0)
    args = ["bench", "compare", "--model", str(folder), "--backends", "numpy", "--rounds", "2"]
    assert main([*args, "--no-report", "--output", str(tmp_path / "out")]) == 0
    lines = capfd.readouterr().err.splitlines()
    assert lines[0].startswith("gpt2core: building numpy; 0% done, 0:00 so far")
    assert any(
        re.fullmatch(r"gpt2core: round 2 of 2: numpy in float32; .* so far, 0:\d\d left", line)
        for line in lines
    )
    assert "100% done" in lines[-1]


def test_a_resumed_comparison_may_have_more_rounds(folder, tmp_path, monkeypatch):
    calls = []
    instantly(monkeypatch, calls)
    rounds.compare(small(folder, rounds=1), tmp_path / "out")
    lines = rounds.compare(small(folder, rounds=3), tmp_path / "out", resume=True)
    assert calls == ["numpy", "torch", "torch", "numpy", "numpy", "torch"]
    assert sorted(map(repr, map(key_of, lines))) == sorted(
        map(repr, plan_lines(small(folder, rounds=3), CONTEXT))
    )


def test_a_checkpoint_is_compared_in_its_own_precision(folder, tmp_path, monkeypatch):
    rounded = tmp_path / "int8"
    assert main(["quantize", str(folder), str(rounded), "--precision", "int8"]) == 0
    instantly(monkeypatch)
    lines = rounds.compare(small(rounded, precisions=("auto",)), tmp_path / "out")
    assert {line["precision"] for line in lines if line["engine"] != "machine"} == {"int8"}
    assert json.loads((tmp_path / "out/settings.json").read_text())["precisions"] == ["int8"]
