"""The ONNX Runtime backend.

`graph` is built of `nodes`, `operators` and `products`; `runs` cuts batches into passes, which `backend`
hands to the session of ONNX Runtime (`passes`) that is fastest for them (`networks`).

`export` writes the same nodes to a file, and `run_exported` is the script that runs that.
"""

from gpt2core.backends.onnx.backend import OnnxBackend
from gpt2core.backends.onnx.passes import OnnxCache

__all__ = ["OnnxBackend", "OnnxCache"]
