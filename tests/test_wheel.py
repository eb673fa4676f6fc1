"""The package as it is built: which libraries a wheel holds, and that it runs without a compiler."""

import json
import os
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

from gpt2core.backends._shared.variants import DIGEST_NAME, VARIANTS, digest_sources, machine_name

ROOT = Path(__file__).parent.parent
INSIDE = "gpt2core/backends/native/prebuilt/"
LARGEST_NBYTES = 20_000_000


def build(folder, kind="wheel", **variables):
    """Have hatchling build from here; the file, and what was said."""
    environment = {k: v for k, v in os.environ.items() if k not in ("GPT2CORE_CC", "GPT2CORE_NATIVE")}
    command = [sys.executable, "-m", "hatchling", "build", "--target", kind, "--directory", str(folder)]
    done = subprocess.run(command, cwd=ROOT, env=environment | variables, capture_output=True, text=True)
    made = list(folder.glob("gpt2core-*"))
    return (made[0] if made else None), done.stdout + done.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """This machine's, compiled quickly."""
    made, said = build(tmp_path_factory.mktemp("wheel"), GPT2CORE_CFLAGS="-O0")
    assert made is not None, said
    return made


def libraries(path):
    with zipfile.ZipFile(path) as archive:
        return {name for name in archive.namelist() if name.startswith(INSIDE)}


def test_a_wheel_built_where_a_compiler_is_has_this_machines_libraries(wheel):
    system = sysconfig.get_platform().replace("-", "_").replace(".", "_")
    assert wheel.name.endswith(f"-py3-none-{system}.whl")
    wanted = {variant.file_name for variant in VARIANTS[machine_name()]} | {DIGEST_NAME}
    assert libraries(wheel) == {INSIDE + name for name in wanted}
    with zipfile.ZipFile(wheel) as archive:
        assert archive.read(INSIDE + DIGEST_NAME).decode().strip() == digest_sources()
        names = archive.namelist()
    assert "gpt2core/backends/native/kernels/gpt2.c" in names  # for those whose libraries do not fit
    assert not any("/tests/" in name for name in names)
    assert wheel.stat().st_size < LARGEST_NBYTES


def test_the_wheel_runs_where_no_compiler_is_and_auto_takes_its_library_for_the_demo(wheel, tmp_path):
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    kept = ("GPT2CORE_NATIVE", "GPT2CORE_BACKEND", "GPT2CORE_CFLAGS", "GPT2CORE_CC")
    environment = {k: v for k, v in os.environ.items() if k not in kept}
    environment |= {
        "PATH": str(tmp_path / "empty"),
        "PYTHONPATH": str(tmp_path / "site"),
        "GPT2CORE_CACHE": str(tmp_path / "cache"),
    }

    def run(*args, **variables):
        command = [sys.executable, "-m", "gpt2core", *args]
        done = subprocess.run(
            command, cwd=tmp_path, env=environment | variables, capture_output=True, text=True, timeout=120
        )
        assert (done.returncode, done.stderr) == (0, "")
        return done.stdout

    options = ("generate", "Once upon a time", "--seed", "7", "--max-new-tokens", "8", "--json", "--offline")
    auto, by_numpy = json.loads(run(*options)), json.loads(run(*options, "--backend", "numpy"))
    assert (auto["backend"], by_numpy["backend"]) == ("native", "numpy")
    assert [one["text"] for one in auto["generations"]] == [one["text"] for one in by_numpy["generations"]]
    assert not (tmp_path / "cache/native").exists()
    listed = json.loads(run("backends", "--json"))
    assert {choice["backend"] for choice in listed["auto"].values()} == {"native"}


def test_a_wheel_for_any_platform_has_no_library(tmp_path):
    made, said = build(tmp_path, GPT2CORE_WHEEL="any")
    assert made is not None, said
    assert made.name.endswith("-py3-none-any.whl")
    assert libraries(made) == set()


def test_where_no_compiler_is_the_wheel_is_for_any_platform_and_that_is_said(tmp_path):
    made, said = build(tmp_path, PATH=str(tmp_path / "empty"), GPT2CORE_CC="no-such-compiler")
    assert made is not None, said
    assert made.name.endswith("-py3-none-any.whl")
    assert "the native backend is not compiled: it needs a C compiler" in said


def test_a_platform_that_no_wheel_is_for_is_refused_with_those_that_there_are(tmp_path):
    made, said = build(tmp_path, GPT2CORE_WHEEL="plan9_x86_64")
    assert made is None
    assert "GPT2CORE_WHEEL is 'plan9_x86_64'; use one of any, manylinux" in said


def test_the_source_distribution_builds_the_same_wheel_and_holds_no_library(tmp_path):
    made, said = build(tmp_path, "sdist")
    assert made is not None, said
    with tarfile.open(made) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"hatch_build.py", "scripts/build-wheels", "tests/test_wheel.py"} <= names
    assert {"gpt2core/backends/native/kernels/tests/hash_model.c"} <= names
    assert not any(name.startswith(INSIDE) for name in names)
