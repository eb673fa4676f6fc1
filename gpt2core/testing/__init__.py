"""For tests of code that uses gpt2core, and of backends: random checkpoints and the conformance suite.

from gpt2core.testing import CONFORMANCE_CHECKS, check_backend, random_checkpoint

folder = random_checkpoint(tmp_path)              # a tiny GPT-2 in Hugging Face layout
check_backend(MyBackend)                          # the whole suite, or check by check:

@pytest.mark.parametrize("check", CONFORMANCE_CHECKS, ids=lambda check: check.__name__)
def test_conformance(check):
    check_backend(MyBackend, checks=[check])
"""

from gpt2core.testing.conformance import CONFORMANCE_CHECKS, check_backend
from gpt2core.testing.random_model import SIZES, VARIANTS, random_checkpoint, random_config, random_weights

__all__ = [
    "CONFORMANCE_CHECKS",
    "SIZES",
    "VARIANTS",
    "check_backend",
    "random_checkpoint",
    "random_config",
    "random_weights",
]
