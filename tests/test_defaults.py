"""The library, every command, the server and the benchmark: what nobody chose is the same at every door."""

import inspect

import httpx2
import pytest
from click.testing import CliRunner
from serving import process

from gpt2core import GPT2, testing
from gpt2core.cli import program
from gpt2core.serve import Settings
from gpt2core.serve.app import load_model

LIBRARY = {
    name: parameter.default for name, parameter in inspect.signature(GPT2.from_pretrained).parameters.items()
}
SHARED = ("backend", "precision", "device", "threads", "revision", "speculation", "draft_model")
LIMITS = ("max_batch", "cache_nbytes")


def find_commands() -> list:
    """Every command, and command of a group, that takes a backend and a precision for one model."""
    found = []
    waiting = [((name,), command) for name, command in program.commands.items()]
    while waiting:
        path, command = waiting.pop()
        waiting += [((*path, name), below) for name, below in getattr(command, "commands", {}).items()]
        if {"backend", "precision"} <= {option.name for option in command.params}:
            found.append(pytest.param(command, id=" ".join(path)))
    return found


def test_the_library_takes_the_weights_as_the_checkpoint_holds_them():
    assert (LIBRARY["backend"], LIBRARY["precision"]) == ("auto", "auto")


@pytest.mark.parametrize("command", find_commands())
def test_a_command_has_the_librarys_defaults(command):
    params = command.make_context("", [], resilient_parsing=True).params
    defaults = {name: params[name] for name in SHARED if name in params}
    assert defaults == {name: LIBRARY[name] for name in defaults}


def test_the_commands_that_load_a_model_are_compared():
    assert {"bench", "generate", "score", "serve"} <= {parameter.id for parameter in find_commands()}


@pytest.mark.parametrize("name", [*SHARED, *LIMITS])
def test_the_server_has_the_librarys_defaults(name):
    assert Settings.model_fields[name].default == LIBRARY[name]


def test_the_server_starts_on_a_quantized_folder(tmp_path):
    folder = testing.random_checkpoint(tmp_path / "float32")
    CliRunner().invoke(program, ["quantize", str(folder), str(tmp_path / "int8")], catch_exceptions=False)
    with process("--model", str(tmp_path / "int8"), "--backend", "numpy") as (_, url):
        answer = httpx2.post(f"{url}/generate", json={"prompt": "a", "max_new_tokens": 2})
    assert (answer.status_code, answer.json()["model"]) == (200, "int8")


def test_the_servers_limits_are_those_of_the_models_engine(tmp_path):
    folder = testing.random_checkpoint(tmp_path / "model")
    settings = Settings(model=str(folder), backend="numpy", max_batch=3, speculation="prompt_lookup")
    with load_model(settings) as model:
        assert model.engine.slots == 3
        assert model.generate([7, 8, 9] * 6, max_new_tokens=30).timing.proposed_tokens > 0
    nbytes = model.config.cache_nbytes(2, model.config.n_positions)
    settings = Settings(model=str(folder), backend="numpy", cache_nbytes=nbytes)
    with load_model(settings) as model:
        assert model.engine.slots == 2
