"""The server's documents and imports say what is so."""

import ast
import re
from pathlib import Path

import pytest

import gpt2core
from gpt2core.serve import Settings
from gpt2core.serve.settings import LIBRARY_VARIABLES

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs/serving.md").read_text()
MODULES = sorted((ROOT / "gpt2core/serve").rglob("*.py"))
PUBLIC_MODULES = (  # and the private helpers that every room shares
    *("gpt2core.serve", "gpt2core.backends", "gpt2core.errors", "gpt2core.testing"),
    *("gpt2core._json", "gpt2core._files", "gpt2core._machine"),
)


def shown(default: object) -> str:
    if default is None or default in ((), ""):
        return ""
    if isinstance(default, bool):
        return f"`{str(default).lower()}`"
    return f"`{','.join(default)}`" if isinstance(default, tuple) else f"`{default}`"


def test_the_table_of_settings_is_that_of_the_settings():
    rows = re.findall(r"^\| `GPT2CORE_(\w+)` \| (.*?) ?\| (.*) \|$", PAGE, re.MULTILINE)
    expected = [
        (name.upper(), shown(field.default), field.description)
        for name, field in Settings.model_fields.items()
    ]
    assert rows == expected


def test_every_variable_of_the_project_is_a_setting_or_is_known_to_be_none():
    sources = [*(ROOT / "gpt2core").rglob("*.py"), *(ROOT / "scripts").iterdir(), ROOT / "tests/no_skips.py"]
    read = {
        name
        for path in sources
        for name in re.findall(r"(?<!-D)\bGPT2CORE_([A-Z_]*[A-Z](?:64)?)\b", path.read_text())
    }
    settings = {name.upper() for name in Settings.model_fields}
    assert read - settings == LIBRARY_VARIABLES


def test_every_metric_and_every_route_is_in_the_documents():
    from gpt2core.serve import create_app
    from gpt2core.serve.metrics import Metrics

    for metric in Metrics().registry.collect():
        assert re.sub("^process_.*", "process_*", metric.name) in PAGE
    for path in create_app(Settings()).openapi()["paths"]:
        assert path.partition("{")[0].rstrip("/") in PAGE


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.name)
def test_the_server_uses_public_names_of_the_library_only(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "gpt2core":
            assert {alias.name for alias in node.names} <= {*gpt2core.__all__, "__version__"}
        elif isinstance(node, ast.ImportFrom) and node.module.startswith("gpt2core."):
            assert node.module.startswith(PUBLIC_MODULES), node.module
