"""`verify`, `info` and `export` of a quantized model: in its precision, or refused by name."""

import json

import numpy as np
import pytest

from gpt2core import RequestError, export_onnx, open_checkpoint
from gpt2core.checkpoint.open import save_checkpoint
from gpt2core.cli import main
from gpt2core.quantization.rounding import PRECISIONS, quantize
from gpt2core.reference import reference_logits
from gpt2core.testing import random_checkpoint
from gpt2core.testing.conformance import ROUNDED_TOLERANCE
from gpt2core.testing.subject import TOLERANCE
from gpt2core.verify import verify, worker

QUICK = {"seeds": 1, "tokens": 8, "threads": 1}
RUN = {
    "int8": ["numpy", "native", "torch", "onnx"],
    "int4": ["numpy", "native", "onnx"],
    "bfloat16": ["numpy", "native"],
}
"""What docs/quantization.md says."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = {}
    for precision in PRECISIONS:
        folder = random_checkpoint(tmp_path_factory.mktemp(precision))
        save_checkpoint(folder, quantize(open_checkpoint(folder).weights, precision))
        made[precision] = folder
    return made


@pytest.fixture(autouse=True)
def _factories_can_be_imported(monkeypatch):
    import os
    from pathlib import Path

    path = [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_each_backend_runs_the_precision_or_is_skipped_by_name(folders, precision):
    report = verify(folders[precision], **QUICK)
    assert report.passed
    assert report.precision == precision
    found = {one.backend: one for one in report.backends}
    assert [name for name, one in found.items() if one.status == "passed"] == RUN[precision]
    for name in {"numpy", "native", "torch", "jax", "onnx"} - set(RUN[precision]):
        assert found[name].status == "skipped"
        (reason,) = found[name].reasons
        assert reason.startswith(f"does not run precision {precision!r}, only float32")
    assert found["numpy"].overall.max_difference < TOLERANCE
    if precision == "bfloat16":
        assert (report.tolerance, report.relative_tolerance) == (TOLERANCE, None)
        assert found["native"].overall.max_difference < TOLERANCE
    else:
        assert (report.tolerance, report.relative_tolerance) == (None, ROUNDED_TOLERANCE)
        # It multiplies integers, which the float32 numbers that these stand for would not show.
        assert found["native"].overall.max_difference > 10 * TOLERANCE
        assert 0.001 < found["native"].overall.relative_difference < ROUNDED_TOLERANCE


def test_the_relative_difference_is_the_root_mean_square_over_the_spread(folders):
    from gpt2core.verify.cases import Case, Row
    from gpt2core.verify.compare import compare_logits

    want = reference_logits(open_checkpoint(folders["int8"]).weights, list(range(40)))
    got = want + np.where(np.arange(257) % 2, 0.3, -0.4).astype(np.float32)
    case = Case("x", 1, ((Row(text=0, slot=0, start=0, end=40),),))
    expected = np.sqrt(np.square(got - want).mean()) / want.std()
    assert compare_logits(case, got, [want]).relative_difference == pytest.approx(expected, rel=1e-6)


def test_one_that_is_named_must_run_the_precision(folders):
    report = verify(folders["int4"], backends=["numpy", "torch"], **QUICK)
    numpy, torch = report.backends
    assert (numpy.status, torch.status) == ("passed", "failed")
    assert torch.reasons == ("RequestError: does not run precision 'int4', only float32, int8",)


def test_a_fault_in_a_quantized_product_is_found_and_a_given_tolerance_is_absolute(folders):
    report = verify(folders["int8"], backends=["faulty:wrong_scale"], **QUICK)
    (one,) = report.backends
    assert one.status == "failed"
    assert "of their spread, allowed is 0.1" in one.reasons[0]
    exact = verify(folders["int8"], backends=["native"], tolerance=1e-6, **QUICK)
    assert "logits differ by" in exact.backends[0].reasons[0]
    assert (exact.tolerance, exact.relative_tolerance) == (1e-6, None)


def test_a_plugin_without_the_precision_is_told_by_its_worker(folders, tmp_path):
    job = {"backend": "faulty:Wrapped", "model": str(folders["int8"]), "threads": 1}
    (tmp_path / "job.json").write_text(json.dumps(job))
    worker.main(tmp_path)
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["unavailable"]
    assert result["errors"] == ["RequestError: does not run precision 'int8', only float32"]


def test_the_command_tells_the_precision_and_how_far_each_is_off(folders, capsys):
    options = ["--backends", "numpy,native", "--seeds", "0"]
    assert main(["verify", str(folders["int8"]), *options]) == 0
    out = capsys.readouterr().out
    assert (
        "against the reference of the weights that its int8 stands for; "
        "allowed root mean square of the differences 0.1 of the logits' spread\n"
    ) in out
    assert "native: off by 0.0" in out


# info


@pytest.mark.parametrize(
    ("precision", "line"),
    [
        ("int8", "int8; runs on numpy, native, torch, onnx"),
        ("int4", "int4, groups of 128; runs on numpy, native, onnx"),
        ("bfloat16", "bfloat16; runs on numpy, native"),
    ],
)
def test_info_tells_the_precision_and_what_runs_it(folders, capsys, precision, line):
    assert main(["info", str(folders[precision])]) == 0
    rows = dict(row.split(None, 1) for row in capsys.readouterr().out.splitlines() if "  " in row)
    assert rows["precision"] == line
    assert main(["info", str(folders[precision]), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert (document["precision"], document["backends"]) == (precision, RUN[precision])


# export


@pytest.mark.parametrize("precision", PRECISIONS)
def test_export_refuses_a_precision_that_it_does_not_write(folders, tmp_path, capsys, precision):
    with pytest.raises(
        RequestError, match=f"the model is in {precision}, and ONNX is exported in float32 only"
    ):
        export_onnx(folders[precision], tmp_path / "out")
    assert main(["export", str(tmp_path / "out"), "--model", str(folders[precision])]) == 2
    assert "pass --precision float32 to write" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    with pytest.raises(RequestError, match="precision is 'int8'; ONNX is exported in 'float32' only"):
        export_onnx(folders[precision], tmp_path / "out", precision="int8")


def test_export_in_float32_writes_what_the_numbers_stand_for(folders, tmp_path):
    import sys

    export_onnx(folders["int8"], tmp_path / "out", precision="float32")
    sys.path.insert(0, str(tmp_path / "out"))
    try:
        from generate import Model
    finally:
        sys.path.pop(0)
        sys.modules.pop("generate", None)
    tokens = list(range(20))
    want = reference_logits(open_checkpoint(folders["int8"]).weights, tokens)
    got = Model(tmp_path / "out").step(tokens, every=True)
    np.testing.assert_allclose(got, want, rtol=0, atol=TOLERANCE)
