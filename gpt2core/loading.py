"""From a checkpoint's name to a backend that holds its weights, and to its tokenizer."""

import inspect
import os
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gpt2core import backends
from gpt2core.backends.base import Backend, LoadProgress
from gpt2core.checkpoint.in_memory import read_transformers
from gpt2core.checkpoint.open import Source, read_checkpoint
from gpt2core.checkpoint.rounded import round_or_read
from gpt2core.engine.draft import check_draft
from gpt2core.errors import CheckpointError, CheckpointWarning, RequestError, did_you_mean
from gpt2core.foreign_names import LOADING
from gpt2core.tokenizer.tokenizer import Tokenizer
from gpt2core.weights import Weights


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a model came from.

    Attributes:
        name: as the caller called it, for messages.
        weights: gives the weights before they are rounded to the backend's precision; reads them again where
            they were in a file, so that nothing is held twice.
        no_tokenizer: why there is no tokenizer; "" where there is one.
    """

    name: str
    weights: Callable[[], Weights]
    no_tokenizer: str = ""

    def rounded(self, precision: str) -> Weights:
        """The weights in a precision."""
        weights = self.weights()
        return weights if weights.precision == precision else round_or_read(weights, precision)


@dataclass(frozen=True, slots=True)
class Loaded:
    """What `GPT2.from_pretrained` loads; whoever holds it closes it."""

    backend: Backend
    tokenizer: Tokenizer | None
    draft: Backend | None
    origin: Origin

    def close(self) -> None:
        """Free the weights."""
        self.backend.close()
        if self.draft is not None:
            self.draft.close()


def load_models(
    source: Source,
    draft_model: str | os.PathLike[str] | None,
    *,
    backend: str,
    precision: str,
    device: str,
    threads: int | None,
    on_progress: LoadProgress | None = None,
) -> Loaded:
    """A model and, where one is named, its draft model. Arguments and errors: see `GPT2.from_pretrained`.

    Raises:
        RequestError: the draft model's tokens are not the model's.
    """

    def load(source: Source) -> tuple[Backend, Tokenizer | None, str]:
        checkpoint = read_checkpoint(source)
        tokenizer, missing = read_tokenizer_if_any(checkpoint.tokenizer_folder)
        made = backends.create_backend(
            backend,
            checkpoint.stored,
            device=device,
            threads=threads,
            precision=precision,
            on_progress=on_progress,
        )
        return made, tokenizer, missing

    target, tokenizer, missing = load(source)
    if missing:
        warnings.warn(f"only token ids can be used, no text: {missing}", CheckpointWarning, stacklevel=3)
    origin = Origin(os.fspath(source.model), lambda: read_checkpoint(source).stored, missing)
    draft = None
    try:
        if draft_model is not None:
            draft, own, _ = load(replace(source, model=draft_model, revision=None, adapter=None))
            check_draft(target.config, draft.config)
            if own and tokenizer and not _same_tokens(own, tokenizer, target.config.vocab_size):
                raise RequestError(
                    f"the draft model {os.fspath(draft_model)!r} has another tokenizer than the model, so "
                    "its tokens mean other texts; take a draft model with the same tokenizer"
                )
    except BaseException:
        Loaded(target, tokenizer, draft, origin).close()
        raise
    return Loaded(target, tokenizer, draft, origin)


def load_transformers(
    hf_model: Any,
    tokenizer: Any,
    *,
    strict: bool,
    backend: str,
    precision: str,
    device: str,
    threads: int | None,
) -> Loaded:
    """A model and a tokenizer that are in memory. Arguments and errors: see `GPT2.from_transformers`."""
    read = None if tokenizer is None else Tokenizer.from_object(tokenizer)
    weights = read_transformers(hf_model, strict=strict)
    made = backends.create_backend(backend, weights, device=device, threads=threads, precision=precision)
    return Loaded(made, read, None, Origin(type(hf_model).__name__, lambda: weights))


def read_tokenizer_if_any(folder: Path) -> tuple[Tokenizer | None, str]:
    """A folder's tokenizer; or None, and why: it has none, or none that can be read."""
    try:
        return Tokenizer.from_folder(folder), ""
    except CheckpointError as error:
        return None, str(error)


def _same_tokens(a: Tokenizer, b: Tokenizer, vocab_size: int) -> bool:
    return all(a.content(i) == b.content(i) for i in range(vocab_size))


def check_unknown(names: Iterable[str], function: Callable[..., object]) -> None:
    """Refuse keywords that `function` does not have.

    Raises:
        RequestError: naming the nearest that it has, or what another library's option is called here.
    """
    for name in names:
        known = [p.name for p in inspect.signature(function).parameters.values() if p.kind is p.KEYWORD_ONLY]
        remedy = LOADING.get(name) or did_you_mean(name, known).removeprefix("; ")
        raise RequestError(f"unknown option {name!r}; {remedy or 'known are ' + ', '.join(known)}")
