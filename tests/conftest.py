"""Live shape checks: every call of a module that annotates shapes is checked against its annotations."""

import os
import sys
import tempfile

if "PYTEST_XDIST_WORKER" in os.environ:  # one thread per worker: spinning pools would fight over the cores
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

if "GPT2CORE_CACHE" not in os.environ:  # one folder for all workers, gone with the process that made it
    _cache = tempfile.TemporaryDirectory(prefix="gpt2core-tests-")
    os.environ["GPT2CORE_CACHE"] = _cache.name

# The kernels that are tested are those of the sources, and what `auto` takes does not depend on whether the
# installation found a compiler; tests of prebuilt libraries make their own.
os.environ.setdefault("GPT2CORE_NATIVE", "compile")

from pathlib import Path

import pytest
from hypothesis import settings
from jaxtyping import install_import_hook
from shape_checks import modules_with_shapes


def pytest_configure(config: pytest.Config) -> None:
    """Check shapes in tests; not in benchmarks, whose times they would spoil."""
    if not config.getoption("benchmark_only", default=False):
        install_import_hook(modules_with_shapes(), "shape_checks.check_shapes").__enter__()


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """`pytest --benchmark-only` is about the folder benchmarks; None leaves the decision to others."""
    return True if config.getoption("benchmark_only", default=False) else None


@pytest.fixture(autouse=True)
def _no_progress_on_a_pipe(monkeypatch):
    """What a busy machine makes slow must not tell so where a test wants nothing on stderr."""
    if (progress := sys.modules.get("gpt2core.cli.progress")) is not None:
        monkeypatch.setattr(progress, "PIPE_DELAY_S", 3600.0)


settings.register_profile("gpt2core", deadline=None)  # a busy machine is not a failing test
settings.load_profile("gpt2core")

pytest_plugins = ["no_skips"]
