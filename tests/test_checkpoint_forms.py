"""Checkpoints as people have them: what is left out is named, and what a folder is instead is said."""

import json
import subprocess
import sys

import pytest

from gpt2core.checkpoint.open import open_checkpoint
from gpt2core.errors import CheckpointWarning, UnsupportedCheckpointError
from gpt2core.testing import random_checkpoint


def with_fields(folder, **fields):
    """A sound small checkpoint with `fields` added to its config.json."""
    random_checkpoint(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | fields))
    return folder


# ---- fields that GPT-2 does not read


def test_unread_field_warns_when_the_checkpoint_is_opened_and_is_refused_if_strict(tmp_path):
    folder = with_fields(tmp_path, author="someone")
    with pytest.warns(CheckpointWarning, match='author = "someone"') as caught:
        open_checkpoint(folder)
    assert len(caught) == 1
    with pytest.raises(UnsupportedCheckpointError, match=r'author = "someone" \(unknown field\)'):
        open_checkpoint(folder, strict=True)


def run(*arguments):
    """The command line in a process of its own: stdout, stderr and the exit code."""
    done = subprocess.run([sys.executable, "-m", "gpt2core", *arguments], capture_output=True, text=True)
    return done.stdout, done.stderr, done.returncode


def test_command_line_warns_of_unread_fields_in_one_line_and_refuses_them_if_strict(tmp_path):
    folder = str(with_fields(tmp_path, author="someone"))
    out, err, code = run("info", folder)
    assert (code, err.count("\n")) == (0, 1)
    assert '  author = "someone"\n' in out
    assert err.startswith("gpt2core: warning: config.json has fields that GPT-2 does not read")
    out, err, code = run("info", folder, "--json")
    assert json.loads(out)["unread_fields"] == {"author": "someone"}
    out, err, code = run("generate", "x", "--model", folder, "--strict", "--backend", "numpy")
    assert (out, code) == ("", 1)
    assert "unknown field" in err
