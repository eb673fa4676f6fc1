"""The build of a wheel: with the native backend's libraries for one platform, or pure.

The environment variable GPT2CORE_WHEEL says which: a platform of `TARGETS`, compiled by `zig cc` on any
machine; "any", the wheel without libraries; unset, this machine's, where it has a C compiler (GPT2CORE_CC
names another, GPT2CORE_CFLAGS adds flags), else the pure one. An editable installation has its libraries in
the source tree.
"""

import importlib.util
import os
import pathlib
import shlex
import shutil
import sys
import sysconfig
import tempfile
from types import ModuleType
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

ROOT = pathlib.Path(__file__).parent
INSIDE = "gpt2core/backends/native/prebuilt"
ANY = "any"
TARGETS = {
    "manylinux_2_17_x86_64.manylinux2014_x86_64": "x86_64-linux-gnu.2.17",
    "manylinux_2_17_aarch64.manylinux2014_aarch64": "aarch64-linux-gnu.2.17",
    "musllinux_1_2_x86_64": "x86_64-linux-musl",
    "musllinux_1_2_aarch64": "aarch64-linux-musl",
    "macosx_11_0_arm64": "aarch64-macos.11.0",
    "macosx_10_15_x86_64": "x86_64-macos.10.15",
    "win_amd64": "x86_64-windows-gnu",
}
"""What `zig cc` calls the platforms of wheels."""


def load_shared(name: str) -> ModuleType:
    """A module of the package by its path: the package itself needs what a build does not have."""
    spec = importlib.util.spec_from_file_location(name, ROOT / f"gpt2core/backends/_shared/{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


variants = load_shared("variants")
c_compiler = load_shared("c_compiler")


class NativeBuildHook(BuildHookInterface):  # type: ignore[type-arg]
    """Compiles the libraries and names the wheel after their platform."""

    def dependencies(self) -> list[str]:
        """`zig` is a package, which this build then needs."""
        cross = os.environ.get("GPT2CORE_WHEEL", "") in TARGETS
        return ["ziglang"] if cross or os.environ.get(c_compiler.VARIABLE) == "zig" else []

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Called before files are collected; `version` is "standard" or "editable"."""
        platform = os.environ.get("GPT2CORE_WHEEL", "")
        if platform not in ("", ANY, *TARGETS):
            raise ValueError(f"GPT2CORE_WHEEL is {platform!r}; use one of {', '.join((ANY, *TARGETS))}")
        if platform == ANY:
            return
        self.folder = pathlib.Path(tempfile.mkdtemp(prefix="gpt2core-build-"))
        built = compile_for(platform, self.folder) if platform else self._compile_here()
        if version == "editable":
            shutil.rmtree(ROOT / INSIDE, ignore_errors=True)
            if built:
                shutil.copytree(self.folder, ROOT / INSIDE)
        elif built:
            made = self.folder.iterdir()
            build_data["force_include"] |= {str(path): f"{INSIDE}/{path.name}" for path in made}
            build_data["pure_python"] = False
            build_data["tag"] = f"py3-none-{platform or name_platform()}"

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        """Called after the wheel was written."""
        if hasattr(self, "folder"):
            shutil.rmtree(self.folder, ignore_errors=True)

    def _compile_here(self) -> bool:
        lacking = c_compiler.missing_compiler()
        wanted = variants.VARIANTS.get(variants.machine_name(), ())
        if lacking is not None or not wanted:
            why = lacking or f"has no libraries for {variants.machine_name()}"
            self.app.display_warning(f"the native backend is not compiled: it {why}")
            return False
        command = [*c_compiler.compile_command(c_compiler.find_compiler()), *variants.FLAGS]
        if variants.machine_name() == "x86_64":  # elsewhere every variant names its processor
            command.append("-mcpu=baseline" if "cc" in command else "-march=x86-64")
        command += shlex.split(os.environ.get("GPT2CORE_CFLAGS", ""))
        failed = variants.build_variants(self.folder, command, variants=wanted)
        for name, said in failed.items():  # an old compiler does not know the newest instructions
            self.app.display_warning(f"the native backend's library {name} is not compiled: {said[-500:]}")
        return wanted[-1].name not in failed


def compile_for(platform: str, folder: pathlib.Path) -> bool:
    """Compile all libraries of a platform of `TARGETS` into `folder`."""
    target = TARGETS[platform]
    compiler = c_compiler.find_zig()
    if compiler is None:
        raise RuntimeError("zig is missing; install it with: pip install ziglang")
    command = [*c_compiler.compile_command(compiler), "-target", target, *variants.FLAGS]
    suffix = ".dll" if "windows" in target else ".so"
    wanted = variants.VARIANTS[target.partition("-")[0]]
    failed = variants.build_variants(folder, command, variants=wanted, suffix=suffix)
    if failed:
        raise RuntimeError("\n".join(f"{platform}: {name}: {said}" for name, said in failed.items()))
    return True


def name_platform() -> str:
    """This machine's, as wheels are named: "linux_x86_64", "macosx_14_0_arm64"."""
    platform = sysconfig.get_platform().replace("universal2", os.uname().machine)
    return platform.replace("-", "_").replace(".", "_")
