"""`backend="auto"` where its first choice cannot be made: the next one, and one warning that says why."""

import subprocess
import sys
import warnings

import pytest

from gpt2core import backends
from gpt2core.backends import choose, create_backend
from gpt2core.backends.native import build
from gpt2core.errors import BackendUnavailableError, RequestError
from gpt2core.testing import random_config, random_weights

WEIGHTS = random_weights(random_config())


@pytest.fixture(autouse=True)
def failing(monkeypatch, tmp_path):
    """A compiler that is found and fails, for a model that counts as large."""
    compiler = tmp_path / "cc"
    compiler.write_text("#!/bin/sh\necho 'stdio.h: No such file or directory' >&2\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("GPT2CORE_CC", str(compiler))
    monkeypatch.setenv("GPT2CORE_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("GPT2CORE_BACKEND", raising=False)
    monkeypatch.setattr(sys.modules["gpt2core.backends.choose"], "SMALL_MODEL_PARAMETERS", 0)
    monkeypatch.setattr(build, "_loaded", {})
    assert choose(WEIGHTS.config)[0] == "native"
    return monkeypatch


def without(monkeypatch, *packages):
    real = backends.find_spec
    monkeypatch.setattr(backends, "find_spec", lambda name: None if name in packages else real(name))


@pytest.mark.parametrize(
    ("lacking", "precision", "taken"),
    [
        ([], "float32", "onnx"),
        ([], "int4", "onnx"),
        ([], "bfloat16", "numpy"),
        (["onnxruntime"], "float32", "torch"),
        (["onnxruntime", "torch"], "float32", "numpy"),
    ],
)
def test_auto_takes_the_next_of_its_rule_and_says_why_in_one_line(
    failing, tmp_path, lacking, precision, taken
):
    without(failing, *lacking)
    with pytest.warns(RuntimeWarning) as said:
        backend = create_backend("auto", WEIGHTS, precision=precision)
    assert backend.name == taken
    assert [str(one.message) for one in said] == [
        f"backend='auto' takes {taken}: the native backend could not be built: {tmp_path}/cc ended with exit "
        "code 1; use backend='onnx', or name another compiler with GPT2CORE_CC"
    ]
    backend.close()


def test_a_backend_that_a_call_or_the_environment_names_is_not_replaced(failing):
    with pytest.raises(BackendUnavailableError, match=r"stdio\.h: No such file or directory"):
        create_backend("native", WEIGHTS)
    failing.setenv("GPT2CORE_BACKEND", "native")
    with pytest.raises(BackendUnavailableError, match=r"stdio\.h: No such file or directory"):
        create_backend("auto", WEIGHTS)


def test_a_wrong_request_is_not_a_reason_for_another_backend():
    with warnings.catch_warnings(), pytest.raises(RequestError, match="threads is 0"):
        create_backend("auto", WEIGHTS, threads=0)


def test_where_each_of_them_fails_numpy_runs_and_each_is_named(failing):
    def refuse(name):
        if name in ("onnx", "torch"):
            raise BackendUnavailableError(f"{name} does not load here")
        return real(name)

    real = backends.load_factory
    failing.setattr(backends, "load_factory", refuse)
    with pytest.warns(RuntimeWarning) as said:
        assert create_backend("auto", WEIGHTS).name == "numpy"
    assert [str(one.message).split(":")[0] for one in said] == [
        "backend='auto' takes onnx",
        "backend='auto' takes torch",
        "backend='auto' takes numpy",
    ]


def test_the_command_line_says_that_it_compiles_and_why_it_goes_on_without(tmp_path):
    code = (
        "import sys, gpt2core.backends; sys.modules['gpt2core.backends.choose'].SMALL_MODEL_PARAMETERS = 0; "
        "from gpt2core.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    from gpt2core.testing import random_checkpoint

    model = random_checkpoint(tmp_path / "model", n_positions=32)
    command = [sys.executable, "-c", code, "generate", "a", "--model", model, "--max-new-tokens", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines() == [
        f"gpt2core: compiling the native backend for this processor with {tmp_path}/cc, which takes some "
        "seconds once",
        f"gpt2core: warning: --backend auto takes onnx: the native backend could not be built: {tmp_path}/cc "
        "ended with exit code 1; use --backend onnx, or name another compiler with GPT2CORE_CC",
    ]
