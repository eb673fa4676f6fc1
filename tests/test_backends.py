"""The registry, the automatic choice, devices, threads, and what a backend shares or copies."""

import subprocess
import sys
import textwrap
from importlib.metadata import EntryPoint

import numpy as np
import onnxruntime
import pytest
import torch

import gpt2core
from gpt2core import _machine, backends
from gpt2core.backends import available, choose, create_backend, load_factory
from gpt2core.backends._shared.threads import _openblas, blas_threads, check_threads
from gpt2core.backends._shared.variants import VARIANTS
from gpt2core.backends.native import NativeBackend
from gpt2core.backends.numpy.backend import NumpyBackend
from gpt2core.backends.onnx import OnnxBackend
from gpt2core.backends.torch.backend import TorchBackend
from gpt2core.batch import Batch
from gpt2core.errors import BackendError, BackendUnavailableError, RequestError
from gpt2core.reference import reference_logits
from gpt2core.testing import check_backend, random_config, random_weights

TINY = random_weights(random_config())


def plug_in(monkeypatch, **targets):
    """Pretend that distributions with these entry points are installed."""
    entries = [EntryPoint(name, target, backends.ENTRY_POINT_GROUP) for name, target in targets.items()]
    monkeypatch.setattr("importlib.metadata.entry_points", lambda group: entries)


# ------------------------------------------------------------------------------------------------- registry


def test_built_in_backends_are_listed_with_the_version_of_their_package():
    infos = available()
    assert list(infos)[:5] == ["numpy", "native", "torch", "jax", "onnx"]
    assert infos["numpy"] == backends.BackendInfo("numpy", True, np.__version__, "")
    assert infos["torch"].version == torch.__version__
    assert infos["onnx"].version == onnxruntime.__version__
    assert infos["native"] == backends.BackendInfo("native", True, gpt2core.__version__, "")


def test_a_missing_framework_is_listed_with_its_pip_extra(monkeypatch):
    monkeypatch.setattr(backends, "find_spec", lambda name: None)
    assert available()["torch"] == backends.BackendInfo(
        "torch", False, None, "install it with: pip install 'gpt2core[torch]'"
    )


def test_native_is_listed_without_a_package_but_not_without_a_compiler(monkeypatch, tmp_path):
    monkeypatch.setattr(backends, "find_spec", lambda name: None)
    assert [name for name, info in available(load_plugins=False).items() if info.available] == ["native"]
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("GPT2CORE_CC", raising=False)
    reason = (
        "needs a C compiler (gcc or clang), and none was found; install one (Debian: apt install gcc; "
        "anywhere: pip install 'gpt2core[native]')"
    )
    assert available()["native"] == backends.BackendInfo("native", False, None, reason)


def test_asking_the_registry_neither_runs_a_compiler_nor_loads_what_would():
    code = (
        "import sys, gpt2core\nbefore = {'subprocess', 'shutil', 'ctypes'} & set(sys.modules)\n"
        "from gpt2core.backends import available\n"
        "assert available(load_plugins=False)['native'].available\n"
        "print(sorted(before), 'gpt2core.backends.native' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[] False\n"


def test_making_a_backend_whose_framework_is_missing_names_its_pip_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "gpt2core.backends.torch.backend", None)

    def fail(module):
        raise ModuleNotFoundError("No module named 'torch'", name="torch")

    monkeypatch.setattr(backends.importlib, "import_module", fail)
    with pytest.raises(
        BackendUnavailableError, match=r"'torch' is not available: .*pip install 'gpt2core\[torch\]'"
    ):
        create_backend("torch", TINY)


def test_a_framework_that_is_there_but_broken_is_not_called_missing(monkeypatch):
    def fail(module):
        raise ImportError("libtorch.so: cannot open shared object file")

    monkeypatch.setattr(backends.importlib, "import_module", fail)
    with pytest.raises(BackendUnavailableError, match=r"its import failed: ImportError: libtorch\.so"):
        load_factory("torch")


def test_an_unknown_backend_is_refused_with_the_known_names():
    with pytest.raises(
        BackendUnavailableError,
        match="no backend 'tensorflow'; known are auto, numpy, native, torch, jax, onnx",
    ):
        create_backend("tensorflow", TINY)


def test_a_plugin_is_found_and_conforms(monkeypatch):
    plug_in(monkeypatch, mine="gpt2core.backends.numpy:NumpyBackend")
    assert available()["mine"].available
    check_backend(load_factory("mine"))


@pytest.mark.parametrize(
    "target", ["no_such_module_anywhere:X", "gpt2core.errors:NoSuchName", "this:.is-bad"]
)
def test_a_broken_plugin_does_not_hide_the_others(monkeypatch, target):
    plug_in(monkeypatch, broken=target, mine="gpt2core.backends.numpy:NumpyBackend")
    infos = available()
    assert infos["mine"].available
    assert infos["numpy"].available
    assert not infos["broken"].available
    assert "its plugin failed to load" in infos["broken"].reason
    with pytest.raises(BackendUnavailableError, match="'broken' is not available: its plugin failed to load"):
        load_factory("broken")


def test_a_plugin_cannot_take_a_built_in_name(monkeypatch):
    plug_in(monkeypatch, numpy="gpt2core.errors:RequestError")
    assert load_factory("numpy") is NumpyBackend


def test_an_unknown_precision_is_refused_by_name():
    with pytest.raises(
        RequestError, match="precision 'float8' is unknown; use 'auto' or 'float32' or 'int8'"
    ):
        create_backend("numpy", TINY, precision="float8")


# -------------------------------------------------------------------------------------------------- choice


def has_only(monkeypatch, path, installed):
    """Pretend that these packages are installed, with "cc" a C compiler, with "lib" a prebuilt library."""
    monkeypatch.delenv("GPT2CORE_BACKEND", raising=False)
    monkeypatch.delenv("GPT2CORE_CC", raising=False)
    monkeypatch.setenv("PATH", str(path))
    monkeypatch.setattr(backends, "find_spec", lambda name: object() if name in installed else None)
    monkeypatch.setattr(backends, "find_prebuilt", lambda: VARIANTS["x86_64"] if "lib" in installed else ())
    if "cc" in installed:
        (path / "cc").write_text("#!/bin/sh\nexit 1\n")  # is looked up, never run
        (path / "cc").chmod(0o755)


@pytest.mark.parametrize(
    ("size", "device", "installed", "chosen"),
    [
        ("tiny", "cpu", ["cc", "torch", "onnxruntime", "onnx"], "numpy"),
        ("tiny", "cpu", ["lib", "torch", "onnxruntime", "onnx"], "native"),
        ("tiny", "cpu", ["lib"], "native"),
        ("small", "cpu", ["cc", "torch", "onnxruntime", "onnx"], "native"),
        ("small", "cpu", ["cc"], "native"),
        ("small", "cpu", ["lib"], "native"),
        ("small", "cpu", ["torch", "onnxruntime", "onnx"], "onnx"),
        ("small", "cpu", ["torch", "onnxruntime"], "torch"),
        ("small", "cpu", ["torch"], "torch"),
        ("small", "cpu", [], "numpy"),
        ("tiny", "cuda", ["cc", "torch", "onnxruntime", "onnx"], "torch"),
        ("tiny", "cuda", ["onnxruntime", "onnx"], "onnx"),
        ("tiny", "cuda:1", ["jax", "jaxlib", "flax", "onnxruntime", "onnx"], "jax"),
        ("tiny", "cuda", ["cc", "lib"], "torch"),
        ("tiny", "tpu", ["cc", "torch", "onnxruntime", "onnx"], "jax"),
        ("small", "cpu", ["jax", "jaxlib", "flax"], "numpy"),
    ],
)
def test_auto_follows_its_documented_rule(monkeypatch, tmp_path, size, device, installed, chosen):
    has_only(monkeypatch, tmp_path, installed)
    name, why = choose(random_config(size), device=device)
    assert name == chosen
    assert why


@pytest.mark.parametrize(
    ("precision", "installed", "chosen"),
    [
        ("bfloat16", ["cc", "torch", "onnxruntime", "onnx"], "native"),
        ("bfloat16", ["torch", "onnxruntime", "onnx"], "numpy"),
        ("int4", ["cc", "torch", "onnxruntime", "onnx"], "native"),
        ("int4", ["torch"], "numpy"),
        ("int8", ["torch"], "torch"),
    ],
)
def test_auto_passes_over_backends_without_the_precision(monkeypatch, tmp_path, precision, installed, chosen):
    has_only(monkeypatch, tmp_path, installed)
    assert choose(random_config("small"), precision=precision)[0] == chosen


def test_the_environment_overrides_the_choice(monkeypatch):
    monkeypatch.setenv("GPT2CORE_BACKEND", "numpy")
    assert choose(random_config("small")) == ("numpy", "GPT2CORE_BACKEND names it")
    monkeypatch.setenv("GPT2CORE_BACKEND", "auto")
    assert choose(random_config())[0] == "numpy"
    monkeypatch.setenv("GPT2CORE_BACKEND", "")
    assert choose(random_config())[0] == "numpy"


def test_a_plugin_may_be_named_by_the_environment(monkeypatch):
    plug_in(monkeypatch, mine="gpt2core.backends.numpy:NumpyBackend")
    monkeypatch.setenv("GPT2CORE_BACKEND", "mine")
    assert choose(random_config("small")) == ("mine", "GPT2CORE_BACKEND names it")


def test_an_unknown_backend_in_the_environment_is_refused_with_the_variables_name(monkeypatch):
    monkeypatch.setenv("GPT2CORE_BACKEND", "nothing")
    message = (
        "GPT2CORE_BACKEND names 'nothing', .*; known are auto, numpy, native, torch, jax, onnx"
        ".* unset the variable"
    )
    with pytest.raises(BackendUnavailableError, match=message):
        create_backend("auto", TINY)


def test_a_backend_named_by_the_caller_does_not_ask_the_environment(monkeypatch):
    monkeypatch.setenv("GPT2CORE_BACKEND", "nothing")
    assert create_backend("numpy", TINY).name == "numpy"


# ------------------------------------------------------------------------------------------------- devices


def test_numpy_refuses_other_devices_by_name():
    with pytest.raises(BackendUnavailableError, match="numpy backend runs on device 'cpu' only, not 'cuda'"):
        NumpyBackend(TINY, device="cuda")


@pytest.mark.parametrize("device", ["tpu", "mps", "", "cuda:x"])
def test_torch_refuses_unknown_devices_by_name(device):
    with pytest.raises(BackendUnavailableError, match=f"device '{device}' is unknown"):
        TorchBackend(TINY, device=device)


def test_torch_says_how_many_gpus_there_are_when_one_is_missing(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(
        BackendUnavailableError, match=r"device 'cuda:1' is not there: .* sees 1 CUDA devices"
    ):
        TorchBackend(TINY, device="cuda:1")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_torch_conforms_on_cuda():
    check_backend(lambda weights, **_: TorchBackend(weights, device="cuda"))


def test_torch_without_onednn_conforms_too(monkeypatch):
    monkeypatch.setattr("gpt2core.backends.torch.products._ONEDNN_LINEAR", None)
    check_backend(TorchBackend)
    check_backend(TorchBackend, random_weights(random_config(activation_function="silu")))


@pytest.mark.parametrize("chunks", [(200,), (64, 136), (3, 130, 67), (127, 73)])
def test_torch_attends_to_long_chunks_by_blocks_as_the_reference_does(chunks):
    weights = random_weights(random_config(n_positions=200))
    tokens = np.random.default_rng(0).integers(0, 257, 200).tolist()
    backend, start, got = TorchBackend(weights), 0, []
    cache = backend.new_cache(3, 200)
    for size in chunks:
        batch = Batch.of([(tokens[start : start + size], start, 1)], range(size))
        got.append(backend.forward(batch, cache))
        start += size
    np.testing.assert_allclose(np.concatenate(got), reference_logits(weights, tokens), atol=1e-4)


def test_a_failure_inside_torch_is_a_backend_error():
    backend = TorchBackend(TINY)
    cache = backend.new_cache(1, 8)
    cache.kv = cache.kv[..., :1]
    with pytest.raises(BackendError, match="torch backend failed on cpu"):
        backend.forward(Batch.of([([1, 2], 0, 0)]), cache)


# ------------------------------------------------------------------------------------------------- threads


@pytest.mark.parametrize("threads", [0, -1, 1.5, True, "2"])
def test_a_bad_thread_count_is_refused(threads):
    with pytest.raises(RequestError, match=r"threads is .*; use None or a whole number of 1 or more"):
        check_threads(threads)


@pytest.mark.parametrize("factory", [NumpyBackend, NativeBackend, TorchBackend])
def test_backends_refuse_a_bad_thread_count(factory):
    with pytest.raises(RequestError, match="threads is 0"):
        factory(TINY, threads=0)


def test_torch_uses_the_threads_asked_for_and_puts_the_former_count_back(monkeypatch):
    seen = []
    real = TorchBackend._logits
    monkeypatch.setattr(TorchBackend, "_logits", lambda *a: seen.append(torch.get_num_threads()) or real(*a))
    before = torch.get_num_threads()
    for threads in (1, 3, None):
        backend = TorchBackend(TINY, threads=threads)
        backend.forward(Batch.of([([1], 0, 0)]), backend.new_cache(1, 8))
        assert torch.get_num_threads() == before
    assert seen == [1, 3, before]


def test_numpy_uses_the_threads_asked_for_and_puts_the_former_count_back(monkeypatch):
    get, _ = _openblas()
    seen, before = [], get()
    real = NumpyBackend._logits
    monkeypatch.setattr(NumpyBackend, "_logits", lambda *a: seen.append(get()) or real(*a))
    for threads in (1, 2, None):
        backend = NumpyBackend(TINY, threads=threads)
        backend.forward(Batch.of([([1], 0, 0)]), backend.new_cache(1, 8))
        assert get() == before
    assert seen == [1, 2, before]


def test_threads_are_put_back_when_the_pass_fails():
    get, _ = _openblas()
    before = get()
    with pytest.raises(ZeroDivisionError), blas_threads(1 if before > 1 else 2):
        1 / 0  # noqa: B018 - raising is the point
    assert get() == before


def test_a_quota_bounds_the_threads_that_nobody_chose(tmp_path, monkeypatch):
    (tmp_path / "cpu.max").write_text("100000 100000\n")
    monkeypatch.setattr(_machine, "_CGROUPS", tmp_path)
    monkeypatch.setattr(_machine, "_count_affinity", lambda: 4)
    seen = {}
    get, put = _openblas()
    before = get()
    put(2)
    try:
        with blas_threads(None):
            seen["numpy"] = get()
        with blas_threads(2):
            seen["numpy, two"] = get()
        assert get() == 2
    finally:
        put(before)
    with TorchBackend(TINY)._running():
        seen["torch"] = torch.get_num_threads()
    seen["onnx"] = OnnxBackend(TINY)._settings.threads
    assert seen == {"numpy": 1, "numpy, two": 2, "torch": 1, "onnx": 1}


def test_a_numpy_without_openblas_says_what_to_do(monkeypatch):
    monkeypatch.setattr("gpt2core.backends._shared.threads._openblas", lambda: None)
    with pytest.raises(BackendUnavailableError, match=r"threads=2: .* leave threads=None"):
        NumpyBackend(TINY, threads=2)
    NumpyBackend(TINY)


# -------------------------------------------------------------------------------------------------- memory


def test_torch_shares_the_weights_on_the_cpu_and_leaves_them_read_only():
    backend = TorchBackend(TINY)
    assert backend._model.wte.data_ptr() == TINY.wte.ctypes.data
    assert backend._model.layers[0].ln_1[0].data_ptr() == TINY.blocks[0].ln_1.weight.ctypes.data
    assert not TINY.wte.flags.writeable


@pytest.mark.parametrize("factory", [NumpyBackend, NativeBackend, TorchBackend])
def test_no_backend_writes_to_the_weights(factory):
    weights = random_weights(random_config())
    before = {name: array.copy() for name, array in weights.named()}
    check_backend(factory, weights)
    for name, array in weights.named():
        np.testing.assert_array_equal(array, before[name], err_msg=name)


@pytest.mark.parametrize("name", ["numpy", "torch"])
def test_weights_are_not_copied_and_unused_slots_take_no_memory(name):
    """In a process of its own: 81 MB of weights and a cache of 600 MB, of which one short row is used."""
    script = f"""
        import psutil
        from gpt2core.backends import load_factory
        from gpt2core.batch import Batch
        from gpt2core.testing import random_config, random_weights
        factory = load_factory({name!r})
        warm = random_weights(random_config())
        backend = factory(warm)
        backend.forward(Batch.of([([1, 2], 0, 0)]), backend.new_cache(1, 8))
        config = random_config(n_embd=512, n_layer=6, n_head=8, vocab_size=2048, n_positions=1024)
        weights = random_weights(config)
        rss = psutil.Process().memory_info().rss
        backend = factory(weights)
        cache = backend.new_cache(24, 1024)
        backend.forward(Batch.of([([1, 2, 3], 0, 0)]), cache)
        print((psutil.Process().memory_info().rss - rss) / weights.nbytes, cache.nbytes)
    """
    out = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=True
    )
    growth, cache_nbytes = out.stdout.split()
    assert int(cache_nbytes) == 2 * 4 * 6 * 24 * 1024 * 512
    assert (
        float(growth) < 0.9
    )  # a copy adds 1.0, a cache that is touched whole 7.5; one slot and scratch 0.65
