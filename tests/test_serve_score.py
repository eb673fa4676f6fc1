"""`POST /score`: the numbers of the library, beside generation, and what is refused."""

import concurrent.futures

import pytest
from serving import serving

from gpt2core import GPT2
from gpt2core.testing import random_checkpoint

TEXTS = ["Once upon a time.", "naïve €uro", "The end of it, and more. " * 9]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(random_checkpoint(tmp_path_factory.mktemp("tiny")))


@pytest.fixture(scope="module")
def model(folder):
    with GPT2.from_pretrained(folder, backend="native") as loaded:
        yield loaded


@pytest.fixture(scope="module")
def server(folder):
    with serving(model=folder, backend="native") as running:
        yield running


def test_scores_are_those_of_the_library(server, model):
    asked = {"text": TEXTS, "bos": "eos", "by": "token", "top": 2, "entropy": True, "stride": 20}
    answer = server.post("/score", asked).json()
    want = model.score(TEXTS, bos="eos", top=2, entropy=True, stride=20)
    assert answer["backend"] == "native"
    assert answer["usage"]["prompt_tokens"] == sum(len(score.token_ids) for score in want)
    for i, (got, score) in enumerate(zip(answer["scores"], want, strict=True)):
        assert (got["index"], got["token_count"]) == (i, len(score.token_ids))
        assert (got["logprob"], got["perplexity"]) == (score.logprob, score.perplexity)
        assert got["words"] is None
        for shown, token in zip(got["tokens"], score.by_token(), strict=True):
            for name in ("text", "token_id", "start", "end", "logprob", "surprisal", "rank", "entropy"):
                assert shown[name] == getattr(token, name)
            assert [one[0] for one in shown["top"]] == [one.token_id for one in token.top]


def test_words_may_be_corrected(server, model):
    asked = {"text": TEXTS[0], "bos": "eos", "by": "word", "corrected": True, "base": "e"}
    [got] = server.post("/score", asked).json()["scores"]
    want = model.score(TEXTS[0], bos="eos", boundaries=True).words(corrected=True, base=2.718281828459045)
    assert [(w["text"], w["logprob"], w["exact"]) for w in got["words"]] == [
        (w.text, w.logprob, w.exact) for w in want
    ]
    assert [w["surprisal"] for w in got["words"]] == pytest.approx([w.surprisal for w in want])


def test_scores_and_texts_run_side_by_side_and_do_not_change_each_other(server, model):
    text = model.generate("Once", max_new_tokens=60, temperature=1.0, seed=3).text
    scores = [score.logprob for score in model.score(TEXTS)]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        texts = [
            pool.submit(server.generate, "Once", max_new_tokens=60, temperature=1.0, seed=3) for _ in range(4)
        ]
        scored = [pool.submit(server.post, "/score", {"text": TEXTS}) for _ in range(4)]
        assert [one.result().json()["generated_text"] for one in texts] == [text] * 4
        for one in scored:
            assert [found["logprob"] for found in one.result().json()["scores"]] == scores
    assert server.idle()


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"text": "a"}, "a score needs at least 2"),
        ({"text": ["ab", "a"]}, "text 1 of the list: text has 1 token"),
        ({"text": "ab", "stride": 5000}, "stride is 5000; it must be a whole number from 1 to 96"),
        ({"text": "ab", "corrected": True}, "corrected is about words"),
        ({"text": "ab", "top": 21}, "top"),
        ({"text": "ab", "bos": "bos"}, "bos"),
        ({"text": [[1, 999]]}, "prompt holds"),
    ],
)
def test_what_cannot_be_scored_is_refused(server, asked, message):
    answer = server.post("/score", asked)
    assert answer.status_code == 422
    assert message in answer.json()["error"]["message"]
    server.check_works()
