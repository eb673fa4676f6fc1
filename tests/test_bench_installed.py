"""Without the extra `bench`, measuring and analysing are refused with the remedy; nothing is written."""

import subprocess
import sys

import pytest

# A package whose entry is None cannot be imported, and is not found either.
WITHOUT = """
import sys
for package in ("scipy", "matplotlib", "seaborn", "jinja2", "httpx2"):
    sys.modules[package] = None
from gpt2core.cli import main
sys.exit(main())
"""


@pytest.mark.parametrize("command", [[], ["compare"], ["analyse", "."]], ids=" ".join)
def test_a_benchmark_without_its_extra_is_refused_with_the_remedy(command, tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT, "bench", *command], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert "scipy" in done.stderr
    assert "pip install 'gpt2core[bench]'" in done.stderr
    assert list(tmp_path.iterdir()) == []
