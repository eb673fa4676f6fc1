"""The model class for lm-evaluation-harness, on a stub of the harness' own base class and windows."""

import importlib
import sys
import types
from dataclasses import dataclass

import fakes
import pytest
from engines import make_model

from gpt2core import RequestError


@dataclass
class Instance:
    args: tuple


class TemplateLM:
    """As lm_eval 0.4.13 has it, without its progress bars."""

    def __init__(self):
        self.rank, self.world_size = 0, 1

    def loglikelihood(self, requests, disable_tqdm=False):
        encoded = []
        for context, own in (request.args for request in requests):
            if context == "":
                encoded.append(((context, own), [self.eot_token_id], self.tok_encode(own)))
            else:
                before = self.tok_encode(context)
                encoded.append(((context, own), before, self.tok_encode(context + own)[len(before) :]))
        return self._loglikelihood_tokens(encoded, disable_tqdm=disable_tqdm)


def get_rolling_token_windows(token_list, prefix_token, max_seq_len, context_len):
    """lm_eval.utils, for a context of 1: each predicts `max_seq_len` tokens, the last is drawn back."""
    assert context_len == 1
    predicted = min(max_seq_len, len(token_list))
    yield [prefix_token, *token_list[: predicted - 1]], token_list[:predicted]
    while predicted < len(token_list):
        count = min(len(token_list) - predicted, max_seq_len)
        end = predicted + count
        yield token_list[end - max_seq_len - 1 : end - 1], token_list[end - count : end]
        predicted += count


def make_disjoint_window(pair):
    before, own = pair
    return before[: len(before) - (len(own) - 1)], own


@pytest.fixture
def eval_model(monkeypatch):
    modules = {name: types.ModuleType(name) for name in ("lm_eval", "lm_eval.api", "lm_eval.utils")}
    modules |= {name: types.ModuleType(name) for name in ("lm_eval.api.instance", "lm_eval.api.model")}
    modules["lm_eval.api.instance"].Instance = Instance
    modules["lm_eval.api.model"].TemplateLM = TemplateLM
    modules["lm_eval.utils"].get_rolling_token_windows = get_rolling_token_windows
    modules["lm_eval.utils"].make_disjoint_window = make_disjoint_window
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "gpt2core.integrations.lm_eval", raising=False)
    module = importlib.import_module("gpt2core.integrations.lm_eval")
    yield module.EvalModel
    monkeypatch.delitem(sys.modules, "gpt2core.integrations.lm_eval", raising=False)


def test_a_likelihood_is_the_sum_over_the_continuation(eval_model):
    model = make_model(fakes.hashed)
    pairs = [("ab", "cd"), ("", "xyz"), ("a" * 80, "bc"), ("ab", "")]
    got = eval_model(model).loglikelihood([Instance(pair) for pair in pairs])
    whole = model.score("abcd").logprobs[1:]
    assert got[0] == (pytest.approx(whole.sum()), False)
    assert got[1][0] == pytest.approx(model.score("xyz", bos="eos").logprobs.sum())
    cut = model.score([97] * 63 + [98, 99], context=64).logprobs[-2:]
    assert got[2][0] == pytest.approx(cut.sum())
    assert got[3] == (0.0, True)


def test_what_is_likeliest_throughout_is_greedy(eval_model):
    model = make_model(fakes.hashed)
    text = model.generate("ab", max_new_tokens=3, ignore_eos=True).token_ids
    model_ = eval_model(model)
    [(_, greedy)] = model_._loglikelihood_tokens([(("", ""), [97, 98], text)])
    [(_, other)] = model_._loglikelihood_tokens([(("", ""), [97, 98], [*text[:2], (text[2] + 1) % 256])])
    assert (greedy, other) == (True, False)


@pytest.mark.parametrize("length", [1, 64, 65, 150])
def test_a_rolling_likelihood_predicts_each_token_once(eval_model, length):
    model = make_model(fakes.hashed)
    text = "".join(chr(97 + i % 26) for i in range(length))
    [got] = eval_model(model).loglikelihood_rolling([Instance((text,))])
    ids, want = [256, *text.encode()], 0.0
    for first in range(0, length, 64):
        last = min(first + 64, length)
        begin = max(0, last - 64)
        window = ids[begin : last + 1]
        want += model.score(window).logprobs[first - begin :].sum()
    assert got == pytest.approx(want)


def test_texts_are_continued_until_a_stop_string(eval_model):
    model = make_model(fakes.endless)
    want = model.generate("ab", max_new_tokens=8).text
    options = {"until": [want[3]], "max_gen_toks": 8, "do_sample": False, "temperature": 0.0}
    requests = [Instance(("ab", options)), Instance(("ab", {"max_gen_toks": 5})), Instance(("", options))]
    got = eval_model(model).generate_until(requests)
    assert got[0] == want[: want.index(want[3])]
    assert got[1] == want[:5]
    assert len(got) == 3


def test_options_that_are_not_known_are_refused(eval_model):
    model = eval_model(make_model())
    with pytest.raises(RequestError, match=r"generation options \['beams'\] are not known"):
        model.generate_until([Instance(("a", {"beams": 3}))])
    with pytest.raises(RequestError, match="max_gen_toks is 64; this model's context is 64"):
        model.generate_until([Instance(("a", {"max_gen_toks": 64}))])
