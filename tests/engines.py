"""What tests of the engine and of the model share: both on a scripted backend, and threads."""

import threading
import time

import fakes

from gpt2core.engine.engine import Engine
from gpt2core.engine.request import Request, Update
from gpt2core.model import GPT2
from gpt2core.sampling.draw import sample_token
from gpt2core.sampling.params import SamplingParams

TOKENIZER = fakes.byte_tokenizer()
HOT = {"temperature": 1.0, "seed": 7}


def make_model(logits_of=fakes.endless, *, context=64, before=None, after=None, **options) -> GPT2:
    backend = fakes.FakeBackend(fakes.config(context), logits_of, before=before, after=after)
    return GPT2(backend, TOKENIZER, **options)


def make_engine(backend=None, *, tokenizer=TOKENIZER, **options) -> Engine:
    return Engine(backend or fakes.FakeBackend(fakes.config(), fakes.endless), tokenizer, **options)


def run(engine: Engine, *requests: Request) -> list[Update]:
    """Step until these requests (all, if none is named) have ended."""
    updates: list[Update] = []
    for _ in range(10_000):
        if not (engine.running or engine.waiting) or (requests and all(r.finished for r in requests)):
            return updates
        updates += engine.step()
    raise AssertionError(f"{engine.running} run and {engine.waiting} wait without an end")


def alone(prompt, logits_of=fakes.endless, context=64, **params) -> list[int]:
    """The loop that the engine is to be equal to, written out for one request."""
    config = fakes.config(context)
    wanted = SamplingParams(**params)
    tokens = list(prompt)
    for _ in range(wanted.resolve_max_new_tokens(len(prompt), context)):
        tokens.append(
            sample_token(
                logits_of(tuple(tokens), config.vocab_size),
                wanted,
                token_ids=tokens,
                prompt_tokens=len(prompt),
                eos_token_ids=config.eos_token_ids,
                seed=wanted.seed or 0,
                choice=0,
            )
        )
        if tokens[-1] in config.eos_token_ids:
            break
    return tokens[len(prompt) :]


def idle(model: GPT2) -> bool:
    return (model.engine.running, model.engine.waiting) == (0, 0)


def texts(generations) -> list[tuple[str, list[int], str]]:
    return [(g.text, g.token_ids, g.finish_reason) for g in generations]


def gate():
    """A gate inside the backend: (what it calls, an event when it is reached, an event that opens it)."""
    entered, leave = threading.Event(), threading.Event()

    def before(batch):
        entered.set()
        assert leave.wait(10)

    return before, entered, leave


def start(function) -> tuple[threading.Thread, list]:
    result: list = []

    def work() -> None:
        try:
            result.append(function())
        except BaseException as error:
            result.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread, result


def wait_for(condition) -> None:
    deadline_s = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(0.001)
