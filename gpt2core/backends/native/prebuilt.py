"""Which library of the kernels is taken: a prebuilt one that this processor can run, else one compiled."""

import os
import pathlib
import warnings
from collections.abc import Sequence
from typing import Final

from gpt2core.backends._shared.variants import COMPILE, FOLDER, NAMES, VARIABLE, Variant, find_prebuilt
from gpt2core.backends.native.build import load_library
from gpt2core.backends.native.library import Kernels, declare
from gpt2core.backends.native.library_cache import load
from gpt2core.errors import BackendUnavailableError

_chosen: Final[dict[tuple[pathlib.Path, str], Kernels | None]] = {}
"""Of this process, by the folder and what GPT2CORE_NATIVE says; so what is wrong is said once."""


def load_kernels(folder: pathlib.Path = FOLDER) -> Kernels:
    """The kernels: the best prebuilt library that this processor can run and that passes its self-test.

    One that does not load or fails is passed over with a warning; without any the kernels are compiled, see
    `load_library`. The environment variable GPT2CORE_NATIVE names one, which is then not replaced, or is
    "compile".

    Args:
        folder: of the prebuilt libraries.

    Raises:
        BackendUnavailableError: no library is here, and none can be compiled; or the one that the
            environment names is not here, does not run on this processor or fails.
    """
    named = os.environ.get(VARIABLE, "")
    if named not in ("", COMPILE, *NAMES):
        known = ", ".join((*NAMES, COMPILE))
        raise BackendUnavailableError(f"{VARIABLE} is {named!r}; use one of {known}, or unset it")
    variants = find_prebuilt(folder)
    if named in NAMES:
        return _load_named(folder, variants, named)
    if not variants:
        return declare(load_library())
    key = folder, named
    if key not in _chosen:
        _chosen[key] = _load_best(folder, variants)
    return _chosen[key] or declare(load_library())


def _load_named(folder: pathlib.Path, variants: Sequence[Variant], named: str) -> Kernels:
    variant = next((variant for variant in variants if variant.name == named), None)
    if variant is None:
        here = ", ".join(variant.name for variant in variants) or "none"
        raise BackendUnavailableError(
            f"{VARIABLE} names {named!r}, and of the prebuilt libraries there is here {here}; use another, "
            f"{COMPILE!r}, or unset it"
        )
    try:
        lacking = set(variant.features) - read_features(folder, variants)
        if not lacking:
            return declare(load(str(folder / variant.file_name)), variant.name)
    except OSError as error:
        raise BackendUnavailableError(
            f"{VARIABLE} names {named!r}, which does not load: {error}; unset it, or reinstall gpt2core"
        ) from error
    raise BackendUnavailableError(
        f"{VARIABLE} names {named!r}, and this processor has no {', '.join(sorted(lacking))}; unset it"
    )


def _load_best(folder: pathlib.Path, variants: Sequence[Variant]) -> Kernels | None:
    """The first variant that runs here and is right; None where none is. What is wrong is a warning."""
    failed, found = [], None
    try:
        features = read_features(folder, variants)
    except OSError as error:
        failed, variants = [str(error)], ()
    for variant in variants:
        if features.issuperset(variant.features):
            try:
                found = declare(load(str(folder / variant.file_name)), variant.name)
                break
            except (OSError, BackendUnavailableError) as error:
                failed.append(f"{variant.name}: {error}")
    if failed:
        instead = f"{found.variant!r} is taken" if found else "they are compiled here"
        warnings.warn(
            f"prebuilt kernels of the native backend are unfit ({'; '.join(failed)}); {instead}; reinstall "
            "gpt2core",
            RuntimeWarning,
            stacklevel=4,
        )
    return found


def read_features(folder: pathlib.Path, variants: Sequence[Variant]) -> frozenset[str]:
    """What this processor has of all that `variants` need; the last of them, which needs nothing, tells.

    Raises:
        OSError: that one does not load.
    """
    asked = {feature for variant in variants for feature in variant.features}
    if not asked:
        return frozenset()
    least = load(str(folder / variants[-1].file_name))
    return frozenset(name for name in asked if least.gpt2core_processor_has(name.encode()) == 1)
