"""Shared fixtures, and live shape checks: every call of these modules is checked against its annotations."""

from jaxtyping import install_import_hook

SHAPE_CHECKED = (
    "gpt2core.reference",
    "gpt2core.backends.numpy_kernels",
    "gpt2core.backends.numpy_backend",
    "gpt2core.backends.ragged",
    "gpt2core.backends.torch_backend",
)
install_import_hook(list(SHAPE_CHECKED), "beartype.beartype").__enter__()

pytest_plugins = ["no_skips"]
