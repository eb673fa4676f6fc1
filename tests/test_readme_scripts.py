"""The scripts behind the README's pictures: the chart from a comparison's lines, the recorded terminal."""

import importlib.util
import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parent.parent / "scripts"


def script(name):
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def figures():
    return script("readme_figures")


def line(engine, precision, round_, value, measure="decode_tok_s", **size):
    family = "gpt2core" if engine == "native" else "peer"
    about = {"batch": 1 if measure == "decode_tok_s" else None, "length": None, "status": "ok"}
    about |= {"started_at": "2026-01-02T03:04:05.678+00:00", "family": family}
    about |= {"engine": engine, "precision": precision, "round": round_, "measure": measure, "value": value}
    return about | size


def write(folder, lines):
    (folder / "runs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "environment.json").write_text(json.dumps({"machine": {"cpu": "A Processor"}}))
    (folder / "settings.json").write_text(json.dumps({"threads": 2, "rounds": 3, "batches": [1, 8]}))
    return folder


@pytest.fixture
def folder(tmp_path):
    speeds = {("native", "int4"): (300, 330, 310), ("openvino", "int4"): (100, 165, 155)}
    lines = [line(*who, i, speed) for who, values in speeds.items() for i, speed in enumerate(values)]
    for i, (ours, theirs) in enumerate([(0.1, 0.2), (0.2, 0.3), (0.1, 0.4)]):
        lines.append(line("native", "int4", i, ours, "prefill_s", length=512))
        lines.append(line("openvino", "int4", i, theirs, "prefill_s", length=512))
    lines.append(line("transformers", "int4", 0, None, status="skipped"))
    return write(tmp_path, lines)


def test_the_table_has_medians_and_the_median_ratio_of_the_same_rounds(figures, folder):
    rows = figures.table(figures.Measured.read(folder)).splitlines()
    assert rows[0].startswith("| engine | precision | batch 1, tok/s | batch 8, tok/s | prefill 512, ms |")
    assert rows[2:] == [
        "| gpt2core, native | int4 | 310 (2.00x) |  | 100 (2.00x) |  |  |",
        "| OpenVINO GenAI | int4 | 155 |  | 300 |  |  |",
    ]


def test_the_charts_title_is_its_finding(figures, folder):
    measured = figures.Measured.read(folder)
    figure = figures.chart(measured)
    title = "gpt2core in int4: 310 tokens per second, 2.0 times OpenVINO GenAI"
    assert figure.get_suptitle() == figures.finding(measured) == title
    labels = {text.get_text() for text in figure.axes[0].texts}
    assert labels == {"310", "155"}


def test_a_table_of_two_days_is_refused(figures, folder):
    later = line("native", "int4", 2, 300) | {"started_at": "2026-01-03T00:00:01.000+00:00"}
    with (folder / "runs.jsonl").open("a") as file:
        file.write(json.dumps(later) + "\n")
    with pytest.raises(SystemExit, match=r"2026-01-02', '2026-01-03.*one day"):
        figures.Measured.read(folder)


def test_text_and_number_are_replaced_where_they_are_marked(figures, tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"at **12 tokens per second**\n{figures.BEGIN}\nold\n{figures.END}\nafter\n")
    figures.replace_between(page, "new")
    figures.replace_number(page, 345.6)
    assert page.read_text() == f"at **346 tokens per second**\n{figures.BEGIN}\nnew\n{figures.END}\nafter\n"
    page.write_text("no number")
    with pytest.raises(SystemExit, match="no \\*\\*N tokens per second"):
        figures.replace_number(page, 1)


def test_the_figures_of_the_comparison_are_copied_and_a_missing_one_is_named(figures, tmp_path):
    with pytest.raises(
        SystemExit, match=r"has no gpt2_throughput\.png; run the comparison without --no-report"
    ):
        figures.copy_figures(tmp_path, tmp_path)
    for name in ("throughput", "roofline"):
        (tmp_path / f"gpt2_{name}.png").write_bytes(name.encode())
    figures.copy_figures(tmp_path, tmp_path)
    assert (tmp_path / "roofline.png").read_bytes() == b"roofline"
    pages = (SCRIPTS.parent / "docs/benchmarks.md").read_text()
    assert all(f"figures/{name}.png" in pages for name in figures.REPORTED)


def test_a_recording_shows_each_piece_where_and_when_it_appeared(tmp_path):
    recorder = script("record_terminal")
    picture = tmp_path / "terminal.svg"
    recorder.main([str(picture), "--", "bash", "-c", r"printf 'wait\r\033[K'; printf 'a<b\n%90s' x"])
    texts = [
        (element.get("y"), element.text)
        for element in ElementTree.parse(picture).iter("{http://www.w3.org/2000/svg}text")
    ]
    typed = [text for _, text in texts[1:7]]
    assert typed == [*"bash-c"]
    (first, shown), (second, padded) = texts[-2:]
    assert (shown, padded.strip()) == ("a<b", "x")
    assert float(second) - float(first) == 2 * recorder.LINE_HEIGHT  # 90 columns wrap
    assert not any("wait" in text for _, text in texts[-3:])


def test_a_command_that_fails_is_not_recorded(tmp_path):
    recorder = script("record_terminal")
    with pytest.raises(SystemExit, match=r"ended with 3:\s+oh no"):
        recorder.main([str(tmp_path / "t.svg"), "--", "bash", "-c", "echo oh no; exit 3"])
    assert not (tmp_path / "t.svg").exists()
