"""The ONNX Runtime backend: `graph` builds it, `runs` cuts batches, `session` runs it."""

from gpt2core.backends.onnx_backend.session import OnnxBackend, OnnxCache

__all__ = ["OnnxBackend", "OnnxCache"]
