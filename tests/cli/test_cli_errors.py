"""The command line's exit codes and one-line errors, and the process around it."""

import fcntl
import os
import signal
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest
from commands import PROGRAM, PROMPT, Result, spawn
from fake_hub import FakeHub, Repository

from gpt2core import GPT2, __version__
from gpt2core.cli import console, program
from gpt2core.testing import random_checkpoint


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--temperature", "nan"], "temperature"),
        (["--temperature", "-1"], "temperature"),
        (["--temperature", "1e400"], "temperature"),
        (["--top-p", "2"], "--top-p is 2.0"),
        (["--min-p", "1.5"], "--min-p is 1.5"),
        (["--top-k", "-1"], "--top-k is -1"),
        (["--repetition-penalty", "0"], "--repetition-penalty is 0.0"),
        (["--seed", str(2**63)], "seed"),
        (["--n", "0"], "n is 0"),
        (["--stop", ""], "stop"),
        (["--max-new-tokens", "-1"], "--max-new-tokens is -1"),
        (["--max-new-tokens", "1000"], "1000"),
        (["--max-new-tokens", "many"], "'many' is not a valid integer"),
        (["--threads", "0"], "0 is not in the range x>=1"),
        (["--precision", "float12"], "float12"),
        (["--frobnicate"], "--frobnicate"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_bad_value_is_one_line_that_names_it_and_exits_2(run, folder, args, message):
    result = run("generate", PROMPT, "--model", folder, *args)
    assert result.code == 2
    assert message in result.error()


@pytest.mark.parametrize("prompt", ["", "x" * 97, "x" * 100_000], ids=["empty", "too long", "far too long"])
def test_a_prompt_that_cannot_run_exits_2(run, folder, prompt):
    result = run("generate", prompt, "--model", folder)
    assert result.code == 2
    assert "prompt" in result.error()


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (["--model", "./nowhere"], 1, "nowhere"),
        (["--model", "nobody/nothing", "--offline"], 1, "nobody/nothing is not in the cache"),
        (
            ["--backend", "frobnicate"],
            1,
            "no backend 'frobnicate'; known are auto, numpy, native, torch, jax, onnx",
        ),
        (["--device", "abacus"], 1, "abacus"),
        (["--revision", "main"], 1, "revision"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_model_that_cannot_be_had_exits_3_and_a_backend_4(run, folder, args, code, message):
    result = run("generate", PROMPT, *(args if "--model" in args else ["--model", folder, *args]))
    assert result.code == code
    assert message in result.error()


def test_a_damaged_checkpoint_is_one_line_that_names_file_and_remedy(run, folder, tmp_path):
    for file in Path(folder).iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    result = run("generate", PROMPT, "--model", str(tmp_path))
    assert result.code == 1
    assert str(weights) in result.error()
    weights.rename(tmp_path / "pytorch_model.bin")
    result = run("generate", PROMPT, "--model", str(tmp_path))
    assert result.code == 1
    assert "gpt2core convert" in result.error()


def test_an_unexpected_exception_is_one_line_and_gpt2core_debug_shows_the_traceback(run, folder, monkeypatch):
    def fail(*args, **options):
        raise ZeroDivisionError("first\nsecond \x1b[31mred")

    monkeypatch.setattr(GPT2, "from_pretrained", fail)
    monkeypatch.delenv("GPT2CORE_DEBUG", raising=False)
    result = run("generate", PROMPT, "--model", folder)
    assert result.code == 1
    assert result.error() == (
        "unexpected ZeroDivisionError: first second \\x1b[31mred; set GPT2CORE_DEBUG=1 to see the traceback"
    )
    monkeypatch.setenv("GPT2CORE_DEBUG", "1")
    with pytest.raises(ZeroDivisionError):
        run("generate", PROMPT, "--model", folder)


def test_running_out_of_memory_is_said_plainly(run, folder, monkeypatch):
    def fail(*args, **options):
        raise MemoryError

    monkeypatch.setattr(GPT2, "from_pretrained", fail)
    result = run("generate", PROMPT, "--model", folder)
    assert (result.code, result.error()) == (1, "not enough memory; try a smaller model")


def test_no_command_prints_help_on_stderr_and_exits_2(run):
    result = run()
    assert (result.code, result.out) == (2, "")
    assert "Usage: gpt2core" in result.err
    assert run("frobnicate").error() == "No such command 'frobnicate'."


@pytest.mark.parametrize("command", [None, *program.commands])
def test_help_is_on_stdout_and_exits_0(run, command):
    result = run(*([command] if command else []), "--help")
    assert (result.code, result.err) == (0, "")
    assert result.out.startswith(f"Usage: gpt2core {command or '[OPTIONS]'}")


def test_version(run):
    assert run("--version") == (0, f"gpt2core {__version__}\n", "")


# the process around it


def test_a_closed_pipe_ends_quietly(folder):
    reader, writer = os.pipe()
    os.close(reader)
    result = spawn("generate", PROMPT, "--model", folder, stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    assert (result.returncode, result.stderr) == (0, b"")


def test_what_a_write_to_stdout_may_raise(run, folder, monkeypatch):
    discarded = []
    monkeypatch.setattr(console, "discard_stdout", lambda: discarded.append(True))

    def write(error):
        def write(text):
            raise error

        return write

    monkeypatch.setattr(sys.stdout, "write", write(BrokenPipeError()))
    assert run("info", folder) == (0, "", "")
    monkeypatch.setattr(sys.stdout, "write", write(OSError(5, "Input/output error")))
    result = run("info", folder)
    assert (result.code, result.error()) == (1, "cannot write to standard output: Input/output error")
    assert discarded == [True, True]


def test_an_interrupt_exits_130(run, folder, monkeypatch):
    def stream(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(GPT2, "stream", stream)
    assert run("generate", PROMPT, "--model", folder) == (130, "", "\n")


def test_a_full_disk_is_one_line_and_exits_1(folder):
    with open("/dev/full", "w") as full:
        result = spawn("generate", PROMPT, "--model", folder, stdout=full, stderr=subprocess.PIPE, text=True)
    assert result.returncode == 1
    assert result.stderr == "gpt2core: error: cannot write to standard output: No space left on device\n"


@pytest.mark.parametrize(
    ("redirect", "code", "message"),
    [(">&-", 1, "cannot write to standard output: it is closed"), ("<&-", 2, "standard input is closed")],
)
def test_a_closed_standard_stream_is_one_line(folder, redirect, code, message):
    command = f'"$@" generate - --model "{folder}" --max-new-tokens 2 {redirect}'
    result = subprocess.run(
        ["bash", "-c", command, "bash", *PROGRAM], input="x", capture_output=True, text=True
    )
    assert result.returncode == code
    assert message in Result(result.returncode, result.stdout, result.stderr).error()


def test_without_stderr_an_error_does_not_go_to_stdout():
    command = ["bash", "-c", '"$@" info ./nowhere 2>&-', "bash", *PROGRAM]
    result = subprocess.run(command, capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (1, "")


@pytest.mark.parametrize("terminal", [False, True], ids=["pipe", "terminal"])
def test_a_download_shows_progress_on_a_terminal_only(folder, tmp_path, terminal):
    files = {path.name: path.read_bytes() for path in Path(folder).iterdir()}
    ours, theirs = os.openpty() if terminal else os.pipe()
    if terminal:
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    with FakeHub({"owner/tiny": Repository({"main": files})}) as server:
        env = {"HF_ENDPOINT": server.url, "HF_HOME": str(tmp_path), "NO_PROXY": "*", "no_proxy": "*"}
        args = ("generate", PROMPT, "--model", "owner/tiny", "--max-new-tokens", "0")
        result = spawn(*args, stdout=subprocess.PIPE, stderr=theirs, env=env)
    os.close(theirs)
    shown = b""
    try:
        while chunk := os.read(ours, 2**16):
            shown += chunk
    except OSError:  # how a terminal says that nobody writes to it any more
        assert terminal
    os.close(ours)
    assert (result.returncode, result.stdout) == (0, PROMPT.encode() + b"\n")
    assert (b"3/3" in shown) == terminal
    assert terminal or shown == b""


def test_ctrl_c_exits_130_and_leaves_what_was_streamed(tmp_path):
    folder = random_checkpoint(tmp_path, n_positions=20_000)
    args = ["generate", PROMPT, "--model", str(folder), "--seed", "7", "--max-new-tokens", "19000"]
    pipe = subprocess.PIPE
    # A runner in the background ignores the signal, which its children would inherit.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    process = subprocess.Popen([*PROGRAM, *args], stdout=pipe, stderr=pipe, bufsize=0)
    signal.signal(signal.SIGINT, before)
    start = process.stdout.read(1)  # unbuffered, so that communicate sees all of the rest
    process.send_signal(signal.SIGINT)
    rest, err = process.communicate(timeout=60)
    assert (process.returncode, err.strip()) == (130, b"")
    text = (start + rest).decode()
    with GPT2.from_pretrained(folder) as model:
        whole = PROMPT
        for piece in model.stream(PROMPT, max_new_tokens=19_000, temperature=0.8, seed=7):
            if len(whole) >= len(text):
                break
            whole += piece.text
    assert whole[: len(text)] == text
    assert len(text) < 19_000


def test_a_locale_that_cannot_show_a_character_does_not_stop_the_text(folder):
    args = ("generate", "Ærø", "--model", folder, "--max-new-tokens", "0")
    result = spawn(*args, capture_output=True, env={"PYTHONIOENCODING": "ascii"})
    assert (result.returncode, result.stdout, result.stderr) == (0, b"?r?\n", b"")


def test_generate_loads_no_framework_and_no_hub_client(folder):
    code = (
        "import sys; from gpt2core.cli import main; "
        f"main(['generate', 'x', '--model', {folder!r}, '--max-new-tokens', '1', '--seed', '1']); "
        "print(*sys.modules, file=sys.stderr)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(result.stderr.split())
    assert not {"torch", "jax", "onnxruntime", "transformers", "huggingface_hub", "requests"} & loaded
    assert "importlib.metadata" not in loaded  # looking for plugins takes as long as loading the model
    assert "gpt2core.engine.engine" in loaded
