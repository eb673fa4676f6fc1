"""The type checker that jaxtyping's import hook calls: beartype, for the arrays in a signature alone.

The other annotations are mypy's. Beartype would refuse at run time what tests pass on purpose: fakes, and
values of a wrong type that a public door must refuse in its own words.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

from beartype import BeartypeConf, beartype
from jaxtyping import AbstractArray

PACKAGE = Path(__file__).parent.parent / "gpt2core"
_DOORS = {"Batch.__init__"}  # take anything; what is wrong is refused by name, by `Batch.check`
_CHECKER = beartype(conf=BeartypeConf(is_pep484_tower=True))


def modules_with_shapes() -> list[str]:
    """Every module that annotates shapes; one that begins to is checked without being named anywhere."""
    return [
        ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)
        for path in sorted(PACKAGE.rglob("*.py"))
        if "\nfrom gpt2core._shapes import " in path.read_text()
    ]


def check_shapes(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, whose calls check the arrays that it takes and gives; others come back as they are."""
    annotations = function.__annotations__
    arrays = {name: hint for name, hint in annotations.items() if _holds_array(hint)}
    if not arrays or function.__qualname__ in _DOORS:
        return function
    function.__annotations__ = arrays
    try:
        checked = _CHECKER(function)
    finally:
        function.__annotations__ = annotations
    checked.__annotations__ = annotations
    return checked


def _holds_array(hint: Any) -> bool:
    if isinstance(hint, type) and issubclass(hint, AbstractArray):
        return True
    return any(_holds_array(part) for part in get_args(hint))
