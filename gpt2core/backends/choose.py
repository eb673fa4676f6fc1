"""The rule behind `backend="auto"`, apart from what is known and installed, which the registry says."""

from collections.abc import Callable
from typing import Final

from gpt2core.backends import recommendation
from gpt2core.config import ModelConfig

SMALL_MODEL_PARAMETERS: Final = 30_000_000
"""Below this, starting a framework or compiling kernels takes longer than most texts take on NumPy."""
_FASTEST_FIRST: Final = ("native", "onnx", "torch")  # on a CPU, as measured with examples/speed.py
_ON_CUDA: Final = ("torch", "jax", "onnx")  # ONNX Runtime last: its cache stays in the host's memory


def apply_rules(
    config: ModelConfig,
    *,
    device: str,
    threads: int | None,
    precision: str,
    can_run: Callable[[str], bool],
    native_is_built: bool,
) -> tuple[str, str]:
    """A backend and why: rules 2 to 5 of `gpt2core.backends.choose`.

    Args:
        config, device, threads, precision: what is to be run, and how.
        can_run: whether a built-in backend can run here, and run `precision`.
        native_is_built: whether the native backend, if it can run, does so without compiling.
    """
    measured = recommendation.find(config, device=device, threads=threads, precision=precision)
    if measured is not None and can_run(measured.backend):
        return measured.backend, measured.why
    if device.partition(":")[0] == "cuda":
        for name in _ON_CUDA:
            if can_run(name):
                return name, f"the first of {', '.join(_ON_CUDA)} that is installed, for device {device!r}"
        return _ON_CUDA[0], f"NumPy does not run on device {device!r}"
    if device != "cpu":
        return "jax", f"no other backend runs on device {device!r}"
    if config.parameters < SMALL_MODEL_PARAMETERS and not (native_is_built and can_run("native")):
        return "numpy", f"{config.parameters / 1e6:.1f} million parameters run before a framework has started"
    for name in _FASTEST_FIRST:
        if can_run(name):
            return name, "it is the fastest of those that run here"
    return "numpy", "there is neither a native library nor a C compiler, ONNX Runtime or PyTorch"
