"""The registry: which backends there are, which can run here, and which one `backend="auto"` takes.

Built-in backends stand in one table; others come from the entry points of the group `gpt2core.backends`,
each naming a `BackendFactory`. A backend's module, and with it its framework, is imported only when that
backend is made.
"""

import importlib
import os
import warnings
from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Final

from gpt2core import foreign_names
from gpt2core._machine import install_hint
from gpt2core._version import __version__
from gpt2core.backends._shared.c_compiler import missing_compiler
from gpt2core.backends._shared.threads import check_threads
from gpt2core.backends._shared.variants import find_prebuilt
from gpt2core.backends.base import (
    Backend,
    BackendFactory,
    BuildsOnce,
    Cache,
    LoadProgress,
    RunsPrecisions,
)
from gpt2core.backends.choose import apply_rules
from gpt2core.config import ModelConfig
from gpt2core.errors import BackendUnavailableError, RequestError, did_you_mean
from gpt2core.quantization import rounding
from gpt2core.weights import Weights

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

__all__ = [
    "Backend",
    "BackendFactory",
    "BackendInfo",
    "Cache",
    "available",
    "choose",
    "create_backend",
    "load_factory",
]

ENTRY_POINT_GROUP: Final = "gpt2core.backends"
PRECISIONS: Final = ("float32", *rounding.PRECISIONS)


@dataclass(frozen=True, slots=True)
class _BuiltIn:
    factory: str  # module:attribute
    package: str | None  # does its arithmetic; also the name of the distribution; None: this library itself
    others: tuple[str, ...] = ()  # what else it imports
    precisions: tuple[str, ...] = ("float32",)  # the factory's, known without importing it
    missing: Callable[[], str | None] = lambda: None  # what it needs beside packages, with the remedy

    @property
    def packages(self) -> tuple[str, ...]:
        return self.others if self.package is None else (self.package, *self.others)


def _missing_kernels() -> str | None:
    return None if find_prebuilt() else missing_compiler()


_BUILT_IN: Final[Mapping[str, _BuiltIn]] = {
    "numpy": _BuiltIn("gpt2core.backends.numpy:NumpyBackend", "numpy", precisions=PRECISIONS),
    "native": _BuiltIn(
        "gpt2core.backends.native:NativeBackend", None, precisions=PRECISIONS, missing=_missing_kernels
    ),
    "torch": _BuiltIn("gpt2core.backends.torch:TorchBackend", "torch", precisions=("float32", "int8")),
    "jax": _BuiltIn("gpt2core.backends.jax:JaxBackend", "jax", ("jaxlib", "flax")),
    "onnx": _BuiltIn(
        "gpt2core.backends.onnx:OnnxBackend", "onnxruntime", ("onnx",), ("float32", "int8", "int4")
    ),
}
BUILT_IN: Final = tuple(_BUILT_IN)
"""The names of the backends that come with the library."""


@dataclass(frozen=True, slots=True)
class BackendInfo:
    """One known backend: can it run here, and if not, why, with the remedy."""

    name: str
    available: bool
    version: str | None  # of the package that does its arithmetic; of gpt2core for what it does itself
    reason: str  # empty where it is available


def available(*, load_plugins: bool = True) -> dict[str, BackendInfo]:
    """Every known backend by name, built-in ones first; a broken plugin is listed with its error.

    Built-in frameworks are looked up, not imported. Plugins are loaded, unless `load_plugins` is False: then
    each is taken to be available.
    """
    infos = {}
    for name, built_in in _BUILT_IN.items():
        missing = _missing(name)
        version = _version(built_in.package) if missing is None else None
        infos[name] = BackendInfo(name, missing is None, version, missing or "")
    for name, entry in _plugins().items():
        version = entry.dist.version if entry.dist else None
        try:
            if load_plugins:
                entry.load()
        except Exception as error:  # whatever a stranger's module raises, the others must stay usable
            infos[name] = BackendInfo(name, False, version, f"its plugin failed to load: {_describe(error)}")
        else:
            infos[name] = BackendInfo(name, True, version, "")
    return infos


def load_factory(name: str) -> BackendFactory:
    """The factory of the backend `name`, its framework imported.

    Raises:
        BackendUnavailableError: no such backend; its package is missing (names the pip extra); or its plugin
            is broken.
    """
    if name in _BUILT_IN:
        module, _, attribute = _BUILT_IN[name].factory.partition(":")
        try:
            factory: BackendFactory = getattr(importlib.import_module(module), attribute)
        except (ImportError, OSError) as error:  # OSError: of a library that the framework loads itself
            missing = isinstance(error, ModuleNotFoundError) and error.name in _BUILT_IN[name].packages
            hint = install_hint(name) if missing else f"its import failed: {_describe(error)}"
            raise BackendUnavailableError(f"backend {name!r} is not available: {hint}") from error
        return factory
    plugins = _plugins()
    if name not in plugins:
        raise BackendUnavailableError(
            f"there is no backend {name!r}; known are {_known_names()}{suggest_backend(name)}"
        )
    try:
        loaded: BackendFactory = plugins[name].load()
    except Exception as error:  # a stranger's module may raise anything; it becomes one typed error
        raise BackendUnavailableError(
            f"backend {name!r} is not available: its plugin failed to load: {_describe(error)}"
        ) from error
    return loaded


def choose(
    config: ModelConfig, *, device: str = "cpu", threads: int | None = None, precision: str = "float32"
) -> tuple[str, str]:
    """The backend that `backend="auto"` takes, and why.

    The first of these rules that applies:

    1. the environment variable GPT2CORE_BACKEND, unless it is empty or "auto";
    2. what `gpt2core bench recommend` measured for this shape of model, device, number of threads and
       precision, as long as the machine and the installed versions are those of that measurement;
    3. for "cuda" and "cuda:N" the first of PyTorch, JAX and ONNX Runtime that is installed; for any other
       device but the CPU ("gpu", "tpu") JAX, the only one that supports it; a missing one says how to
       install it;
    4. NumPy for a model of less than 30 million parameters where the native backend would first have to be
       compiled, or cannot run;
    5. the native backend where there is a prebuilt library or a C compiler, else ONNX Runtime where it is
       installed, else PyTorch where it is, else NumPy (faster than JAX here).

    Backends that do not run `precision` are passed over, except by the first rule.

    Raises:
        BackendUnavailableError: GPT2CORE_BACKEND names a backend that does not exist.
    """
    named = _named_by_environment()
    if named is not None:
        if named not in _BUILT_IN and named not in _plugins():
            raise BackendUnavailableError(
                f"GPT2CORE_BACKEND names {named!r}, which does not exist; known are {_known_names()}; "
                f"name one of these or unset the variable{suggest_backend(named)}"
            )
        return named, "GPT2CORE_BACKEND names it"
    return _choose(config, device, threads, precision, frozenset())


def _named_by_environment() -> str | None:
    named = os.environ.get("GPT2CORE_BACKEND")
    return named if named not in ("", "auto") else None


def _choose(
    config: ModelConfig, device: str, threads: int | None, precision: str, without: Set[str]
) -> tuple[str, str]:
    def can_run(name: str) -> bool:
        able = name in _BUILT_IN and precision in _BUILT_IN[name].precisions
        return able and name not in without and _missing(name) is None

    return apply_rules(
        config,
        device=device,
        threads=threads,
        precision=precision,
        can_run=can_run,
        native_is_built=bool(find_prebuilt()),
    )


def create_backend(
    name: str,
    weights: Weights,
    *,
    device: str = "cpu",
    threads: int | None = None,
    precision: str = "auto",
    on_progress: LoadProgress | None = None,
) -> Backend:
    """Make the backend `name` over `weights`; "auto" is `choose`'s answer.

    Where that answer, unlike one that the environment names, cannot be made on the CPU (a compiler that is
    found but fails, a framework that does not load), a warning says why and the rule's next one is taken.

    Args:
        name: of `available()`, or "auto".
        weights: float32 or quantized.
        device, threads: as of the backend.
        precision: what the backend is to run: "auto" takes the weights as they are; another rounds float32
            weights to it, without calibration (see `gpt2core.quantization.rounding`), and keeps the result
            in the user's cache where that takes long (see `gpt2core.checkpoint.rounded`).
        on_progress: is told what takes long.

    Raises:
        BackendUnavailableError: as `load_factory`, or the backend does not run on `device`.
        RequestError: an unknown precision, one that the backend does not run or that the weights do not have,
            or `threads` below 1.
    """
    precision = resolve_precision(weights, precision)
    if name != "auto":
        return _create(name, weights, device, threads, precision, on_progress)
    without: set[str] = set()
    name, _ = choose(weights.config, device=device, threads=threads, precision=precision)
    while True:
        try:
            return _create(name, weights, device, threads, precision, on_progress)
        except BackendUnavailableError as error:
            if device != "cpu" or name == "numpy" or _named_by_environment() is not None:
                raise
            without.add(name)
            name, _ = _choose(weights.config, device, threads, precision, without)
            reason = str(error).partition("\n")[0]
            warnings.warn(f"backend='auto' takes {name}: {reason}", RuntimeWarning, stacklevel=2)


def _create(
    name: str,
    weights: Weights,
    device: str,
    threads: int | None,
    precision: str,
    on_progress: LoadProgress | None,
) -> Backend:
    factory = load_factory(name)
    offered = factory.precisions if isinstance(factory, RunsPrecisions) else ("float32",)
    if precision not in offered:
        able = run_precision(precision)
        raise RequestError(
            f"the {name} backend does not run precision {precision!r}, only {', '.join(offered)}; use "
            f"backend={' or '.join(map(repr, able))} for it"
        )
    tell = on_progress or _tell_nobody
    if precision != weights.precision:
        from gpt2core.checkpoint.rounded import round_or_read  # only those who round wait for it

        what = f"rounding the weights to {precision}"
        weights = round_or_read(weights, precision, on_progress=lambda done, all: tell(what, done, all))
    if isinstance(factory, BuildsOnce):
        check_threads(threads)  # a wrong request is told before something is compiled
        tell(f"compiling the {name} backend, once")
        factory.build()
        tell("loading the weights")
    return factory(weights, device=device, threads=threads)


def refuse_precision(name: str, precision: str) -> str | None:
    """Why a built-in backend does not run a precision, without importing it; None where it does."""
    if name not in _BUILT_IN or precision in (offered := _BUILT_IN[name].precisions):
        return None
    return f"does not run precision {precision!r}, only {', '.join(offered)}"


def run_precision(precision: str) -> list[str]:
    """The built-in backends that run a precision, installed or not."""
    return [name for name, built_in in _BUILT_IN.items() if precision in built_in.precisions]


def _tell_nobody(what: str, done: int | None = None, all: int | None = None, /) -> None:
    """Progress that nobody asked for."""


def resolve_precision(weights: Weights, precision: str) -> str:
    """The precision that `precision` means for these weights.

    Raises:
        RequestError: it is unknown, or the weights were quantized to another.
    """
    if precision not in ("auto", *PRECISIONS):
        known = " or ".join(map(repr, PRECISIONS))
        near = did_you_mean(precision, PRECISIONS, foreign_names.PRECISIONS)
        raise RequestError(f"precision {precision!r} is unknown; use 'auto' or {known}{near}")
    if precision == "auto":
        return weights.precision
    if weights.precision not in ("float32", precision):
        raise RequestError(
            f"precision {precision!r} is asked for, but the checkpoint is quantized to "
            f"{weights.precision!r}; ask for that, or load the float checkpoint that it was made of"
        )
    return precision


def _missing(name: str) -> str | None:
    """What the built-in backend `name` lacks here, with the remedy; None where it can run."""
    built_in = _BUILT_IN[name]
    if any(find_spec(package) is None for package in built_in.packages):
        return install_hint(name)
    return built_in.missing()


def _plugins() -> dict[str, "EntryPoint"]:
    from importlib.metadata import entry_points  # costs tens of milliseconds, so only where plugins matter

    return {e.name: e for e in entry_points(group=ENTRY_POINT_GROUP) if e.name not in _BUILT_IN}


def _known_names() -> str:
    return ", ".join(["auto", *_BUILT_IN, *_plugins()])


def suggest_backend(name: str) -> str:
    """The end of a message about an unknown backend; see `did_you_mean`."""
    return did_you_mean(name, ["auto", *_BUILT_IN, *_plugins()], foreign_names.BACKENDS)


def _version(package: str | None) -> str | None:
    if package is None:
        return __version__
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _describe(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"
