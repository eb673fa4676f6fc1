"""Engines on nothing but the standard library, for tests of the comparison."""

import textwrap

from gpt2core.bench import engines
from gpt2core.bench.compare.worker import EngineSetup

# An adapter on nothing but the standard library; VARIANT is replaced by what goes wrong.
FAKE = """
import json, os, signal, sys

def load(job):
    VARIANT
    return Engine()

class Engine:
    settings = {"python": sys.executable, "has_gpt2core": "gpt2core" in sys.modules}

    def generate(self, prompts, new_tokens):
        return [[1] * new_tokens for _ in prompts]

    def prefill(self, ids):
        pass
"""


# An adapter that answers as the reference does.
CHECKED = """
import os, signal
import numpy as np
from gpt2core import GPT2

def load(job):
    return Engine(job)

class Engine:
    settings = {}

    def __init__(self, job):
        self.job, self.name = job, job["checkpoint"].rsplit("/", 1)[1]
        VARIANT
        self.model = GPT2.from_pretrained(job["checkpoint"], backend="numpy")

    def generate(self, prompts, new_tokens):
        out = self.model.generate(prompts, max_new_tokens=new_tokens, min_new_tokens=new_tokens)
        return [one.token_ids for one in out]

    def prefill(self, ids):
        pass

    def logits(self, ids):
        return self.model.logits(ids)
"""


def fake_peers(tmp_path, monkeypatch):
    """A function that makes a peer of some name from the text of an adapter."""

    def make(name="fake", text=FAKE, *, goes_wrong="pass", packages=(), python=None) -> EngineSetup:
        path = tmp_path / f"{name}_adapter.py"
        path.write_text(textwrap.dedent(text).replace("VARIANT", goes_wrong))
        monkeypatch.setitem(engines.PEERS, name, engines.Peer(path, packages, name))
        return EngineSetup.peer(name, python=python)

    return make
