"""What the benchmarks share: models by shape and backend, made once. They run with `pytest --benchmark-only`.

Without that option this folder is not even imported.
"""

import gc
from collections.abc import Iterator
from pathlib import Path

import pytest

from gpt2core import GPT2, backends
from gpt2core.testing import random_checkpoint

SHAPES = ("tiny", "small")  # of `gpt2core.testing.SIZES`; small is GPT-2 small's, with random weights
BACKENDS = [name for name, info in backends.available().items() if info.available]


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Ordinary runs pass this folder by; None leaves the decision to others."""
    return None if config.getoption("benchmark_only", default=False) else True


@pytest.fixture(scope="session", params=SHAPES)
def shape(request: pytest.FixtureRequest) -> str:
    """The name of a model's shape."""
    return request.param


@pytest.fixture(scope="session")
def checkpoint(shape: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with random weights of that shape."""
    return random_checkpoint(tmp_path_factory.mktemp(shape), shape)


@pytest.fixture(scope="session", params=BACKENDS)
def model(request: pytest.FixtureRequest, checkpoint: Path) -> Iterator[GPT2]:
    """That checkpoint on each available backend; one is open at a time."""
    with GPT2.from_pretrained(checkpoint, backend=request.param) as opened:
        yield opened
    gc.collect()
