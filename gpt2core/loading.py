"""From a checkpoint's name to a backend that holds its weights, and to its tokenizer."""

import os
from dataclasses import dataclass
from typing import Any

from gpt2core import backends
from gpt2core.backends.base import Backend
from gpt2core.checkpoint.open import open_checkpoint
from gpt2core.engine.draft import check_draft
from gpt2core.errors import RequestError
from gpt2core.tokenizer.tokenizer import Tokenizer

Name = str | os.PathLike[str]


@dataclass(frozen=True, slots=True)
class Loaded:
    """What `GPT2.from_pretrained` loads; whoever holds it closes it."""

    backend: Backend
    tokenizer: Tokenizer
    draft: Backend | None

    def close(self) -> None:
        """Free the weights."""
        self.backend.close()
        if self.draft is not None:
            self.draft.close()


def load_models(model: Name, draft_model: Name | None, *, revision: str | None, **how: Any) -> Loaded:
    """A model and, where one is named, its draft model. Arguments and errors: see `GPT2.from_pretrained`.

    Raises:
        RequestError: the draft model's tokens are not the model's.
    """
    backend, tokenizer = _load(model, revision=revision, **how)
    draft = None
    try:
        if draft_model is not None:
            draft, own = _load(draft_model, revision=None, **how)
            check_draft(backend.config, draft.config)
            if any(own.content(i) != tokenizer.content(i) for i in range(backend.config.vocab_size)):
                raise RequestError(
                    f"the draft model {os.fspath(draft_model)!r} has another tokenizer than the model, so "
                    "its tokens mean other texts; take a draft model with the same tokenizer"
                )
    except BaseException:
        Loaded(backend, tokenizer, draft).close()
        raise
    return Loaded(backend, tokenizer, draft)


def _load(
    name: Name,
    *,
    revision: str | None,
    backend: str,
    precision: str,
    device: str,
    threads: int | None,
    **where: Any,
) -> tuple[Backend, Tokenizer]:
    checkpoint = open_checkpoint(name, revision=revision, **where)
    tokenizer = Tokenizer.from_folder(checkpoint.folder)
    made = backends.create_backend(
        backend, checkpoint.stored, device=device, threads=threads, precision=precision
    )
    return made, tokenizer
