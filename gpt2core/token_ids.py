"""Token ids as callers give them: a sequence of ints, or a NumPy array or a tensor of any framework."""

import operator
from collections.abc import Iterable, Sequence
from typing import Any, Protocol, TypeAlias, TypeGuard

from gpt2core.errors import RequestError, in_short


class Tensor(Protocol):
    """A NumPy array, or a tensor of PyTorch, JAX and others."""

    @property
    def shape(self) -> Any:
        """Its sizes."""
        ...

    def tolist(self) -> Any:
        """Its numbers as Python's own, in lists."""
        ...


TokenIds: TypeAlias = Sequence[int] | Tensor
"""One text's token ids; of an array the shape is (T,)."""


def is_tensor(value: object) -> TypeGuard[Tensor]:
    """Whether a value is an array of any framework; its numbers count as arrays of shape ()."""
    plain = isinstance(value, bytes | bytearray | memoryview)
    return not plain and hasattr(value, "shape") and hasattr(value, "tolist")


def check_token_ids(token_ids: Iterable[int] | Tensor, vocab_size: int) -> list[int]:
    """The token ids as a new list of plain ints.

    Raises:
        RequestError: there are none, one of them is not a whole number in [0, vocab_size), or they are an
            array of more than one dimension.
    """
    if is_tensor(token_ids):
        if len(token_ids.shape) != 1:
            raise RequestError(
                f"prompt is an array of shape {tuple(token_ids.shape)}; token ids of one text have the shape "
                "(T,)"
            )
        ids = token_ids.tolist()
    elif isinstance(token_ids, str | bytes) or not isinstance(token_ids, Iterable):
        raise RequestError(f"prompt is {in_short(token_ids)}; expected a sequence of token ids")
    else:
        ids = list(token_ids)
    for place, value in enumerate(ids):
        if type(value) is not int:
            ids[place] = _whole(value)
        if not 0 <= ids[place] < vocab_size:
            raise RequestError(
                f"prompt holds {in_short(value)} at place {place}; this model's token ids are whole numbers "
                f"from 0 to {vocab_size - 1}"
            )
    if not ids:
        raise RequestError("prompt is empty; give at least one token, for example the end-of-text token")
    return ids


def _whole(value: object) -> int:
    """A number of NumPy or of another framework as an int; -1 for what is no whole number."""
    if not is_tensor(value) or tuple(value.shape) != () or "bool" in str(getattr(value, "dtype", "")):
        return -1
    try:
        return operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        return -1
