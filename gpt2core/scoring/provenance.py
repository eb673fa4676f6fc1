"""What fixes the numbers: the model, the tokenizer, the arithmetic and the choices, as a line to cite."""

import hashlib
from pathlib import Path
from typing import Any, Final, Protocol

import numpy as np

from gpt2core import Backend, ModelConfig, __version__
from gpt2core.scoring.options import ResolvedOptions

_PROBE_TOKENS: Final = 64
_MODEL_FILES: Final = ("config.json", "*.safetensors", "*.safetensors.index.json")
_TOKENIZER_FILES: Final = ("tokenizer.json", "vocab.json", "merges.txt")


class LoadedModel(Protocol):
    """What is asked of a GPT2."""

    backend: Backend

    @property
    def config(self) -> ModelConfig: ...  # noqa: D102
    def logits(self, token_ids: list[int]) -> np.ndarray: ...  # noqa: D102


def digest_files(folder: Path, patterns: tuple[str, ...]) -> str:
    """SHA-256 over the names and contents of a folder's files."""
    digest = hashlib.sha256()
    for path in sorted({path for pattern in patterns for path in folder.glob(pattern)}):
        digest.update(path.name.encode() + b"\0")
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def probe_bits(model: LoadedModel, config: ModelConfig) -> str:
    """16 hexadecimal digits over the bits of the logits of a fixed sequence of 64 tokens.

    Two runs with the same digits use the same arithmetic on the same weights; on `native` every processor
    gives the same (docs/reproducibility.md).
    """
    count = min(_PROBE_TOKENS, config.n_positions)
    logits = model.logits([(31 * i + 7) % config.vocab_size for i in range(count)])
    return hashlib.sha256(logits.astype("<f4").tobytes()).hexdigest()[:16]


def describe_run(
    model: LoadedModel, name: str, folder: Path, options: ResolvedOptions, **more: Any
) -> dict[str, Any]:
    """Everything that fixes the numbers, as JSON holds it."""
    return {
        "gpt2core": __version__,
        "model": name,
        "model_sha256": digest_files(folder, _MODEL_FILES),
        "tokenizer_sha256": digest_files(folder, _TOKENIZER_FILES),
        "backend": model.backend.name,
        "precision": getattr(model.backend, "precision", "float32"),
        "bits": probe_bits(model, model.config),
        "bos": options.bos,
        "end": options.end,
        "context": options.context,
        "stride": options.stride,
        "allow_special": options.allow_special,
        "leading_space": options.leading_space,
        **more,
    }


def cite(head: dict[str, Any]) -> str:
    """The line to cite."""
    bos = "none" if head["bos"] is None else f"token {head['bos']}"
    return (
        f"gpt2core {head['gpt2core']}, {head['model']} (model {head['model_sha256'][:12]}, tokenizer "
        f"{head['tokenizer_sha256'][:12]}), {head['backend']} {head['precision']} (bits {head['bits']}), "
        f"bos {bos}, context {head['context']}, stride {head['stride']}"
    )
