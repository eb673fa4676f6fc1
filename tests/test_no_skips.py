"""The plugin that keeps skipped tests from passing unseen."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def run_pytest(folder: Path, source: str, *args: str, **env: str) -> subprocess.CompletedProcess[str]:
    (folder / "test_it.py").write_text("import pytest\n\ndef test_runs():\n    pass\n\n" + source)
    (folder / "pytest.ini").write_text("[pytest]\n")
    clean = {k: v for k, v in os.environ.items() if k not in ("CI", "GPT2CORE_NO_SKIPS", "PYTEST_ADDOPTS")}
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no_skips", "-p", "no:cacheprovider", *args, str(folder)],
        env=clean | {"PYTHONPATH": str(HERE), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"} | env,
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=60,
    )


SKIP = "def test_other():\n    pytest.skip('package frobnicate is missing')\n"
CUDA_SKIP = "@pytest.mark.skipif(True, reason='needs a CUDA device')\ndef test_other():\n    pass\n"
MODULE_SKIP = "pytest.importorskip('frobnicate')\n"
XFAIL = "@pytest.mark.xfail\ndef test_other():\n    assert False\n"


@pytest.mark.parametrize("env", [{"CI": "true"}, {"GPT2CORE_NO_SKIPS": "1"}], ids=lambda env: next(iter(env)))
@pytest.mark.parametrize("distribute", [(), ("-p", "xdist", "-n", "1")], ids=["alone", "xdist"])
def test_a_skip_without_hardware_reason_fails_the_run_and_is_named(tmp_path, env, distribute):
    result = run_pytest(tmp_path, SKIP, *distribute, **env)
    assert result.returncode == 1, result.stdout
    assert "test_it.py::test_other: Skipped: package frobnicate is missing" in result.stdout
    assert "1 passed, 1 skipped" in result.stdout


@pytest.mark.parametrize("distribute", [(), ("-p", "xdist", "-n", "1")], ids=["alone", "xdist"])
def test_a_module_skipped_while_it_is_collected_fails_the_run(tmp_path, distribute):
    result = run_pytest(tmp_path, MODULE_SKIP, *distribute, CI="true")
    assert result.returncode == 1, result.stdout
    assert "test_it.py: Skipped: could not import 'frobnicate'" in result.stdout


def test_a_skip_for_want_of_a_cuda_device_is_excused(tmp_path):
    result = run_pytest(tmp_path, CUDA_SKIP, CI="true")
    assert result.returncode == 0, result.stdout
    assert "1 passed, 1 skipped" in result.stdout


def test_a_reason_that_only_mentions_cuda_is_not_excused(tmp_path):
    source = "def test_other():\n    pytest.skip('cuda is fine, but there was no time')\n"
    result = run_pytest(tmp_path, source, CI="true")
    assert result.returncode == 1, result.stdout
    assert "there was no time" in result.stdout


def test_a_test_that_gives_up_with_xfail_fails_the_run_and_is_named(tmp_path):
    source = "def test_other():\n    pytest.xfail('does not work yet')\n"
    result = run_pytest(tmp_path, source, CI="true")
    assert result.returncode == 1, result.stdout
    assert "test_it.py::test_other: pytest.xfail: does not work yet" in result.stdout


def test_an_expected_failure_is_no_skip(tmp_path):
    assert run_pytest(tmp_path, XFAIL, CI="true").returncode == 0


def test_outside_ci_a_skip_is_allowed(tmp_path):
    assert run_pytest(tmp_path, SKIP).returncode == 0
