"""Shapes in signatures are checked while the tests run, in every module that has them."""

import ast
import importlib

import numpy as np
import pytest
from jaxtyping import TypeCheckError
from shape_checks import PACKAGE, modules_with_shapes

from gpt2core.batch import Batch
from gpt2core.reference import reference_logits
from gpt2core.testing import random_config, random_weights
from gpt2core.trace import Trace


def test_every_module_that_imports_shapes_is_hooked():
    importers = set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module == "gpt2core._shapes":
                importers.add(".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts))
    assert importers == set(modules_with_shapes())
    assert len(importers) > 20


@pytest.mark.parametrize("name", modules_with_shapes())
def test_a_module_with_shapes_was_loaded_by_the_hook_that_checks_them(name):
    module = importlib.import_module(name)
    assert type(module.__spec__.loader).__name__ == "_JaxtypingLoader"


def test_an_array_of_another_shape_or_type_is_refused():
    weights = random_weights(random_config())
    trace = Trace(np.zeros((4, 5, 32)), np.zeros((3, 4, 5, 5)), np.zeros((5, 257)))
    for arrays in (
        (trace.hidden_states[0], trace.attentions, trace.logits),
        (trace.hidden_states, trace.attentions, trace.logits[:4]),
    ):
        with pytest.raises(TypeCheckError):
            Trace(*arrays)
    assert len(Batch.of([([1, 2], 0, 0)]).positions) == 2
    with pytest.raises(TypeCheckError):  # a result
        Batch.positions.fget(Batch.of([([1, 2], 0, 0)]).__class__(*[np.ones(2, np.int64)] * 5))
    assert reference_logits(weights, [1, 2]).shape == (2, 257)
