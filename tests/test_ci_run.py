"""`.ci/run` ends well where all that it runs does, and fails where any of that fails."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

RUN = Path(__file__).parent.parent / ".ci/run"
SCRIPTS = ("test-extras", "sanitize", "aarch64", "test")
BACKENDS = ", ".join(
    f'{{"name": "{n}", "available": true}}' for n in ("numpy", "native", "torch", "jax", "onnx")
)
PROGRAM = r"""#!/bin/bash
echo "$@" >>"$CALLS"
case "$1 $*" in
  "backends "*--json) echo '{"backends": [BACKENDS]}' ;;
  bench*--output*) mkdir -p "$(echo "$*" | sed 's/.*--output //; s/ .*//')" ;;
  generate*) [[ "$*" == *torch* ]] && echo "$OTHER_TEXT" || echo ;;
esac
[ "$1" != "$FAILS" ]
""".replace("BACKENDS", BACKENDS)


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Run it in a tree whose scripts and programs only note that they were called; one of them may fail."""
    tree, bin_ = tmp_path / "tree", tmp_path / "bin"
    for folder in (tree / ".ci", tree / "scripts", bin_):
        folder.mkdir(parents=True)
    shutil.copy(RUN, tree / ".ci/run")
    for name in SCRIPTS:
        path = tree / "scripts" / name
        path.write_text(f'#!/bin/bash\necho {name} >>"$CALLS"; echo "7 passed"; [ {name} != "$FAILS" ]\n')
        path.chmod(0o755)
    (bin_ / "gpt2core").write_text(PROGRAM)
    pytest_stub = '[[ "$*" == *pytest* ]] && exit "$([ "$FAILS" = pytest ] && echo 1 || echo 0)"'
    (bin_ / "python").write_text(f'#!/bin/bash\n{pytest_stub}\nexec "{sys.executable}" "$@"\n')
    for name in ("chromium", "clang", "qemu-aarch64", "aarch64-linux-gnu-gcc"):
        (bin_ / name).write_text("#!/bin/sh\n")
    for path in bin_.iterdir():
        path.chmod(0o755)
    install = f'install() {{ mkdir -p "$GPT2CORE_VENV"; ln -s "{bin_}" "$GPT2CORE_VENV/bin"; }}'
    (tree / "scripts/venv.sh").write_text(f"{install}\n")
    monkeypatch.setenv("PATH", f"{bin_}{os.pathsep}{os.environ['PATH']}")
    scratch = tmp_path / "scratch"

    def run_with(fails="", other_text=""):
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir()
        (tmp_path / "calls").write_text("")
        settings = {"TMPDIR": str(scratch), "CALLS": str(tmp_path / "calls"), "FAILS": fails}
        done = subprocess.run(
            ["bash", str(tree / ".ci/run")],
            env=os.environ | settings | {"OTHER_TEXT": other_text},
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert not list(scratch.glob("tmp.*")), "what it made stays"
        return done, (tmp_path / "calls").read_text().split()

    return run_with


def test_it_ends_well_where_everything_does(run):
    done, calls = run()
    assert done.returncode == 0, done.stdout + done.stderr
    assert {*SCRIPTS, "verify", "bench", "generate"} <= {*calls}
    assert done.stdout.endswith("7 passed\n")


@pytest.mark.parametrize("fails", [*SCRIPTS, "verify", "bench", "generate", "backends", "pytest"])
def test_it_fails_where_something_does(run, fails):
    done, _ = run(fails)
    assert done.returncode != 0


def test_it_fails_where_backends_write_different_texts(run):
    assert run(other_text="another story")[0].returncode != 0
