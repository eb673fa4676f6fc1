"""The scripts that a person types, on a machine played by a few files: no package is really installed."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TOOLS = ("bash", "basename", "cat", "chmod", "cksum", "dirname", "env", "mkdir")

# A Python that "makes" virtual environments; what their pip and program are asked goes to the log.
PYTHON = """#!/usr/bin/env bash
case "$*" in
  "-c import sys"*) exit {too_old} ;;
  --version) echo "Python 3.99" ;;
  "-m venv "*) mkdir -p "$3/bin" && cat "$0" >"$3/bin/python"
    printf '#!/usr/bin/env bash\\necho "gpt2core $PWD: $*" >>{log}\\n' >"$3/bin/gpt2core"
    chmod +x "$3/bin/python" "$3/bin/gpt2core" ;;
  *) echo "python $*" >>{log} ; exit {pip_fails} ;;
esac
"""


class Machine:
    def __init__(self, folder: Path) -> None:
        self.project, self.bin, self.log = folder / "a project", folder / "bin", folder / "log"
        self.project.mkdir()
        self.bin.mkdir()
        self.log.touch()
        shutil.copytree(ROOT / "scripts", self.project / "scripts")
        for name in ("pyproject.toml", "constraints.txt"):
            shutil.copy(ROOT / name, self.project)
        for tool in TOOLS:
            (self.bin / tool).symlink_to(shutil.which(tool))

    def add_python(self, name: str, *, too_old: bool = False, pip_fails: bool = False) -> None:
        path = self.bin / name
        path.write_text(PYTHON.format(log=self.log, too_old=int(too_old), pip_fails=int(pip_fails)))
        path.chmod(0o755)

    def run(self, script: str, *args: str, cwd: Path | None = None, **env: str):
        result = subprocess.run(
            [self.project / "scripts" / script, *args],
            cwd=cwd or self.project,
            env={"PATH": str(self.bin), "HOME": os.devnull} | env,
            capture_output=True,
            text=True,
        )
        lines = self.log.read_text().splitlines()
        self.log.write_text("")
        return result, lines


@pytest.fixture
def machine(tmp_path):
    return Machine(tmp_path)


def test_try_installs_the_core_once_and_passes_its_arguments_on(machine):
    machine.add_python("python3")
    result, log = machine.run("try", "Once upon a time", "--seed", "7")
    options = "--quiet --quiet --disable-pip-version-check --no-compile -c constraints.txt"
    pip = f"python -m pip install {options} -e ."
    run = f"gpt2core {machine.project}: generate Once upon a time --seed 7"
    assert (result.returncode, result.stdout, log) == (0, "", [pip, run])
    assert "making the virtual environment .venv with Python 3.99" in result.stderr
    result, log = machine.run("try", "Once upon a time", "--seed", "7")
    assert (result.returncode, result.stderr, log) == (0, "", [run])


@pytest.mark.parametrize("changed", ["pyproject.toml", "constraints.txt"])
def test_try_installs_again_when_what_is_installed_changed(machine, changed):
    machine.add_python("python3")
    machine.run("try", "x")
    with (machine.project / changed).open("a") as file:
        file.write("# changed\n")
    _, log = machine.run("try", "x")
    assert [line.split()[0] for line in log] == ["python", "gpt2core"]


def test_try_runs_where_the_user_stands(machine, tmp_path):
    machine.add_python("python3")
    _, log = machine.run("try", "x", "--model", "here", cwd=tmp_path)
    assert log[-1] == f"gpt2core {tmp_path}: generate x --model here"


def test_an_installation_that_failed_is_not_taken_for_done(machine):
    machine.add_python("python3", pip_fails=True)
    for _ in range(2):
        result, log = machine.run("try", "x")
        assert (result.returncode, len(log)) == (1, 1)
        assert "try: the installation failed; see above" in result.stderr


def test_the_first_python_that_is_new_enough_is_taken(machine):
    machine.add_python("python3", too_old=True)
    machine.add_python("python3.12")
    result, log = machine.run("try", "x")
    assert (result.returncode, len(log)) == (0, 2)


@pytest.mark.parametrize("old", [True, False], ids=["too old", "none"])
def test_without_a_python_that_is_new_enough_the_script_says_so(machine, old):
    if old:
        machine.add_python("python3", too_old=True)
    result, log = machine.run("try", "x")
    assert (result.returncode, log) == (1, [])
    assert result.stderr == (
        "try: no Python of version 3.11 or later on the PATH; "
        "install one (on Debian: apt install python3 python3-venv)\n"
    )


def test_test_installs_everything_and_passes_its_arguments_to_pytest(machine, tmp_path):
    machine.add_python("python3")
    venv = str(tmp_path / "elsewhere")
    result, log = machine.run("test", "tests/cli", "-k", "stream", GPT2CORE_VENV=venv)
    assert result.returncode == 0
    assert [line.rsplit(" -e ")[-1] for line in log] == [
        ".[all,dev]",
        "python -m pytest tests/cli -k stream",
    ]
    assert not (machine.project / ".venv").exists()


def test_check_without_its_tools_says_what_installs_them(machine):
    result, _ = machine.run("check")
    assert result.returncode == 1
    assert (
        result.stderr
        == "check: .venv/bin has no pytest; run ./scripts/test once, it installs what the checks need\n"
    )


def test_check_runs_every_step_and_names_those_that_failed(machine):
    tools = machine.project / ".venv/bin"
    tools.mkdir(parents=True)
    for name, code in {"ruff": 1, "mypy": 0, "pytest": 0, "python": 1}.items():
        (tools / name).write_text(f"#!/usr/bin/env bash\necho {name} $1\nexit {code}\n")
        (tools / name).chmod(0o755)
    result, _ = machine.run("check")
    assert result.returncode == 1
    ran = [line for line in result.stdout.splitlines() if not line.startswith("==")]
    assert ran == ["ruff check", "ruff format", "mypy", "python -m", "python -m"]
    assert result.stdout.endswith("== failed: ruff check ruff format pytest of Ray pytest\n")
    for name in ("ruff", "python"):
        (tools / name).write_text("#!/usr/bin/env bash\n")
    result, _ = machine.run("check")
    assert (result.returncode, result.stdout.splitlines()[-1]) == (0, "== all checks passed")
