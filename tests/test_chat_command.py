"""`gpt2core chat`: turns, commands, the cache between turns, and the terminal, by processes."""

import os
import re
import select
import subprocess
import sys
import time

import pytest

from gpt2core import GPT2, ChatTemplate
from gpt2core.chat_template import PLAIN
from gpt2core.cli import main
from gpt2core.testing import random_checkpoint

PROGRAM = [sys.executable, "-m", "gpt2core", "chat"]
OPTIONS = ["--chat-template", "plain", "-n", "6", "-s", "3"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(random_checkpoint(tmp_path_factory.mktemp("tiny"), n_positions=256))


def say(folder, *lines, options=OPTIONS, code=0):
    """Standard output and error after these lines."""
    done = subprocess.run(
        [*PROGRAM, "--model", folder, *options],
        input="".join(f"{line}\n" for line in lines),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == code, done.stderr
    return done.stdout, done.stderr


def answers(folder, *turns, seed=3, system=None, **options):
    """What a model that reads every conversation from its beginning says."""
    template = ChatTemplate.find("plain")
    messages = [] if system is None else [{"role": "system", "content": system}]
    said = []
    with GPT2.from_pretrained(folder) as model:
        for turn in turns:
            messages.append({"role": "user", "content": turn})
            ids = template(model.tokenizer).encode(
                messages, model.tokenizer, context=256, add_generation_prompt=True
            )
            options = {"max_new_tokens": 6, "temperature": 0.8, "seed": seed, "stop": ["\nUser:"]} | options
            text = model.generate(ids, **options).text
            said.append(text.lstrip())
            messages.append({"role": "assistant", "content": text.strip()})
    return said


def test_each_turn_answers_the_whole_conversation(folder):
    turns = ["Who are you?", "And why?", "//run"]
    out, err = say(folder, *turns)
    assert (out, err) == ("".join(f"{text}\n" for text in answers(folder, *turns[:2], "/run")), "")
    out, _ = say(folder, "Hi", options=[*OPTIONS, "--system", "Be brief."])
    assert out == answers(folder, "Hi", system="Be brief.")[0] + "\n"


def test_reset_forgets_seed_is_told_and_set_and_quit_leaves(folder):
    out, err = say(folder, "Hi", "/seed", "/reset", "/seed 8", "Hi", "", "/seed", "/quit", "Not said")
    assert out == answers(folder, "Hi")[0] + "\n" + answers(folder, "Hi", seed=8)[0] + "\n"
    assert err.splitlines() == ["seed 3", "seed 8"]


def test_without_a_seed_each_answer_has_a_fresh_one_that_repeats_it(folder):
    out, err = say(folder, "Hi", "/seed", "/reset", "Hi", "/seed", options=OPTIONS[:-2])
    first, second = (int(line.split()[1]) for line in err.splitlines())
    assert first != second
    assert out == answers(folder, "Hi", seed=first)[0] + "\n" + answers(folder, "Hi", seed=second)[0] + "\n"


def test_a_turn_that_cannot_be_answered_is_told_and_not_said(folder):
    out, err = say(folder, "Hi", "x" * 300, "/sed 4", "/seed many", "/nothing", "Yes")
    assert out == "".join(f"{text}\n" for text in answers(folder, "Hi", "Yes"))
    long, misspelt, many, unknown = err.splitlines()
    assert long.startswith("gpt2core: ")
    assert "this model's context" in long
    assert misspelt.startswith("gpt2core: there is no command '/sed'; did you mean '/seed'?")
    assert many.startswith("gpt2core: /seed is 'many'; give a whole number")
    assert "/help lists those that there are" in unknown


def test_help_lists_every_command(folder):
    _, err = say(folder, "/help")
    for command in ("/reset", "/seed", "/help", "/quit", "//"):
        assert command in err


def test_a_model_without_a_template_takes_plain_and_says_so(folder):
    out, err = say(folder, "Hi", options=OPTIONS[2:])
    assert out == answers(folder, "Hi")[0] + "\n"
    assert err == "gpt2core: this model has no chat template; taking `plain`\n"


def test_the_models_own_template_is_taken_as_the_server_does(tmp_path):
    folder = random_checkpoint(tmp_path, n_positions=256)
    (folder / "chat_template.jinja").write_text(PLAIN)
    own, err = say(str(folder), "Hi", options=OPTIONS[2:])
    assert (own, err) == say(str(folder), "Hi")


def test_a_template_that_cannot_be_read_and_bad_bytes_end_with_2(folder):
    _, err = say(folder, "Hi", options=["--chat-template", "nowhere.jinja"], code=2)
    assert "give a file, dialogpt or plain" in err
    done = subprocess.run([*PROGRAM, "--model", folder, *OPTIONS], input=b"caf\xe9\n", capture_output=True)
    assert (done.returncode, b"is not UTF-8" in done.stderr) == (2, True)


def test_without_jinja_the_extra_is_named(folder):
    code = (
        "import sys; sys.modules['jinja2'] = None\n"
        "from gpt2core.cli import main\n"
        f"sys.exit(main(['chat', '--model', {folder!r}, '--chat-template', 'plain']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, stdin=subprocess.DEVNULL
    )
    assert done.returncode == 1
    assert "pip install 'gpt2core[chat]'" in done.stderr


# The cache between the turns


def test_what_was_read_in_the_turn_before_is_not_read_again(folder, monkeypatch, capsys):
    from gpt2core.backends.numpy import NumpyBackend

    read = []
    forward = NumpyBackend.forward

    def counted(self, batch, cache):
        read.append(len(batch.tokens))
        return forward(self, batch, cache)

    monkeypatch.setattr(NumpyBackend, "forward", counted)
    import io

    turns = ["Who are you?", "And why do you say that?"]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("\n".join(turns).encode())))
    assert main(["chat", "--model", folder, "--backend", "numpy", *OPTIONS]) == 0
    prompts = [count for count in read if count > 1]
    said = answers(folder, *turns)
    assert capsys.readouterr().out == "".join(f"{text}\n" for text in said)
    whole = f"User: {turns[0]}\nAssistant: {said[0].strip()}\nUser: {turns[1]}\nAssistant:"
    assert len(prompts) == 2
    assert sum(prompts) <= len(whole) + 10  # some token a byte, and not the first turn twice


# The terminal


READY = b"\r\n> "
OWN_TERMINAL = """
import fcntl, os, signal, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)  # so that Ctrl-C reaches it
signal.signal(signal.SIGINT, signal.default_int_handler)  # a runner in the background ignores it
from gpt2core.cli import main
sys.exit(main())
"""


def talk(folder, tmp_path, *steps, options=OPTIONS, again=b""):
    """What a terminal shows; each step is what to wait for, and what is typed then.

    `again` is typed once more where nothing comes for a second: a key may come before readline is ready.
    """
    terminal, theirs = os.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", OWN_TERMINAL, "chat", "--model", folder, *options],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
        env={**os.environ, "GPT2CORE_CACHE": str(tmp_path), "TERM": "dumb"},
    )
    os.close(theirs)
    shown = b""
    deadline = time.monotonic() + 120

    def read_until(wanted):
        nonlocal shown
        begin = len(shown)
        while wanted is None or wanted not in shown[begin:]:
            waiting, _, _ = select.select([terminal], [], [], 1.0)
            assert time.monotonic() < deadline, shown
            if not waiting:
                os.write(terminal, again)
                continue
            try:
                part = os.read(terminal, 4096)
            except OSError:  # the program has ended
                part = b""
            if not part:
                assert wanted is None, shown
                return
            shown += part

    try:
        for wanted, typed in steps:
            read_until(wanted)
            os.write(terminal, typed)
        read_until(None)
        code = process.wait(60)
    finally:
        process.kill()
        process.wait()
        os.close(terminal)
    return code, re.sub(rb"\x1b\[[?\w]*|\r", b"", shown).decode()


def test_at_a_terminal_lines_are_edited_and_those_of_earlier_times_are_known(folder, tmp_path):
    code, shown = talk(folder, tmp_path, (READY, b"Who are yoo\x7fu?\r"), (READY, b"\x04"))
    assert code == 0
    answer = answers(folder, "Who are you?")[0]
    assert "".join(answer.split()) in "".join(shown.split())
    history = tmp_path / "chat" / "history"
    assert "Who are you?" in history.read_text()
    assert history.stat().st_mode & 0o077 == 0
    code, shown = talk(folder, tmp_path, (READY, b"\x1b[A\r"), (READY, b"/quit\r"))
    assert code == 0
    assert "Who are you?" in shown


def test_an_interrupt_at_the_prompt_ends_the_program_with_130(folder, tmp_path):
    assert talk(folder, tmp_path, (READY, b"\x03"), again=b"\x03")[0] == 130


def test_an_interrupt_ends_an_answer_and_not_the_conversation(tmp_path):
    folder = str(random_checkpoint(tmp_path / "model", n_positions=4000, eos_token_ids=()))
    long = ["--chat-template", "plain", "-n", "3500", "-s", "3", "--logit-bias", "98=100"]
    with GPT2.from_pretrained(folder) as model:
        begun = model.tokenizer.decode([98] * 5).encode()
    steps = ((READY, b"Hi\r"), (begun, b"\x03"), (READY, b"/quit\r"))
    code, shown = talk(folder, tmp_path, *steps, options=long)
    assert code == 0
    assert len(shown) < 3500
