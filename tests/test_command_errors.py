"""Answers to what was typed: others' names, near misses, the command line's own spelling, exit codes."""

import re
import shlex
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import click
import pytest

from gpt2core import GPT2, InvalidSamplingError, RequestError, SamplingParams, foreign_names
from gpt2core.backends import BUILT_IN, PRECISIONS
from gpt2core.cli import EXIT_CODES, main, program
from gpt2core.cli.command import respell
from gpt2core.errors import (
    BackendError,
    BackendUnavailableError,
    CheckpointError,
    ContextLengthError,
    NumericalError,
    UnsupportedCheckpointError,
)
from gpt2core.prompts import merge_options
from gpt2core.testing import random_checkpoint

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(random_checkpoint(tmp_path_factory.mktemp("tiny")))


@pytest.fixture
def fails(capsys):
    def run(*args, code=2):
        assert main(args) == code
        out, err = capsys.readouterr()
        assert out == ""
        assert err.count("\n") == 1, err
        return err.removeprefix("gpt2core: error: ").rstrip("\n")

    return run


def commands(command=program, path=()):
    yield path, command
    for name, below in getattr(command, "commands", {}).items():
        yield from commands(below, (*path, name))


# Names of other libraries


@pytest.mark.parametrize("name", foreign_names.SAMPLING)
def test_a_foreign_sampling_name_is_answered_with_ours(name):
    assert name not in SamplingParams.__dataclass_fields__, f"{name} is ours by now; take it off the table"
    with pytest.raises(InvalidSamplingError) as caught:
        merge_options(None, {name: 1})
    answer = foreign_names.SAMPLING[name]
    assert str(caught.value) == f"unknown sampling parameter {name!r}; {answer}"
    named = set(re.findall(r"\b([a-z_]+)=", answer)) - {"draft_model", "speculation"}
    beside_them = {"logits_processors", "stopping"}  # functions, of `generate` itself
    assert named <= {field.name for field in fields(SamplingParams)} | beside_them


@pytest.mark.parametrize("name", foreign_names.LOADING)
def test_a_foreign_option_of_loading_is_answered_with_ours(name):
    import inspect

    known = inspect.signature(GPT2.from_pretrained).parameters
    assert name not in known
    with pytest.raises(RequestError) as caught:
        GPT2.from_pretrained("demo", **{name: 1})
    answer = foreign_names.LOADING[name]
    assert str(caught.value) == f"unknown option {name!r}; {answer}"
    assert set(re.findall(r"\b([a-z_]+)=", answer)) <= known.keys()


def test_a_misspelt_option_of_loading_is_answered_with_the_nearest():
    with pytest.raises(RequestError, match=r"^unknown option 'backnd'; did you mean 'backend'\?$"):
        GPT2.from_pretrained("demo", backnd="numpy")
    with pytest.raises(RequestError, match=r"^unknown option 'zzz'; known are backend, precision, "):
        GPT2.from_pretrained("demo", zzz=1)


@pytest.mark.parametrize(
    ("option", "answer"),
    [
        ("--do-sample", "--temperature 0.8 (any above 0) draws, --temperature 0 takes the likeliest token"),
        ("--beam-width=4", "use --num-beams 4"),
        ("--stop-strings", "use --stop text"),
        ("--max-tokens", "use --max-new-tokens 100"),
        ("--max_new_tokens", "use --max-new-tokens"),
        ("--bad-words-ids", "use --logit-bias 50256=-100"),
        ("--eos_token_id", "use --stop-token-id 50256"),
        ("--load-in-8bit", "use --precision int8"),
        ("--local-files-only", "use --offline"),
        ("--trust-remote-code", "no code of a model is ever run; leave it out"),
    ],
)
def test_a_foreign_option_on_the_command_line_is_answered_in_its_spelling(fails, option, answer):
    name = option.partition("=")[0]
    assert fails("generate", "x", option, "1") == f"No such option {name!r}; {answer}"


def test_an_answer_never_names_an_option_that_the_command_lacks(fails):
    assert fails("info", "--do-sample") == "No such option '--do-sample'."


# Near misses


@pytest.mark.parametrize(
    ("args", "code", "end"),
    [
        (["generate", "x", "--backend", "trch"], 1, "; did you mean 'torch'?"),
        (["generate", "x", "--backend", "PyTorch"], 1, "; did you mean 'torch'?"),
        (["verify", "demo", "--backends", "nunpy"], 1, "; did you mean 'numpy'?"),
        (["generate", "x", "--precision", "int-8"], 2, "; did you mean 'int8'?"),
        (["generate", "x", "--precision", "bf16"], 2, "; did you mean 'bfloat16'?"),
        (["export", "out", "--form", "potable"], 2, "'fast', 'portable'; did you mean 'portable'?"),
        (["generate", "x", "--sed", "7"], 2, "Did you mean '--seed'?"),
        (["generate", "x", "--speculation", "prompt-lookup"], 2, "; did you mean 'prompt_lookup'?"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_near_miss_is_answered_with_what_is_meant(fails, args, code, end):
    assert fails(*args, code=code).endswith(end)


def test_what_is_near_nothing_is_answered_with_a_list_alone(fails):
    assert fails("generate", "x", "--backend", "zzz", code=1).endswith(
        f"known are auto, {', '.join(BUILT_IN)}"
    )


def test_names_that_others_use_lead_to_names_that_there_are():
    assert set(foreign_names.BACKENDS.values()) <= set(BUILT_IN)
    assert set(foreign_names.PRECISIONS.values()) <= set(PRECISIONS)
    assert not set(foreign_names.BACKENDS) & set(BUILT_IN)
    assert not set(foreign_names.PRECISIONS) & set(PRECISIONS)


# The spelling of the door


@pytest.mark.parametrize(
    ("message", "want"),
    [
        ("pass max_new_tokens=92 or less", "pass --max-new-tokens 92 or less"),
        ("not in the cache, and local_files_only=True forbids", "not in the cache, and --offline forbids"),
        ("use backend='numpy' or 'native' for it", "use --backend numpy or native for it"),
        ("backend='auto' takes numpy: no", "--backend auto takes numpy: no"),
        ("with allow_special=True", "with --allow-special"),
        ("top_p is 2", "--top-p is 2"),
        ("temperature is nan; 0 always", "--temperature is nan; 0 always"),
        ("stop[0] has 0 characters", "--stop[0] has 0 characters"),
        ("min_new_tokens 9 exceeds max_new_tokens 5", "--min-new-tokens 9 exceeds --max-new-tokens 5"),
        ("the prompt's seed is one", "the prompt's seed is one"),
        ("/data/top_p/top_k.txt is a file", "/data/top_p/top_k.txt is a file"),
        ("'max_length' is no file", "'max_length' is no file"),
        ("my_top_p=2", "my_top_p=2"),
    ],
)  # fmt: skip
def test_a_message_is_put_into_the_command_lines_spelling(message, want):
    assert respell(message, program.commands["generate"].params) == want


def test_errors_of_a_command_are_in_its_spelling(fails, folder):
    message = fails("generate", "abc", "--model", folder, "--max-new-tokens", "1000")
    assert "--max-new-tokens is 1000" in message
    assert "pass --max-new-tokens 93 or less" in message
    offline = fails("generate", "x", "--model", "nobody/nothing", "--offline", code=1)
    assert "and --offline forbids the network" in offline
    assert "local_files_only" not in offline


# Exit codes


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (RequestError("x"), 2),
        (ContextLengthError("x"), 2),
        (InvalidSamplingError("x"), 2),
        (click.UsageError("x"), 2),
        (CheckpointError("x"), 1),
        (UnsupportedCheckpointError("x"), 1),
        (BackendUnavailableError("x"), 1),
        (BackendError("x"), 1),
        (NumericalError("x"), 1),
        (MemoryError(), 1),
        (OSError("x"), 1),
        (ZeroDivisionError("x"), 1),
        (KeyboardInterrupt(), 130),
    ],
    ids=repr,
)
def test_each_kind_of_fault_has_its_exit_code(capsys, monkeypatch, error, code):
    def fail(*args, **options):
        raise error

    monkeypatch.setattr(GPT2, "from_pretrained", fail)
    assert main(["generate", "x"]) == code
    assert code in EXIT_CODES


def test_the_exit_codes_of_the_page_are_those_of_the_program():
    page = (ROOT / "docs/command_line.md").read_text()
    rows = re.findall(r"^\| (\d+) \| (.+) \|$", page, re.MULTILINE)
    assert {int(code): meaning for code, meaning in rows} == EXIT_CODES


def test_a_process_ends_with_the_code_of_the_fault(tmp_path):
    def code(*args):
        return subprocess.run([sys.executable, "-m", "gpt2core", *args], capture_output=True).returncode

    assert code("info", str(tmp_path / "nowhere")) == 1
    assert code("generate", "x", "--backend", "zzz") == 1
    assert code("generate", "x", "--top-p", "7") == 2


# Help and completion


def named(value):
    return " ".join(value) if isinstance(value, tuple) else ""


@pytest.mark.parametrize(("path", "command"), list(commands()), ids=named)
def test_the_help_of_a_command_ends_with_examples_that_its_options_allow(capsys, path, command):
    assert main([*path, "--help"]) == 0
    shown = capsys.readouterr().out.partition("\nExamples:\n")[2].splitlines()
    assert shown
    for line in shown:
        words = shlex.split(line.rpartition("| ")[2].split(" > ")[0].split(" >> ")[0])
        assert words[0] == "gpt2core"
        names, found = words[1:], program
        while names and names[0] in getattr(found, "commands", {}):
            found = found.commands[names.pop(0)]
        assert found is command or not path, line
        if "COMMAND" not in names:
            known = {option for param in found.params for option in (*param.opts, *param.secondary_opts)}
            assert {word for word in names if word.startswith("-") and word != "-"} <= known | {"--help"}


def completions(words: list[str], last: str) -> list[str]:
    """What bash is offered after `gpt2core WORDS... LAST`, by a process."""
    import os

    typed = ["gpt2core", *words, last]
    environment = {"_GPT2CORE_COMPLETE": "bash_complete", "COMP_WORDS": " ".join(typed)}
    environment["COMP_CWORD"] = str(len(typed) - 1)
    done = subprocess.run(
        [sys.executable, "-m", "gpt2core"],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return [line.partition(",")[2] for line in done.stdout.splitlines()]


def test_a_shell_completes_commands_options_backends_precisions_and_models():
    assert completions([], "gen") == ["generate"]
    assert completions(["generate"], "--max-") == ["--max-new-tokens", "--max-length"]
    assert completions(["generate", "--backend"], "n") == ["numpy", "native"]
    assert completions(["generate", "-b"], "") == ["auto", *BUILT_IN]
    assert completions(["verify", "--backends"], "numpy,t") == ["numpy,torch"]
    assert completions(["generate", "--precision"], "int") == ["int8", "int4"]
    assert "demo" in completions(["generate", "--model"], "de")
    assert completions(["export", "out", "--form"], "") == ["fast", "portable"]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_prints_the_script_of_a_shell(shell, capsys):
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    assert "_GPT2CORE_COMPLETE" in script
    assert f"{shell}_complete" in script


def test_bash_itself_completes_with_the_script(tmp_path):
    (tmp_path / "gpt2core").write_text(f'#!/bin/sh\nexec "{sys.executable}" -m gpt2core "$@"\n')
    (tmp_path / "gpt2core").chmod(0o755)
    script = (
        f'PATH="{tmp_path}:$PATH"; eval "$(gpt2core completion bash)"; '
        "COMP_WORDS=(gpt2core generate --backend nat); COMP_CWORD=3; "
        '_gpt2core_completion gpt2core; echo "${COMPREPLY[@]}"; complete -p gpt2core'
    )
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines()[0] == "native", done.stderr
    assert "_gpt2core_completion gpt2core" in done.stdout.splitlines()[1]
