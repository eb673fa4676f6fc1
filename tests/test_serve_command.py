"""The command `gpt2core serve`: what it says at its start, and how it ends when it cannot start."""

import json
import os
import re
import socket
import subprocess
import sys

import pytest

from gpt2core.serve import Settings
from gpt2core.serve.server import describe_address
from gpt2core.testing import random_checkpoint


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(random_checkpoint(tmp_path_factory.mktemp("tiny"), n_positions=512))


def command(*options, **environment):
    return subprocess.run(
        [sys.executable, "-m", "gpt2core", "serve", *options],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, **environment},
    )


def test_a_model_that_does_not_exist_ends_the_command_with_3_and_says_why(tmp_path):
    result = command("--model", str(tmp_path / "nothing"), "--port", "0", "--offline")
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1].startswith("gpt2core: error: ")
    assert "is not an existing folder" in result.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("options", "environment", "message"),
    [
        (["--host", "0.0.0.0"], {}, "--insecure-no-auth"),
        ([], {"GPT2CORE_MAX_BATCH": "zero"}, "GPT2CORE_MAX_BATCH is 'zero': "),
        (["--deadline", "-1"], {}, "--deadline is -1.0: "),
        (
            ["--max-batch", "1"],
            {"GPT2CORE_MAX_QUEUE": "0", "GPT2CORE_MAX_PROMPTS": "9"},
            "raise --max-queue or lower max_prompts",
        ),
    ],
)
def test_wrong_usage_ends_the_command_with_2_and_one_line(options, environment, message):
    result = command(*options, **environment)
    assert result.returncode == 2
    assert message in result.stderr
    assert result.stderr.count("\n") == 1


def test_a_port_that_is_taken_ends_the_command_with_1(folder):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        result = command("--model", folder, "--port", str(taken.getsockname()[1]))
    assert result.returncode == 1
    assert "is in use by another program; stop that, or choose another port with --port" in result.stderr


def test_a_setting_with_a_typo_is_warned_of_with_the_nearest_name(folder):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        result = command("--model", folder, "--port", port, GPT2CORE_MAX_BATCHH="3", GPT2CORE_CC="gcc")
    warned = [json.loads(line) for line in result.stderr.splitlines() if line.startswith("{")]
    found = [
        (line["variable"], line["did_you_mean"]) for line in warned if line["event"] == "unknown_setting"
    ]
    assert found == [("GPT2CORE_MAX_BATCHH", "GPT2CORE_MAX_BATCH")]


def test_on_a_terminal_the_server_says_where_to_open_the_page(folder):
    main, terminal = os.openpty()
    running = subprocess.Popen(
        [sys.executable, "-m", "gpt2core", "serve", "--port", "0", "--model", folder], stderr=terminal
    )
    os.close(terminal)
    try:
        shown = b""
        while b"Ctrl-C" not in shown:
            shown += os.read(main, 4096)
        assert re.search(rb"^Open http://127.0.0.1:\d+/ in a browser", shown, re.MULTILINE)
    finally:
        running.kill()
        running.wait()
        os.close(main)


@pytest.mark.parametrize(
    ("settings", "shown"),
    [
        ({"host": "::"}, "http://[::1]:8000/ "),
        (
            {"host": "0.0.0.0", "api_key": "secret"},
            "http://127.0.0.1:8000/ in a browser; leave the name empty",
        ),
        ({"host": "example.org", "playground": False}, "http://example.org:8000/docs "),
    ],
)
def test_the_page_is_named_as_this_machine_reaches_it(settings, shown):
    text = describe_address(Settings(**settings), 8000)
    assert shown in text
    assert "secret" not in text


def test_without_the_extra_the_command_says_what_to_install():
    code = (
        "import sys; sys.modules['fastapi'] = None\n"
        "from gpt2core.cli import main\n"
        "sys.exit(main(['serve', '--port', '0']))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 1
    assert "pip install 'gpt2core[serve]'" in result.stderr
