"""The methods of GPT2 that score texts."""

# V vocabulary

from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterable, Iterator
from functools import cached_property
from typing import Literal, Unpack, overload

import numpy as np

from gpt2core._shapes import Float32
from gpt2core.config import ModelConfig
from gpt2core.engine.engine import Engine
from gpt2core.errors import RequestError, in_short
from gpt2core.prompts import Prompt, Prompts, split_prompts
from gpt2core.scoring.options import ScoreChoices, ScoreOptions
from gpt2core.scoring.run import Progress, Scorer, Text, boundary_members, in_groups
from gpt2core.scoring.score import Score
from gpt2core.tokenizer.tokenizer import Tokenizer


class Scorable:
    """What a model needs, and gets, for scoring; docs/scoring.md has the definitions."""

    engine: Engine
    _run_until: Callable[[Callable[[], bool]], None]

    @property
    def tokenizer(self) -> Tokenizer:
        """The checkpoint's tokenizer."""
        raise NotImplementedError

    @property
    def config(self) -> ModelConfig:
        """What the model computes."""
        return self.engine.config

    def _check_open(self) -> None:
        if self.engine.closed:
            raise RequestError("this model is closed; load it again with GPT2.from_pretrained")

    @overload
    def score(
        self,
        text: Prompt,
        *,
        on_progress: Callable[[int, int], None] | None = None,
        **choices: Unpack[ScoreChoices],
    ) -> Score: ...
    @overload
    def score(
        self,
        text: list[str] | list[list[int]],
        *,
        on_progress: Callable[[int, int], None] | None = None,
        **choices: Unpack[ScoreChoices],
    ) -> list[Score]: ...
    def score(
        self,
        text: Prompts,
        *,
        on_progress: Callable[[int, int], None] | None = None,
        **choices: Unpack[ScoreChoices],
    ) -> Score | list[Score]:
        """How well the model predicts one text or several, each of any length.

        Texts that are longer than the context are read in windows that overlap
        (`gpt2core.scoring.windows.score_windows`); many short ones share a pass. On the backend `native` a
        text's numbers have the same bits alone and among others.

        Args:
            text: a text, or token ids; or a list of texts and of lists of token ids.
            on_progress: is called after each window with the tokens scored so far and the tokens in all.
            bos: what stands before each text: None, so that its first token is not scored; "eos" for the
                end-of-text token, which GPT-2 has seen before documents; or a token id.
            end: likewise what stands after it, and is scored as its last token.
            stride: how many tokens each further window adds; None: half of `context`. 1 is exact: each token
                is predicted from as many as the context holds, and costs a pass over them.
            context: most tokens that are read at a time; None: all that the model can.
            top: how many of the likeliest tokens to name at each place, at most 1000.
            entropy: whether to keep the entropy of each prediction.
            boundaries: whether to keep what `Score.words(corrected=True)` needs.
            allow_special: as of `generate`.
            leading_space: whether a text that begins without a space gets one, as words within a text have.

        Returns:
            A `Score` for one text; else a list of them, in order.

        Raises:
            RequestError: an option is out of its range; or a text has nothing to be scored: fewer than 2
                tokens, of which without `bos` the first is not predicted.
            BackendError: the backend failed.
        """
        texts, single = split_prompts(text)
        report: Progress | None = None
        if on_progress is not None:
            done: dict[int, tuple[int, int]] = {}

            def report(number: int, scored: int, tokens: int) -> None:
                done[number] = scored, tokens
                on_progress(sum(scored for scored, _ in done.values()), sum(all for _, all in done.values()))

        scores = []
        for number, score in enumerate(self._scorer(choices).score(texts, report)):
            if isinstance(score, RequestError):
                raise score if single else type(score)(f"text {number} of the list: {score}")
            scores.append(score)
        return scores[0] if single else scores

    @overload
    def score_iter(
        self, texts: Iterable[Text], *, errors: Literal["raise"] = "raise", **choices: Unpack[ScoreChoices]
    ) -> Iterator[Score]: ...
    @overload
    def score_iter(
        self, texts: Iterable[Text], *, errors: Literal["return"], **choices: Unpack[ScoreChoices]
    ) -> Iterator[Score | RequestError]: ...
    def score_iter(
        self,
        texts: Iterable[Text],
        *,
        errors: Literal["raise", "return"] = "raise",
        **choices: Unpack[ScoreChoices],
    ) -> Iterator[Score] | Iterator[Score | RequestError]:
        """Score texts from any source, in order, in bounded memory.

        Up to 1,024 texts or 8,192 tokens are read ahead, so that short ones can share a pass.

        Args:
            texts: texts, or lists of token ids; may be endless.
            errors: "raise" ends at a text that cannot be scored; "return" gives its `RequestError` in its
                place and goes on.
            **choices: as of `score`.

        Raises:
            RequestError: an option is out of its range, at once; or a text cannot be scored.
            BackendError: the backend failed.
        """
        if errors not in ("raise", "return"):
            raise RequestError(f"errors is {in_short(errors)}; it must be 'raise' or 'return'")
        scorer = self._scorer(choices)
        return scorer.score(texts) if errors == "return" else _raise_errors(scorer.score(texts))

    async def score_async(
        self, texts: Iterable[Text] | AsyncIterable[Text], **choices: Unpack[ScoreChoices]
    ) -> AsyncIterator[Score]:
        """`score_iter` for an event loop, which goes on meanwhile: `async for score in ...`.

        Texts may come from an asynchronous source; they are read as they are needed, and the numbers are
        computed in a thread.
        """
        import asyncio  # costs more than all else here, and most do not want it

        scorer = self._scorer(choices)
        async for group in in_groups(texts):
            for score in await asyncio.to_thread(list, _raise_errors(scorer.score(group))):
                yield score

    def _scorer(self, choices: ScoreChoices) -> Scorer:
        """What scores texts so.

        Raises:
            RequestError: a choice is unknown or out of its range, or the model is closed.
        """
        self._check_open()
        options = ScoreOptions.of(choices).resolve(self.config)
        members = self._boundary_members if options.boundaries else None
        return Scorer(self.engine, self._run_until, options, members, lambda: self.tokenizer)

    @cached_property
    def _boundary_members(self) -> Float32[np.ndarray, "V"]:
        return boundary_members(self.tokenizer, self.config.vocab_size, self.config.eos_token_ids)


def _raise_errors(scores: Iterable[Score | RequestError]) -> Iterator[Score]:
    for number, score in enumerate(scores):
        if isinstance(score, RequestError):
            raise type(score)(f"text {number}: {score}")
        yield score
