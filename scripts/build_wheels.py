"""What scripts/build-wheels does in its environment: build every wheel, look into it, run what runs here.

A library is run on random models, whose logits must have the golden bits: by itself where the processor is
this one or qemu's, through Python in a fresh environment where the platform is this machine's. What nothing
here can run is listed as built only.
"""

import argparse
import io
import json
import os
import pathlib
import platform
import shutil
import subprocess
import sys
import tempfile
import zipfile
from typing import Any

ROOT = pathlib.Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from hatch_build import ANY, INSIDE, TARGETS, c_compiler, variants  # noqa: E402

LARGEST_NBYTES = 20_000_000
GOLDEN = ROOT / "gpt2core/verify/golden_bits.json"
MODELS = ("0", "20", "50")  # as tests/bits.py has them: first seed, models, positions
DRIVER_FLAGS = ("-O2", "-std=gnu11", "-fno-math-errno", "-ffp-contract=off", "-pthread", "-fno-sanitize=all")
MAGIC = {
    "manylinux": b"\x7fELF",
    "musllinux": b"\x7fELF",
    "macosx": b"\xcf\xfa\xed\xfe",  # Mach-O with 64 bits
    "win": b"MZ",
}


def main() -> int:
    """Build, check, and print the table of what was made."""
    parser = argparse.ArgumentParser(prog="build-wheels", description=__doc__)
    parser.add_argument("folder", nargs="?", default="dist", type=pathlib.Path)
    parser.add_argument("--only", action="append", choices=[ANY, *TARGETS], help="a platform; repeatable")
    arguments = parser.parse_args()
    folder = arguments.folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    if not arguments.only:
        made = build(folder, "sdist", ANY)
        lines.append((made.name, f"{made.stat().st_size / 1e6:.1f} MB", "", ""))
    for name in arguments.only or [ANY, *TARGETS]:
        wheel = build(folder, "wheel", name)
        inside = check_content(wheel, name)
        ran = run_libraries(wheel, name) if name in TARGETS else ""
        if name.endswith(platform.machine()) and "manylinux" in name:
            ran += "; " + run_installed(wheel)
        lines.append((wheel.name, f"{wheel.stat().st_size / 1e6:.1f} MB", ", ".join(inside), ran))
        print(*lines[-1], sep="\n    ", flush=True)
    subprocess.run(
        [sys.executable, "-m", "twine", "check", "--strict", *map(str, folder.iterdir())], check=True
    )
    print("\n| file | size | libraries | run |", "|---|---|---|---|", sep="\n")
    print(*("| " + " | ".join(line) + " |" for line in lines), sep="\n")
    return 0


def build(folder: pathlib.Path, kind: str, name: str) -> pathlib.Path:
    """A distribution, as any front end builds it."""
    with tempfile.TemporaryDirectory() as empty:
        command = [sys.executable, "-m", "hatchling", "build", "--target", kind, "--directory", empty]
        subprocess.run(command, cwd=ROOT, env={**os.environ, "GPT2CORE_WHEEL": name}, check=True)
        (made,) = pathlib.Path(empty).iterdir()
        return pathlib.Path(shutil.move(made, folder / made.name))


def check_content(wheel: pathlib.Path, name: str) -> list[str]:
    """The names of its libraries, which must be those of its platform and no others."""
    require(wheel.stat().st_size <= LARGEST_NBYTES, f"{wheel.name} is larger than {LARGEST_NBYTES} bytes")
    require(wheel.name.endswith(f"-py3-none-{name}.whl"), f"{wheel.name} is not for {name}")
    with zipfile.ZipFile(wheel) as archive:
        libraries = sorted(file for file in archive.namelist() if file.endswith((".so", ".dll", ".dylib")))
        if name == ANY:
            require(not libraries, f"{wheel.name} holds {libraries}")
            return []
        suffix = ".dll" if name.startswith("win") else ".so"
        wanted = variants_of(name)
        require(
            libraries == sorted(f"{INSIDE}/{variant.name}{suffix}" for variant in wanted),
            f"{wheel.name} holds {libraries}",
        )
        magic = next(start for system, start in MAGIC.items() if name.startswith(system))
        for file in libraries:
            require(archive.read(file).startswith(magic), f"{file} is of another system")
        digest = archive.read(f"{INSIDE}/{variants.DIGEST_NAME}").decode().strip()
        require(digest == variants.digest_sources(), f"{wheel.name} was made of other sources")
        if name.startswith("musllinux"):  # auditwheel knows musl's libc by Alpine's name for it only
            for file in libraries:
                needed = read_needed(archive.read(file))
                require(needed == ["libc.so"], f"{file} needs {needed}")  # which musl's loader is itself
    if name.startswith("manylinux"):
        command = [sys.executable, "-m", "auditwheel", "show", str(wheel)]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        promised = f'"{name.partition(".")[0]}"'
        require(promised in said.replace("\n", " "), f"auditwheel says of {wheel.name}: {said}")
    return [variant.name for variant in wanted]


def read_needed(library: bytes) -> list[str]:
    """The libraries that an ELF file is linked with."""
    from elftools.elf.elffile import ELFFile  # comes with auditwheel

    dynamic = ELFFile(io.BytesIO(library)).get_section_by_name(".dynamic")
    return [tag.needed for tag in dynamic.iter_tags() if tag.entry.d_tag == "DT_NEEDED"]


def variants_of(name: str) -> tuple[Any, ...]:
    """A platform's variants, best first."""
    return variants.VARIANTS[TARGETS[name].partition("-")[0]]


def run_libraries(wheel: pathlib.Path, name: str) -> str:
    """Run each library on random models; what ran it, and which of them."""
    runner = find_runner(name)
    if runner is None:
        return "built only"
    command, environment, how = runner
    golden = json.loads(GOLDEN.read_text())["random models"]["short"]
    ran = []
    with tempfile.TemporaryDirectory() as scratch, zipfile.ZipFile(wheel) as archive:
        driver = compile_driver(pathlib.Path(scratch), name)
        for variant in variants_of(name):
            if not can_run(variant, name):
                continue
            suffix = ".dll" if name.startswith("win") else ".so"
            library = archive.extract(f"{INSIDE}/{variant.name}{suffix}", scratch)
            done = subprocess.run(
                [*command, str(driver), *MODELS, "--library", library],
                env={**os.environ, **environment},
                capture_output=True,
                text=True,
                check=False,
            )
            found = dict(line.split()[:2] for line in done.stdout.splitlines())
            require(found == golden, f"{wheel.name}, {variant.name}: {found or done.stderr}, not {golden}")
            ran.append(variant.name)
    return f"{', '.join(ran)} {how}"


def find_runner(name: str) -> tuple[list[str], dict[str, str], str] | None:
    """What runs a platform's programs here, with its environment, in words; None: nothing."""
    machine = TARGETS[name].partition("-")[0]
    emulator = [] if machine == platform.machine() else [f"qemu-{machine}"]
    by = f"by {emulator[0]}" if emulator else "on this processor"
    if emulator and shutil.which(emulator[0]) is None:
        return None
    if name.startswith("manylinux"):
        return emulator, {"QEMU_LD_PREFIX": f"/usr/{machine}-linux-gnu"}, by
    if name.startswith("musllinux"):  # the loader is the libc too
        folders = (os.environ.get("GPT2CORE_MUSL") or "/", "/")
        loaders = [pathlib.Path(folder, f"lib/ld-musl-{machine}.so.1") for folder in folders]
        loader = next((path for path in loaders if path.exists()), None)
        return loader and ([*emulator, str(loader)], {}, f"{by} with musl's loader")
    wine = shutil.which("wine64") or shutil.which("wine") or shutil.which("/usr/lib/wine/wine64")
    if name.startswith("win") and wine and not emulator:
        return [wine], {"WINEDEBUG": "-all"}, "by wine"
    return None


def can_run(variant: Any, name: str) -> bool:
    """Whether this processor, or qemu, which has everything, runs a variant."""
    if not name.endswith(platform.machine()) and not name.startswith("win"):
        return True
    has = pathlib.Path("/proc/cpuinfo").read_text().split()
    return set(variant.features) <= set(has)


def compile_driver(folder: pathlib.Path, name: str) -> pathlib.Path:
    """The program that runs a library on random models, for the least processor of a platform."""
    made = folder / "driver.exe"
    source = variants.KERNELS / "tests/hash_model.c"
    dynamic = ["-dynamic"] if "musl" in name else []  # it loads libraries
    compiler = c_compiler.compile_command(c_compiler.find_zig())
    command = [
        *compiler,
        "-target",
        TARGETS[name],
        *dynamic,
        *DRIVER_FLAGS,
        "-w",
        str(source),
        "-o",
        str(made),
    ]
    subprocess.run([*command, "-lm", *([] if name.startswith("win") else ["-ldl"])], check=True)
    return made


def run_installed(wheel: pathlib.Path) -> str:
    """Install the wheel where no compiler is, and ask every variant for the demo model's golden bits."""
    with tempfile.TemporaryDirectory() as scratch:
        subprocess.run([sys.executable, "-m", "venv", f"{scratch}/venv"], check=True)
        python = f"{scratch}/venv/bin/python"
        pip = [python, "-m", "pip", "install", "--quiet", "-c", str(ROOT / "constraints.txt"), str(wheel)]
        subprocess.run(pip, check=True)
        environment = {"PATH": f"{scratch}/venv/bin", "HOME": scratch}
        ran = []
        target = wheel.stem.split("-")[-1]
        for variant in ["", *(one.name for one in variants_of(target) if can_run(one, target))]:
            done = subprocess.run(
                [f"{scratch}/venv/bin/gpt2core", "verify", "--bits"],
                env={**environment, variants.VARIABLE: variant},
                cwd=scratch,
                capture_output=True,
                text=True,
                check=False,
            )
            require(done.returncode == 0 and not done.stderr, f"{variant}: {done.stdout} {done.stderr}")
            ran.append(variant or "auto")
        require(not (pathlib.Path(scratch) / ".cache/gpt2core/native").exists(), "something was compiled")
        return f"installed without a compiler: {', '.join(ran)}"


def require(condition: bool, otherwise: str) -> None:
    """End with `otherwise` unless the condition holds."""
    if not condition:
        raise SystemExit(f"build-wheels: {otherwise}")


if __name__ == "__main__":
    sys.exit(main())
