"""What `gpt2core bench analyse` says of folders with a known answer."""

import json
import re

import pytest
from bench_synthesis import SPEEDS, classic_folder, comparison_folder

from gpt2core.bench import analyse
from gpt2core.bench.records import read_records
from gpt2core.bench.tables import fitting_unit
from gpt2core.errors import RequestError


def strict(analysis):
    """The analysis as a reader of its JSON has it; NaN and infinity would fail here."""
    return json.loads(json.dumps(analysis.to_dict(), allow_nan=False))


# The classic benchmark


def test_straight_times_are_found_straight_with_their_seconds_per_token(tmp_path):
    found = strict(analyse(classic_folder(tmp_path, step_s=1e-3)))
    assert found["regressor"] == "new tokens"
    assert found["line"]["slope"]["mid"] == pytest.approx(1e-3, rel=0.02)
    assert found["within_run"]["slope"]["low"] < 0 < found["within_run"]["slope"]["high"]


def test_growth_with_the_position_is_found_within_the_runs(tmp_path):
    analysis = analyse(classic_folder(tmp_path, growth_s=4e-6))
    found = strict(analysis)
    assert found["within_run"]["slope"]["mid"] == pytest.approx(4e-6, rel=0.1)
    assert found["within_run"]["units"] == "prompts"
    assert "later tokens take longer" in analysis.text()


def test_the_table_shows_each_prompt_its_means_and_its_failures(tmp_path):
    failed = ((0, 50, 0), (0, 50, 1), *((1, 100, run) for run in range(5)))
    analysis = analyse(classic_folder(tmp_path, failed=failed))
    cells = {(c["prompt_index"], c["length"]): c for c in strict(analysis)["cells"]}
    assert (cells[0, 50]["runs"], cells[0, 50]["failed"]) == (3, 2)
    assert (cells[1, 100]["runs"], cells[1, 100]["mean_s"]) == (0, None)
    assert cells[3, 200]["mean_s"] == pytest.approx(0.196, rel=0.03)
    text = analysis.text()
    assert "1  Once upon a time" in text
    rows = {(row[0][0], row[1]): row for row in analysis.tables[0].rows}
    assert rows["1", "50"][-1] == "2"
    assert rows["2", "100"][2:] == ("-", "-", "-", "-", "5")
    assert "Failed: 7 x TimeoutError: no answer after 30 s" in text
    assert "Warm-up: 5 runs, not counted above; they took" in text


def test_warm_up_is_not_among_the_means(tmp_path):
    found = strict(analyse(classic_folder(tmp_path)))
    assert found["warm_up_ratio"] == pytest.approx(2.0, abs=0.2)  # 50 ms longer than 50 ms
    assert max(cell["runs"] for cell in found["cells"]) == 5


def test_a_server_that_tells_no_token_counts_is_analysed_by_length(tmp_path):
    analysis = analyse(classic_folder(tmp_path, tokens_known=False))
    assert strict(analysis)["regressor"] == "total length"
    assert strict(analysis)["line"]["slope"]["mid"] == pytest.approx(1e-3, rel=0.02)
    assert "Within a run: not known" in analysis.text()


@pytest.mark.parametrize(
    "shape",
    [
        {"prompts": ("Only one",), "runs": 1, "lengths": (50,)},
        {"prompts": ("Only one",), "runs": 3},
        {"prompts": ("One", "Two"), "runs": 1, "lengths": (30, 60)},
        {"runs": 1},
        {"failed": tuple((p, n, r) for p in range(5) for n in (50, 100, 200) for r in range(-1, 5))},
    ],
)
def test_what_the_data_do_not_allow_to_say_is_not_said(tmp_path, shape):
    analysis = analyse(classic_folder(tmp_path, **shape))
    found = strict(analysis)
    if len(shape.get("prompts", range(5))) == 1:
        assert "the only prompt" in analysis.text()
    if shape.get("failed"):
        assert found["line"] is None
    assert len(analysis.findings) >= 3
    assert analysis.tables[0].rows


# The comparison


def test_the_comparison_tabulates_medians_and_ratios_to_transformers(tmp_path):
    analysis = analyse(comparison_folder(tmp_path))
    found = strict(analysis)
    assert found["baseline"] == "transformers"
    points = {(p["engine"], p["measure"], p["at"]): p for p in found["points"]}
    for engine, speed in SPEEDS.items():
        assert points[engine, "decode_tok_s", "batch 1"]["value"]["mid"] == pytest.approx(speed, rel=0.03)
    assert points["onnx", "decode_tok_s", "batch 8"]["ratio"]["mid"] == pytest.approx(2.5, rel=0.03)
    assert points["numpy", "step_s", "position 1000"]["ratio"]["mid"] == pytest.approx(4 / 3, rel=0.03)
    assert points["transformers", "step_s", "position 1000"]["ratio"] is None
    assert points["jax", "compile_s", ""]["ratio"] is None
    assert points["numpy", "peak_memory_nbytes", ""]["ratio"]["mid"] == pytest.approx(
        1.1e9 / 1.2667e9, rel=0.02
    )


def test_ratios_pair_by_pair_survive_a_machine_that_becomes_slower(tmp_path):
    analysis = analyse(comparison_folder(tmp_path, drift=3.0))
    [point] = [p for p in analysis.points_of("decode_tok_s") if p.engine == "onnx" and p.x == 1]
    assert point.ratio.covers(2.5)
    assert point.ratio.high - point.ratio.low < 0.2
    assert point.value.high / point.value.low > 2


def test_a_wrong_engine_is_called_wrong_wherever_it_stands(tmp_path):
    analysis = analyse(comparison_folder(tmp_path))
    assert [engine.label for engine in analysis.engines if engine.wrong] == ["ctranslate2"]
    rows = [row[0] for table in analysis.tables for row in table.rows]
    assert "ctranslate2 (WRONG)" in rows
    assert "ctranslate2" not in rows
    text = " ".join(analysis.text().split())
    assert "ctranslate2 is WRONG on inverse_layer_scaling: logits differ by 3.5" in text
    assert "Right on every variant that was checked: numpy, torch, onnx, jax, transformers." in text


def test_skipped_and_failed_engines_are_told_with_their_reasons(tmp_path):
    text = " ".join(analyse(comparison_folder(tmp_path, failed=("torch",))).text().split())
    assert "llamacpp was skipped: llamacpp is not installed; pip install llamacpp" in text
    assert "torch failed 5 x: decode_tok_s: MemoryError: no room for the cache" in text


def test_the_roofline_relates_bytes_per_second_to_the_measured_bandwidth(tmp_path):
    roofs = {roof.engine: roof for roof in analyse(comparison_folder(tmp_path)).roofs}
    assert roofs["numpy"].achieved_bytes_s.mid == pytest.approx(40 * 5e8, rel=0.02)
    assert roofs["numpy"].share.mid == pytest.approx(1.0, rel=0.02)


def test_precisions_are_engines_of_their_own_and_a_baseline_can_be_named(tmp_path):
    folder = comparison_folder(tmp_path, precisions=("float32", "int8"), baseline="onnx int8")
    analysis = analyse(folder)
    assert analysis.baseline == "onnx int8"
    assert {"onnx", "onnx int8"} <= {engine.label for engine in analysis.engines}


def test_a_baseline_that_was_not_measured_gives_way_to_another_and_it_is_said(tmp_path):
    analysis = analyse(comparison_folder(tmp_path, baseline="openvino"))
    assert (analysis.baseline, analysis.missing_baseline) == ("transformers", "openvino")
    assert "The baseline openvino was not measured; ratios are over transformers." in analysis.findings
    assert "Times as fast as transformers" in analysis.text()


def test_a_comparison_in_which_all_were_skipped_still_says_why(tmp_path):
    analysis = analyse(comparison_folder(tmp_path, engines=(), rounds=0))
    assert analysis.baseline is None
    assert analysis.tables == []
    assert "llamacpp was skipped" in analysis.text()


def test_the_memory_of_an_engine_is_so_many_times_that_of_the_baseline(tmp_path):
    points = analyse(comparison_folder(tmp_path, engines=("numpy", "transformers"))).points_of(
        "peak_memory_nbytes"
    )
    own, base = (point.value.mid for point in points)
    assert points[0].ratio.mid == pytest.approx(own / base, rel=1e-3)
    assert points[1].ratio is None


def test_the_roofline_pairs_the_bandwidth_and_the_speed_of_a_round(tmp_path):
    roofs = analyse(comparison_folder(tmp_path, drift=4.0)).roofs
    share = next(roof.share for roof in roofs if roof.engine == "numpy")
    assert share.covers(1.0)
    assert share.high - share.low < 0.05


def test_who_is_fastest_by_how_much_and_what_overlaps_is_said(tmp_path):
    findings = analyse(comparison_folder(tmp_path)).findings
    assert findings[0].startswith(
        "onnx decodes fastest at batch 1: 74.6 tok/s, 1.25 [1.24, 1.26] times as fast"
    )
    assert findings[0].endswith("as torch. Intervals overlap: none.")
    alike = analyse(comparison_folder(tmp_path / "b", engines=("other", "another"))).findings
    assert ", which may be chance" in alike[0]
    assert alike[0].endswith(
        ("Intervals overlap: other and another.", "Intervals overlap: another and other.")
    )


def test_a_busy_machine_is_said(tmp_path):
    def finding(name, **how):
        return analyse(comparison_folder(tmp_path / name, **how)).findings[-1]

    busy = finding("a", others_cores=1.25, steal_share=0.08, drift=1.5)
    assert "other processes kept 1.2 of 2 cores busy" in busy
    assert "the hypervisor gave 8% of the processors' time to others (steal)" in busy
    assert "took 1.4" in busy or "took 1.5" in busy
    mixed = finding("d", others_cores=0.0, drift=1.5, batches=(1,), lengths=(32,), positions=())
    assert re.search(r"took 1\.[45]\d times as long", mixed)  # a speed and a time that drift together
    assert finding("b", others_cores=0.01, steal_share=0.0).startswith("The machine was quiet")
    assert not finding("c").startswith("The machine")  # where the system does not tell, nothing is claimed


# Folders that cannot be read


def test_a_folder_that_is_missing_or_has_no_runs_is_refused_with_one_line(tmp_path):
    for folder, message in [
        (tmp_path / "missing", "missing does not exist; name the output folder of a `gpt2core bench` run"),
        (tmp_path, "has no runs.jsonl; name the output folder"),
    ]:
        with pytest.raises(RequestError) as caught:
            analyse(folder)
        assert message in str(caught.value)
        assert "\n" not in str(caught.value)
    (tmp_path / "runs.jsonl").write_text("")
    with pytest.raises(RequestError, match="holds no runs"):
        analyse(tmp_path)
    with pytest.raises(RequestError, match="is not a folder"):
        analyse(tmp_path / "runs.jsonl")


LINE = '{"kind": "classic", "cell": [0, 50, 0], "prompt": "A", "status": "ok", "elapsed_s": 1.0}'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"kind": "other"}\n', "holds lines of kind other; expected are all 'classic' or all 'comparison'"),
        (LINE + '\n{"kind": "comparison"}\n', "holds lines of kind classic, comparison"),
        (LINE + "\nnonsense\n", "line 2 is not strict JSON"),
        (LINE.replace("1.0", "NaN") + "\n", "line 1 is not strict JSON: NaN is not a JSON number"),
        (LINE.replace("1.0", "null") + "\n", "line 1, holds a wrong value: elapsed_s of a run that did not"),
        (LINE.replace("1.0", '"fast"') + "\n", "line 1, holds a wrong value: 'fast' is not a finite number"),
        (
            LINE.replace("1.0", "1e999") + "\n",
            "strict JSON: the number 1e999 is too large for a float",
        ),
        (LINE.replace("[0, 50, 0]", "[0, 50]") + "\n", "line 1, holds a wrong value: not enough values"),
        (LINE.replace('"prompt": "A", ', "") + "\n", "line 1, has no 'prompt'"),
        ("[1]\n", "line 1 holds [1], expected a JSON object; remove it or restore the file"),
        (f"\n{LINE}\n \nnonsense\n", "line 4 is not strict JSON"),
    ],
)
def test_a_broken_line_is_named_by_its_number(tmp_path, text, message):
    (tmp_path / "runs.jsonl").write_text(text)
    with pytest.raises(RequestError) as caught:
        analyse(tmp_path)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_torn_last_line_is_passed_over_and_the_later_of_two_equal_cells_counts(tmp_path):
    (tmp_path / "runs.jsonl").write_text(f"{LINE}\n{LINE.replace('1.0', '2.0')}\n{LINE[:40]}")
    [run] = read_records(tmp_path).runs
    assert run.elapsed_s == 2.0


# Units


@pytest.mark.parametrize(
    ("unit", "value", "text"),
    [
        ("s", 0.01234, "12.3 ms"), ("s", 1.5, "1.50 s"), ("s", 2e-6, "2.00 µs"),
        ("bytes", 1.234e9, "1.23 GB"),
        ("bytes", 5e6, "5.00 MB"), ("tok/s", 123.4, "123 tok/s"), ("bytes/s", 2e10, "20.0 GB/s"),
        ("s", 0.0, "0 s"), ("s", 0.0005, "500 µs"), ("s", 2.5e-8, "25.0 ns"), ("x", 0.25, "0.250 x"),
    ],
)  # fmt: skip
def test_a_value_is_shown_in_the_unit_that_fits(unit, value, text):
    assert fitting_unit(unit, [value]).text(value) == text
