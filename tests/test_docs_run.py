"""What the documents show is run as a reader would, on the demo model and on small ones of other names.

Python blocks of one document share their names, from the top to the bottom. A `text` block that follows one
is what it prints. In a `console` block the lines after `$ command` are what the command prints. `...` stands
for any text. Times, speeds, sizes of memory and differences in rounding are not compared.
"""

import contextlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
from fake_hub import FakeHub, Repository

from gpt2core.testing import random_checkpoint

ROOT = Path(__file__).parent.parent
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TIMEOUT_S = 300

NOT_RUN = {
    "a minute of measuring that no option shortens; tests/test_bench_recommend.py": r"bench recommend",
    "replicas on Ray; tests/test_serve_ray.py": r"batch_inference_ray",
}
"""Commands that are only checked for their options (tests/test_project.py), and why."""

SMALLER = {
    r"gpt2core verify (?!--bits)": "--seeds 1 --tokens 2 --threads 1",
    r"gpt2core verify (?!--bits)(?!.*--backends)": "--backends numpy,native",
    r"gpt2core bench (?!compare|analyse|.*--url)": "--runs 1 --lengths 40 --no-report",
    r"gpt2core bench .*--url": "--runs 1 --lengths 40 --no-report",
    r"gpt2core bench compare": "--rounds 1 --batch 1 --prefill 8 --no-check --no-report",
    r"gpt2core bench compare (?!--backends numpy --peers)": "--backends numpy",
    r"gpt2core bench compare .*--peers": "--peers transformers",
    r"gpt2core generate .*FOLDER": "--max-new-tokens 8",
    r"examples/speculation.py": "--rounds 1 --new-tokens 8",
    r"examples/step_times.py": "--rounds 1 --batch 1 --prefill 8 --position 8",
    r"examples/idle_interference.py": "--pairs 1 --limit 1000",
    r"gpt2core bench (?!analyse|.*--output|.*--resume)": "--force",  # each writes into the same folder
    r"gpt2core bench .*openai-community/": "--lengths 140",  # the small one reads a prompt as its bytes
    r"examples/scoring_speed.py": "--sentences 8 --rounds 1 --threads 1 --size tiny",
    r"examples/scoring_speed.py --long": "--long 300 --stride 32",
    r"examples/codec_figures.py": "--levels 1 --precision float32",
    r"examples/quantization_quality.py": "--tokens 128 --precisions int8,bfloat16 --backends numpy,native",
}
"""Commands that take minutes are run with these options at their end, where the last one given counts."""

OTHERS = {
    r"http://127\.0\.0\.1:8000": "{url}",  # of a server that the test starts
    r"--random small": "demo",
    r"--host 0\.0\.0\.0": "--host 127.0.0.1",
}
"""What stands in a command for what a test cannot have."""

HUB = ("openai-community/gpt2", "microsoft/DialoGPT-small", "owner/base", "owner/adapter")
"""Models that the documents name; a server on this machine has small ones of these names."""

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
    return [
        (command, output)
        for command, output in found
        if re.match(r"gpt2core |echo |printf |python [\w-]+/", command)
    ]


def is_run(command: str) -> bool:
    return not any(re.search(pattern, command) for pattern in NOT_RUN.values())


def smaller(command: str) -> str:
    """The command as the test runs it: of seconds."""
    command, _, _ = command.partition("  #")
    more = [options for pattern, options in SMALLER.items() if re.search(pattern, f"{command} ")]
    for pattern, other in OTHERS.items():
        command = re.sub(pattern, other, command)
    return " ".join([command.rstrip(), *more])


def comparable(text: str) -> str:
    lines = [re.sub(r"\s+", " ", MEASURED.sub("~", line)).strip() for line in text.splitlines()]
    return "\n".join(line for line in lines if line)


def assert_shows(output: str, shown: str, what: str) -> None:
    pattern = re.escape(comparable(shown)).replace(re.escape("..."), ".*")
    assert re.fullmatch(pattern, comparable(output), re.DOTALL), (
        f"{what} prints\n{output}\nthe document shows\n{shown}"
    )


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """A server that has the models of `HUB`."""
    import numpy as np
    from safetensors.numpy import save

    folder = random_checkpoint(tmp_path_factory.mktemp("hub"), n_positions=256)
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    chats = files | {"chat_template.jinja": b"{{ messages[-1].content }}"}
    lora = "base_model.model.transformer.h.0.attn.c_attn.lora_"
    width = json.loads(files["config.json"])["n_embd"]
    tensors = {f"{lora}A.weight": np.ones((2, width), np.float32)}
    tensors[f"{lora}B.weight"] = np.ones((3 * width, 2), np.float32)
    described = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["c_attn"]}
    described |= {"fan_in_fan_out": True, "base_model_name_or_path": "owner/base"}
    adapter = {"adapter_config.json": json.dumps(described).encode()}
    adapter["adapter_model.safetensors"] = save(tensors)
    served = dict.fromkeys(HUB, files) | {"microsoft/DialoGPT-small": chats, "owner/adapter": adapter}
    with FakeHub({name: Repository({"main": files}) for name, files in served.items()}) as server:
        yield server


@pytest.fixture
def reader(tmp_path, monkeypatch, hub):
    """A folder to stand in, with the files that a reader has; the programs on the PATH; the hub's server."""
    bin_ = tmp_path / "bin"
    bin_.mkdir()
    (bin_ / "gpt2core").write_text(f'#!/bin/sh\nexec "{sys.executable}" -m gpt2core "$@"\n')
    (bin_ / "python").write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    for program in bin_.iterdir():
        program.chmod(0o755)
    folder = tmp_path / "reader"
    (folder / "home/.config/fish/completions").mkdir(parents=True)  # as fish makes it
    for name in ("FOLDER", "FOLDER_OF_A_SMALLER_MODEL"):
        random_checkpoint(folder / name, n_positions=1024)
    for name in ("BOOK", "BOOK.txt"):
        (folder / name).write_text("Once upon a time there lived a king.\n" * 40)
    (folder / "my-prompts.txt").write_text("Once upon a time\nThe king said\n")
    (folder / "keys.txt").write_text("not-a-secret-but-long-enough-for-a-key\n")
    (folder / "examples").symlink_to(ROOT / "examples")
    (folder / "PATH/bin").mkdir(parents=True)
    (folder / "PATH/bin/python").symlink_to(bin_ / "python")
    monkeypatch.chdir(folder)
    monkeypatch.setenv("PATH", f"{bin_}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("HOME", str(folder / "home"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.setenv("COLUMNS", "100")
    return folder


def run(command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", "-o", "pipefail", "-c", command],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )


@contextlib.contextmanager
def serving(command: str) -> Iterator[str]:
    """The address of a server that a document's command starts, on a free port; it must end well."""
    process = subprocess.Popen(
        ["bash", "-c", f"exec {command} --port 0"],
        stderr=subprocess.PIPE,
        text=True,
        stdin=subprocess.DEVNULL,
    )
    said: list[str] = []
    events: dict[str, dict[str, object]] = {}
    try:
        for line in process.stderr:
            said.append(line)
            if line.startswith("{"):
                event = json.loads(line)
                events[event["event"]] = event
            if "ready" in events:
                break
        else:
            raise AssertionError(f"{command} ended:\n{''.join(said)}")
        yield f"http://127.0.0.1:{events['listening']['port']}"
    finally:
        process.terminate()
        process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 0


def pickle(folder: Path) -> None:
    """Turn a checkpoint's weights into pickled ones, for `convert` to turn back."""
    import torch
    from safetensors.torch import load_file

    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


WITH_COMMANDS = [path for path in DOCUMENTS if any(is_run(command) for command, _ in sessions(path))]


@pytest.mark.parametrize("path", WITH_COMMANDS, ids=lambda path: path.name)
def test_the_commands_of_a_document_do_what_it_shows(path, reader):
    commands = [(command, shown) for command, shown in sessions(path) if is_run(command)]
    with contextlib.ExitStack() as stack:
        url = ""
        if any("--url" in command for command, _ in commands):
            url = stack.enter_context(serving("gpt2core serve --model demo"))
        for command, shown in commands:
            if "gpt2core serve" in command:
                with serving(smaller(command)):
                    continue
            if "gpt2core convert FOLDER" in command:
                pickle(reader / "FOLDER")
            done = run(smaller(command).replace("{url}", url))
            assert done.returncode == 0, f"{command} ended with {done.returncode}:\n{done.stderr}"
            if shown is not None and smaller(command) == command:
                assert_shows(done.stdout + done.stderr, shown, command)
        for language, text in blocks(path):  # once the commands have made the folders that it opens
            if language == "python" and path.name == "benchmarks.md":
                text = text.replace("runs=5", "runs=1, lengths=(40,)")
                done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True)
                assert done.returncode == 0, done.stderr


WITH_PYTHON = [
    path
    for path in DOCUMENTS
    if path.name != "benchmarks.md" and any(language == "python" for language, _ in blocks(path))
]


@pytest.mark.parametrize("path", WITH_PYTHON, ids=lambda path: path.name)
def test_the_python_of_a_document_does_what_it_shows(path, reader):
    needed = [command for command, _ in sessions(path) if "gpt2core export story-model" in command]
    for command in needed[:1]:  # the exported folder that onnx.md's Python opens
        assert run(command).returncode == 0
    shown = blocks(path)
    mark = "-- end of block --"
    code = "".join(f"{text}\nprint({mark!r})\n" for language, text in shown if language == "python")
    (reader / "document.py").write_text(code, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-W", "error", "document.py"], capture_output=True, text=True, timeout=TIMEOUT_S
    )
    assert done.returncode == 0, done.stderr
    outputs = iter(done.stdout.split(f"{mark}\n"))
    for i, (language, text) in enumerate(shown):
        if language != "python":
            continue
        output = next(outputs)
        if i + 1 < len(shown) and shown[i + 1][0] == "text":
            assert_shows(output, shown[i + 1][1], text)


@pytest.mark.parametrize("pattern", [*SMALLER, *OTHERS, *NOT_RUN.values()])
def test_every_exception_is_needed(pattern):
    commands = [f"{command} " for path in DOCUMENTS for command, _ in sessions(path)]
    assert any(re.search(pattern, command) for command in commands)


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
