"""For tests of code that uses gpt2core, and of backends: a fake, random checkpoints, the conformance suite.

from gpt2core.testing import FakeBackend, check_backend, conformance_tests, random_checkpoint

folder = random_checkpoint(tmp_path)              # a tiny GPT-2 in Hugging Face layout
backend = FakeBackend(random_config())            # logits without a model
check_backend(MyBackend)                          # the whole suite, or check by check:

@pytest.mark.parametrize("test", conformance_tests(MyBackend), ids=lambda test: test.__name__)
def test_conformance(test):
test()
"""

from gpt2core.testing.conformance import CONFORMANCE_CHECKS, check_backend, conformance_tests
from gpt2core.testing.fake import FakeBackend, FakeCache, hashed, scripted
from gpt2core.testing.random_model import SIZES, VARIANTS, random_checkpoint, random_config, random_weights
from gpt2core.testing.subject import NotApplicable

__all__ = [
    "CONFORMANCE_CHECKS",
    "SIZES",
    "VARIANTS",
    "FakeBackend",
    "FakeCache",
    "NotApplicable",
    "check_backend",
    "conformance_tests",
    "hashed",
    "random_checkpoint",
    "random_config",
    "random_weights",
    "scripted",
]
