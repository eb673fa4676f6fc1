"""The native backend gives the same bits on every processor and from every compiler, and checks it."""

import ctypes
import json
import shutil
import subprocess
from dataclasses import replace
from types import SimpleNamespace

import bits
import numpy as np
import pytest
from click.testing import CliRunner
from native_builds import driver

from gpt2core.backends.native import NativeBackend, build
from gpt2core.backends.native.build import load_library
from gpt2core.backends.native.library import declare
from gpt2core.batch import Batch
from gpt2core.cli.verify import verify
from gpt2core.errors import BackendUnavailableError
from gpt2core.testing import random_config, random_weights
from gpt2core.verify.bits import GOLDEN, verify_bits

COMPILER = "gcc" if shutil.which("gcc") else "cc"


@pytest.mark.parametrize("name", bits.BUILDS)
def test_every_build_gives_the_golden_bits_of_random_models(name):
    compiler, flags = bits.BUILDS[name]
    assert bits.run_driver(driver(compiler, flags), compiler, bits.SHORT) == bits.golden(bits.SHORT)


def test_the_naive_definition_gives_the_golden_bits():
    compiler, flags = next(iter(bits.BUILDS.values()))
    got = bits.run_driver(driver(compiler, flags), compiler, bits.SHORT, "--naive")
    assert got == bits.golden(bits.SHORT)


@pytest.mark.parametrize("name", bits.SANITIZERS)
def test_sanitizers_find_nothing_in_passes_of_random_models(name):
    program = driver(COMPILER, bits.SANITIZERS[name])
    assert bits.run_driver(program, COMPILER, bits.SHORT) == bits.golden(bits.SHORT)


@pytest.mark.parametrize("flags", ["-O2 -march=native", "-O2", "-O2 -DGPT2CORE_SCALAR"])
def test_the_parts_of_the_kernels_pass_their_unit_tests_in_c(flags):
    program = driver(COMPILER, flags, "unit_tests.c")
    done = subprocess.run([str(program)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


def test_the_demo_model_gives_the_golden_bits_through_python():
    assert [one.precision for one in verify_bits() if not one.passed] == []


def test_verify_bits_says_whether_this_machine_gives_the_bits_of_others(tmp_path, monkeypatch):
    done = CliRunner().invoke(verify, ["--bits", "--json"])
    assert done.exit_code == 0
    golden = json.loads(GOLDEN.read_text())
    assert {one["precision"]: one["digest"] for one in json.loads(done.output)["bits"]} == golden["demo"]
    other = tmp_path / "golden.json"
    other.write_text(json.dumps({"demo": {**golden["demo"], "int8": "0123456789abcdef"}}))
    monkeypatch.setattr("gpt2core.verify.bits.GOLDEN", other)
    done = CliRunner().invoke(verify, ["--bits"])
    assert done.exit_code == 1
    assert "NOT 0123456789abcdef" in done.output


# ---------------------------------------------------------------------------------------- flags that break it


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("GPT2CORE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(build, "_loaded", {})


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("-O1 -ffast-math", "could not be built"),
        ("-Ofast", "could not be built"),
        ("-O1 -ffinite-math-only", "could not be built"),
        ("-O2 -ffp-contract=fast", "fails its self-test"),
        ("-O1 -funsafe-math-optimizations", "fails its self-test"),
    ],
)
@pytest.mark.usefixtures("cache")
def test_flags_that_change_the_arithmetic_are_refused(flags, said, monkeypatch):
    monkeypatch.setenv("GPT2CORE_CFLAGS", flags)
    with pytest.raises(BackendUnavailableError, match=said):
        declare(load_library())
    tiny = np.full(4, 1e-40, np.float32)
    assert np.count_nonzero(tiny * np.float32(0.5)) == 4  # loading it left this thread's arithmetic alone


@pytest.mark.usefixtures("cache")
def test_speed_without_the_promise_is_a_flag_and_says_so(monkeypatch):
    assert declare(load_library()).portable
    monkeypatch.setenv("GPT2CORE_CFLAGS", "-O1 -DGPT2CORE_UNFUSED")
    assert not declare(load_library()).portable


def test_a_library_with_other_structures_is_refused():
    library = load_library()

    def layout(count):
        count._obj.value = 3
        return (ctypes.c_int64 * 3)(48, 0, 4)

    with pytest.raises(BackendUnavailableError, match="laid out as"):
        declare(SimpleNamespace(gpt2core_layout=layout, gpt2core_self_test=library.gpt2core_self_test))


def test_only_names_with_the_prefix_are_exported(tmp_path):
    path = bits.compile_driver(COMPILER, "-O1 -shared -fPIC", tmp_path / "kernels.so", "../gpt2.c")
    done = subprocess.run(
        ["nm", "-D", "--defined-only", str(path)], capture_output=True, text=True, check=True
    )
    names = {line.split()[2] for line in done.stdout.splitlines() if line.split()[1] == "T"}
    assert {name for name in names if not name.startswith("gpt2core_")} <= {"_init", "_fini"}
    assert "gpt2core_forward" in names


def test_subnormal_numbers_count_also_where_another_library_has_switched_them_off():
    """torch.set_flush_denormal and -ffast-math elsewhere change the calling thread's rules."""
    import torch

    weights = random_weights(random_config(), seed=2)
    tiny = weights.wte * np.float32(1e-40)
    assert np.count_nonzero(tiny)
    weights = replace(weights, wte=tiny, lm_head=tiny)

    def logits():
        backend = NativeBackend(weights, threads=2)
        cache = backend.new_cache(1, 16)
        return backend.forward(Batch.of([(list(range(16)), 0, 0)], range(16)), cache).view(np.uint32)

    want = logits()
    assert np.count_nonzero(want & 0x7FFFFFFF)  # not all zero, as they would be
    assert torch.set_flush_denormal(True)
    try:
        got = logits()
    finally:
        torch.set_flush_denormal(False)
    np.testing.assert_array_equal(got, want)
