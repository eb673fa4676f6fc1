"""Session: a text that grows, whose beginning is not read again.

A session keeps its tokens and nothing else. What was read of them stays in the engine's prefix cache, from
which each call goes on. So a fork is a copy of a list, and where the cache has lost a text it is read again:
slower, and on `native` the same to the last bit.
"""

# T tokens of a session, P of a further text

import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from functools import cached_property
from pathlib import Path
from typing import Any, Final, Unpack

import numpy as np

from gpt2core.backends.base import MovesCache, PortableBits
from gpt2core.backends.digest import probe_digest
from gpt2core.engine.engine import Engine
from gpt2core.engine.request import Piece, Request, ScoreReader
from gpt2core.engine.step_loop import all_done, raise_error
from gpt2core.errors import ContextLengthError, RequestError, in_short
from gpt2core.generation import Generation, make_generation
from gpt2core.prompts import OneChoiceOptions, Prompt, encode_prompt, merge_options
from gpt2core.sampling.params import SamplingParams
from gpt2core.scoring.score import Score, mean_perplexity
from gpt2core.session_file import read_session, write_session
from gpt2core.token_ids import check_token_ids
from gpt2core.token_scores import TokenScores

_READ_ONLY: Final = SamplingParams(max_new_tokens=0)
_TRIES: Final = 3


class HoldsSessions:
    """What a model needs, and gets, for sessions."""

    engine: Engine
    _run_until: Callable[[Callable[[], bool]], None]

    def _submitted(
        self, prompts: list[list[int]], params: Sequence[SamplingParams], **options: Any
    ) -> AbstractContextManager[list[Request]]:
        raise NotImplementedError

    def _pieces(self, submitted: AbstractContextManager[list[Request]]) -> Iterator[Piece]:
        raise NotImplementedError

    def session(self, text: Prompt = "", *, allow_special: bool = False) -> "Session":
        """A text that grows: `append`, `generate`, `stream`, `score`, `fork`, `rewind`, `save`.

        Args:
            text: what it begins with, a text or token ids; may be empty.
            allow_special: as of `generate`.

        Raises:
            RequestError: it is no text, or the model is closed.
            ContextLengthError: it exceeds the context.
        """
        session = Session(self, [], "")
        return (
            session
            if isinstance(text, str) and not text
            else session.append(text, allow_special=allow_special)
        )

    def load_session(self, path: str | os.PathLike[str]) -> "Session":
        """A session that `Session.save` has written, here or in another process.

        What was read of it is read from the file, as far as a slot is free. On `native` it goes on with the
        bits with which it would have gone on where it was saved.

        Raises:
            CheckpointError: the file cannot be read, is damaged, or is of another model, backend, precision,
                version of the backend's bits or of the format; says which.
            RequestError: the model is closed.
            BackendError: the backend failed.
        """
        token_ids, positions = read_session(Path(path), self._session_facts)
        if token_ids:
            self.engine.check(token_ids, _READ_ONLY)
        # A key of its own: what a file says shall never be taken for what this model has read itself.
        key = f"session {os.urandom(8).hex()}"
        if positions is not None:
            self.engine.write_prefix(token_ids[: positions.shape[3]], positions, key)
        return Session(self, token_ids, key)

    @cached_property
    def _session_facts(self) -> dict[str, str]:
        """What a file must agree with."""
        backend = self.engine.backend
        return {
            "backend": backend.name,
            "precision": str(getattr(backend, "precision", "float32")),
            "bits_version": str(backend.bits_version) if isinstance(backend, PortableBits) else "none",
            "model": self.engine.between_steps(lambda: probe_digest(backend)).hex()[:32],
        }


class Session:
    """A text that grows; made by `GPT2.session`. For one thread at a time; a fork is for another.

    With a prefix cache (on `native` by default) a call reads only what is new since the last one.
    """

    def __init__(self, model: HoldsSessions, token_ids: list[int], cache_key: str) -> None:
        self._model = model
        self._token_ids = token_ids
        self._cache_key = cache_key

    def __len__(self) -> int:
        """How many tokens it has: the position at which it goes on."""
        return len(self._token_ids)

    def __repr__(self) -> str:
        return f"<Session of {len(self)} tokens>"

    @property
    def token_ids(self) -> list[int]:
        """Its T tokens, a copy."""
        return self._token_ids.copy()

    @property
    def text(self) -> str:
        """What its tokens stand for.

        Raises:
            RequestError: the model has no tokenizer.
        """
        tokenizer = self._model.engine.tokenizer
        if tokenizer is None:
            raise RequestError("this model has no tokenizer; take the session's token_ids")
        return tokenizer.decode(self._token_ids)

    def append(self, text: Prompt, *, allow_special: bool = False) -> "Session":
        """Go on with a text, or token ids; it is read by the call after this. Returns the session.

        The text is turned into tokens by itself: what comes before it does not change them.

        Raises:
            RequestError: it is empty or no text.
            ContextLengthError: the session would exceed the context; it stays as it was.
        """
        ids = self._encode(text, allow_special)
        self._check_length(len(self) + len(ids))
        self._token_ids += ids
        return self

    def generate(
        self, params: SamplingParams | None = None, **sampling: Unpack[OneChoiceOptions]
    ) -> Generation:
        """Go on with what the model writes, all tokens of it, also those of a stop string.

        Arguments, result and errors are those of `GPT2.generate` with the session as the prompt; `n` is 1.
        """
        params = self._merge(params, sampling)
        with self._model._submitted([self.token_ids], [params], cache_key=self._cache_key) as requests:
            self._model._run_until(lambda: all_done(requests))
        raise_error(requests)
        generation = make_generation(requests[0])
        self._token_ids += generation.token_ids
        return generation

    def stream(
        self, params: SamplingParams | None = None, **sampling: Unpack[OneChoiceOptions]
    ) -> Iterator[Piece]:
        """The same piece by piece, as `GPT2.stream`; leaving early keeps the tokens that came."""
        params = self._merge(params, sampling)
        ids, _ = self._model.engine.check(self._token_ids, params)
        options = {"stream": True, "cache_key": self._cache_key}
        return self._keep(self._model._pieces(self._model._submitted([ids], [params], **options)))

    def _keep(self, pieces: Iterator[Piece]) -> Iterator[Piece]:
        length = len(self)
        for piece in pieces:
            if len(self) != length:
                raise RequestError(
                    f"the session has {len(self)} tokens, and its stream is at {length}; leave a stream, or "
                    "fork the session, before it goes on otherwise"
                )
            if piece.token_id is not None:
                self._token_ids.append(piece.token_id)
                length += 1
            yield piece

    def score(self, text: Prompt, *, allow_special: bool = False) -> Score:
        """How well the model predicts a text after the session, which stays as it is.

        Returns:
            A `Score` of the P tokens of the text, all of them predicted.

        Raises:
            RequestError: the session has no token yet, or the text is empty.
            ContextLengthError: both together exceed the context.
            BackendError: the backend failed.
        """
        ids = self._encode(text, allow_special)
        start = len(self) - 1
        if start < 0:
            raise RequestError(
                "the session has no tokens that could predict a text; append some, or take GPT2.score"
            )
        self._check_length(len(self) + len(ids))
        scores = TokenScores.empty(len(ids), 0, False)

        def read(position: int, found: TokenScores) -> None:
            scores.put(slice(position - start, position - start + len(found.logprobs)), found)

        sequence = [*self._token_ids, *ids]
        reader = ScoreReader(targets=sequence[1:], top=0, members=None, read=read)
        options = {"logits_from": start, "on_scores": reader, "cache_key": self._cache_key}
        with self._model._submitted([sequence[:-1]], [_READ_ONLY], **options) as requests:
            self._model._run_until(lambda: all_done(requests))
        raise_error(requests)
        whole = text if isinstance(text, str) else None
        located, spans = "", [(0, 0)] * len(ids)  # nobody knows without a tokenizer
        if self._model.engine.tokenizer is not None:
            located, spans = self._model.engine.tokenizer.locate(ids, whole, allow_special=allow_special)
        nbytes = len(located.encode())
        bits = -math.fsum(scores.logprobs) / math.log(2)
        return Score(
            token_ids=ids,
            logprobs=scores.logprobs,
            perplexity=mean_perplexity(scores.logprobs),
            bits_per_byte=bits / nbytes if nbytes and whole is not None else None,
            ranks=scores.ranks,
            entropies=scores.entropies,
            top=None,
            boundary_logprobs=None,
            text=located,
            byte_offsets=spans,
            marks=None,
        )

    def fork(self) -> "Session":
        """Another session with the same tokens, which goes on by itself. Copies a list and reads nothing."""
        return Session(self._model, self.token_ids, self._cache_key)

    def rewind(self, position: int) -> "Session":
        """Forget the tokens from `position` on; `len(session)` forgets none. Returns the session.

        Raises:
            RequestError: it is no position from 0 to the session's length.
        """
        if isinstance(position, bool) or not isinstance(position, int) or not 0 <= position <= len(self):
            raise RequestError(
                f"position is {in_short(position)}; this session goes back to one from 0 to {len(self)}"
            )
        del self._token_ids[position:]
        return self

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the session, with what was read of it, for `GPT2.load_session`.

        The file is as large as the tokens' part of the cache. On a backend without the capability
        `MovesCache`, or without a prefix cache, it holds the tokens alone, and they are read again once it is
        loaded.

        Raises:
            CheckpointError: the file cannot be written.
            BackendError: the backend failed.
        """
        write_session(Path(path), self._model._session_facts, self.token_ids, self._read_positions())

    def _read_positions(self) -> np.ndarray | None:
        """Keys and values of all tokens but the last; None where they are not to be had."""
        engine, ids = self._model.engine, self._token_ids[:-1]
        if not ids or engine.prefixes is None or not isinstance(engine.backend, MovesCache):
            return None
        positions = engine.read_prefix(ids, self._cache_key)
        for _ in range(_TRIES):  # others may need the slot between reading a text and reading its slot
            if positions is not None:
                break
            with self._model._submitted([ids], [_READ_ONLY], cache_key=self._cache_key) as requests:
                self._model._run_until(lambda requests=requests: all_done(requests))  # type: ignore[misc]
            raise_error(requests)
            positions = engine.read_prefix(ids, self._cache_key)
        return positions

    def _encode(self, text: Prompt, allow_special: bool) -> list[int]:
        engine = self._model.engine
        if isinstance(text, str):
            if engine.tokenizer is None:
                raise RequestError("text needs a tokenizer, which this model lacks; give token ids")
            text = encode_prompt(
                text, engine.tokenizer, engine.config.n_positions, allow_special=allow_special
            )
        return check_token_ids(text, engine.config.vocab_size)

    def _check_length(self, length: int) -> None:
        context = self._model.engine.config.n_positions
        if length > context:
            raise ContextLengthError(
                f"the session would have {length} tokens; this model's context is {context}; append less, or "
                "rewind it first"
            )

    def _merge(self, params: SamplingParams | None, sampling: Any) -> SamplingParams:
        params = merge_options(params, sampling)
        if params.n != 1:
            raise RequestError(
                f"n is {params.n}; a session goes on in one way, so give n=1, and fork it for others"
            )
        if params.overflow != "error":
            raise RequestError(
                f"overflow is {params.overflow!r}; a session's text is whole; rewind it where it is too long"
            )
        return params
