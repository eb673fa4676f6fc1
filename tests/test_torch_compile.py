"""The PyTorch backend with what stands between its products compiled."""

import numpy as np
import pytest
import torch

from gpt2core.backends.torch.backend import TorchBackend
from gpt2core.backends.torch.products import ACTIVATIONS, EAGER
from gpt2core.batch import Batch
from gpt2core.errors import RequestError
from gpt2core.reference import reference_logits
from gpt2core.testing import random_config, random_weights
from gpt2core.testing.conformance import TOLERANCE

# PyTorch's compiler uses parts of PyTorch that PyTorch calls deprecated.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
TINY = random_weights(random_config())


@pytest.mark.parametrize(("value", "compiled"), [(None, False), ("0", False), ("1", True)])
def test_the_environment_decides_whether_to_compile(monkeypatch, value, compiled):
    if value is not None:
        monkeypatch.setenv("GPT2CORE_TORCH_COMPILE", value)
    assert (TorchBackend(TINY)._pieces is not EAGER) is compiled  # compiling itself waits for a pass
    assert TorchBackend(TINY, compiled=False)._pieces is EAGER


def test_a_bad_variable_is_refused(monkeypatch):
    monkeypatch.setenv("GPT2CORE_TORCH_COMPILE", "yes")
    with pytest.raises(RequestError, match="GPT2CORE_TORCH_COMPILE is 'yes'; use '0' or '1'"):
        TorchBackend(TINY)


def test_the_compiled_pieces_compute_what_the_others_do():
    rng, compiled = torch.Generator().manual_seed(0), EAGER.compiled()
    for rows in (1, 5, 24):  # one compilation serves all but one row
        x, y = torch.randn(rows, 64, generator=rng), torch.randn(rows, 64, generator=rng)
        weight, bias = torch.rand(64, generator=rng), torch.rand(64, generator=rng)
        (got, got_scale), (want, want_scale) = compiled.rounded(x, 127), EAGER.rounded(x, 127)
        torch.testing.assert_close(got_scale, want_scale)
        assert int((got.int() - want.int()).abs().max()) <= 1  # of two equally near numbers
        act = ACTIVATIONS["gelu_new"]
        finished = [one.finished(y.clone(), want_scale, bias, act) for one in (compiled, EAGER)]
        torch.testing.assert_close(*finished)
        for mine, theirs in zip(
            compiled.added(x, y.clone(), weight, bias, 1e-5),
            EAGER.added(x, y.clone(), weight, bias, 1e-5),
            strict=True,
        ):
            torch.testing.assert_close(mine, theirs)


def test_a_compiled_backend_computes_the_references_logits():
    backend = TorchBackend(TINY, compiled=True)
    cache, tokens = backend.new_cache(1, 16), [3, 1, 4, 1, 5, 9]
    got = [backend.forward(Batch.of([(tokens[:5], 0, 0)]), cache)[0]]
    got.append(backend.forward(Batch.of([(tokens[5:], 5, 0)]), cache)[0])
    np.testing.assert_allclose(got, reference_logits(TINY, tokens)[4:], rtol=0, atol=TOLERANCE)
