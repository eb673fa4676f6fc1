"""Figures: every label is there and in its place, whatever the prompts are and whatever failed."""

import subprocess
import sys
from itertools import combinations

import matplotlib as mpl
import pytest
from bench_synthesis import PROMPTS, classic_folder, comparison_folder
from matplotlib.colors import to_hex
from matplotlib.image import imread
from matplotlib.text import Text

from gpt2core.bench import analyse
from gpt2core.bench.components import component_figure
from gpt2core.bench.report import comparison_figures, sweep_figures
from gpt2core.bench.report.drawing import COLORS, label, png, wrapped

HARD_PROMPTS = (
    "\U0001f600\U0001f680 emoji", "日本語のとても長いプロンプトです。" * 3, "_begins with a line",
    "costs $5 and $x_1^2$", "word " * 80, "x" * 400, "two\nlines\tand\x00control",
    "עברית العربية", "<b>&amp;</b>",
    "%s {0} \\frac{1}{2}", "   ", "Once upon a time",
)  # fmt: skip


def texts(figure):
    figure.canvas.draw()
    hidden = set()  # labels of ticks beyond the ends of their axis are not drawn
    for axis in (axis for ax in figure.axes for axis in (ax.xaxis, ax.yaxis)):
        low, high = sorted(axis.get_view_interval())
        for tick in [*axis.get_major_ticks(), *axis.get_minor_ticks()]:
            if not low <= tick.get_loc() <= high:
                hidden |= {tick.label1, tick.label2}
    visible = (text for text in figure.findobj(Text) if text.get_visible() and text not in hidden)
    return [text for text in visible if text.get_text().strip()]


def shown(figure):
    return "\n".join(text.get_text() for text in texts(figure))


def overlaps(figure):
    """Pairs of texts whose boxes overlap by more than a hair."""
    renderer = figure.canvas.get_renderer()
    boxes = [(t.get_text(), t.get_window_extent(renderer)) for t in texts(figure)]
    found = []
    for (a, one), (b, other) in combinations(boxes, 2):
        width = min(one.x1, other.x1) - max(one.x0, other.x0)
        height = min(one.y1, other.y1) - max(one.y0, other.y0)
        if width > 1.5 and height > 1.5:
            found.append((a, b))
    return found


def outside(figure):
    """Texts that stick out of the figure."""
    box, renderer = figure.bbox, figure.canvas.get_renderer()
    extents = [(t.get_text(), t.get_window_extent(renderer)) for t in texts(figure)]
    return [t for t, e in extents if e.x0 < -2 or e.y0 < -2 or e.x1 > box.x1 + 2 or e.y1 > box.y1 + 2]


CLASSIC = {
    "usual": {},
    "twelve hard prompts": {"prompts": HARD_PROMPTS},
    "one prompt, one run": {"prompts": PROMPTS[:1], "runs": 1},
    "one length": {"lengths": (64,)},
    "some failed": {"failed": ((0, 50, 0), *((1, 100, run) for run in range(5)))},
    "all failed": {
        "failed": tuple((p, n, r) for p in range(5) for n in (50, 100, 200) for r in range(-1, 5))
    },
}


@pytest.mark.parametrize("draw", [sweep_figures.bar_figure, sweep_figures.line_figure], ids=["bars", "lines"])
@pytest.mark.parametrize("case", CLASSIC, ids=lambda case: case.replace(" ", "_"))
def test_no_label_of_the_classic_figures_overlaps_another_or_is_cut_off(tmp_path, case, draw):
    figure = draw(analyse(classic_folder(tmp_path, **CLASSIC[case])))
    assert overlaps(figure) == []
    assert outside(figure) == []


def test_the_bars_name_prompts_lengths_unit_means_and_failures(tmp_path):
    failed = CLASSIC["some failed"]["failed"]
    text = shown(sweep_figures.bar_figure(analyse(classic_folder(tmp_path, failed=failed))))
    for part in (
        "1. Once upon a time",
        "mean generation time (ms)",
        "total tokens",
        "200",
        "all 5 runs failed",
    ):
        assert part in text
    assert "(1 failed)" in text
    assert "demo, numpy, float32" in text
    assert "95 % intervals (Student's t over up to 5 runs" in text


def test_the_lines_are_drawn_at_the_means_with_their_intervals(tmp_path):
    analysis = analyse(classic_folder(tmp_path, prompts=PROMPTS[:1]))
    [ax] = sweep_figures.line_figure(analysis).axes
    [container] = ax.containers
    line, _, [segments] = container.lines
    means = [cell.mean_s * 1e3 for cell in analysis.cells]
    assert list(line.get_ydata()) == pytest.approx(means)
    ends = [(segment[0][1], segment[1][1]) for segment in segments.get_segments()]
    want = [(cell.low_s * 1e3, cell.high_s * 1e3) for cell in analysis.cells]
    assert ends == [pytest.approx(pair) for pair in want]
    assert ax.get_xlabel() == "total length (tokens, prompt included)"
    assert ax.get_ylabel() == "mean generation time (ms)"


def test_one_run_is_said_to_have_no_interval(tmp_path):
    figure = sweep_figures.bar_figure(analyse(classic_folder(tmp_path, runs=1)))
    assert "One run for each bar or point, so there are no intervals." in shown(figure)
    assert [c for c in figure.axes[0].containers if hasattr(c, "has_xerr") and c.has_xerr] == []


def test_one_length_gives_bars_and_no_line(tmp_path):
    [ax] = sweep_figures.line_figure(analyse(classic_folder(tmp_path / "a", lengths=(64,)))).axes
    assert len(ax.patches) == len(PROMPTS)
    folder = comparison_folder(tmp_path / "b", **COMPARISON["one point"])
    for name in ("gpt2_throughput.png", "gpt2_prefill.png", "gpt2_step.png"):
        [ax] = comparison_figures.FIGURES[name][0](analyse(folder)).axes
        assert len(ax.patches) == 6
        assert ax.get_xscale() == "linear"


def test_titles_state_the_findings(tmp_path):
    classic = analyse(classic_folder(tmp_path / "a", growth_s=4e-6))
    comparison = analyse(comparison_folder(tmp_path / "b"))
    figures = {name: draw(classic) for name, (draw, _) in sweep_figures.FIGURES.items()}
    figures |= {name: draw(comparison) for name, (draw, _) in comparison_figures.FIGURES.items()}
    titles = {name: " ".join(figure.get_suptitle().split()) for name, figure in figures.items()}
    for name, title in {
        "gpt2_benchmark.png": "demo, numpy, float32: 692 to 708 tok/s at 200 tokens",
        "gpt2_benchmark_line.png": "per token, later tokens take longer",
        "gpt2_throughput.png": "onnx decodes fastest at batch 32: 850 tok/s, 1.26 [1.23, 1.28] times",
        "gpt2_prefill.png": "onnx reads prompts fastest at length 512: 574 ms, 1.25 [1.24, 1.27] times",
        "gpt2_step.png": "onnx has the fastest step at position 1000",
        "gpt2_startup.png": "onnx is the first to answer after a cold start: 998 ms",
        "gpt2_memory.png": "onnx needs the least memory: 866 MB; torch needs 1.08 [1.08, 1.08] times as much",
        "gpt2_roofline.png": "onnx reads weights at 186% of the memory's speed",
        "gpt2_ratios.png": "onnx decodes 2.50 times as fast as transformers at batch 32",
    }.items():
        assert title in titles[name], titles[name]


@pytest.mark.parametrize("kind", ["classic", "comparison"])
def test_no_number_stands_where_a_whisker_may_cross_it(tmp_path, kind):
    if kind == "classic":
        figure = sweep_figures.bar_figure(analyse(classic_folder(tmp_path, noise=0.2)))
    else:
        figure = comparison_figures.FIGURES["gpt2_memory.png"][0](analyse(comparison_folder(tmp_path)))
    [ax] = figure.axes
    numbers = [text for text in ax.texts if text.get_text()[0].isdigit()]
    assert len(numbers) == len(ax.patches)
    figure.canvas.draw()
    edge = ax.get_window_extent().x1
    assert all(text.get_window_extent().x0 >= edge for text in numbers)


COMPARISON = {
    "usual": {},
    "two precisions": {"precisions": ("float32", "int8")},
    "one engine, one round": {"engines": ("numpy",), "rounds": 1, "wrong": (), "skipped": ()},
    "failed": {"failed": ("torch",)},
    "one point": {"batches": (1,), "lengths": (128,), "positions": (100,)},
}


@pytest.mark.parametrize("name", comparison_figures.FIGURES)
@pytest.mark.parametrize("case", COMPARISON, ids=lambda case: case.replace(" ", "_"))
def test_no_label_of_the_comparison_figures_overlaps_another_or_is_cut_off(tmp_path, case, name):
    draw, _ = comparison_figures.FIGURES[name]
    figure = draw(analyse(comparison_folder(tmp_path, **COMPARISON[case])))
    if case == "one engine, one round" and name == "gpt2_ratios.png":
        assert figure is None  # there is nothing to relate it to
        return
    assert overlaps(figure) == []
    assert outside(figure) == []


def test_what_was_not_measured_is_not_drawn(tmp_path):
    analysis = analyse(comparison_folder(tmp_path, engines=(), rounds=0))
    assert [name for name, (draw, _) in comparison_figures.FIGURES.items() if draw(analysis)] == []


@pytest.mark.parametrize("name", comparison_figures.FIGURES)
def test_a_wrong_engine_is_named_wrong_and_a_skipped_one_is_listed_in_every_figure(tmp_path, name):
    draw, _ = comparison_figures.FIGURES[name]
    text = shown(draw(analyse(comparison_folder(tmp_path))))
    assert "ctranslate2 (WRONG)" in text
    assert "ctranslate2 answers WRONG on: inverse_layer_scaling." in text
    assert "Skipped: llamacpp (llamacpp is not installed; pip install llamacpp)." in text
    assert "onnx (WRONG)" not in text


def test_only_the_wrong_engines_bars_are_hatched(tmp_path):
    [ax] = comparison_figures.FIGURES["gpt2_memory.png"][0](analyse(comparison_folder(tmp_path))).axes
    hatched = [bool(bar.get_hatch()) for bar in ax.patches]
    names = [text.get_text() for text in ax.get_yticklabels()]
    assert dict(zip(names, hatched, strict=True)) == {name: "WRONG" in name for name in names}


def test_an_engine_has_one_colour_of_the_colour_blind_palette_in_all_figures(tmp_path):
    analysis = analyse(comparison_folder(tmp_path))
    palette = {to_hex(colour) for colour in COLORS}
    [lines] = comparison_figures.FIGURES["gpt2_step.png"][0](analysis).axes
    of_lines = [to_hex(container.lines[0].get_color()) for container in lines.containers]
    [bars] = comparison_figures.FIGURES["gpt2_memory.png"][0](analysis).axes
    of_bars = [
        to_hex(bar.get_edgecolor() if bar.get_hatch() else bar.get_facecolor()) for bar in bars.patches
    ]
    assert of_lines == of_bars
    assert len(set(of_lines)) == 6
    assert set(of_lines) <= palette


def test_the_roofline_shows_the_bandwidth_and_each_share_of_it(tmp_path):
    text = shown(comparison_figures.roofline_figure(analyse(comparison_folder(tmp_path))))
    assert "read bandwidth 20.0 GB/s" in text
    assert "(75%)" in text


def test_component_bars_add_up_to_all_and_name_each_component():
    seconds = {"attention": 1e-3, "MLP": 2e-3, "head": -1e-6}
    parts = {name: {"low": 0, "mid": value, "high": 0} for name, value in seconds.items()}
    lines = [{"backend": b, "phase": "decode", "total_s": 3e-3, "seconds": parts} for b in ("numpy", "onnx")]
    figure = component_figure({"lines": lines, "method": "by cutting"})
    text = shown(figure)
    for part in ("numpy, decode", "attention", "MLP", "head", "67 %", "33 %", "3.00 ms", "by cutting"):
        assert part in text
    assert sum(bar.get_width() for bar in figure.axes[0].patches) == pytest.approx(200)
    assert overlaps(figure) == []


def test_a_png_has_its_pixels_and_is_the_same_for_the_same_data(tmp_path):
    analysis = analyse(classic_folder(tmp_path))
    image = png(sweep_figures.bar_figure(analysis))
    assert image == png(sweep_figures.bar_figure(analysis))
    (tmp_path / "bars.png").write_bytes(image)
    pixels = imread(tmp_path / "bars.png")
    assert pixels.shape[0] > 400
    assert pixels.shape[1] == 1170
    assert len({tuple(p) for p in pixels[::7, ::7, :3].reshape(-1, 3).round(2).tolist()}) > 5


def test_drawing_leaves_the_callers_settings_alone(tmp_path):
    before = dict(mpl.rcParams)
    png(sweep_figures.bar_figure(analyse(classic_folder(tmp_path))))
    assert dict(mpl.rcParams) == before


def test_drawing_opens_no_figure_and_chooses_no_backend(tmp_path):
    folder = classic_folder(tmp_path)
    code = f"""
from gpt2core.bench import analyse
from gpt2core.bench.report import drawing, sweep_figures
drawing.png(sweep_figures.line_figure(analyse({str(folder)!r})))
import matplotlib, matplotlib.pyplot as plt
assert plt.get_fignums() == [], "a figure is open"
print(matplotlib.rcParams._get("backend") is matplotlib.rcsetup._auto_backend_sentinel)
"""
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("True\n", "")


def test_labels_are_one_line_short_and_drawable():
    assert label("two\nlines\tand\x00control") == "two lines and control"
    assert label("x" * 100, 10) == "x" * 9 + "…"
    assert label("a\U0010fffdb") == "a b"
    assert label("a\U0001f680b") in ("a□b", "a\U0001f680b")
    assert wrapped("word " * 30, 20).splitlines()[-1].endswith("…")
    assert [len(line) <= 20 for line in wrapped("one two three four five six seven", 20).splitlines()] == [
        True
    ] * 2
