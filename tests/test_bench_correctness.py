"""Peers are checked for right answers on every variant of the family."""

import re

import pytest
from bench_fakes import CHECKED, fake_peers

from gpt2core.bench.compare import correctness
from gpt2core.bench.compare.worker import EngineSetup
from gpt2core.testing import VARIANTS, random_checkpoint


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return random_checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def fake(tmp_path, monkeypatch):
    return fake_peers(tmp_path, monkeypatch)


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("GPT2CORE_CACHE", str(tmp_path / "cache"))


# ----------------------------------------------------------------------------------------------- correctness

SOME = {name: VARIANTS[name] for name in ("plain", "unscaled_attention", "separate_head")}


def checked(engine, variants=SOME):
    found = list(correctness.check(engine, threads=1, variants=variants, timeout_s=120))
    assert sorted(one["variant"] for one in found) == sorted(variants)
    return {one["variant"]: one for one in found}


def test_an_engine_that_computes_the_reference_is_right_on_every_variant(fake):
    found = checked(fake(text=CHECKED), VARIANTS)
    assert {(one["status"], one["value"], one["error"]) for one in found.values()} == {("ok", 1.0, None)}
    assert max(one["difference"] for one in found.values()) < 1e-4


def test_transformers_with_the_version_tested_here_is_right(fake):
    found = checked(EngineSetup.peer("transformers"))
    assert {one["value"] for one in found.values()} == {1.0}
    assert found["plain"]["settings"]["versions"]["transformers"] >= "5"


def test_an_engine_that_ignores_a_flag_is_wrong_on_it_and_only_there(fake):
    text = CHECKED.replace(
        "self.model =",
        "path = job['checkpoint'] + '/config.json'; text = open(path).read()\n"
        "        flag = '\"scale_attn_weights\": '\n"
        "        open(path, 'w').write(text.replace(flag + 'false', flag + 'true'))\n"
        "        self.model =",
    ).replace("    def generate", "        open(path, 'w').write(text)\n\n    def generate")
    found = checked(fake(text=text))
    assert {name: one["value"] for name, one in found.items()} == {
        "plain": 1.0,
        "unscaled_attention": 0.0,
        "separate_head": 1.0,
    }
    assert found["unscaled_attention"]["difference"] > 1
    assert "a logit is off by" in found["unscaled_attention"]["error"]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("self.model.logits(ids)", "self.model.logits(ids)[:-1]", r"its logits have the shape \(39, 257\)"),
        ("self.model.logits(ids)", "self.model.logits(ids) * np.nan", "its logits are not finite"),
        ("[one.token_ids for", "[one.token_ids[::-1] for", "greedy token 0 is .* below the largest"),
        (
            "[one.token_ids for",
            "[one.token_ids[:3] for",
            "it generated 3 tokens of the vocabulary, asked for 24",
        ),
        ("[one.token_ids for", "[[999] * 24 for", "it generated 24 tokens of the vocabulary"),
    ],
    ids=["shape", "nan", "tokens", "few", "foreign"],
)
def test_each_kind_of_wrong_answer_is_told(fake, old, new, message):
    (one,) = checked(fake(text=CHECKED.replace(old, new)), {"plain": {}}).values()
    assert one["value"] == 0.0
    assert re.search(message, one["error"]), one["error"]


def test_a_variant_that_kills_the_process_is_a_failure_and_the_others_are_checked(fake):
    dies = "if self.name == 'unscaled_attention': os.kill(os.getpid(), signal.SIGSEGV)"
    found = checked(fake(text=CHECKED, goes_wrong=dies))
    assert {name: one["value"] for name, one in found.items()} == {
        "plain": 1.0, "unscaled_attention": None, "separate_head": 1.0,
    }  # fmt: skip
    assert found["unscaled_attention"]["status"] == "failed"
    assert "killed by SIGSEGV" in found["unscaled_attention"]["error"]


def test_a_variant_that_an_engine_refuses_is_skipped(fake):
    refuses = "if self.name == 'plain': raise NotImplementedError('it has no plain models')"
    found = checked(fake(text=CHECKED, goes_wrong=refuses))
    assert (found["plain"]["status"], found["plain"]["error"]) == ("skipped", "it has no plain models")
    assert found["separate_head"]["value"] == 1.0


def test_an_engine_that_is_not_installed_is_skipped_on_every_variant(fake):
    found = checked(fake(text="import nothing_here\n" + CHECKED, packages=("nothing_here",)))
    assert {one["status"] for one in found.values()} == {"skipped"}
    assert "nothing_here is not installed" in found["plain"]["error"]


def test_a_lossy_precision_is_judged_by_what_it_may_lose(fake):
    noise = "self.model.logits(ids) + np.random.default_rng(0).normal(0, SIZE, (40, 257))"
    values = {}
    for size in ("0.1", "1.0"):
        text = CHECKED.replace("self.model.logits(ids)", noise.replace("SIZE", size))
        fake(text=text)
        for precision in ("float32", "int8"):
            (one,) = checked(EngineSetup.peer("fake", precision), {"plain": {}}).values()
            values[size, precision] = one["value"]
    assert values == {
        ("0.1", "float32"): 0.0,
        ("0.1", "int8"): 1.0,
        ("1.0", "float32"): 0.0,
        ("1.0", "int8"): 0.0,
    }
