"""`pip install 'gpt2core[...]'` is said only where it would work."""

import os
import platform
import sys
from types import SimpleNamespace

import pytest

from gpt2core import _machine
from gpt2core.backends import available, load_factory
from gpt2core.checkpoint.convert import convert_pickle
from gpt2core.errors import BackendUnavailableError
from gpt2core.testing import random_checkpoint


def musl(name):
    raise ValueError("unrecognized configuration name")


@pytest.mark.parametrize(
    ("platform_", "machine", "changes", "lacking"),
    [
        ("linux", "x86_64", {}, ""),
        ("linux", "aarch64", {}, ""),
        ("darwin", "arm64", {}, ""),
        ("win32", "AMD64", {}, ""),
        ("linux", "x86_64", {"confstr": musl}, "Linux without glibc"),
        ("linux", "armv7l", {}, "armv7l on Linux"),
        ("linux", "x86_64", {"maxsize": 2**31 - 1}, "a Python of 32 bits"),
        ("darwin", "x86_64", {"system": "Darwin"}, "x86_64 on Darwin"),
        ("win32", "ARM64", {"system": "Windows"}, "arm64 on Windows"),
        ("linux", "x86_64", {"implementation": "pypy"}, "PyPy"),
    ],
)
def test_the_command_is_named_where_there_are_wheels(monkeypatch, platform_, machine, changes, lacking):
    implementation = SimpleNamespace(name=changes.get("implementation", "cpython"))
    shown = {"pypy": "PyPy", "cpython": "CPython"}[implementation.name]
    system = SimpleNamespace(
        platform=platform_, maxsize=changes.get("maxsize", 2**63 - 1), implementation=implementation
    )
    monkeypatch.setattr(_machine, "sys", system)
    monkeypatch.setattr(platform, "machine", lambda: machine)
    monkeypatch.setattr(platform, "system", lambda: changes.get("system", "Linux"))
    monkeypatch.setattr(platform, "python_implementation", lambda: shown)
    monkeypatch.setattr(os, "confstr", changes.get("confstr", lambda name: "glibc 2.36"))
    hint = _machine.install_hint("torch")
    if lacking:
        assert hint.startswith(f"its packages have no wheels for {lacking}; take the backend numpy or native")
        assert "pip install" not in hint
    else:
        assert hint == "install it with: pip install 'gpt2core[torch]'"


def test_backends_that_are_not_installed_say_so(monkeypatch):
    monkeypatch.setattr(_machine, "_without_wheels", lambda: "Linux without glibc")
    monkeypatch.setattr("gpt2core.backends.find_spec", lambda package: None)
    assert "have no wheels for Linux without glibc" in available()["torch"].reason


def break_torch(monkeypatch, tmp_path, line):
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "torch.py").write_text(line + "\n")
    monkeypatch.syspath_prepend(tmp_path / "broken")
    for name in [name for name in sys.modules if name.split(".")[0] == "torch"]:
        monkeypatch.delitem(sys.modules, name)
    for name in [name for name in sys.modules if name.startswith("gpt2core.backends.torch")]:
        monkeypatch.delitem(sys.modules, name)


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ('raise ImportError("libcudart.so.12: cannot open shared object file")', "ImportError: libcudart"),
        ('raise OSError("WinError 126: a module was not found")', "OSError: WinError 126"),
        ("import a_module_that_nobody_has", "ModuleNotFoundError: No module named 'a_module_that"),
    ],
)
def test_a_framework_that_is_installed_and_broken_is_not_called_missing(tmp_path, monkeypatch, line, why):
    folder = random_checkpoint(tmp_path / "model")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    break_torch(monkeypatch, tmp_path, line)
    with pytest.raises(
        BackendUnavailableError, match=f"needs PyTorch, whose import failed: {why}"
    ) as convert:
        convert_pickle(folder)
    with pytest.raises(BackendUnavailableError, match=f"its import failed: {why}") as load:
        load_factory("torch")
    for error in (convert, load):
        assert "pip install" not in str(error.value)
