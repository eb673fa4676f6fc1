"""The example of a backend from outside: it conforms, and its entry point is all that it needs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from gpt2core.batch import Batch
from gpt2core.errors import BackendError, BackendUnavailableError, RequestError
from gpt2core.testing import CONFORMANCE_CHECKS, VARIANTS, check_backend, random_config, random_weights

EXAMPLES = Path(__file__).parent.parent / "examples"
sys.path.insert(0, str(EXAMPLES))
from custom_backend import OpenVinoBackend  # noqa: E402 - the folder is no package

# what depends on the variant; the rest is checked once, since each check compiles the model anew
ARITHMETIC = [check for check in CONFORMANCE_CHECKS if check.__name__.startswith(("agrees", "prefill_and"))]


@pytest.fixture(scope="module")
def tiny():
    return random_weights(random_config())


@pytest.mark.parametrize("check", CONFORMANCE_CHECKS, ids=lambda check: check.__name__)
def test_the_example_conforms(check):
    check_backend(OpenVinoBackend, checks=[check])


@pytest.mark.parametrize("variant", [v for v in VARIANTS if v != "plain"])
def test_the_example_agrees_with_the_reference_on_every_variant(variant):
    weights = random_weights(random_config(n_positions=64, **VARIANTS[variant]), seed=1)
    check_backend(OpenVinoBackend, weights, checks=ARITHMETIC)


@pytest.mark.parametrize("threads", [0, True, 1.5])
def test_the_example_refuses_a_bad_thread_count(tiny, threads):
    with pytest.raises(RequestError, match=r"threads is .*; use None or a whole number of 1 or more"):
        OpenVinoBackend(tiny, threads=threads)


def test_the_example_refuses_a_device_that_is_not_there(tiny):
    with pytest.raises(BackendUnavailableError, match=r"does not see device 'abacus'; there are: .*cpu"):
        OpenVinoBackend(tiny, device="abacus")


def test_a_failure_inside_the_engine_is_a_backend_error_that_writes_nothing(tiny):
    backend = OpenVinoBackend(tiny)
    cache = backend.new_cache(1, 8)
    cache.kv = cache.kv[..., :1]
    with pytest.raises(BackendError, match="the openvino backend failed"):
        backend.forward(Batch.of([([1, 2], 0, 0)]), cache)
    assert not np.any(cache.kv)


@pytest.fixture
def installed(tmp_path):
    """The environment of a process in which the example is installed: its metadata, and its file's folder."""
    info = tmp_path / "custom_backend-1.2.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: custom-backend\nVersion: 1.2\n")
    (info / "entry_points.txt").write_text("[gpt2core.backends]\nopenvino = custom_backend:OpenVinoBackend\n")
    paths = [str(tmp_path), str(EXAMPLES), str(EXAMPLES.parent), os.environ.get("PYTHONPATH", "")]
    return os.environ | {"PYTHONPATH": os.pathsep.join(path for path in paths if path)}


def gpt2core(env, *args):
    command = [sys.executable, "-m", "gpt2core", *args]
    return subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout


def test_the_example_is_found_through_its_entry_point(installed):
    listed = {one["name"]: one for one in json.loads(gpt2core(installed, "backends", "--json"))["backends"]}
    assert listed["openvino"] == {"name": "openvino", "available": True, "version": "1.2", "reason": ""}


def test_the_example_writes_what_numpy_writes_for_the_same_seed(installed):
    options = ("generate", "Once upon a time", "--seed", "7", "--max-new-tokens", "40", "--offline")
    text = gpt2core(installed, *options, "--backend", "openvino")
    assert len(text) > 40
    assert text == gpt2core(installed, *options, "--backend", "numpy")
