"""GPT-2-family language models from one Hugging Face checkpoint on pluggable backends.

    from gpt2core import GPT2

    model = GPT2.from_pretrained("demo")
    print(model.generate("Once upon a time", max_new_tokens=50).text)

Importing the package imports nothing else: each name below is loaded when it is first used.
"""

TYPE_CHECKING = False  # type checkers take it for true; `typing` itself would cost more than all of the rest
if TYPE_CHECKING:
    from gpt2core.backends.base import Backend, BackendFactory, Cache, Traces
    from gpt2core.batch import Batch
    from gpt2core.checkpoint import Checkpoint, open_checkpoint
    from gpt2core.config import ModelConfig
    from gpt2core.engine import Engine
    from gpt2core.errors import (
        BackendError,
        BackendUnavailableError,
        CheckpointError,
        ContextLengthError,
        Gpt2CoreError,
        InvalidSamplingError,
        NumericalError,
        RequestError,
        UnsupportedCheckpointError,
    )
    from gpt2core.generation import Generation, Timing
    from gpt2core.model import GPT2
    from gpt2core.params import SamplingParams
    from gpt2core.sampling import TokenLogprob
    from gpt2core.scoring import Score
    from gpt2core.sequence import Piece, Sequence, Update
    from gpt2core.tokenizer import Tokenizer
    from gpt2core.trace import Trace
    from gpt2core.weights import Weights

__version__ = "0.1.0"

_MODULE_OF = {
    "GPT2": "model",
    "Backend": "backends.base",
    "BackendError": "errors",
    "BackendFactory": "backends.base",
    "BackendUnavailableError": "errors",
    "Batch": "batch",
    "Cache": "backends.base",
    "Checkpoint": "checkpoint",
    "CheckpointError": "errors",
    "ContextLengthError": "errors",
    "Engine": "engine",
    "Generation": "generation",
    "Gpt2CoreError": "errors",
    "InvalidSamplingError": "errors",
    "ModelConfig": "config",
    "NumericalError": "errors",
    "Piece": "sequence",
    "RequestError": "errors",
    "SamplingParams": "params",
    "Score": "scoring",
    "Sequence": "sequence",
    "Timing": "generation",
    "TokenLogprob": "sampling",
    "Tokenizer": "tokenizer",
    "Trace": "trace",
    "Traces": "backends.base",
    "UnsupportedCheckpointError": "errors",
    "Update": "sequence",
    "Weights": "weights",
    "open_checkpoint": "checkpoint",
}

__all__ = [
    "GPT2",
    "Backend",
    "BackendError",
    "BackendFactory",
    "BackendUnavailableError",
    "Batch",
    "Cache",
    "Checkpoint",
    "CheckpointError",
    "ContextLengthError",
    "Engine",
    "Generation",
    "Gpt2CoreError",
    "InvalidSamplingError",
    "ModelConfig",
    "NumericalError",
    "Piece",
    "RequestError",
    "SamplingParams",
    "Score",
    "Sequence",
    "Timing",
    "TokenLogprob",
    "Tokenizer",
    "Trace",
    "Traces",
    "UnsupportedCheckpointError",
    "Update",
    "Weights",
    "open_checkpoint",
]


def __getattr__(name: str) -> object:
    module = _MODULE_OF.get(name)
    if module is None:
        raise AttributeError(f"module 'gpt2core' has no attribute {name!r}")
    from importlib import import_module

    value = globals()[name] = getattr(import_module(f"gpt2core.{module}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
