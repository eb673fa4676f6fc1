"""report.html stands alone, escapes what users wrote, and is replaced whole or not at all."""

import base64
import html.parser
import json
import re

import pytest
from bench_synthesis import PROMPTS, classic_folder, comparison_folder

from gpt2core.bench import store as files
from gpt2core.bench import write_report
from gpt2core.bench.errors import BenchmarkError
from gpt2core.bench.store import write_atomically
from gpt2core.errors import RequestError

COMPONENTS = {
    "kind": "components", "model": "demo", "method": "by cutting", "skipped": {},
    "lines": [{
        "backend": "numpy", "phase": "decode", "total_s": 0.003,
        "seconds": {"attention": {"mid": 0.001}, "MLP": {"mid": 0.002}},
    }],
}  # fmt: skip
VOID = {"meta", "img", "link", "br", "hr", "input"}


class Page(html.parser.HTMLParser):
    """Tags with their attributes; a tag that is left open or closed twice is a fault."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.faults, self._open = [], [], []
        self.feed(text)
        self.faults += self._open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_endtag(self, tag):
        if not self._open or self._open.pop() != tag:
            self.faults.append(f"</{tag}>")

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


def classic(tmp_path, **options):
    return write_report(classic_folder(tmp_path, **options))


def test_the_report_is_one_sound_page_that_loads_nothing_from_outside(tmp_path):
    for path in (classic(tmp_path / "a"), write_report(comparison_folder(tmp_path / "b"))):
        text = path.read_text()
        page = Page(text)
        assert page.faults == []
        assert page.all("script") == page.all("link") == page.all("iframe") == []
        assert not re.search(r"https?://|url\(|@import", text)
        assert all(image["src"].startswith("data:image/png;base64,") for image in page.all("img"))
        assert all(image["alt"] for image in page.all("img"))
        assert "prefers-color-scheme: dark" in text


def test_each_figure_stands_in_the_page_and_beside_it(tmp_path):
    path = classic(tmp_path)
    images = [base64.b64decode(i["src"].partition(",")[2]) for i in Page(path.read_text()).all("img")]
    names = ["gpt2_benchmark.png", "gpt2_benchmark_line.png"]
    assert images == [(tmp_path / name).read_bytes() for name in names]
    assert all(image.startswith(b"\x89PNG") for image in images)


def test_every_link_leads_to_a_file_of_the_folder_or_a_section(tmp_path):
    (tmp_path / "components.json").write_text(json.dumps(COMPONENTS))
    page = Page(classic(tmp_path).read_text())
    links = [link["href"] for link in page.all("a")]
    sections = {f"#{section['id']}" for section in page.all("section")}
    assert {link for link in links if link.startswith("#")} == sections
    files = {link for link in links if not link.startswith("#")}
    assert {"runs.jsonl", "analysis.json", "components.json", "gpt2_components.png"} <= files
    assert [name for name in files if not (tmp_path / name).is_file()] == []


def test_findings_tables_method_and_environment_are_in_the_page(tmp_path):
    (tmp_path / "components.json").write_text(json.dumps(COMPONENTS))
    text = classic(tmp_path, failed=((0, 50, 0),)).read_text()
    for part in (
        *("Linear fit over 15 points", "Within a run:"),
        *("In a galaxy far, far away", "<td>1</td>", "TimeoutError: no answer after 30 s", "by cutting"),
        *(
            "Theil-Sen",
            "Imaginary CPU @ 3 GHz",
            "3.11.7",
            "0123456789abcdef",
            "Time by component",
        ),
    ):
        assert part in text, part


def test_what_users_wrote_is_escaped(tmp_path):
    attack = "<script>alert(1)</script><img src=x onerror=alert(2)>"
    text = classic(tmp_path, prompts=(attack, "a & b", *PROMPTS)).read_text()
    assert Page(text).all("script") == []
    assert "&lt;script&gt;alert(1)" in text
    assert "a &amp; b" in text
    assert len(Page(text).all("img")) == 2


def test_a_wrong_engine_is_marked_in_findings_and_tables(tmp_path):
    text = write_report(comparison_folder(tmp_path)).read_text()
    assert '<li class="wrong">ctranslate2 is WRONG on inverse_layer_scaling' in text
    assert '<tr class="wrong"><th scope="row">ctranslate2 (WRONG)</th>' in text
    assert "llamacpp was skipped" in text
    assert "Times as fast as transformers" in text


def test_analysis_json_holds_the_same_numbers_as_strict_json(tmp_path):
    classic(tmp_path)
    found = json.loads((tmp_path / "analysis.json").read_text(), parse_constant=pytest.fail)
    assert found["line"]["slope"]["mid"] == pytest.approx(1e-3, rel=0.02)
    assert found["kind"] == "classic"


@pytest.mark.parametrize("case", ["one run", "all failed", "nothing measured"])
def test_a_report_of_little_is_still_a_report(tmp_path, case):
    if case == "nothing measured":
        text = write_report(comparison_folder(tmp_path, engines=(), rounds=0)).read_text()
        assert "Nothing was measured that could be drawn." in text
    else:
        failed = tuple((0, 50, run) for run in range(-1, 1)) if case == "all failed" else ()
        text = classic(tmp_path, prompts=PROMPTS[:1], lengths=(50,), runs=1, failed=failed).read_text()
        assert "Linear fit: not possible" in text
    assert Page(text).faults == []


def test_a_folder_without_runs_is_refused_and_gets_no_files(tmp_path):
    with pytest.raises(RequestError, match=r"has no runs\.jsonl"):
        write_report(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_broken_components_file_is_refused(tmp_path):
    (tmp_path / "components.json").write_text('{"lines": 3}')
    with pytest.raises(RequestError, match=r"components\.json is not what it should be"):
        classic(tmp_path)


# Files


def test_a_file_is_replaced_whole(tmp_path):
    path = tmp_path / "file"
    write_atomically(path, b"old")
    write_atomically(path, b"new" * 1000)
    assert path.read_bytes() == b"new" * 1000
    assert list(tmp_path.iterdir()) == [path]


def test_what_cannot_be_replaced_stays_and_leaves_nothing_beside_it(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_atomically(path, b"old")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "replace", full)
    with pytest.raises(BenchmarkError, match="No space left on device"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]
