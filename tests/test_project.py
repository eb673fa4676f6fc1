"""What the project promises about itself: versions, scripts, pins, layout, links."""

import ast
import importlib.metadata
import importlib.util
import os
import re
import stat
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import gpt2core

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
MODULES = sorted((ROOT / "gpt2core").rglob("*.py"))
TEXT_PATTERNS = (
    *("*.md", "*.toml", "*.txt", "docs/**/*.md", "gpt2core/**/*.py", "gpt2core/**/*.md"),
    *("tests/**/*.py", "examples/**/*.py", "scripts/*", ".ci/run"),
)
TEXTS = sorted(path for pattern in TEXT_PATTERNS for path in ROOT.glob(pattern))
NOT_OURS_TO_PIN = (
    "cuda-",
    "nvidia-",
    "triton",
    "setuptools",
)  # torch pins its GPU build; venv brings setuptools
RUNTIME_EXTRAS_OUTSIDE_ALL = {"all", "dev", "native", "ray"}


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def test_the_version_stands_alike_in_pyproject_and_in_the_package():
    assert PROJECT["version"] == gpt2core.__version__


def test_the_changelog_begins_with_this_version_or_with_unreleased_work():
    headings = re.findall(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert headings[0] in ("Unreleased", gpt2core.__version__)
    assert gpt2core.__version__ in headings


def test_python_m_gpt2core_prints_the_version():
    result = subprocess.run([sys.executable, "-m", "gpt2core", "--version"], capture_output=True, text=True)
    assert (result.returncode, result.stdout, result.stderr) == (0, f"gpt2core {gpt2core.__version__}\n", "")


# Scripts


@pytest.mark.parametrize(
    "script",
    sorted(relative(path) for path in (*(ROOT / "scripts").iterdir(), ROOT / ".ci/run") if not path.suffix),
)
def test_a_script_is_executable_and_is_valid_bash(script):
    path = ROOT / script
    assert path.stat().st_mode & stat.S_IXUSR, f"{script} is not executable"
    assert path.read_text().startswith("#!/usr/bin/env bash\n")
    result = subprocess.run(["bash", "-n", path], capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")


def test_the_readme_shows_the_two_commands_and_every_script_it_names_exists():
    readme = (ROOT / "README.md").read_text()
    named = set(re.findall(r"\./(scripts/[\w-]+|\.ci/\w+)", readme))
    assert {"scripts/try", "scripts/test"} <= named
    assert [script for script in named if not os.access(ROOT / script, os.X_OK)] == []


def test_every_command_and_option_that_the_documents_show_exists():
    from gpt2core.cli import program

    shown = []
    for path in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]:
        for line in re.findall(r"^\s*(?:\$ )?gpt2core ([a-z].*)$", path.read_text(), re.MULTILINE):
            shown.append((relative(path), line))
            words = line.split("#")[0].split("|")[0].split()
            assert words[0] in program.commands, f"{relative(path)} shows `gpt2core {line}`"
            command = program.commands[words[0]]
            if len(words) > 1:
                command = getattr(command, "commands", {}).get(words[1], command)
            known = {option for p in command.params for option in (*p.opts, *p.secondary_opts)}
            unknown = {word for word in words if word.startswith("--")} - known
            assert not unknown, f"{relative(path)} shows {unknown} in `gpt2core {line}`"
    assert len(shown) >= 5


# Dependencies


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    requirements = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(r.name): str(r.specifier) for r in requirements}


def test_constraints_pin_exact_public_versions():
    loose = {name: pin for name, pin in pins().items() if not re.fullmatch(r"==[0-9][0-9a-z.]*", pin)}
    assert loose == {}


def requirements_of(name: str, extra: str) -> list[Requirement]:
    """What a package asks for under one of its extras ("" for none) on this machine."""
    if name == "gpt2core":
        texts = PROJECT["optional-dependencies"][extra] if extra else PROJECT["dependencies"]
    else:
        texts = importlib.metadata.distribution(name).requires or []
    found = [Requirement(text) for text in texts]
    return [r for r in found if r.marker is None or r.marker.evaluate({"extra": extra})]


def test_constraints_cover_all_that_is_installed_at_the_versions_that_are_tested():
    waiting, seen, pinned = [("gpt2core", "all"), ("gpt2core", "dev"), ("gpt2core", "")], set(), pins()
    missing, differing = set(), set()
    while waiting:
        name, extra = waiting.pop()
        if (name, extra) in seen or name.startswith(NOT_OURS_TO_PIN):
            continue
        seen.add((name, extra))
        if name != "gpt2core":
            version = importlib.metadata.version(name).split("+")[0]
            if name not in pinned:
                missing.add(name)
            elif pinned[name] != f"=={version}":
                differing.add(f"{name} {version}, pinned {pinned[name]}")
        for below in requirements_of(name, extra):
            waiting += [(canonicalize_name(below.name), e) for e in ("", *below.extras)]
    assert (missing, differing) == (set(), set())


def test_the_floors_in_pyproject_admit_the_pinned_versions():
    extras = PROJECT["optional-dependencies"]
    for text in [*PROJECT["dependencies"], *(line for lines in extras.values() for line in lines)]:
        requirement = Requirement(text)
        if requirement.name != "gpt2core":
            pinned = pins()[canonicalize_name(requirement.name)].removeprefix("==")
            assert requirement.specifier.contains(pinned), text


def test_each_dependency_of_the_core_is_imported_by_the_core():
    outside = {"backends", "bench", "codec", "integrations", "serve"}
    used = {name.split(".")[0] for path in MODULES if part_of(path) not in outside for name in imports(path)}
    assert {Requirement(text).name.replace("-", "_") for text in PROJECT["dependencies"]} <= used


def test_all_holds_every_runtime_extra():
    extras = PROJECT["optional-dependencies"]
    held = {extra for text in extras["all"] for extra in Requirement(text).extras}
    assert held == set(extras) - RUNTIME_EXTRAS_OUTSIDE_ALL


# Layout


@pytest.mark.parametrize("path", [*MODULES, *sorted((ROOT / "tests").rglob("*.py"))], ids=relative)
def test_a_file_has_at_most_500_lines(path):
    assert len(path.read_text().splitlines()) <= 500


# Who may import whom: each part only what stands before it.
LAYERS = (
    ("errors", "foreign_names", "_shapes", "_files", "_machine", "_version"),
    ("_json", "encodings", "kernels", "token_ids"),
    ("config",),
    ("weights", "batch", "trace", "token_scores"),
    ("sampling", "tokenizer"),
    ("prompts", "reference", "chat_template", "constraints"),
    ("quantization",),
    ("checkpoint",),
    ("backends",),
    ("engine",),
    ("scoring",),
    ("generation", "loading", "scorable", "session_file"),
    ("session",),
    ("model",),
    ("async_model", "testing"),
    ("verify",),
    ("bench", "codec", "integrations", "serve"),
    ("cli",),
    ("__main__",),
)
RANK = {part: rank for rank, layer in enumerate(LAYERS) for part in layer}
CONCRETE = r"gpt2core\.backends\.(numpy|native|torch|onnx|jax)\b"
FRAMEWORKS = {"flax", "jax", "onnx", "onnxruntime", "torch", "transformers"}


def imports(path: Path) -> set[str]:
    """Full names of everything that a file imports, at its top or inside functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{relative(path)}:{node.lineno}: imports here are absolute"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def part_of(path: Path) -> str:
    return path.relative_to(ROOT / "gpt2core").parts[0].removesuffix(".py")


def own_part(name: str) -> str:
    """The part that an import of ours comes from; a public name comes from that of its module."""
    return gpt2core._MODULE_OF.get(first := name.split(".")[1], first).split(".")[0]


@pytest.mark.parametrize("path", [p for p in MODULES if p != ROOT / "gpt2core/__init__.py"], ids=relative)
def test_a_module_imports_only_what_stands_before_it(path):
    own = part_of(path)
    assert own in RANK, f"say in LAYERS (and in docs/architecture.md) where {own} stands"
    used = {own_part(name) for name in imports(path) if name.startswith("gpt2core.")} - {"__version__", own}
    assert {part for part in used if RANK[part] >= RANK[own]} == set()


def test_no_module_imports_another_that_imports_it_in_turn():
    names = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in MODULES}
    waiting = {}
    for name, path in names.items():
        used = {part for full in imports(path) for part in (full, full.rpartition(".")[0])}
        waiting[name] = used & names.keys() - {name}
    while ready := {name for name, used in waiting.items() if not used & waiting.keys()}:
        for name in ready:
            del waiting[name]
    assert waiting == {}


@pytest.mark.parametrize(
    "path",
    [p for p in MODULES if part_of(p) in ("bench", "codec", "integrations", "scoring", "serve")],
    ids=relative,
)
def test_what_stands_apart_uses_public_names_only(path):
    helpers = {"_files", "_json", "_machine", "_shapes", "token_ids"}  # one of each in the whole library
    public = {*gpt2core.__all__, "__version__", *helpers, "backends", "errors", "testing", part_of(path)}
    used = {name.split(".")[1] for name in imports(path) if name.startswith("gpt2core.")}
    assert used - public == set()


@pytest.mark.parametrize("path", MODULES, ids=relative)
def test_a_module_imports_no_framework_but_its_own(path):
    used = {name.split(".")[0] for name in imports(path)} & FRAMEWORKS
    if path.is_relative_to(ROOT / "gpt2core/backends"):
        own = path.relative_to(ROOT / "gpt2core/backends").parts[0]
        used = {name for name in used if not own.startswith(name.removesuffix("runtime"))}
        if own == "jax":
            used -= {"flax"}
    elif path.is_relative_to(ROOT / "gpt2core/bench/engines"):
        if path.stem.endswith("_peer"):  # measures other libraries, each in a process of its own
            used -= {"onnxruntime", "torch", "transformers"}
    elif path == ROOT / "gpt2core/checkpoint/convert.py":
        used -= {"torch"}  # reads pickles for `gpt2core convert`
    assert used == set()


@pytest.mark.parametrize("path", MODULES, ids=relative)
def test_a_concrete_backend_is_named_by_the_registry_only(path):
    concrete = {name for name in imports(path) if re.match(CONCRETE, name)}
    own = ".".join(path.relative_to(ROOT).parts[:3]) + "."  # the parts of a backend that is a folder
    foreign = {name for name in concrete if not name.startswith(own)}
    assert foreign == set() or path.parent == ROOT / "gpt2core/backends"


def test_importing_gpt2core_loads_neither_frameworks_nor_the_hub_client():
    code = "import gpt2core, sys; print(*sorted({name.split('.')[0] for name in sys.modules}))"
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    assert not {"numpy", "huggingface_hub", "tokenizers", "click", *FRAMEWORKS} & set(loaded)


# Texts


FORBIDDEN = {
    "a path of one machine": r"(?<![\w.*-])/(?:[rw]o(?:ot|rk)|home|Users|opt)/",
    "a number of the tracker": r"\b[Ii]ssue #?\d",
    "unfinished work": r"\b(?:TO[D]O|FIX[M]E|X[X]X)\b",
    "a registry's host": r"py[p]i\.org|pythonhost[e]d|npm[j]s\.",
}


@pytest.mark.parametrize("path", TEXTS, ids=relative)
def test_a_text_holds_nothing_that_does_not_belong(path):
    text = path.read_text()
    found = {what: re.findall(pattern, text) for what, pattern in FORBIDDEN.items()}
    assert {what: hits for what, hits in found.items() if hits} == {}


@pytest.mark.parametrize("path", [p for p in TEXTS if p.suffix == ".md"], ids=relative)
def test_relative_links_lead_somewhere(path):
    links = re.findall(r"\]\((?!https?:|mailto:|#)([^)#\s]+)", path.read_text())
    assert [link for link in links if not (path.parent / link).exists()] == []


@pytest.mark.parametrize("path", [p for p in TEXTS if p.suffix == ".md"], ids=relative)
def test_prose_keeps_the_line_limit_outside_tables_and_links(path):
    lines = path.read_text().splitlines()
    long = [
        line for line in lines if len(line) > 110 and not line.lstrip().startswith("|") and "](" not in line
    ]
    assert long == []


def test_the_architecture_page_names_every_part():
    page = (ROOT / "docs/architecture.md").read_text()
    parts = {part_of(path) for path in MODULES}
    assert {part for part in parts if f"`{part}.py" not in page and f"`{part}/" not in page} == set()


def test_the_changelogs_new_modules_exist():
    text = (ROOT / "CHANGELOG.md").read_text()
    table = re.search(r"\| old, in `gpt2core` .*?\n((?:\|.*\n)+)", text)
    assert table
    new = {name for row in table[1].splitlines()[1:] for name in re.findall(r"`([\w.]+)`", row.split("|")[2])}
    assert len(new) > 40
    assert {name for name in new if importlib.util.find_spec(f"gpt2core.{name}") is None} == set()
