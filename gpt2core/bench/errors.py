"""What can go wrong with a benchmark beyond what goes wrong with a model."""

from importlib.util import find_spec
from typing import Final

from gpt2core.errors import BackendUnavailableError, Gpt2CoreError

ALWAYS: Final = ("scipy",)
FOR_SERVERS: Final = ("httpx2",)
FOR_REPORTS: Final = ("jinja2", "matplotlib", "seaborn")
"""Packages of the extra `bench`: looked for before a run, not missed after it."""


class BenchmarkError(Gpt2CoreError):
    """A benchmark cannot begin, go on or be read; the message names the remedy."""


class NotInstalledError(BenchmarkError, BackendUnavailableError):
    """A package of the extra `bench` is missing."""


class ServerError(BenchmarkError):
    """A server answered with an error, or with something that is no answer.

    Attributes:
        again: whether the same request may succeed later.
        retry_after_s: how long the server asks to wait, if it does.
    """

    def __init__(self, message: str, *, again: bool, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.again = again
        self.retry_after_s = retry_after_s


def check_installed(*packages: str) -> None:
    """Refuse to begin without a package that will be needed.

    Raises:
        NotInstalledError: naming those that are missing and the extra that brings them.
    """
    missing = [package for package in packages if find_spec(package) is None]
    if missing:
        verb = "is" if len(missing) == 1 else "are"
        raise NotInstalledError(
            f"{', '.join(missing)} {verb} not installed; install with: pip install 'gpt2core[bench]'"
        )
