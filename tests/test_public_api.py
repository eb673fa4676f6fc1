"""What people import: which names there are, and what importing them costs."""

import ast
import dataclasses
import importlib
import inspect
import subprocess
import sys
from pathlib import Path
from typing import Never

import pytest

import gpt2core
from gpt2core.generation import Generation, Timing
from gpt2core.model import GPT2
from gpt2core.prompts import SamplingOptions
from gpt2core.sampling.draw import SamplingParams

PUBLIC = [
    "GPT2",
    "Alternative",
    "AsyncGPT2",
    "Backend",
    "BackendError",
    "BackendFactory",
    "BackendUnavailableError",
    "Batch",
    "Cache",
    "ChatTemplate",
    "Checkpoint",
    "CheckpointError",
    "CheckpointWarning",
    "ContextLengthError",
    "Embeds",
    "Engine",
    "Generation",
    "Gpt2CoreError",
    "InvalidSamplingError",
    "ModelConfig",
    "NumericalError",
    "Piece",
    "PortableBits",
    "Request",
    "RequestError",
    "SamplingParams",
    "Score",
    "ScoreReader",
    "ScoresTokens",
    "Sequence",
    "Timing",
    "TokenLogprob",
    "TokenQuery",
    "TokenScore",
    "TokenScores",
    "Tokenizer",
    "Trace",
    "Traces",
    "UnsupportedCheckpointError",
    "Update",
    "Weights",
    "WordScore",
    "export_onnx",
    "open_checkpoint",
]
HEAVY = {
    "secrets",
    "click",
    "difflib",
    "huggingface_hub",
    "importlib.metadata",
    "jax",
    "onnxruntime",
    "safetensors.torch",
    "torch",
}


def modules_after(code: str) -> set[str]:
    """What a fresh interpreter has loaded beyond what it starts with."""
    code = f"import sys; before = set(sys.modules)\n{code}\nprint(*(set(sys.modules) - before))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(run.stdout.split())


def imported_for_type_checkers() -> dict[str, str]:
    tree = ast.parse(Path(gpt2core.__file__).read_text())
    [block] = [node for node in tree.body if isinstance(node, ast.If)]
    return {
        alias.name: node.module.removeprefix("gpt2core.")
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }


def test_the_public_names_are_these():
    assert gpt2core.__all__ == PUBLIC


def test_type_checkers_see_the_names_that_are_loaded_at_run_time():
    assert imported_for_type_checkers() == gpt2core._MODULE_OF
    assert sorted({*gpt2core._MODULE_OF, *gpt2core._RENAMED} - {"__version__"}) == sorted(PUBLIC)


@pytest.mark.parametrize("name", PUBLIC)
def test_a_public_name_is_the_object_of_its_module_and_is_documented(name):
    current = gpt2core._RENAMED.get(name, name)
    module = importlib.import_module(f"gpt2core.{gpt2core._MODULE_OF[current]}")
    assert getattr(gpt2core, name) is getattr(module, current)
    assert inspect.getdoc(getattr(gpt2core, name))


def test_a_star_import_gives_the_public_names():
    namespace: dict[str, object] = {}
    exec("from gpt2core import *", namespace)
    assert {*PUBLIC} <= {*namespace}
    assert {*namespace} - {*PUBLIC} == {"__builtins__"}


def test_dir_lists_the_public_names_before_they_are_loaded():
    code = "import gpt2core; assert {*gpt2core.__all__, '__version__'} <= {*dir(gpt2core)}"
    assert modules_after(code) == {"gpt2core"}
    assert {*PUBLIC} <= {*dir(gpt2core)}


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'gpt2core' has no attribute 'gpt3'"):
        gpt2core.gpt3  # noqa: B018


def test_importing_the_package_loads_nothing_else_not_even_numpy():
    assert modules_after("import gpt2core") == {"gpt2core"}


def test_an_error_type_costs_its_own_module_only():
    got = modules_after("from gpt2core import RequestError")
    assert {name for name in got if name.startswith("gpt2core")} == {"gpt2core", "gpt2core.errors"}
    assert "numpy" not in got


def test_the_facade_loads_no_framework_no_hub_client_and_no_command_line():
    got = modules_after("from gpt2core import GPT2")
    assert "gpt2core.engine.engine" in got
    assert got & HEAVY == set()


def test_the_keywords_of_generate_are_the_fields_of_sampling_params():
    assert sorted(SamplingOptions.__annotations__) == sorted(
        [*(f.name for f in dataclasses.fields(SamplingParams)), "num_return_sequences"]
    )


def test_the_signatures_are_those_that_callers_write():
    loads = dict(inspect.signature(GPT2.from_pretrained).parameters)
    assert loads.pop("unknown").annotation is Never  # refused, with what others call so
    assert {name: p.default for name, p in loads.items() if name != "model"} == {
        "backend": "auto",
        "precision": "auto",
        "device": "cpu",
        "threads": None,
        "revision": None,
        "cache_dir": None,
        "local_files_only": False,
        "token": None,
        "adapter": None,
        "strict": False,
        "max_batch": 32,
        "cache_nbytes": 4 * 2**30,
        "speculation": "off",
        "draft_model": None,
        "prefix_cache": None,
        "on_progress": None,
    }
    assert all(p.kind is p.KEYWORD_ONLY for name, p in loads.items() if name != "model")
    for method in (GPT2.generate, GPT2.stream):
        assert [*inspect.signature(method).parameters] == [
            "self",
            "prompt",
            "params",
            "allow_special",
            "logits_processors",
            "stopping",
            "sampling",
        ]


def test_the_results_have_these_fields():
    assert [f.name for f in dataclasses.fields(Generation)] == [
        "text", "token_ids", "finish_reason", "prompt_tokens", "logprobs", "seed", "choice", "timing",
        "truncated_tokens", "score",
    ]  # fmt: skip
    assert [f.name for f in dataclasses.fields(Timing)] == [
        "ttft_s", "elapsed_s", "tokens_per_s", "proposed_tokens", "accepted_tokens",
    ]  # fmt: skip
    assert [f.name for f in dataclasses.fields(gpt2core.Score)] == [
        "token_ids", "logprobs", "perplexity", "bits_per_byte", "ranks", "entropies", "top",
        "boundary_logprobs", "text", "byte_offsets", "marks",
    ]  # fmt: skip
    assert [f.name for f in dataclasses.fields(gpt2core.Piece)] == [
        "text", "token_id", "logprobs", "finish_reason", "prompt", "choice", "truncated_tokens",
    ]  # fmt: skip
