"""What the benchmarks share: models by shape and backend, made once. They run with `pytest --benchmark-only`.

Without that option this folder is not even imported.
"""

import gc
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:  # the functions import it: every run reads this file, before shape checks are in place
    from gpt2core import GPT2

SHAPES = ("tiny", "small")  # of `gpt2core.testing.SIZES`; small is GPT-2 small's, with random weights


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Ordinary runs pass this folder by; None leaves the decision to others."""
    return None if config.getoption("benchmark_only", default=False) else True


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run what takes a model on each available backend."""
    from gpt2core import backends

    if "model" in metafunc.fixturenames:
        names = [name for name, info in backends.available().items() if info.available]
        metafunc.parametrize("model", names, indirect=True, scope="session")


@pytest.fixture(scope="session", params=SHAPES)
def shape(request: pytest.FixtureRequest) -> str:
    """The name of a model's shape."""
    return request.param


@pytest.fixture(scope="session")
def checkpoint(shape: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with random weights of that shape."""
    from gpt2core.testing import random_checkpoint

    return random_checkpoint(tmp_path_factory.mktemp(shape), shape)


@pytest.fixture(scope="session")
def model(request: pytest.FixtureRequest, checkpoint: Path) -> "Iterator[GPT2]":
    """That checkpoint on each available backend; one is open at a time."""
    from gpt2core import GPT2

    with GPT2.from_pretrained(checkpoint, backend=request.param) as opened:
        yield opened
    gc.collect()
