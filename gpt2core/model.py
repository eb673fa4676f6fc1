"""GPT2: the facade that people import. Thread-safe: threads that call it at the same time share one batch."""

# T tokens, V vocabulary, n positions of one chunk

import os
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, Literal, Never, Self, Unpack, overload

import numpy as np

from gpt2core._shapes import Float32
from gpt2core.backends.base import Backend, LoadProgress
from gpt2core.checkpoint.open import Source, save_model
from gpt2core.engine.beams import check_streams
from gpt2core.engine.engine import CACHE_NBYTES, Engine
from gpt2core.engine.request import LogitsReader, Piece, Request
from gpt2core.engine.speculation import SpeculationMode
from gpt2core.engine.steering import LogitsProcessor, StoppingFunction, take_functions
from gpt2core.engine.step_loop import (
    StepLoop,
    all_done,
    has_news,
    raise_error,
    run_waiting,
    take_pieces,
)
from gpt2core.errors import RequestError, in_short
from gpt2core.generation import Generation, Timing, make_generation
from gpt2core.loading import Loaded, Origin, check_unknown, load_models, load_transformers
from gpt2core.prompts import (
    OneChoiceOptions,
    Params,
    Prompt,
    Prompts,
    SamplingOptions,
    check_prompts,
    merge_options_of_each,
    split_prompts,
)
from gpt2core.sampling.draw import SamplingParams
from gpt2core.scorable import Scorable
from gpt2core.scoring.score import Score
from gpt2core.session import HoldsSessions
from gpt2core.token_ids import TokenIds, check_token_ids
from gpt2core.tokenizer.tokenizer import Tokenizer

__all__ = ["GPT2", "Generation", "Piece", "Prompt", "SamplingOptions", "Score", "Timing"]

_READ_ONLY = SamplingParams(max_new_tokens=0)


class GPT2(Scorable, HoldsSessions):
    """A model, ready to generate.

    Every method may be called from several threads at once; each of their calls is one more row of the same
    batch. Threads that wait take turns in running the steps, so there is no thread in the background.

    Args:
        backend: what computes; `close` closes it.
        tokenizer: the checkpoint's; without one there are token ids only, no text.
        max_batch: most texts that are generated at once; further ones wait for their turn.
        cache_nbytes: limit on the KV cache, bytes, counted in float32; may lower `max_batch`.
        speculation, draft, prefix_cache: as of `Engine`; `close` closes the draft model too.

    Attributes:
        engine: what runs the requests. Its `submit`, `cancel` and `step` may be used beside these methods.

    Raises:
        RequestError: a limit is too low, or the model cannot speculate so.
    """

    def __init__(
        self,
        backend: Backend,
        tokenizer: Tokenizer | None,
        *,
        max_batch: int = 32,
        cache_nbytes: int = CACHE_NBYTES,
        speculation: SpeculationMode = "off",
        draft: Backend | None = None,
        prefix_cache: bool | None = None,
    ) -> None:
        self.backend = backend
        self._tokenizer = tokenizer
        self._origin: Origin | None = None
        self._draft = draft
        limits = {"max_slots": max_batch, "cache_nbytes": cache_nbytes}
        self.engine = Engine(
            backend, tokenizer, **limits, speculation=speculation, draft=draft, prefix_cache=prefix_cache
        )
        self._run_until = StepLoop(self.engine).run_until

    @classmethod
    def from_pretrained(
        cls,
        model: str | os.PathLike[str],
        *,
        backend: str = "auto",
        precision: str = "auto",
        device: str = "cpu",
        threads: int | None = None,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        token: str | None = None,
        adapter: str | os.PathLike[str] | None = None,
        strict: bool = False,
        max_batch: int = 32,
        cache_nbytes: int = CACHE_NBYTES,
        speculation: SpeculationMode = "off",
        draft_model: str | os.PathLike[str] | None = None,
        prefix_cache: bool | None = None,
        on_progress: LoadProgress | None = None,
        **unknown: Never,
    ) -> Self:
        """Load a checkpoint.

        Args:
            model: "demo" (bundled), a folder, or a model's id on the Hugging Face hub.
            backend: a name that `gpt2core backends` lists, or "auto".
            precision: "float32", "int8", "int4", "bfloat16" (rounded on loading), or "auto" for as stored.
            device: where the backend computes.
            threads: CPU threads for it; None lets it decide.
            revision, cache_dir, local_files_only, token: of the hub, as of `open_checkpoint`.
            adapter: a folder or hub id of a LoRA adapter to merge into the model, as of `open_checkpoint`.
            strict: refuse unknown fields of `config.json`, as of `open_checkpoint`.
            max_batch, cache_nbytes: as of the class.
            speculation: "prompt_lookup" is faster where a text repeats itself; the tokens stay the same.
            draft_model: a small model of the same vocabulary that makes `model` faster; the tokens stay the
                same. Loaded like `model`, but for the revision, which is the hub's default.
            prefix_cache: whether prompts that begin as others before them, as in a chat or with one system
                message, are read from there on only. None: where no bit changes by it, on `native`.
                Elsewhere numbers may differ by rounding, as with another length of a prompt's parts.
            on_progress: is called with what takes long (rounding the weights, compiling the native backend),
                and how many of how many parts of it are done, as far as that is known.

        Raises:
            CheckpointError: the checkpoint cannot be found, read or trusted.
            BackendUnavailableError: the backend is unknown, or its package or device is missing.
            RequestError: an option is unknown (says what another library's is called here) or out of its
                range.
        """
        check_unknown(unknown, cls.from_pretrained)
        source = Source(model, revision, cache_dir, local_files_only, token, strict, adapter)
        limits = {"max_batch": max_batch, "cache_nbytes": cache_nbytes}
        how = dict[str, Any](backend=backend, precision=precision, device=device, threads=threads)
        got = load_models(source, draft_model, **how, on_progress=on_progress)
        return cls._of(got, **limits, speculation=speculation, prefix_cache=prefix_cache)

    @classmethod
    def from_transformers(
        cls,
        hf_model: Any,
        tokenizer: Any,
        *,
        backend: str = "auto",
        precision: str = "auto",
        device: str = "cpu",
        threads: int | None = None,
        strict: bool = False,
        max_batch: int = 32,
        cache_nbytes: int = CACHE_NBYTES,
        speculation: SpeculationMode = "off",
    ) -> Self:
        """Run a GPT-2 of transformers that is in memory, without its files.

        The weights are copied, as float32: training `hf_model` further does not change this model. Its
        configuration and tensors are checked as those of a folder.

        Args:
            hf_model: `GPT2LMHeadModel` or a relative, also compiled or in DataParallel.
            tokenizer: a fast tokenizer of transformers, a `tokenizers.Tokenizer` or a `Tokenizer`; None for
                token ids alone.
            backend, precision, device, threads, strict, max_batch, cache_nbytes, speculation: as of
                `from_pretrained`.

        Raises:
            CheckpointError: the model is not a sound GPT-2 language model.
            BackendUnavailableError: the backend is unknown, or its package or device is missing.
            RequestError: an object is none of those, or an option is out of its range.
        """
        limits = {"max_batch": max_batch, "cache_nbytes": cache_nbytes}
        got = load_transformers(
            hf_model,
            tokenizer,
            strict=strict,
            backend=backend,
            precision=precision,
            device=device,
            threads=threads,
        )
        return cls._of(got, **limits, speculation=speculation)

    @classmethod
    def _of(cls, got: Loaded, **options: Any) -> Self:
        try:
            made = cls(got.backend, got.tokenizer, draft=got.draft, **options)
        except BaseException:
            got.close()
            raise
        made._origin = got.origin
        return made

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write `model.safetensors`, `config.json` and the tokenizer, which read back as this model.

        In float32 transformers opens the folder too; in fewer bits it is that of `gpt2core quantize`. A model
        that was loaded from files is read from them once more.

        Args:
            folder: made if it does not exist; a model that was saved there before is replaced.

        Raises:
            RequestError: the model was made of a backend alone.
            CheckpointError: the folder cannot be written, or holds other files that belong to a model.
        """
        if self._origin is None:
            raise RequestError(
                "this model was made of a backend, which does not give its weights back; save one that "
                "from_pretrained or from_transformers made"
            )
        files = {} if self._tokenizer is None else self._tokenizer.files()
        save_model(folder, self._origin.rounded(self.precision), files)

    def __repr__(self) -> str:
        name = "" if self._origin is None else f" {self._origin.name}:"
        closed = ", closed" if self.engine.closed else ""
        return (
            f"<{type(self).__name__}{name} {self.config.parameters:,} parameters, {self.precision}, "
            f"{self.backend.name}{closed}>"
        )

    @property
    def tokenizer(self) -> Tokenizer:
        """The checkpoint's tokenizer.

        Raises:
            RequestError: it has none that can be read; says why.
        """
        if self._tokenizer is None:
            why = self._origin.no_tokenizer if self._origin else ""
            raise RequestError(
                f"this model has no tokenizer{': ' * bool(why)}{why}; give token ids instead of text"
            )
        return self._tokenizer

    @property
    def precision(self) -> str:
        """Of the weights that the backend runs: "float32", "int8", "int4" or "bfloat16"."""
        return getattr(self.backend, "precision", "float32")  # a backend that names none has no other

    def wait_with(self, run_until: Callable[[Callable[[], bool]], None]) -> None:
        """Leave the engine's steps to somebody else, as a server that runs them in a thread of its own.

        Args:
            run_until: is called by every method that waits, with what says whether it need wait no longer;
                returns when that is so.
        """
        self._run_until = run_until

    @property
    def speculated(self) -> tuple[int, int]:
        """How many tokens speculation has proposed so far, and how many of them were accepted."""
        return self.engine.proposed_tokens, self.engine.accepted_tokens

    @overload
    def generate(
        self,
        prompt: Prompt,
        params: None = None,
        *,
        allow_special: bool = ...,
        logits_processors: Sequence[LogitsProcessor] = ...,
        stopping: Sequence[StoppingFunction] = ...,
        n: Literal[1] = 1,
        **sampling: Unpack[OneChoiceOptions],
    ) -> Generation: ...
    @overload
    def generate(
        self,
        prompt: list[str] | list[list[int]],
        params: Params = None,
        *,
        allow_special: bool = ...,
        logits_processors: Sequence[LogitsProcessor] = ...,
        stopping: Sequence[StoppingFunction] = ...,
        **sampling: Unpack[SamplingOptions],
    ) -> list[Generation]: ...
    @overload
    def generate(
        self,
        prompt: Prompts,
        params: Params = None,
        *,
        allow_special: bool = ...,
        logits_processors: Sequence[LogitsProcessor] = ...,
        stopping: Sequence[StoppingFunction] = ...,
        **sampling: Unpack[SamplingOptions],
    ) -> Generation | list[Generation]: ...
    def generate(
        self,
        prompt: Prompts,
        params: Params = None,
        *,
        allow_special: bool = False,
        logits_processors: Sequence[LogitsProcessor] = (),
        stopping: Sequence[StoppingFunction] = (),
        **sampling: Any,
    ) -> Generation | list[Generation]:
        """Continue one prompt or several, batched.

        Args:
            prompt: a text; or one prompt as token ids, a list or an array (T,) of NumPy, PyTorch, ...; or a
                list of such prompts; or an array (N, T) of token ids.
            params: how to sample; a list gives each prompt its own.
            allow_special: whether special tokens that a text spells out, as `<|endoftext|>`, become those
                tokens.
            logits_processors: functions of (token ids of prompt and text, logits (V,) float32) that return
                logits, called before each draw in their order, after the penalties and before the
                temperature (`transform_logits` has the whole order).
            stopping: functions of (token ids of prompt and text, text), called after each token; the text
                ends with it, `finish_reason` "stop", once one of them returns true.
            **sampling: fields of `SamplingParams`, which take precedence over `params`; `seed` may be a list
                with one for each prompt.

        Returns:
            One `Generation` for one prompt with `n=1`; otherwise a flat list, prompt after prompt, each
            prompt's `n` choices side by side. An empty list gives an empty list.

        Raises:
            InvalidSamplingError: a keyword is unknown or out of its range.
            ContextLengthError: prompt and new tokens exceed the model's context.
            RequestError: a prompt is empty or no prompt; the model is closed; or a function raised.
            BackendError: the backend failed; `NumericalError` if what it returned is not finite.

        With one `seed` and several prompts each prompt gets what it would get alone. Without a seed each
        prompt has a fresh one, which its `Generation` names. The functions keep that promise if their results
        depend on their arguments alone. They run between two steps, and must not call the model.
        """
        functions: dict[str, Any] = {"logits_processors": logits_processors, "stopping": stopping}
        work = self._generating(prompt, params, allow_special=allow_special, **functions, **sampling)
        return run_waiting(work, self._run_until)

    def stream(
        self,
        prompt: Prompts,
        params: Params = None,
        *,
        allow_special: bool = False,
        logits_processors: Sequence[LogitsProcessor] = (),
        stopping: Sequence[StoppingFunction] = (),
        **sampling: Unpack[SamplingOptions],
    ) -> Iterator[Piece]:
        """Continue a prompt piece by piece: one `Piece` per token, as soon as it is drawn.

        The texts of the pieces join to exactly what `generate` returns with the same seed: a character that
        is split between tokens comes whole, and what may turn out to begin a stop string comes when that is
        decided. With `echo=True` a piece with the prompt's text comes first. Of several prompts, or with `n`
        above 1, the pieces come interleaved; `piece.prompt` and `piece.choice` tell them apart.

        Arguments and errors are those of `generate`; what is wrong with the request is raised here and not by
        the first `next`, which starts the work. Closing the iterator, or leaving the loop, ends the
        generation.
        """
        functions: dict[str, Any] = {"logits_processors": logits_processors, "stopping": stopping}
        work = self._streaming(prompt, params, allow_special=allow_special, **functions, **sampling)
        return self._pieces(work)

    def logits(self, token_ids: TokenIds) -> Float32[np.ndarray, "T V"]:
        """The model's logits at every position of one sequence.

        Shapes: `token_ids` (T,) with T at most the context, result (T, V) float32.

        Raises:
            ContextLengthError: more tokens than the context.
            RequestError: no tokens, or something that is not a token id.
            BackendError: the backend failed.
        """
        ids = check_token_ids(token_ids, self.config.vocab_size)
        _READ_ONLY.resolve_max_new_tokens(len(ids), self.config.n_positions)
        result = np.empty((len(ids), self.config.vocab_size), np.float32)

        def read(position: int, logits: Float32[np.ndarray, "n V"]) -> None:
            result[position : position + len(logits)] = logits

        self._read(ids, 0, read)
        return result

    def embed(
        self,
        text: Prompts,
        *,
        pooling: Literal["mean", "last"] = "mean",
        normalize: bool = False,
        allow_special: bool = False,
    ) -> Float32[np.ndarray, "... D"]:
        """Embeddings of one text or several, from the hidden states after the final layer norm.

        Shapes: (D,) float32 for one text, (N, D) for a list of N.

        Args:
            text: as the prompt of `generate`; each within the context.
            pooling: "mean" of all tokens, or that of the "last" token, which has seen all others.
            normalize: whether each has the length 1.
            allow_special: as of `generate`.

        Raises:
            RequestError: a text is empty, `pooling` is unknown, or the backend lacks the capability `Embeds`.
            ContextLengthError: a text exceeds the context.
            BackendError: the backend failed.
        """
        if pooling not in ("mean", "last"):
            raise RequestError(f"pooling is {in_short(pooling)}; it must be 'mean' or 'last'")
        texts, _, single = self._prompts(text, _READ_ONLY, {}, allow_special)
        result = np.empty((len(texts), self.config.n_embd), np.float32)
        for i, ids in enumerate(texts):
            hidden = self.engine.hidden_states(ids)  # (T, D)
            result[i] = hidden.mean(0, dtype=np.float64) if pooling == "mean" else hidden[-1]
        if normalize:
            result /= np.linalg.norm(result, axis=1, keepdims=True)
        return result[0] if single else result

    def close(self) -> None:
        """Free the model; calling it twice is harmless. Calls in other threads end as "cancelled"."""
        for part in (self.engine, self.backend, self._draft):
            if part is not None:
                part.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _generating(
        self, prompt: Prompts, params: Params, *, allow_special: bool, **options: Any
    ) -> Generator[list[Request], None, Generation | list[Generation]]:
        """The work of `generate`, which yields what it waits for."""
        functions = take_functions(options)
        prompts, each, single = self._prompts(prompt, params, options, allow_special)
        with self._submitted(prompts, each, **functions) as requests:
            yield requests
        raise_error(requests)
        generations = [make_generation(request) for request in requests]
        return generations[0] if single and each[0].n == 1 else generations

    def _streaming(
        self, prompt: Prompts, params: Params, *, allow_special: bool, **options: Any
    ) -> AbstractContextManager[list[Request]]:
        """The requests of `stream`, which are submitted on entering; what is wrong is raised at once."""
        functions = take_functions(options)
        prompts, each, _ = self._prompts(prompt, params, options, allow_special)
        check_streams(*each)
        return self._submitted(prompts, each, stream=True, **functions)

    def _pieces(self, submitted: AbstractContextManager[list[Request]]) -> Iterator[Piece]:
        with submitted as requests:
            left = list(requests)
            while left:
                self._run_until(lambda: has_news(left))
                yield from take_pieces(left)

    def _read(self, ids: list[int], logits_from: int, reader: LogitsReader) -> None:
        """Let `reader` see the logits from position `logits_from` on."""
        with self._submitted([ids], [_READ_ONLY], logits_from=logits_from, on_logits=reader) as requests:
            self._run_until(lambda: all_done(requests))
        raise_error(requests)
        if any(request.finish_reason == "cancelled" for request in requests):
            self._check_open()

    @contextmanager
    def _submitted(
        self, prompts: list[list[int]], params: Sequence[SamplingParams], **options: Any
    ) -> Iterator[list[Request]]:
        """Requests for the prompts; those that have not ended by the end of the context are cancelled."""
        requests: list[Request] = []
        try:
            for i, (ids, own) in enumerate(zip(prompts, params, strict=True)):
                requests += self.engine.submit(ids, own, prompt=i, **options)
            yield requests
        finally:
            for request in requests:
                self.engine.cancel(request)

    def _prompts(
        self, prompt: Prompts, params: Params, options: Mapping[str, Any], allow_special: bool
    ) -> tuple[list[list[int]], list[SamplingParams], bool]:
        """Each prompt's token ids and parameters, checked before anything is submitted; whether it is one."""
        prompts, single = split_prompts(prompt)
        each = merge_options_of_each(params, options, len(prompts))
        self._check_open()

        def encode(prompt: Prompt, own: SamplingParams) -> list[int]:
            if isinstance(prompt, str) and self._tokenizer is None:
                _ = self.tokenizer  # says what is missing
            return self.engine.encode(prompt, own, allow_special=allow_special)

        return check_prompts(prompts, each, encode, single=single), each, single
