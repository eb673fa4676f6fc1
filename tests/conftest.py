"""Shared fixtures, and live shape checks: every call of these modules is checked against its annotations."""

import os
import tempfile

if "PYTEST_XDIST_WORKER" in os.environ:  # one thread per worker: spinning pools would fight over the cores
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

if "GPT2CORE_CACHE" not in os.environ:  # one folder for all workers, gone with the process that made it
    _cache = tempfile.TemporaryDirectory(prefix="gpt2core-tests-")
    os.environ["GPT2CORE_CACHE"] = _cache.name

from pathlib import Path

import pytest
from hypothesis import settings
from jaxtyping import install_import_hook

SHAPE_CHECKED = (
    "gpt2core.reference",
    "gpt2core.kernels",
    "gpt2core.backends.numpy.backend",
    "gpt2core.backends.jax.runs",
    "gpt2core.backends.jax.backend",
    "gpt2core.backends._shared.ragged",
    "gpt2core.backends.torch.backend",
)


def pytest_configure(config: pytest.Config) -> None:
    """Check shapes in tests; not in benchmarks, whose times they would spoil."""
    if not config.getoption("benchmark_only", default=False):
        install_import_hook(list(SHAPE_CHECKED), "beartype.beartype").__enter__()


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """`pytest --benchmark-only` is about the folder benchmarks; None leaves the decision to others."""
    return True if config.getoption("benchmark_only", default=False) else None


settings.register_profile("gpt2core", deadline=None)  # a busy machine is not a failing test
settings.load_profile("gpt2core")

pytest_plugins = ["no_skips"]
