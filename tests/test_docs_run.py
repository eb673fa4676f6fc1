"""What the documents show is run as a reader would run it, offline on the demo model.

Python blocks of one document share their names, from the top to the bottom. A `text` block that follows one
is what it prints. In a `console` block the lines after `$ command` are what the command prints. `...` stands
for any text. Times, speeds, sizes of memory and differences in rounding are not compared.
"""

import os
import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TIMEOUT_S = 300

NOT_RUN = {
    "the reader's own model, or a download": r"\b(?:FOLDER|MODEL|BOOK)\b|openai-community/",
    "a server, which does not end by itself; tests/test_serve_*.py": r"gpt2core serve|--url",
    "minutes of measuring; tests/test_bench_*.py": r"gpt2core bench",
    "minutes of measuring, each table by its own command": r"python examples/",
    "all backends in processes of their own; tests/test_verify.py": r"gpt2core verify",
}
"""Commands that are only checked for their options (tests/test_project.py), and why."""

OWNERS = '"owner/'
"""Stands in Python that loads models of the reader's own."""

FENCE = re.compile(r"^( *)```(\w+)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
MEASURED = re.compile(r"\d[\d.]*(?:e-?\d+)? (?:s|ms|MB|GB|tok/s)\b|\b\d[\d.]*e-\d+")


def blocks(path: Path) -> list[tuple[str, str]]:
    """Language and text of each fenced block."""
    return [(language, text) for _, language, text in FENCE.findall(path.read_text(encoding="utf-8"))]


def sessions(path: Path) -> list[tuple[str, str | None]]:
    """Each command with the output that is shown for it, or None."""
    found: list[tuple[str, str | None]] = []
    for language, text in blocks(path):
        text = text.replace("\\\n", " ")
        if language == "console":
            for session in re.split(r"^\$ ", text, flags=re.MULTILINE)[1:]:
                command, _, output = session.partition("\n")
                found.append((command, output))
        elif language == "bash":
            found += [(line.strip(), None) for line in text.splitlines()]
    programs = re.compile(r"gpt2core |echo |printf |python [\w-]+/")
    return [(command, output) for command, output in found if programs.match(command)]


def is_run(command: str) -> bool:
    return not any(re.search(pattern, command) for pattern in NOT_RUN.values())


def comparable(text: str) -> str:
    lines = [re.sub(r"\s+", " ", MEASURED.sub("~", line)).strip() for line in text.splitlines()]
    return "\n".join(line for line in lines if line)


def assert_shows(output: str, shown: str, what: str) -> None:
    pattern = re.escape(comparable(shown)).replace(re.escape("..."), ".*")
    assert re.fullmatch(pattern, comparable(output), re.DOTALL), (
        f"{what} prints\n{output}\nthe document shows\n{shown}"
    )


@pytest.fixture
def reader(tmp_path, monkeypatch):
    """An empty folder to stand in, `gpt2core` and `python` on the PATH, and no network."""
    bin_ = tmp_path / "bin"
    bin_.mkdir()
    (bin_ / "gpt2core").write_text(f'#!/bin/sh\nexec "{sys.executable}" -m gpt2core "$@"\n')
    (bin_ / "python").write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    for program in bin_.iterdir():
        program.chmod(0o755)
    folder = tmp_path / "reader"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setenv("PATH", f"{bin_}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("HOME", str(folder / "home"))
    (folder / "home/.config/fish/completions").mkdir(parents=True)  # as fish makes it
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("COLUMNS", "100")
    return folder


def run(command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True, timeout=TIMEOUT_S
    )


WITH_COMMANDS = [path for path in DOCUMENTS if any(is_run(command) for command, _ in sessions(path))]


@pytest.mark.parametrize("path", WITH_COMMANDS, ids=lambda path: path.name)
def test_the_commands_of_a_document_do_what_it_shows(path, reader):
    for command, shown in sessions(path):
        if not is_run(command):
            continue
        done = run(command)
        assert done.returncode == 0, f"{command} ended with {done.returncode}:\n{done.stderr}"
        if shown is not None:
            assert_shows(done.stdout + done.stderr, shown, command)


WITH_PYTHON = [
    path
    for path in DOCUMENTS
    if path.name != "benchmarks.md"
    and any(language == "python" and OWNERS not in text for language, text in blocks(path))
]


@pytest.mark.parametrize("path", WITH_PYTHON, ids=lambda path: path.name)
def test_the_python_of_a_document_does_what_it_shows(path, reader):
    needed = [command for command, _ in sessions(path) if "gpt2core export" in command and is_run(command)]
    for command in needed[:1]:  # the exported folder that onnx.md's Python opens
        assert run(command).returncode == 0
    shown = blocks(path)
    mark = "-- end of block --"
    runnable = [text for language, text in shown if language == "python" and OWNERS not in text]
    code = "".join(f"{text}\nprint({mark!r})\n" for text in runnable)
    (reader / "document.py").write_text(code, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-W", "error", "document.py"], capture_output=True, text=True, timeout=TIMEOUT_S
    )
    assert done.returncode == 0, done.stderr
    outputs = iter(done.stdout.split(f"{mark}\n"))
    for i, (language, text) in enumerate(shown):
        if language != "python" or OWNERS in text:
            continue
        output = next(outputs)
        if i + 1 < len(shown) and shown[i + 1][0] == "text":
            assert_shows(output, shown[i + 1][1], text)


def test_the_readme_and_the_page_on_python_show_output_that_is_compared():
    for name in ("README.md", "docs/python.md"):
        kinds = [language for language, _ in blocks(ROOT / name)]
        assert ("python", "text") in list(pairwise(kinds)), name


def test_python_md_shows_every_parameter():
    import inspect
    from dataclasses import fields

    from gpt2core import GPT2, SamplingParams
    from gpt2core.scoring.options import ScoreChoices

    page = "\n".join(text for language, text in blocks(ROOT / "docs/python.md") if language == "python")
    names = {field.name for field in fields(SamplingParams)} | {*ScoreChoices.__annotations__}
    for method in (GPT2.from_pretrained, GPT2.generate, GPT2.stream, GPT2.logits, GPT2.score):
        parameters = inspect.signature(method).parameters.values()
        names |= {p.name for p in parameters if p.kind is p.KEYWORD_ONLY}
    assert {name for name in names if f"{name}=" not in page} == set()


def test_a_wrong_output_in_a_document_is_found(tmp_path):
    path = tmp_path / "page.md"
    path.write_text("```console\n$ gpt2core generate x --seed 7\nhello 5 s\nworld\n```\n")
    ((command, shown),) = sessions(path)
    assert (command, is_run(command)) == ("gpt2core generate x --seed 7", True)
    assert_shows("hello 0.31 s\nworld\n", shown, command)
    assert_shows("hello 0.31 s\nworld\n", "hello 2 s\n...\n", command)
    with pytest.raises(AssertionError, match="the document shows"):
        assert_shows("hello 0.31 s\nWorld\n", shown, command)


def test_the_readmes_number_is_that_of_the_measured_table():
    number = re.search(r"\*\*(\d+) tokens per second\*\*", (ROOT / "README.md").read_text())
    row = re.search(
        r"^\| gpt2core, native \| int4 \| (\d+)", (ROOT / "docs/performance.md").read_text(), re.MULTILINE
    )
    assert number
    assert row
    assert number[1] == row[1]
    assert (ROOT / "docs/figures/tokens_per_second.png").stat().st_size > 10_000
