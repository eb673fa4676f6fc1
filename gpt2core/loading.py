"""From a checkpoint's name to a backend that holds its weights, and to its tokenizer."""

import os
from dataclasses import dataclass, replace

from gpt2core import backends
from gpt2core.backends.base import Backend
from gpt2core.checkpoint.open import Source, read_checkpoint
from gpt2core.engine.draft import check_draft
from gpt2core.errors import RequestError
from gpt2core.tokenizer.tokenizer import Tokenizer


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


def load_models(
    source: Source,
    draft_model: str | os.PathLike[str] | None,
    *,
    backend: str,
    precision: str,
    device: str,
    threads: int | None,
) -> Loaded:
    """A model and, where one is named, its draft model. Arguments and errors: see `GPT2.from_pretrained`.

    Raises:
        RequestError: the draft model's tokens are not the model's.
    """

    def load(source: Source) -> tuple[Backend, Tokenizer]:
        checkpoint = read_checkpoint(source)
        tokenizer = Tokenizer.from_folder(checkpoint.tokenizer_folder)
        made = backends.create_backend(
            backend, checkpoint.stored, device=device, threads=threads, precision=precision
        )
        return made, tokenizer

    target, tokenizer = load(source)
    draft = None
    try:
        if draft_model is not None:
            draft, own = load(replace(source, model=draft_model, revision=None, adapter=None))
            check_draft(target.config, draft.config)
            if any(own.content(i) != tokenizer.content(i) for i in range(target.config.vocab_size)):
                raise RequestError(
                    f"the draft model {os.fspath(draft_model)!r} has another tokenizer than the model, so "
                    "its tokens mean other texts; take a draft model with the same tokenizer"
                )
    except BaseException:
        Loaded(target, tokenizer, draft).close()
        raise
    return Loaded(target, tokenizer, draft)
