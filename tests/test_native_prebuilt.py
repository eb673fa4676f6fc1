"""The native backend's prebuilt libraries: chosen by the processor, the same bits, replaced when unfit."""

import platform
import shutil
import warnings
from pathlib import Path
from types import SimpleNamespace

import bits
import numpy as np
import pytest

from gpt2core.backends import create_backend
from gpt2core.backends._shared import c_compiler, variants
from gpt2core.backends._shared.variants import (
    COMPILE,
    DIGEST_NAME,
    NAMES,
    VARIANTS,
    build_variants,
    find_prebuilt,
)
from gpt2core.backends.native import build, prebuilt
from gpt2core.backends.native.library_cache import load
from gpt2core.backends.native.prebuilt import load_kernels, read_features
from gpt2core.batch import Batch
from gpt2core.errors import BackendUnavailableError
from gpt2core.testing import random_config, random_weights

HERE = VARIANTS[variants.machine_name()]
BASE = ["-march=x86-64"] if variants.machine_name() == "x86_64" else []


@pytest.fixture(autouse=True)
def environment(monkeypatch, tmp_path):
    for name in ("GPT2CORE_NATIVE", "GPT2CORE_CC", "GPT2CORE_CFLAGS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(prebuilt, "_chosen", {})


def processor_flags() -> set[str]:
    """What Linux says of this processor."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return set(next(line for line in lines if line.startswith(("flags", "Features"))).split())


RUNNABLE = [variant for variant in HERE if processor_flags().issuperset(variant.features)]


@pytest.fixture(scope="module")
def libraries(tmp_path_factory):
    """Every variant of this machine, compiled quickly."""
    folder = tmp_path_factory.mktemp("prebuilt")
    compiler = [c_compiler.find_compiler(), *variants.FLAGS, *BASE, "-O0"]
    assert build_variants(folder, compiler, variants=HERE) == {}
    return folder


@pytest.fixture
def folder(libraries, tmp_path):
    """A copy, to be damaged."""
    return Path(shutil.copytree(libraries, tmp_path / "prebuilt"))


# --------------------------------------------------------------------------------------------- which are here


def test_what_was_built_is_found_best_first(folder):
    assert find_prebuilt(folder) == HERE
    (folder / HERE[0].file_name).unlink()
    assert find_prebuilt(folder) == HERE[1:]


@pytest.mark.parametrize("lacking", [DIGEST_NAME, HERE[-1].file_name])
def test_without_their_digest_or_the_least_of_them_none_counts(folder, lacking):
    (folder / lacking).unlink()
    assert find_prebuilt(folder) == ()


def test_libraries_of_other_sources_do_not_count(folder, tmp_path, monkeypatch):
    kernels = Path(shutil.copytree(variants.KERNELS, tmp_path / "kernels"))
    monkeypatch.setattr(variants, "KERNELS", kernels)
    assert find_prebuilt(folder) == HERE
    (kernels / "vectors.h").write_text((kernels / "vectors.h").read_text() + "\n")
    assert find_prebuilt(folder) == ()


@pytest.mark.parametrize(
    ("name", "value"),
    [("GPT2CORE_CC", "gcc"), ("GPT2CORE_CFLAGS", "-O2"), ("GPT2CORE_NATIVE", COMPILE)],
)
def test_who_asks_for_a_compilation_gets_one(libraries, monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    monkeypatch.setattr(prebuilt, "load_library", lambda: load(str(libraries / HERE[-1].file_name)))
    assert find_prebuilt(libraries) == ()
    assert load_kernels(libraries).variant == "compiled"


def test_a_variant_is_named_with_a_compilers_variables_set(folder, monkeypatch):
    monkeypatch.setenv("GPT2CORE_CC", "gcc")
    monkeypatch.setenv("GPT2CORE_NATIVE", HERE[-1].name)
    assert load_kernels(folder).variant == HERE[-1].name


# -------------------------------------------------------------------------------- which the processor can run

NEHALEM = "fpu sse sse2 pni ssse3 cx16 sse4_1 sse4_2 popcnt"
SANDY_BRIDGE = f"{NEHALEM} avx"
HASWELL = f"{SANDY_BRIDGE} fma f16c movbe bmi1 avx2 bmi2 abm"
SKYLAKE_X = f"{HASWELL} avx512f avx512dq avx512cd avx512bw avx512vl"
KNIGHTS_LANDING = f"{HASWELL} avx512f avx512cd avx512er avx512pf"
PROCESSORS = {
    "Nehalem": ("x86_64", NEHALEM, "sse2"),
    "Sandy Bridge": ("x86_64", SANDY_BRIDGE, "sse2"),
    "Haswell, Zen 3": ("x86_64", HASWELL, "avx2"),
    "Alder Lake": ("x86_64", f"{HASWELL} avx_vnni", "avxvnni"),
    "Knights Landing": ("x86_64", KNIGHTS_LANDING, "avx2"),
    "Skylake-X": ("x86_64", SKYLAKE_X, "avx512"),
    "Cascade Lake, Zen 4": ("x86_64", f"{SKYLAKE_X} avx512_vnni", "avx512vnni"),
    "Sapphire Rapids": ("x86_64", f"{SKYLAKE_X} avx512_vnni avx_vnni amx_int8", "avx512vnni"),
    "a virtual machine that hides FMA": ("x86_64", f"{SANDY_BRIDGE} avx2", "sse2"),
    "Cortex-A72": ("aarch64", "fp asimd evtstrm aes crc32", "neon"),
    "Graviton 2": ("aarch64", "fp asimd aes atomics fphp asimdhp asimddp", "dotprod"),
    "Apple M1": ("aarch64", "fp asimd asimddp", "dotprod"),
    "Graviton 3, Apple M2": ("aarch64", "fp asimd asimddp i8mm bf16", "i8mm"),
}


@pytest.mark.parametrize("name", PROCESSORS)
def test_each_processor_gets_the_best_of_what_it_can_run(name, tmp_path, monkeypatch):
    machine, flags, wanted = PROCESSORS[name]
    has = flags.split()
    for variant in VARIANTS[machine]:
        (tmp_path / variant.file_name).touch()
    (tmp_path / DIGEST_NAME).write_text(variants.digest_sources())
    loaded = []

    def load_fake(path):
        loaded.append(Path(path).stem)
        return SimpleNamespace(gpt2core_processor_has=lambda feature: int(feature.decode() in has))

    monkeypatch.setattr(platform, "machine", lambda: machine)
    monkeypatch.setattr(prebuilt, "load", load_fake)
    monkeypatch.setattr(prebuilt, "declare", lambda library, variant: SimpleNamespace(variant=variant))
    assert load_kernels(tmp_path).variant == wanted
    assert set(loaded) == {VARIANTS[machine][-1].name, wanted}  # nothing that it may not be able to run


@pytest.mark.parametrize(
    ("said", "machine"),
    [("x86_64", "x86_64"), ("AMD64", "x86_64"), ("arm64", "aarch64"), ("ARM64", "aarch64"), ("ppc64le",) * 2],
)
def test_a_machine_has_one_name_on_every_system(monkeypatch, said, machine):
    monkeypatch.setattr(platform, "machine", lambda: said)
    assert variants.machine_name() == machine


def test_the_processor_is_asked_for_the_very_features_that_linux_lists(libraries):
    library = load(str(libraries / HERE[-1].file_name))
    flags = processor_flags()
    asked = {feature for variant in HERE for feature in variant.features}
    assert asked
    has = {feature for feature in asked if library.gpt2core_processor_has(feature.encode()) == 1}
    assert has == asked & flags
    assert library.gpt2core_processor_has(b"no_such_feature") == -1


def test_every_feature_of_a_variant_is_known_to_the_c_code():
    source = (variants.KERNELS / "processor.h").read_text()
    for machine in VARIANTS.values():
        assert machine[-1].features == ()
        for variant in machine:
            assert all(f'"{feature}"' in source for feature in variant.features), variant


# ---------------------------------------------------------------------------------------------- the same bits


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    folder = tmp_path_factory.mktemp("driver")
    return bits.compile_driver(c_compiler.find_compiler(), " ".join(["-O0", *BASE]), folder / "driver")


@pytest.mark.parametrize("variant", RUNNABLE, ids=lambda variant: variant.name)
def test_every_library_gives_the_golden_bits_of_random_models(variant, libraries, driver):
    path = libraries / variant.file_name
    assert bits.run_driver(driver, "cc", bits.SHORT, "--library", str(path)) == bits.golden(bits.SHORT)


@pytest.mark.parametrize("variant", RUNNABLE, ids=lambda variant: variant.name)
def test_a_named_library_computes_what_the_compiled_one_does(variant, libraries, monkeypatch):
    weights = random_weights(random_config(), seed=5)
    batch = Batch.of([(list(range(16)), 0, 0)], range(16))

    def logits():
        with_cache = create_backend("native", weights, threads=2)
        return with_cache.variant, with_cache.forward(batch, with_cache.new_cache(1, 16))

    monkeypatch.setattr("gpt2core.backends.native.backend.load_kernels", lambda: load_kernels(libraries))
    monkeypatch.setenv("GPT2CORE_NATIVE", COMPILE)
    compiled, want = logits()
    monkeypatch.setenv("GPT2CORE_NATIVE", variant.name)
    named, got = logits()
    assert (compiled, named) == ("compiled", variant.name)
    np.testing.assert_array_equal(got.view(np.uint32), want.view(np.uint32))


# ----------------------------------------------------------------------------------------- what does not work


@pytest.fixture(scope="module")
def wrong(tmp_path_factory):
    """A library whose compiler has changed the arithmetic."""
    folder = tmp_path_factory.mktemp("wrong")
    compiler = [c_compiler.find_compiler(), *variants.FLAGS, *BASE, "-O1", "-funsafe-math-optimizations"]
    assert build_variants(folder, compiler, variants=HERE[-1:]) == {}
    return folder / HERE[-1].file_name


def put(path: Path, content: Path | bytes) -> None:
    """Replace a library; another file, since the one of that name may be loaded."""
    path.unlink()
    path.write_bytes(content if isinstance(content, bytes) else content.read_bytes())


@pytest.mark.parametrize("how", ["no library", "a wrong one"])
def test_a_library_that_is_unfit_is_passed_over_for_the_next_and_that_is_said_once(folder, wrong, how):
    best, following = RUNNABLE[:2]
    put(folder / best.file_name, wrong if how == "a wrong one" else b"text")
    said = "fails its self-test" if how == "a wrong one" else "file too short|invalid ELF header"
    with pytest.warns(
        RuntimeWarning, match=rf"unfit \({best.name}: .*({said}).*'{following.name}' is taken"
    ) as heard:
        assert load_kernels(folder).variant == following.name
    assert len(heard) == 1
    with warnings.catch_warnings():
        assert load_kernels(folder).variant == following.name


@pytest.mark.parametrize("how", ["the least is no library", "all are wrong"])
def test_where_none_is_fit_the_kernels_are_compiled(folder, wrong, how):
    for variant in HERE if how == "all are wrong" else HERE[-1:]:
        put(folder / variant.file_name, wrong if how == "all are wrong" else b"text")
    with pytest.warns(RuntimeWarning, match="they are compiled here; reinstall gpt2core") as said:
        assert load_kernels(folder).variant == "compiled"
    assert len(said) == 1


def test_where_none_is_fit_and_there_is_no_compiler_auto_goes_on_without(folder, monkeypatch, tmp_path):
    put(folder / HERE[-1].file_name, b"text")
    monkeypatch.setattr("gpt2core.backends.native.backend.load_kernels", lambda: load_kernels(folder))
    monkeypatch.setattr("gpt2core.backends.find_prebuilt", lambda: find_prebuilt(folder))
    monkeypatch.setattr(build, "find_compiler", lambda: None)
    monkeypatch.setattr(c_compiler, "find_compiler", lambda: None)
    monkeypatch.delenv("GPT2CORE_BACKEND", raising=False)
    with pytest.warns(RuntimeWarning) as said:
        backend = create_backend("auto", random_weights(random_config()))
    assert backend.name == "numpy"
    assert [str(one.message).partition(" (")[0] for one in said] == [
        "prebuilt kernels of the native backend are unfit",
        "backend='auto' takes numpy: the native backend needs a C compiler",
    ]


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("wrong", "fails its self-test"),
        ("no library", f"GPT2CORE_NATIVE names '{HERE[0].name}', which does not load"),
        ("missing", f"names '{HERE[0].name}', and .* there is here {HERE[1].name}, .*; use another"),
    ],
)
def test_a_named_library_is_not_replaced(folder, wrong, monkeypatch, fault, said):
    named = folder / HERE[0].file_name
    if fault == "missing":
        named.unlink()
    else:
        put(named, wrong if fault == "wrong" else b"text")
    monkeypatch.setenv("GPT2CORE_NATIVE", HERE[0].name)
    everything = frozenset(HERE[0].features)
    monkeypatch.setattr(prebuilt, "read_features", lambda *_: everything)
    with pytest.raises(BackendUnavailableError, match=said):
        load_kernels(folder)


def test_a_named_library_that_the_processor_cannot_run_is_refused_with_what_it_lacks(folder, monkeypatch):
    best = HERE[0]
    monkeypatch.setenv("GPT2CORE_NATIVE", best.name)
    monkeypatch.setattr(prebuilt, "read_features", lambda *_: frozenset(best.features[1:]))
    with pytest.raises(BackendUnavailableError) as caught:
        load_kernels(folder)
    assert str(caught.value) == (
        f"GPT2CORE_NATIVE names {best.name!r}, and this processor has no {best.features[0]}; unset it"
    )


def test_a_name_that_no_library_has_is_refused_with_those_that_there_are(monkeypatch):
    monkeypatch.setenv("GPT2CORE_NATIVE", "avx1024")
    with pytest.raises(BackendUnavailableError) as caught:
        load_kernels()
    assert str(caught.value) == (
        f"GPT2CORE_NATIVE is 'avx1024'; use one of {', '.join((*NAMES, COMPILE))}, or unset it"
    )


# ------------------------------------------------------------------------------------------ the build of them


def test_what_a_compiler_cannot_build_is_told_and_the_others_are_built(tmp_path):
    least, unknown = HERE[-1], variants.Variant("unknown", ("future",), ("-mno-such-instruction",))
    compiler = [c_compiler.find_compiler(), *variants.FLAGS, *BASE, "-O0"]
    said = build_variants(tmp_path, compiler, variants=(unknown, least))
    assert list(said) == ["unknown"]
    assert "-mno-such-instruction" in said["unknown"]
    assert {path.name for path in tmp_path.iterdir()} == {least.file_name, DIGEST_NAME}
    assert read_features(tmp_path, HERE) <= processor_flags()


def test_the_zig_of_the_package_is_found_last_and_by_its_name(tmp_path, monkeypatch):
    (tmp_path / "zig").write_text("#!/bin/sh\n")
    (tmp_path / "zig").chmod(0o755)
    spec = SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr(c_compiler, "find_spec", lambda name: spec if name == "ziglang" else None)
    zig = str(tmp_path / "zig")
    monkeypatch.setenv("GPT2CORE_CC", "zig")
    assert c_compiler.find_compiler() == zig
    assert c_compiler.compile_command(zig)[:2] == [zig, "cc"]
    monkeypatch.delenv("GPT2CORE_CC")
    assert c_compiler.find_compiler() not in (None, zig)
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    assert c_compiler.find_compiler() == zig
    assert c_compiler.missing_compiler() is None
    assert c_compiler.compile_command("gcc") == ["gcc"]
