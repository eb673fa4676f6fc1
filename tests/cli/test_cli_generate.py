"""`gpt2core generate`: what it prints and where, and what it reads from stdin."""

import dataclasses
import json
import re
import sys

import pytest
from commands import PROMPT, Result, spawn, strict_json

from gpt2core import GPT2
from gpt2core.backends import load_factory
from gpt2core.cli import console
from gpt2core.errors import RequestError


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
def test_generate_passes_each_option_on(run, folder, model, options, sampling, capfd):
    sampling = {"temperature": 0.8, "max_new_tokens": 40, "seed": 5} | sampling
    want = model.generate(PROMPT, **sampling).text
    args = ("generate", PROMPT, "--model", folder, "--max-new-tokens", "40", "--seed", "5", *options)
    if "native" in options:
        load_factory("native").build()
        capfd.readouterr()  # that it is compiled
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
        assert got.keys() == fields.keys()
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
        assert stats["first"].endswith("tok/s after it")
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
