"""The packages of the extra `bench`: looked for before a run, not missed after it."""

from importlib.util import find_spec
from typing import Final

from gpt2core.bench.errors import BenchmarkError

ALWAYS: Final = ("scipy", "tqdm")
FOR_SERVERS: Final = ("httpx2",)
FOR_REPORTS: Final = ("jinja2", "matplotlib", "seaborn")


def check_installed(*packages: str) -> None:
    """Refuse to begin without a package that will be needed.

    Raises:
        BenchmarkError: naming those that are missing and the extra that brings them.
    """
    missing = [package for package in packages if find_spec(package) is None]
    if missing:
        verb = "is" if len(missing) == 1 else "are"
        raise BenchmarkError(
            f"{', '.join(missing)} {verb} not installed; install with: pip install 'gpt2core[bench]'"
        )
