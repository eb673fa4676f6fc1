"""Array types for signatures: `Float32[np.ndarray, "N D"]`, checked at run time under pytest.

jaxtyping is a development dependency. When it was imported first (tests/conftest.py does), these names are
jaxtyping's and its import hook checks every call of the hooked modules; otherwise they cost nothing.
"""

import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING or "jaxtyping" in sys.modules:
    from jaxtyping import Bool, Float, Float32, Float64, Int, Int32, Int64
else:

    class _AnyShape:
        def __class_getitem__(cls, item: tuple[Any, str]) -> Any:
            return item[0]

    Bool = Float = Float32 = Float64 = Int = Int32 = Int64 = _AnyShape

__all__ = ["Bool", "Float", "Float32", "Float64", "Int", "Int32", "Int64"]
