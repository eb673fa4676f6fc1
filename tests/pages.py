"""What tests of the playground share: an app that answers with planted events."""

import asyncio
import json
import math
import threading

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse
from playwright.sync_api import expect
from serving import HANG_S

from gpt2core.serve import playground
from gpt2core.serve.guard import SECURITY_HEADERS

expect.set_options(timeout=1000 * HANG_S)
SEED = 2**63 - 25  # is no number of JavaScript
BINS = ((0.01, "0"), (0.05, "1"), (0.2, "2"), (0.5, "3"), (0.9, "4"))
HOSTILE = "<img src=x onerror=alert(1)>"


def token(text, probability=0.9, *, token_id=5, name=None, top=(), finish=None):
    logprob = math.log(probability)
    others = [{"token": t, "token_id": 1000 + i, "logprob": math.log(p)} for i, (t, p) in enumerate(top)]
    shown = {"token": text if name is None else name, "token_id": token_id, "logprob": logprob}
    return {
        **{"index": 0, "choice": 0, "text": text, **shown, "finish_reason": finish},
        "top_logprobs": sorted([shown, *others], key=lambda one: -one["logprob"]),
    }


def summary(text, completion_tokens, finish="length"):
    one = {"text": text, "finish_reason": finish, "prompt_tokens": 1, "completion_tokens": completion_tokens}
    return {
        **{"generated_text": text, "generations": [{**one, "index": 0, "choice": 0, "seed": SEED}]},
        **{"model": "planted", "backend": "none", "seed": SEED, "elapsed_s": 0.5, "usage": {}},
    }


def data(*events):
    return "".join(f"data: {e if isinstance(e, str) else json.dumps(e)}\n\n" for e in events).encode()


class Planted:
    """An app whose `/generate` answers what a test planted."""

    def __init__(self):
        self.app = FastAPI()
        self.app.include_router(playground.assets())
        self.app.post("/generate")(self.generate)
        self.app.get("/readyz")(self.readyz)
        self.app.get("/playground/server.json")(self.server)
        self.app.post("/tokenize")(self.tokenize)
        self.app.middleware("http")(self.secure)
        self.forget()

    def forget(self):
        self.chunks, self.refusal, self.ready = [], None, []
        self.wait = self.hold = False  # after each chunk, after the last
        self.bodies, self.keys, self.gone = [], [], threading.Event()
        self.about = {"model": "planted", "backend": "none", "context": 32, "max_logprobs": 5}
        self.counted = []

    async def secure(self, request, call_next):
        answer = await call_next(request)
        answer.headers.update(SECURITY_HEADERS)
        return answer

    async def readyz(self):
        if self.ready:
            return error_response(*self.ready.pop(0))
        return {"status": "ready"}

    async def server(self):
        return self.about

    async def tokenize(self, request: Request):
        """One token a word."""
        self.counted.append((await request.json())["prompt"])
        words = len(self.counted[-1].split())
        return {"count": words, "max_model_len": 32, "tokens": list(range(words))}

    async def generate(self, request: Request):
        self.bodies.append((await request.body()).decode())
        self.keys.append(request.headers.get("authorization"))
        if self.refusal is not None:
            return error_response(*self.refusal)

        async def chunks():
            try:
                for chunk in self.chunks:
                    yield chunk
                    await asyncio.sleep(0.01)
                    while self.wait:
                        await asyncio.sleep(0.01)
                while self.hold:
                    await asyncio.sleep(0.01)
            except asyncio.CancelledError:
                self.gone.set()
                raise

        return StreamingResponse(chunks(), media_type="text/event-stream")


def error_response(status, message, param=None, headers=None, code="c"):
    body = {"error": {"type": "t", "code": code, "param": param, "message": message}}
    return JSONResponse(body, status, headers)


def run(page, prompt="Hello"):
    page.locator("#prompt").fill(prompt)
    page.keyboard.press("Control+Enter")
