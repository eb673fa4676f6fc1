"""What tests of speculation share: texts that repeat themselves, and who proposes."""

import fakes
import numpy as np
from engines import TOKENIZER, run

from gpt2core import testing
from gpt2core.engine.engine import Engine
from gpt2core.engine.request import Request
from gpt2core.sampling.params import SamplingParams

LETTERS = [*b"abcdef"]
PROMPT = [*b"abcabcabc"]


def walk(history: tuple[int, ...], vocab_size: int) -> np.ndarray:
    """Logits of a text that repeats itself often: letters by the last two tokens, one of them likely."""
    logits = np.full(vocab_size, -50, np.float32)
    logits[LETTERS] = fakes.hashed(history[-2:], vocab_size)[LETTERS]
    logits[LETTERS[sum(history[-2:]) % 6]] += 5
    return logits


def chain(history: tuple[int, ...], vocab_size: int) -> np.ndarray:
    """Like `walk`, less sure of itself, by the last token alone."""
    logits = np.full(vocab_size, -np.float32(50))
    logits[LETTERS] = fakes.hashed(history[-1:], vocab_size)[LETTERS] / 4
    return logits


def fresh(history: tuple[int, ...], vocab_size: int) -> np.ndarray:
    """Logits of a text in which trigrams recur, and each time something new follows."""
    logits = np.zeros(vocab_size, np.float32)
    at = len(history) % 4
    logits[b"xyz"[at] if at < 3 else 100 + len(history) // 4 % 150] = 50
    return logits


def make_engine(logits_of=walk, *, context=64, before=None, after=None, draft=None, **options) -> Engine:
    """An engine on a large model; `draft` is the logits of a small one."""
    backend = fakes.FakeBackend(big(context), logits_of, before=before, after=after)
    if draft is not None and not isinstance(draft, fakes.FakeBackend):
        draft = fakes.FakeBackend(fakes.config(context), draft)
    return Engine(backend, TOKENIZER, draft=draft, **options)


def big(context: int = 64):
    """Of more parameters than the draft model's `fakes.config`."""
    return testing.random_config(
        "tiny",
        vocab_size=257,
        n_positions=context,
        n_embd=64,
        n_head=2,
        n_layer=4,
        eos_token_ids=(fakes.END,),
    )


def outcome(request: Request) -> tuple:
    return (
        request.generated,
        request.text,
        request.finish_reason,
        request.logprobs,
        repr(request.error),
    )


def generated(logits_of=walk, prompt=PROMPT, *, params=None, **options) -> tuple[list[tuple], Engine]:
    engine = make_engine(logits_of, **options)
    requests = engine.submit(prompt, SamplingParams(**{"max_new_tokens": 50, "seed": 1, **(params or {})}))
    run(engine)
    return [outcome(request) for request in requests], engine


SOURCES = {
    "prompt lookup": {"speculation": "prompt_lookup"},
    "a good draft": {"draft": walk},
    "a bad draft": {"draft": chain},
}
PARAMS = {
    "greedy": {},
    "warm": {"temperature": 0.8},
    "hot": {"temperature": 1.5},
    "top_k": {"temperature": 0.8, "top_k": 3},
    "top_p": {"temperature": 0.8, "top_p": 0.9},
    "min_p": {"temperature": 0.8, "min_p": 0.05},
    "repetition": {"repetition_penalty": 1.3},
    "presence and frequency": {"temperature": 0.8, "presence_penalty": 0.5, "frequency_penalty": 0.2},
    "n-grams": {"no_repeat_ngram_size": 5, "temperature": 0.8},
    "bias": {"temperature": 0.8, "logit_bias": {LETTERS[0]: 3.0, LETTERS[1]: -100}},
    "logprobs": {"temperature": 0.8, "logprobs": 2},
    "echo": {"temperature": 0.8, "logprobs": 2, "echo": True},
    "stop": {"temperature": 0.8, "stop": ["fa", "dd", "cbcb"]},
    "min_new_tokens": {"temperature": 0.8, "min_new_tokens": 40, "logit_bias": {fakes.END: 51.0}},
    "end of text": {"temperature": 0.8, "logit_bias": {fakes.END: 51.0}},
    "choices": {"temperature": 0.8, "n": 3},
    "one token": {"max_new_tokens": 1},
    "two tokens": {"max_new_tokens": 2},
    "no token": {"max_new_tokens": 0},
}
