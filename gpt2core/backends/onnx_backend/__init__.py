"""The ONNX Runtime backend: `graph` is built of `nodes` and `operators`, `runs` cuts batches, `session` runs.

`export` writes the same nodes to a file, and `run_exported` is the script that runs that.
"""

from gpt2core.backends.onnx_backend.passes import OnnxCache
from gpt2core.backends.onnx_backend.session import OnnxBackend

__all__ = ["OnnxBackend", "OnnxCache"]
