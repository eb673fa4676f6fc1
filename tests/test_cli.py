"""The command line: what it prints and where, its exit codes, its one-line errors."""

import dataclasses
import fcntl
import io
import json
import math
import os
import re
import signal
import struct
import subprocess
import sys
import termios
from pathlib import Path
from typing import NamedTuple

import pytest
from fake_hub import FakeHub, Repository

from gpt2core import GPT2, ModelConfig, __version__
from gpt2core.checkpoint import open as checkpoint
from gpt2core.cli import console, main, program
from gpt2core.errors import RequestError
from gpt2core.testing import random_checkpoint

PROGRAM = [sys.executable, "-m", "gpt2core"]
PROMPT = "Once upon"


class Result(NamedTuple):
    code: int
    out: str
    err: str

    def error(self) -> str:
        """The one line of an error, after its prefix."""
        assert self.out == ""
        assert self.err.count("\n") == 1, self.err
        assert self.err.startswith("gpt2core: error: "), self.err
        return self.err.removeprefix("gpt2core: error: ").rstrip("\n")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(random_checkpoint(tmp_path_factory.mktemp("tiny")))


@pytest.fixture(scope="module")
def model(folder):
    with GPT2.from_pretrained(folder) as loaded:
        yield loaded


class TerminalInput(io.TextIOWrapper):
    def isatty(self):
        return True


@pytest.fixture
def run(capfd, monkeypatch):
    """Run a command in this process, with bytes on stdin."""

    def run(*args: str, stdin: bytes = b"", terminal: bool = False) -> Result:
        stream = (TerminalInput if terminal else io.TextIOWrapper)(io.BytesIO(stdin))
        monkeypatch.setattr(sys, "stdin", stream)
        code = main(args)
        return Result(code, *capfd.readouterr())

    return run


def spawn(*args: str, **options) -> subprocess.CompletedProcess:
    environment = {k: v for k, v in os.environ.items() if k != "GPT2CORE_DEBUG"}
    environment |= options.pop("env", {})
    return subprocess.run([*PROGRAM, *args], env=environment, stdin=subprocess.DEVNULL, timeout=60, **options)


def strict_json(text: str):
    def refuse(name):
        raise AssertionError(f"{name} is no JSON")

    assert text.endswith("\n")
    assert text.count("\n") == 1
    return json.loads(text, parse_constant=refuse)


# generate


def test_generate_prints_the_prompt_and_what_the_library_generates(run, folder, model):
    want = model.generate(PROMPT, max_new_tokens=12, temperature=0.8, seed=7).text
    args = ("generate", PROMPT, "--model", folder, "--max-new-tokens", "12", "--seed", "7")
    assert run(*args) == (0, f"{PROMPT}{want}\n", "")
    assert run(*args, "--no-stream") == (0, f"{PROMPT}{want}\n", "")


@pytest.mark.parametrize(
    ("options", "sampling"),
    [
        (("--temperature", "0"), {"temperature": 0.0}),
        (("--top-k", "3"), {"top_k": 3}),
        (("--top-p", "0.5"), {"top_p": 0.5}),
        (("--min-p", "0.2"), {"min_p": 0.2}),
        (("--repetition-penalty", "1.9"), {"repetition_penalty": 1.9}),
        (("--stop", "a", "--stop", "e"), {"stop": ["a", "e"]}),
        (("--backend", "native"), {}),
        (("--backend", "torch"), {}),
        (("--backend", "onnx"), {}),
        (("--backend", "jax"), {}),
        (("--threads", "1", "--device", "cpu", "--precision", "float32"), {}),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_generate_passes_each_option_on(run, folder, model, options, sampling):
    sampling = {"temperature": 0.8, "max_new_tokens": 40, "seed": 5} | sampling
    want = model.generate(PROMPT, **sampling).text
    args = ("generate", PROMPT, "--model", folder, "--max-new-tokens", "40", "--seed", "5", *options)
    assert run(*args) == (0, f"{PROMPT}{want}\n", "")


def test_generate_without_max_new_tokens_goes_to_the_end_of_a_small_context(run, folder, model):
    result = run("generate", PROMPT, "--model", folder, "--json", "--seed", "1")
    (generation,) = strict_json(result.out)["generations"]
    if generation["finish_reason"] == "length":
        used = generation["prompt_tokens"] + len(generation["token_ids"])
        assert used == model.config.n_positions < 100 + generation["prompt_tokens"]


def test_generate_with_n_numbers_the_texts(run, folder, model):
    wants = model.generate([PROMPT], max_new_tokens=5, temperature=0.8, seed=7, n=2)
    result = run("generate", PROMPT, "--model", folder, "--max-new-tokens", "5", "--seed", "7", "--n", "2")
    texts = [f"--- {i} of 2 ---\n{PROMPT}{want.text}\n" for i, want in enumerate(wants, 1)]
    assert result == (0, "".join(texts), "")
    assert texts[0][len("--- 1 of 2 ---") :] != texts[1][len("--- 2 of 2 ---") :]


def test_generate_json_is_one_strict_document_of_what_the_library_returns(run, folder, model):
    wants = model.generate([PROMPT], max_new_tokens=6, temperature=0.8, seed=3, n=2)
    args = (
        "generate",
        PROMPT,
        "--model",
        folder,
        "--max-new-tokens",
        "6",
        "--seed",
        "3",
        "--n",
        "2",
        "--json",
    )
    result = run(*args)
    assert (result.code, result.err) == (0, "")
    document = strict_json(result.out)
    assert {k: document[k] for k in ("model", "backend", "precision", "prompt")} == {
        "model": folder,
        "backend": "numpy",
        "precision": "float32",
        "prompt": PROMPT,
    }
    assert document["load_s"] > 0
    for got, want in zip(document["generations"], wants, strict=True):
        fields = dataclasses.asdict(want)
        assert got.keys() == fields.keys() - {"logprobs"}
        assert got["timing"].keys() == fields["timing"].keys()
        assert {k: got[k] for k in got if k != "timing"} == {k: fields[k] for k in got if k != "timing"}


def test_generate_without_a_seed_draws_one_and_tells_it(run, folder):
    args = ("generate", PROMPT, "--model", folder, "--max-new-tokens", "20", "--stats")
    first, second = run(*args), run(*args)
    assert first.out != second.out
    seed = next(line.split()[1] for line in first.err.splitlines() if line.startswith("seed"))
    assert run(*args, "--seed", seed).out == first.out


def test_generate_stats_go_to_stderr_and_name_what_was_measured(run, folder):
    args = ("generate", PROMPT, "--model", folder, "--max-new-tokens", "9", "--seed", "7")
    plain, streamed, whole = run(*args), run(*args, "--stats"), run(*args, "--stats", "--no-stream")
    assert streamed.out == whole.out == plain.out
    for result in (streamed, whole):
        stats = dict(line.split(None, 1) for line in result.err.splitlines())
        assert list(stats) == ["backend", "seed", "load", "tokens", "first", "peak"]
        assert (stats["backend"], stats["seed"], stats["tokens"]) == ("numpy", "7", "9")
        assert stats["first"].endswith("tokens/s after it")
        assert stats["peak"].endswith(("MB", "GB"))  # of this test process, whatever else ran in it


@pytest.mark.parametrize("how", [("--speculation", "prompt_lookup"), ("--draft-model", "FOLDER")])
def test_generate_with_speculation_prints_the_same_text_and_its_stats(run, folder, how):
    args = ("generate", "abcabcabcabc", "--model", folder, "--temperature", "0", "--max-new-tokens", "40")
    how = tuple(folder if word == "FOLDER" else word for word in how)
    plain = run(*args, "--backend", "numpy")
    for more in ((), ("--no-stream",)):
        result = run(*args, "--backend", "numpy", *how, "--stats", *more)
        assert (result.code, result.out) == (0, plain.out)
        found = re.search(
            r"^speculation   (\d+) of (\d+) proposed tokens accepted( \(\d+%\))?$", result.err, re.M
        )
        assert int(found[1]) <= int(found[2])
        assert int(found[2]) > 0
    timing = json.loads(run(*args, *how, "--json").out)["generations"][0]["timing"]
    assert timing["accepted_tokens"] <= timing["proposed_tokens"]


def test_two_ways_of_speculating_at_once_are_refused(run, folder):
    result = run(
        "generate", "a", "--model", folder, "--speculation", "prompt_lookup", "--draft-model", folder
    )
    assert result.code == 2
    assert "only one can propose" in result.err


@pytest.mark.parametrize("how", [(), ("--no-stream",)], ids=["streamed", "whole"])
def test_generate_stats_of_no_token_at_all(run, folder, how):
    result = run("generate", PROMPT, "--model", folder, "--max-new-tokens", "0", "--stats", *how)
    assert (result.code, result.out) == (0, f"{PROMPT}\n")
    assert "first token   none" in result.err


def test_each_piece_is_flushed_before_the_next_token_is_computed(run, folder, monkeypatch):
    written, flushed = [], []
    monkeypatch.setattr(sys.stdout, "write", written.append)
    monkeypatch.setattr(sys.stdout, "flush", lambda: flushed.append("".join(written)))
    real = GPT2.stream

    def stream(*args, **options):
        expected = PROMPT
        for piece in real(*args, **options):
            assert flushed[-1] == expected
            expected += piece.text
            yield piece

    monkeypatch.setattr(GPT2, "stream", stream)
    assert run("generate", PROMPT, "--model", folder, "--max-new-tokens", "8", "--seed", "7").code == 0
    assert len(flushed) >= 9


def test_special_tokens_in_the_prompt_are_text_unless_allowed(run, folder):
    args = ("generate", "a<|endoftext|>", "--model", folder, "--max-new-tokens", "1", "--json")
    tokens = [
        strict_json(run(*args, *more).out)["generations"][0]["prompt_tokens"]
        for more in ((), ("--allow-special",))
    ]
    assert tokens == [len("a<|endoftext|>"), 2]


# stdin


@pytest.mark.parametrize("argument", [("-",), ()], ids=["dash", "none"])
@pytest.mark.parametrize(
    ("stdin", "prompt"),
    [
        (b"Once", "Once"),
        (b"Once\n", "Once"),
        (b"Once\r\n", "Once"),
        (b"Once\n\n", "Once\n"),
        (b"Once\r", "Once\r"),
        (b"\xef\xbb\xbfOnce", "Once"),
        ("Ærøskøbing 🦢".encode(), "Ærøskøbing 🦢"),
        (b"nul\0byte", "nul\0byte"),
    ],
    ids=["plain", "newline", "crlf", "two newlines", "cr", "byte order mark", "non-ascii", "nul"],
)
def test_generate_reads_the_prompt_from_stdin(run, folder, argument, stdin, prompt):
    args = ("generate", *argument, "--model", folder, "--max-new-tokens", "1", "--json")
    assert strict_json(run(*args, stdin=stdin).out)["prompt"] == prompt


def test_stdin_that_is_not_utf8_is_refused_in_one_line(run, folder):
    result = run("generate", "-", "--model", folder, stdin=b"caf\xe9 au lait")
    assert result.code == 2
    assert result.error() == (
        "standard input is not UTF-8: byte 0xe9 at offset 3; "
        "convert it first, for example with iconv -f LATIN1 -t UTF-8"
    )


def test_a_prompt_argument_that_is_not_utf8_is_refused(folder):
    result = spawn("generate", b"caf\xe9", "--model", folder, capture_output=True, text=True)
    assert result.returncode == 2
    error = Result(result.returncode, result.stdout, result.stderr).error()
    assert error == "PROMPT is not UTF-8 at character 3; convert it, or check the locale"


def test_a_lone_surrogate_in_the_prompt_is_refused(run, folder):
    result = run("generate", "caf\udce9", "--model", folder)
    assert (result.code, result.error()) == (
        2,
        "PROMPT is not UTF-8 at character 3; convert it, or check the locale",
    )


def test_a_program_without_standard_streams_says_so(run, folder, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(console.sys, "stdout", None)
        result = run("info", folder)
    assert (result.code, result.error()) == (1, "cannot write to standard output: it is closed")
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(RequestError, match="standard input is closed; give the text another way"):
        console.read_stdin()


def test_stdin_without_end_is_not_read_to_the_end(run, folder):
    result = run("generate", "-", "--model", folder, stdin=b"y\n" * 2**20)
    assert result.code == 2
    assert "standard input has more than 1048576 bytes" in result.error()


def test_no_prompt_on_a_terminal_is_a_usage_error(run, folder):
    result = run("generate", "--model", folder, terminal=True)
    assert result.code == 2
    assert result.error() == "no prompt; give a PROMPT, or - to read it from stdin"


# errors


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--temperature", "nan"], "temperature"),
        (["--temperature", "-1"], "temperature"),
        (["--temperature", "1e400"], "temperature"),
        (["--top-p", "2"], "top_p"),
        (["--min-p", "1.5"], "min_p"),
        (["--top-k", "-1"], "top_k"),
        (["--repetition-penalty", "0"], "repetition_penalty"),
        (["--seed", str(2**63)], "seed"),
        (["--n", "0"], "n is 0"),
        (["--stop", ""], "stop"),
        (["--max-new-tokens", "-1"], "max_new_tokens"),
        (["--max-new-tokens", "1000"], "1000"),
        (["--max-new-tokens", "many"], "'many' is not a valid integer"),
        (["--threads", "0"], "0 is not in the range x>=1"),
        (["--precision", "float12"], "float12"),
        (["--frobnicate"], "--frobnicate"),
        (["surplus"], "unexpected extra argument (surplus)"),
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
    ("args", "message"),
    [
        (["--model", "./nowhere"], "nowhere"),
        (["--model", "nobody/nothing", "--offline"], "nobody/nothing is not in the cache"),
        (
            ["--backend", "frobnicate"],
            "no backend 'frobnicate'; known are auto, numpy, native, torch, jax, onnx",
        ),
        (["--device", "abacus"], "abacus"),
        (["--revision", "main"], "revision"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_model_or_backend_that_cannot_be_had_exits_1(run, folder, tmp_path, monkeypatch, args, message):
    result = run("generate", PROMPT, *(args if "--model" in args else ["--model", folder, *args]))
    assert result.code == 1
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


# score


TEXT = "It was the best of times, it was the worst of times. " * 5  # more than the tiny model's context


@pytest.mark.parametrize("text", ["Once upon a time", TEXT], ids=["short", "longer than the context"])
def test_score_prints_what_the_library_computes(run, folder, model, tmp_path, text):
    file = tmp_path / "text.txt"
    file.write_text(text)
    want = model.score(text)
    result = run("score", str(file), "--model", folder, "--json")
    assert (result.code, result.err) == (0, "")
    assert strict_json(result.out) == {
        "tokens": len(text),
        "perplexity": pytest.approx(want.perplexity),
        "bits_per_byte": pytest.approx(want.bits_per_byte),
        "mean_logprob": pytest.approx(-math.log(want.perplexity)),
        "model": folder,
        "backend": "numpy",
    }
    shown = dict(line.rsplit(None, 1) for line in run("score", str(file), "--model", folder).out.splitlines())
    assert shown == {
        "tokens": str(len(text)),
        "perplexity": f"{want.perplexity:.4f}",
        "bits per byte": f"{want.bits_per_byte:.4f}",
        "mean logprob": f"{-math.log(want.perplexity):.4f}",
    }


def test_score_lists_tokens_on_request(run, folder, model):
    want = model.score("Öl!")
    document = strict_json(
        run("score", "-", "--model", folder, "--json", "--per-token", stdin="Öl!".encode()).out
    )
    assert [t["id"] for t in document["per_token"]] == want.token_ids
    assert [t["text"] for t in document["per_token"]] == ["\ufffd", "\ufffd", "l", "!"]
    assert document["per_token"][0]["logprob"] is None
    assert [t["logprob"] for t in document["per_token"][1:]] == pytest.approx(list(want.logprobs))
    lines = run("score", "-", "--model", folder, "--per-token", stdin="Öl!".encode()).out.splitlines()
    assert lines[4].split() == ["id", "logprob", "token"]
    assert lines[7].split() == [str(want.token_ids[2]), f"{want.logprobs[1]:.4f}", "'l'"]


def test_score_shows_progress_on_a_terminal(run, folder, monkeypatch, tmp_path):
    shown = []
    monkeypatch.setattr(console.Status, "update", lambda self, text: shown.append(text))
    file = tmp_path / "text.txt"
    file.write_text(TEXT)
    assert run("score", str(file), "--model", folder).err == ""
    assert shown[-1] == f"scoring {file}: {len(TEXT)} of {len(TEXT)} tokens"
    assert len(shown) > 2


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("missing", None, "does not exist"),
        (".", None, "is a directory"),
        ("latin1", b"caf\xe9", "latin1 is not UTF-8: byte 0xe9 at offset 3"),
        ("short", b"x", "a score needs at least 2"),
        ("empty", b"", "empty"),
    ],
)
def test_score_refuses_what_cannot_be_scored(run, folder, tmp_path, file, content, message):
    if content is not None:
        (tmp_path / file).write_bytes(content)
    result = run("score", str(tmp_path / file), "--model", folder)
    assert result.code == 2
    assert message in result.error()


# info, backends, convert


def test_info_json_describes_the_checkpoint(run, folder, model):
    document = strict_json(run("info", folder, "--json").out)
    config = model.config
    assert document == {
        "model": folder,
        "folder": folder,
        "base": folder,
        "adapter": None,
        "unread_fields": {},
        "config": json.loads(json.dumps(dataclasses.asdict(config))),
        "parameters": config.parameters,
        "float32_nbytes": 4 * config.parameters,
        "cache_nbytes_per_sequence": config.cache_nbytes(1, config.n_positions),
        "tokenizer": {"vocab_size": 257, "special_ids": [0]},
        "files": {path.name: path.stat().st_size for path in Path(folder).iterdir()},
    }


def test_info_prints_what_a_person_asks(run, tmp_path):
    folder = str(random_checkpoint(tmp_path, tie_word_embeddings=False, n_inner=48, eos_token_ids=(0, 7)))
    result = run("info", folder)
    assert (result.code, result.err) == (0, "")
    lines = {line[:33].strip(): line[33:].strip() for line in result.out.splitlines()}
    assert lines["tied head"] == "no"
    assert lines["n_inner"] == "48"
    assert lines["eos_token_ids"] == "0, 7"
    assert lines["scale_attn_weights"] == "yes"
    assert lines["KV cache"] == "73.7 kB per sequence of 96 tokens, float32"
    assert lines["model.safetensors"].endswith("kB")


def test_backends_lists_engines_and_what_auto_takes(run, folder, monkeypatch):
    monkeypatch.setattr(checkpoint, "DEMO", Path(folder))
    monkeypatch.delenv("GPT2CORE_BACKEND", raising=False)
    document = strict_json(run("backends", "--json").out)
    found = {one["name"]: one for one in document["backends"]}
    assert found["numpy"]["available"]
    assert found["torch"]["available"]
    assert document["auto"]["demo"]["backend"] == "numpy"
    assert document["auto"]["openai-community/gpt2"]["backend"] == "native"
    assert all(choice["why"] for choice in document["auto"].values())
    text = run("backends").out
    assert f"torch    {found['torch']['version']}" in text
    assert "openai-community/gpt2  native" in text


def test_backends_tells_the_remedy_for_what_is_missing(run, folder, monkeypatch):
    monkeypatch.setattr(checkpoint, "DEMO", Path(folder))
    monkeypatch.setenv("GPT2CORE_CC", "no-such-compiler")
    monkeypatch.setattr("gpt2core.backends.find_spec", lambda name: object() if name == "numpy" else None)
    result = run("backends")
    assert "pip install 'gpt2core[torch]'" in result.out
    assert "native   -        needs a C compiler, and GPT2CORE_CC names 'no-such-compiler'" in result.out
    assert "openai-community/gpt2  numpy" in result.out


def test_backends_works_without_the_demo_model(run, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "DEMO", tmp_path / "nowhere")
    monkeypatch.delenv("GPT2CORE_BACKEND", raising=False)
    assert list(strict_json(run("backends", "--json").out)["auto"]) == ["openai-community/gpt2"]
    assert "openai-community/gpt2  native" in run("backends").out


def test_an_unknown_backend_in_the_environment_is_one_line_and_exits_1(run, folder, monkeypatch):
    monkeypatch.setenv("GPT2CORE_BACKEND", "frobnicate")
    result = run("generate", PROMPT, "--model", folder)
    assert result.code == 1
    assert "GPT2CORE_BACKEND names 'frobnicate'" in result.error()


def test_backends_lists_engines_though_the_environment_names_none_and_says_so_in_one_line(
    run, folder, monkeypatch
):
    monkeypatch.setattr(checkpoint, "DEMO", Path(folder))
    monkeypatch.setenv("GPT2CORE_BACKEND", "frob\nnicate")
    result = run("backends")
    assert (result.code, result.err) == (0, "")
    lines = result.out.splitlines()
    assert [line.split()[0] for line in lines[:6]] == ["backend", "numpy", "native", "torch", "jax", "onnx"]
    [line] = [line for line in lines if "GPT2CORE_BACKEND" in line]
    assert line == lines[-1]
    assert line.startswith(
        r"auto has no choice: GPT2CORE_BACKEND names 'frob\nnicate', which does not exist;"
    )
    assert line.endswith("unset the variable")
    document = strict_json(run("backends", "--json").out)
    assert {one["name"] for one in document["backends"]} >= {"numpy", "native", "torch", "jax", "onnx"}
    assert set(document["auto"]) == {"demo", "openai-community/gpt2"}
    for choice in document["auto"].values():
        assert choice["backend"] is None
        assert "GPT2CORE_BACKEND names" in choice["why"]


def test_convert_writes_safetensors_that_generate_the_same(run, folder, tmp_path):
    import torch

    with GPT2.from_pretrained(folder) as model:
        want = model.generate(PROMPT, max_new_tokens=8).text
        tensors = {
            name: torch.from_numpy(array.copy())
            for name, array in checkpoint.open_checkpoint(folder).weights.named()
        }
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / name).write_bytes((Path(folder) / name).read_bytes())
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    assert run("convert", str(tmp_path)) == (0, f"{tmp_path}/model.safetensors\n", "")
    with GPT2.from_pretrained(tmp_path) as model:
        assert model.generate(PROMPT, max_new_tokens=8).text == want
    again = run("convert", str(tmp_path))
    assert again.code == 1
    assert "--force" in again.error()
    assert run("convert", str(tmp_path), "--force").code == 0
    elsewhere = tmp_path / "new"
    assert run("convert", str(tmp_path), "--output", str(elsewhere)).out == f"{elsewhere}/model.safetensors\n"


def test_convert_refuses_a_folder_without_pickles(run, folder, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(ModelConfig().to_dict()))
    result = run("convert", str(tmp_path))
    assert result.code == 1
    assert "no pickled weights" in result.error()
    assert "does not exist" in run("convert", str(tmp_path / "missing")).error()


# parts


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [(0, "0 bytes"), (999, "999 bytes"), (1000, "1.0 kB"), (999_949, "999.9 kB"), (999_951, "1.0 MB"),
     (498_000_000, "498.0 MB"), (6_500_000_000, "6.5 GB"), (3 * 10**15, "3000.0 TB")],
)  # fmt: skip
def test_format_nbytes(nbytes, text):
    assert console.format_nbytes(nbytes) == text


@pytest.mark.parametrize(("value", "want"), [(1.5, 1.5), (None, None), (math.inf, None), (math.nan, None)])
def test_finite_keeps_json_strict(value, want):
    assert console.finite(value) == want


class Terminal(io.StringIO):
    def isatty(self):
        return True


def wait_for(terminal: io.StringIO, text: str) -> None:
    import time

    deadline = time.monotonic() + 20
    while text not in terminal.getvalue():
        assert time.monotonic() < deadline, terminal.getvalue()
        time.sleep(0.001)


def test_a_status_line_appears_after_its_delay_follows_updates_and_vanishes(monkeypatch):
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    monkeypatch.setattr(console, "STATUS_DELAY_S", 0.0)
    with console.Status("loading") as status:
        wait_for(terminal, "\r\x1b[Kloading")
        status.update("half")
    assert terminal.getvalue() == "\r\x1b[Kloading\r\x1b[Khalf\r\x1b[K"


def test_a_status_line_of_something_quick_is_never_drawn(monkeypatch):
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    with console.Status("loading") as status:
        status.update("half")
    status._show()  # the timer fires while the context ends
    assert terminal.getvalue() == ""


def test_a_status_line_is_only_for_terminals(monkeypatch):
    monkeypatch.setattr(sys, "stderr", pipe := io.StringIO())
    monkeypatch.setattr(console, "STATUS_DELAY_S", 0.0)
    with console.Status("loading") as status:
        assert not status._timer.is_alive()
    assert pipe.getvalue() == ""
