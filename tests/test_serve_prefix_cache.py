"""The server's prefix cache: whose prompts are reused for whom, and what is counted."""

import httpx2
import pytest
from serving import serving

from gpt2core.backends.native.build import load_library

PROMPT = "Once upon a time there was a little girl who lived in a small house by the sea. "
HITS, SAVED = "gpt2core_prefix_cache_hits_total", "gpt2core_prefix_cache_saved_tokens_total"


def ask(server, key, prompt=PROMPT):
    answer = httpx2.post(
        f"{server.url}/generate",
        json={"prompt": prompt, "max_new_tokens": 3, "seed": 5},
        headers={"Authorization": f"Bearer {key}"},
    )
    assert answer.status_code == 200
    return answer.json()


def counts(server, key):
    text = httpx2.get(f"{server.url}/metrics", headers={"Authorization": f"Bearer {key}"}).text
    found = dict(line.split(" ") for line in text.splitlines() if line.startswith("gpt2core_prefix_cache"))
    return int(float(found[HITS])), int(float(found[SAVED]))


@pytest.fixture(scope="module", autouse=True)
def _built():
    """A server that compiles first is not ready as soon as the tests' servers must be."""
    load_library()


@pytest.fixture
def keys(tmp_path):
    path = tmp_path / "keys"
    path.write_text("one\ntwo\n")
    return path


def test_a_key_reuses_its_own_prompts_and_no_others(keys):
    with serving(backend="native", api_key_file=keys) as server:
        first = ask(server, "one")
        assert counts(server, "one") == (0, 0)
        other = ask(server, "two")
        assert counts(server, "one") == (0, 0)
        again = ask(server, "one")
        hits, saved = counts(server, "one")
        assert hits == 1
        assert saved > 10
        assert first["generations"] == other["generations"] == again["generations"]


def test_shared_reuses_everybodys_and_off_nobodys(keys):
    for setting, hits in (("shared", 1), ("off", 0)):
        with serving(backend="native", api_key_file=keys, prefix_cache=setting) as server:
            ask(server, "one")
            ask(server, "two")
            assert counts(server, "one")[0] == hits


def test_the_choices_of_one_prompt_read_it_once():
    with serving(backend="native") as server:
        answer = server.client.post("/generate", json={"prompt": PROMPT, "max_new_tokens": 3, "n": 3})
        assert answer.status_code == 200
        assert server.metric(HITS) == 2


def test_without_keys_addresses_are_kept_apart():
    from gpt2core.serve.state import Client

    keys = {Client("10.0.0.1").cache_key, Client("10.0.0.2").cache_key, Client("10.0.0.1", 1).cache_key}
    assert len(keys) == 3
    assert Client("10.0.0.1", 1).cache_key == Client("10.0.0.2", 1).cache_key
