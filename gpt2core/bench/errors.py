"""What can go wrong with a benchmark beyond what goes wrong with a model."""

from gpt2core.errors import Gpt2CoreError


class BenchmarkError(Gpt2CoreError):
    """A benchmark cannot begin, go on or be read; the message names the remedy."""


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
