"""The compiled kernels as Python calls them: their types, checked to be those that C has.

A library that lays out its structures otherwise, or whose compiler changed the arithmetic, is refused.
"""

from collections.abc import Callable, Sequence
from ctypes import POINTER, Structure, byref, c_char_p, c_int, c_int64, c_void_p, sizeof
from dataclasses import dataclass
from typing import Any, Final

from gpt2core.backends.native.packing import CBlock, CCache, CLinear, CMatrix, CModel, CNorm, CScores, CTrace
from gpt2core.errors import BackendUnavailableError

_STRUCTURES: Final[tuple[type[Structure], ...]] = (
    *(CMatrix, CLinear, CNorm, CBlock, CModel, CCache, CTrace, CScores),
)
_FAILURES: Final = {
    1: "rounds or fuses otherwise than IEEE 754 and the kernels say",
    2: "multiplies and adds with a rounding too many",
    3: "changes what an expression means",
}
_REMEDY: Final = (
    "leave such flags out of GPT2CORE_CFLAGS, name another compiler with GPT2CORE_CC, or use backend='onnx'"
)


@dataclass(frozen=True, slots=True)
class Kernels:
    """The functions of `kernels/gpt2.c`.

    Attributes:
        portable: whether logits have the bits that every processor gives (docs/reproducibility.md); false
            only where the library was built with -DGPT2CORE_UNFUSED.
        variant: the prebuilt library it is; "compiled" is one made by this machine's compiler.
    """

    forward: Callable[..., int]
    team_new: Callable[[int], int | None]
    team_free: Callable[[Any], None]
    lanes: Callable[[], int]
    key_block: Callable[[], int]
    strip_width: Callable[[], int]
    activation_named: Callable[[bytes], int]
    pack_float32: Callable[..., None]
    pack_bfloat16: Callable[..., None]
    pack_int8: Callable[..., None]
    pack_int4: Callable[..., None]
    portable: bool
    variant: str


_TYPES: Final[dict[str, tuple[Any, Sequence[Any]]]] = {
    "forward": (
        c_int,
        (
            *(c_void_p, POINTER(CModel), POINTER(CCache)),
            *(c_void_p, c_int64, c_void_p, c_int64, c_void_p, c_int64, c_void_p),
            *(POINTER(CTrace), POINTER(CScores)),
        ),
    ),
    "team_new": (c_void_p, (c_int,)),
    "team_free": (None, (c_void_p,)),
    "lanes": (c_int64, ()),
    "key_block": (c_int64, ()),
    "strip_width": (c_int64, ()),
    "activation_named": (c_int, (c_char_p,)),
    "pack_float32": (None, (c_void_p, *[c_int64] * 4, c_void_p)),
    "pack_bfloat16": (None, (c_void_p, *[c_int64] * 4, c_void_p)),
    "pack_int8": (None, (c_void_p, *[c_int64] * 5, c_void_p)),
    "pack_int4": (None, (c_void_p, *[c_int64] * 2, c_void_p)),
}


def declare(library: Any, variant: str = "compiled") -> Kernels:
    """The kernels of a loaded library, after its structures and its arithmetic have been checked.

    Args:
        library: loaded, and known to hold nothing that this processor cannot run.
        variant: what to call it.

    Raises:
        BackendUnavailableError: either is not what it should be.
    """
    _check_layout(library)
    result = int(library.gpt2core_self_test())
    if result > 0:
        raise BackendUnavailableError(
            f"the native backend was built, but fails its self-test: the compiler {_FAILURES[result]}; "
            f"{_REMEDY}"
        )
    functions: dict[str, Any] = {}
    for name, (result_type, argument_types) in _TYPES.items():
        functions[name] = getattr(library, f"gpt2core_{name}")
        functions[name].restype, functions[name].argtypes = result_type, argument_types
    return Kernels(**functions, portable=result == 0, variant=variant)


def _check_layout(library: Any) -> None:
    count = c_int64()
    library.gpt2core_layout.restype = POINTER(c_int64)
    table = library.gpt2core_layout(byref(count))
    theirs = table[: count.value]
    ours = [number for structure in _STRUCTURES for number in _layout(structure)]
    if theirs != ours:
        raise BackendUnavailableError(
            f"the native backend's structures are laid out as {theirs} in C and as {ours} in Python; "
            "reinstall gpt2core"
        )


def _layout(structure: type[Structure]) -> list[int]:
    """The size and the offsets of the fields."""
    return [sizeof(structure), *(getattr(structure, field[0]).offset for field in structure._fields_)]
