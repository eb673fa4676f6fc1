"""Where arrays live: one device, or a mesh over whose last axis the model is cut (tensor parallelism)."""

from dataclasses import dataclass
from typing import Any, Final

import jax
import numpy as np
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

from gpt2core.backends.jax.module import MODEL_AXIS
from gpt2core.errors import BackendUnavailableError, RequestError

_PLATFORMS: Final = ("cpu", "gpu", "cuda", "rocm", "tpu")


@dataclass(frozen=True, slots=True)
class Placement:
    """A device, or a mesh."""

    devices: tuple[Any, ...]
    mesh: Mesh | None = None

    def sharding(self, shape: tuple[int, ...], cut: tuple[str | None, ...]) -> Sharding:
        """How an array of `shape` lies; an axis that does not divide evenly is held whole by each device."""
        if self.mesh is None:
            return SingleDeviceSharding(self.devices[0])
        axis = self.mesh.axis_names[-1]
        size = self.mesh.shape[axis]
        return NamedSharding(
            self.mesh,
            PartitionSpec(  # type: ignore[no-untyped-call]
                *(
                    axis if name == MODEL_AXIS and n % size == 0 else None
                    for n, name in zip(shape, cut, strict=True)
                )
            ),
        )

    @property
    def whole(self) -> Sharding:
        """Each device holds all."""
        if self.mesh is None:
            return SingleDeviceSharding(self.devices[0])
        return NamedSharding(self.mesh, PartitionSpec())  # type: ignore[no-untyped-call]

    def put(self, array: np.ndarray, cut: tuple[str | None, ...]) -> Array:
        """The array on the devices; on the CPU one that is aligned to 64 bytes is shared, not copied."""
        return jax.device_put(array, self.sharding(array.shape, cut))


def choose_placement(device: str, mesh: Mesh | None, devices: int | None) -> Placement:
    """What the options of `JaxBackend` ask for.

    Raises:
        BackendUnavailableError: JAX knows no such device here; the message names those that are.
        RequestError: both `mesh` and `devices`, or `devices` below 1.
    """
    if mesh is not None and devices is not None:
        raise RequestError("mesh and devices were both given; a mesh names its devices, so leave devices out")
    if mesh is not None:
        return Placement(tuple(mesh.devices.flat), mesh)
    platform, _, number = device.partition(":")
    if platform not in _PLATFORMS or (":" in device and not number.isdecimal()):
        raise BackendUnavailableError(
            f"device {device!r} is unknown to the jax backend; use 'cpu', 'gpu', 'cuda' or 'tpu', "
            "with ':N' for the N-th"
        )
    try:
        found = jax.local_devices(backend=platform)
    except RuntimeError:
        found = []
    index = int(number or 0)
    if index >= len(found):
        raise BackendUnavailableError(
            f"device {device!r} is not there: JAX {jax.__version__} sees {_there()}; use one of these or "
            "install the build of jaxlib for it (pip install 'jax[cuda]' or 'jax[tpu]')"
        )
    if devices is None:
        return Placement((found[index],))
    if isinstance(devices, bool) or not isinstance(devices, int) or devices < 1:
        raise RequestError(f"devices is {devices!r}; use a whole number of 1 or more")
    if index + devices > len(found):
        raise BackendUnavailableError(
            f"devices={devices} from {device!r} on are not there: JAX sees {_there()}"
        )
    chosen = found[index : index + devices]
    return Placement(tuple(chosen), Mesh(np.array(chosen), (MODEL_AXIS,)))


def _there() -> str:
    platforms = dict.fromkeys(d.platform for d in jax.local_devices())
    seen = {**platforms, "cpu": None}
    return ", ".join(f"{len(jax.local_devices(backend=name))} x {name}" for name in seen)
