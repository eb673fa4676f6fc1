"""GPT-2-family language models from one Hugging Face checkpoint on pluggable backends.

    from gpt2core import GPT2

    model = GPT2.from_pretrained("demo")
    print(model.generate("Once upon a time", max_new_tokens=50).text)

Importing the package imports nothing else: each name below is loaded when it is first used.
"""

TYPE_CHECKING = False  # type checkers take it for true; `typing` itself would cost more than all of the rest
if TYPE_CHECKING:
    from gpt2core._version import __version__ as __version__
    from gpt2core.async_model import AsyncGPT2
    from gpt2core.backends.base import (
        Backend,
        BackendFactory,
        Cache,
        Embeds,
        PortableBits,
        ScoresTokens,
        Traces,
    )
    from gpt2core.backends.export import export_onnx
    from gpt2core.batch import Batch
    from gpt2core.chat_template import ChatTemplate
    from gpt2core.checkpoint.open import Checkpoint, open_checkpoint
    from gpt2core.config import ModelConfig
    from gpt2core.engine.engine import Engine
    from gpt2core.engine.request import Piece, Request, ScoreReader, Update
    from gpt2core.errors import (
        BackendError,
        BackendUnavailableError,
        CheckpointError,
        CheckpointWarning,
        ContextLengthError,
        Gpt2CoreError,
        InvalidSamplingError,
        NumericalError,
        RequestError,
        UnsupportedCheckpointError,
    )
    from gpt2core.generation import Generation, Timing
    from gpt2core.model import GPT2
    from gpt2core.sampling.draw import TokenLogprob
    from gpt2core.sampling.params import SamplingParams
    from gpt2core.scoring.score import Alternative, Score, TokenScore
    from gpt2core.scoring.words import WordScore
    from gpt2core.token_scores import TokenQuery, TokenScores
    from gpt2core.tokenizer.tokenizer import Tokenizer
    from gpt2core.trace import Trace
    from gpt2core.weights import Weights

    Sequence = Request

_MODULE_OF = {
    "GPT2": "model",
    "Alternative": "scoring.score",
    "AsyncGPT2": "async_model",
    "Backend": "backends.base",
    "BackendError": "errors",
    "BackendFactory": "backends.base",
    "BackendUnavailableError": "errors",
    "Batch": "batch",
    "Cache": "backends.base",
    "ChatTemplate": "chat_template",
    "Checkpoint": "checkpoint.open",
    "CheckpointError": "errors",
    "CheckpointWarning": "errors",
    "ContextLengthError": "errors",
    "Embeds": "backends.base",
    "Engine": "engine.engine",
    "Generation": "generation",
    "Gpt2CoreError": "errors",
    "InvalidSamplingError": "errors",
    "ModelConfig": "config",
    "NumericalError": "errors",
    "Piece": "engine.request",
    "PortableBits": "backends.base",
    "Request": "engine.request",
    "RequestError": "errors",
    "SamplingParams": "sampling.params",
    "Score": "scoring.score",
    "ScoreReader": "engine.request",
    "ScoresTokens": "backends.base",
    "Timing": "generation",
    "TokenLogprob": "sampling.draw",
    "TokenQuery": "token_scores",
    "TokenScore": "scoring.score",
    "TokenScores": "token_scores",
    "Tokenizer": "tokenizer.tokenizer",
    "Trace": "trace",
    "Traces": "backends.base",
    "UnsupportedCheckpointError": "errors",
    "Update": "engine.request",
    "Weights": "weights",
    "WordScore": "scoring.words",
    "__version__": "_version",
    "export_onnx": "backends.export",
    "open_checkpoint": "checkpoint.open",
}

_RENAMED = {"Sequence": "Request"}
"""Names that a later one has replaced: both are the same object."""

__all__ = [
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


def __getattr__(name: str) -> object:
    module = _MODULE_OF.get(_RENAMED.get(name, name))
    if module is None:
        raise AttributeError(f"module 'gpt2core' has no attribute {name!r}")
    from importlib import import_module

    value = globals()[name] = getattr(import_module(f"gpt2core.{module}"), _RENAMED.get(name, name))
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, "__version__"})
