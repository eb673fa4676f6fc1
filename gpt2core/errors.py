"""What can go wrong, as types.

    Gpt2CoreError
    ├── CheckpointError              a file is missing, broken or not what config.json promises
    │   └── UnsupportedCheckpointError   a sound checkpoint of something this library does not compute
    ├── BackendError                 an engine failed
    │   ├── BackendUnavailableError      its package or device is not there; says the pip extra
    │   └── NumericalError               it returned NaN or infinity; names backend and step
    └── RequestError (ValueError)    the caller asked for something impossible
        ├── ContextLengthError           prompt plus new tokens exceed the model's context
        └── InvalidSamplingError         a sampling parameter out of its range
            └── ConstraintError              a constraint that cannot be compiled or followed

Each message names the value, the limit and the remedy. What is no error but should be known is a
`CheckpointWarning`, of the module `warnings`.
"""

from collections.abc import Iterable, Mapping

_NEAR = 0.6  # of difflib's measure


class Gpt2CoreError(Exception):
    """Base of every error that gpt2core raises on purpose."""


class CheckpointError(Gpt2CoreError):
    """A checkpoint cannot be found, read or trusted."""


class UnsupportedCheckpointError(CheckpointError):
    """A checkpoint asks for something that this library refuses or does not implement, by name."""


class CheckpointWarning(UserWarning):
    """A checkpoint is read, and holds something that is left out, or stands otherwise than usual; named."""


class BackendError(Gpt2CoreError):
    """A backend failed to compute."""


class BackendUnavailableError(BackendError):
    """A backend is unknown, or its package or device is missing."""


class NumericalError(BackendError):
    """A backend returned logits that are not finite."""


class RequestError(Gpt2CoreError, ValueError):
    """The request itself is wrong; trying again without a change will not help."""


class ContextLengthError(RequestError):
    """Prompt plus new tokens exceed the model's context."""


class InvalidSamplingError(RequestError):
    """A sampling parameter is outside its range or contradicts another."""


class ConstraintError(InvalidSamplingError):
    """A regular expression, schema or grammar cannot be compiled, or takes too much to follow.

    Attributes:
        summary: the same without quoting it, for those who may not repeat it.
    """

    def __init__(self, message: str, summary: str = "") -> None:
        super().__init__(message)
        self.summary = summary or message


def in_short(value: object) -> str:
    """A value that a caller gave, as a message may print it: its repr, cut to one short line."""
    try:
        text = repr(value)
    except Exception:  # a repr of the caller's, or an int of more digits than Python prints
        return f"a {type(value).__name__} that cannot be shown"
    return text if len(text) <= 60 else text[:57] + "..."


def did_you_mean(value: str, known: Iterable[str], elsewhere: Mapping[str, str] | None = None) -> str:
    """The end of a message about an unknown value: "; did you mean 'torch'?", or nothing if none is near.

    Args:
        value: what was given.
        known: what there is.
        elsewhere: names that others use -> those here.
    """
    import difflib  # here: only an error needs it

    folded = value.lower()
    if elsewhere is not None and folded in elsewhere:
        return f"; did you mean {elsewhere[folded]!r}?"
    near = difflib.get_close_matches(folded, list(known), n=1, cutoff=_NEAR)
    return f"; did you mean {near[0]!r}?" if near else ""
