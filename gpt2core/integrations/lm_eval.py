"""A model class for lm-evaluation-harness, without a server and without PyTorch.

    import lm_eval
    from gpt2core import GPT2
    from gpt2core.integrations.lm_eval import EvalModel

    lm_eval.simple_evaluate(model=EvalModel(GPT2.from_pretrained("demo")), tasks=["blimp"])

Requests are encoded, cut and windowed as the harness' own `hf` model does, so that the numbers agree with it
but for rounding; here they do not depend on the batch.
"""

from collections.abc import Iterable, Sequence
from typing import Any, Final

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from gpt2core import GPT2, RequestError

_DEFAULT_NEW_TOKENS: Final = 256
_KNOWN: Final = {"until", "max_gen_toks", "do_sample", "temperature", "top_p", "top_k", "seed"}

Encoded = tuple[tuple[str, str], list[int], list[int]]
"""The texts of a request, and the token ids of its context and of its continuation."""


class EvalModel(TemplateLM):  # type: ignore[misc]  # the harness has no types
    """A loaded model as the harness wants it; closing the model stays with who loaded it.

    Raises:
        RequestError: the model names no end-of-text token, which stands before a text without a context.
    """

    def __init__(self, model: GPT2) -> None:
        super().__init__()
        if not model.config.eos_token_ids:
            raise RequestError("this model names no end-of-text token; the harness begins texts with it")
        self._model = model

    @property
    def eot_token_id(self) -> int:
        """The end-of-text token, which also begins texts."""
        return self._model.config.eos_token_ids[0]

    @property
    def max_length(self) -> int:
        """Most tokens of a request."""
        return self._model.config.n_positions

    @property
    def tokenizer_name(self) -> str:
        """For the harness' caches."""
        return "gpt2core"

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Token ids of a text."""
        if not string:
            return []
        begin = bool(add_special_tokens)
        return self._model.tokenizer.encode(string, allow_special=True, begin=begin)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood of each whole text, in windows that do not overlap, as the harness has it."""
        windows: list[tuple[int, Encoded]] = []
        for number, request in enumerate(requests):
            (text,) = request.args
            for window in get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.eot_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            ):
                windows.append((number, (("", text), *make_disjoint_window(window))))
        totals = [0.0] * len(requests)
        found = self._loglikelihood_tokens([window for _, window in windows])
        for (number, _), (value, _) in zip(windows, found, strict=True):
            totals[number] += value
        return totals

    def _loglikelihood_tokens(self, requests: Sequence[Encoded], **kwargs: Any) -> list[tuple[float, bool]]:
        """Each continuation's log probability, and whether all of its tokens are the likeliest."""
        known = [(context, own) for _, context, own in requests if own]
        scores = self._model.score_iter([*context, *own][-(self.max_length + 1) :] for context, own in known)
        found = []
        for _, _, own in requests:
            if not own:  # nothing is certain
                found.append((0.0, True))
                continue
            score = next(scores)
            logprobs, ranks = score.logprobs[-len(own) :], score.ranks[-len(own) :]
            found.append((float(logprobs.sum()), bool((ranks == 1).all())))
        return found

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Continue each text until one of its stop strings."""
        groups: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            groups.setdefault(repr(request.args[1]), []).append(number)
        texts = [""] * len(requests)
        for numbers in groups.values():
            options = requests[numbers[0]].args[1]
            contexts = [requests[number].args[0] for number in numbers]
            for number, text in zip(numbers, self._generate(contexts, options), strict=True):
                texts[number] = text
        return texts

    def _generate(self, contexts: Iterable[str], options: dict[str, Any]) -> list[str]:
        unknown = set(options) - _KNOWN
        if unknown:
            raise RequestError(
                f"generation options {sorted(unknown)} are not known; known are {sorted(_KNOWN)}"
            )
        until = options.get("until") or []
        until = [until] if isinstance(until, str) else list(until)
        new_tokens = int(options.get("max_gen_toks") or _DEFAULT_NEW_TOKENS)
        room = self.max_length - new_tokens
        if room < 1:
            raise RequestError(
                f"max_gen_toks is {new_tokens}; this model's context is {self.max_length}; give fewer"
            )
        sampling: dict[str, Any] = {"temperature": 0.0}
        if options.get("do_sample"):
            sampling = {name: options[name] for name in ("top_p", "top_k", "seed") if name in options}
            sampling["temperature"] = float(options.get("temperature", 1.0))
        prompts = [self.tok_encode(context)[-room:] or [self.eot_token_id] for context in contexts]
        found = self._model.generate(prompts, max_new_tokens=new_tokens, stop=until, **sampling)
        return [generation.text for generation in found]
