"""The ONNX Runtime backend.

`graph` is built of `nodes`, `operators` and `products`; `runs` cuts batches into passes, which `session`
hands to the session of ONNX Runtime (`passes`) that is fastest for them (`networks`).

`export` writes the same nodes to a file, and `run_exported` is the script that runs that.
"""

from gpt2core.backends.onnx_backend.passes import OnnxCache
from gpt2core.backends.onnx_backend.session import OnnxBackend

__all__ = ["OnnxBackend", "OnnxCache"]
