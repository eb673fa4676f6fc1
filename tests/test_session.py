"""Sessions: each call gives what a cold model gives; a file goes on where it was saved."""

import json
import subprocess
import sys

import numpy as np
import pytest

from gpt2core import GPT2, CheckpointError, ContextLengthError, RequestError
from gpt2core.testing import random_checkpoint

HOT = {"max_new_tokens": 6, "temperature": 0.9, "seed": 3, "logprobs": 3}
HEAD = [(7 * i) % 90 for i in range(40)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return random_checkpoint(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def cold(folder):
    with GPT2.from_pretrained(folder, backend="native", prefix_cache=False) as model:
        yield model


@pytest.fixture
def model(folder):
    with GPT2.from_pretrained(folder, backend="native") as model:
        yield model


def facts(generation):
    return generation.token_ids, generation.logprobs, generation.finish_reason


def test_each_call_gives_what_the_whole_text_gives_a_cold_model(model, cold):
    session = model.session(HEAD)
    for new in ([1, 2], [3], [4, 5, 6]):
        want = cold.generate(session.append(new).token_ids, **HOT)
        before = session.token_ids
        assert facts(session.generate(**HOT)) == facts(want)
        assert session.token_ids == [*before, *want.token_ids]
    assert model.engine.prefixes.hits == 2  # all but the first call
    want = list(cold.stream(session.token_ids, **HOT))
    assert list(session.stream(**HOT)) == want
    assert session.token_ids[-6:] == [piece.token_id for piece in want]


def test_a_fork_and_its_origin_go_on_by_themselves(model, cold):
    session = model.session(HEAD)
    session.generate(**HOT)
    fork = session.fork()
    a, b = session.append([1]).generate(**HOT), fork.append([2]).generate(**HOT)
    assert session.token_ids != fork.token_ids
    assert facts(a) == facts(cold.generate(session.token_ids[:-6], **HOT))
    assert facts(b) == facts(cold.generate(fork.token_ids[:-6], **HOT))


def test_after_a_rewind_it_goes_on_from_there(model, cold):
    session = model.session(HEAD)
    first = session.generate(**HOT)
    assert len(session.rewind(len(HEAD))) == len(HEAD)
    assert facts(session.generate(**HOT)) == facts(first)
    session.rewind(7).append([5])
    assert facts(session.generate(**HOT)) == facts(cold.generate([*HEAD[:7], 5], **HOT))
    assert len(session.rewind(0)) == 0


def test_a_score_is_that_of_the_text_after_the_session_which_stays(model, cold):
    session = model.session(HEAD)
    session.generate(**HOT)
    before = session.token_ids
    text = [9, 8, 7, 9]
    got, want = session.score(text), cold.score([*before, *text], entropy=True)
    assert session.token_ids == before
    assert got.token_ids == text
    np.testing.assert_array_equal(got.logprobs, want.logprobs[-4:])
    np.testing.assert_array_equal(got.ranks, want.ranks[-4:])
    np.testing.assert_array_equal(got.entropies, want.entropies[-4:])
    assert got.perplexity == pytest.approx(np.exp(-got.logprobs.mean()))
    assert session.score([3]).logprobs.shape == (1,)


def test_text_goes_in_and_out():
    with GPT2.from_pretrained("demo", backend="native") as model:
        session = model.session("Once upon a time")
        added = session.append(" there was a girl").generate(max_new_tokens=4)
        assert session.text == "Once upon a time there was a girl" + added.text
        assert session.score(" and").text == " and"
        pieces = session.stream(max_new_tokens=9)
        begun = [next(pieces) for _ in range(3)]
        pieces.close()
        assert session.token_ids[-3:] == [piece.token_id for piece in begun]


@pytest.mark.parametrize("backend", ["numpy", "torch", "onnx", "jax"])
def test_on_other_backends_a_session_has_the_tokens_of_the_whole_text(folder, tmp_path, backend):
    with GPT2.from_pretrained(folder, backend=backend, prefix_cache=True) as model:
        session = model.session(HEAD)
        want = model.generate(HEAD, **HOT)
        assert session.generate(**HOT).token_ids == want.token_ids
        session.append([1, 2]).save(tmp_path / "a.session")
        again = model.load_session(tmp_path / "a.session")
        assert again.token_ids == session.token_ids
        assert again.generate(**HOT).token_ids == session.generate(**HOT).token_ids


def test_misuse_is_refused_and_changes_nothing(model):
    session = model.session()
    with pytest.raises(RequestError, match="no tokens that could predict"):
        session.score([1])
    with pytest.raises(RequestError, match="prompt"):
        session.generate(**HOT)
    session.append(HEAD)
    context = model.config.n_positions
    with pytest.raises(ContextLengthError, match=f"would have {context + 1} tokens; this model's context is"):
        session.append([1] * (context + 1 - len(HEAD)))
    with pytest.raises(RequestError, match="n is 2; a session goes on in one way"):
        session.generate(**HOT, n=2)
    with pytest.raises(RequestError, match="overflow is 'slide'; a session's text is whole"):
        session.generate(**HOT, overflow="slide")
    with pytest.raises(RequestError, match="position is 41; this session goes back to one from 0 to 40"):
        session.rewind(41)
    with pytest.raises(ContextLengthError):
        session.generate(max_new_tokens=context)
    assert session.token_ids == HEAD
    pieces = session.stream(**HOT)
    next(pieces)
    session.append([1])
    with pytest.raises(RequestError, match="leave a stream, or fork the session"):
        list(pieces)


# Files


@pytest.fixture
def saved(model, tmp_path):
    session = model.session(HEAD)
    session.generate(**HOT)
    path = tmp_path / "a.session"
    session.save(path)
    return session, path


GOES_ON = """
import json, sys
from gpt2core import GPT2
with GPT2.from_pretrained(sys.argv[1], backend="native", precision=sys.argv[3]) as model:
    session = model.load_session(sys.argv[2])
    found = session.generate(max_new_tokens=6, temperature=0.9, seed=3, logprobs=3)
    logprobs = [entry.logprob for entry in found.logprobs]
    print(json.dumps([session.token_ids, logprobs, model.engine.prefixes.saved_tokens]))
"""


@pytest.mark.parametrize("precision", ["float32", "int8"])
def test_another_process_goes_on_with_the_same_bits_and_reads_one_token(folder, tmp_path, precision):
    path = tmp_path / "a.session"
    with GPT2.from_pretrained(folder, backend="native", precision=precision) as model:
        session = model.session(HEAD)
        session.generate(**HOT)
        session.save(path)
        command = [sys.executable, "-c", GOES_ON, str(folder), str(path), precision]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        tokens, logprobs, saved_tokens = json.loads(output)
        assert saved_tokens == len(session) - 1
        want = session.generate(**HOT)
        assert tokens == session.token_ids
        assert logprobs == [entry.logprob for entry in want.logprobs]


def test_what_the_cache_has_lost_is_read_again_to_be_saved(folder, tmp_path, cold):
    with GPT2.from_pretrained(folder, backend="native", max_batch=1) as model:
        session = model.session(HEAD)
        session.generate(**HOT)
        model.generate([1, 2, 3], **HOT)
        session.save(tmp_path / "a.session")
        want = cold.generate(session.token_ids, **HOT)
        model.generate([1, 2, 3], **HOT)
        loaded = model.load_session(tmp_path / "a.session")
        hits = model.engine.prefixes.hits
        assert facts(loaded.generate(**HOT)) == facts(want)
        assert model.engine.prefixes.hits == hits + 1


def test_a_file_of_something_else_is_refused_by_name(saved, folder, tmp_path):
    _, path = saved
    other = random_checkpoint(tmp_path / "other", seed=5)
    for name, given in (
        ('the precision "float32", and this model\'s is "int8"', {"precision": "int8"}),
        ('the backend "native", and this model\'s is "numpy"', {"backend": "numpy"}),
        ("the model ", {"model": other}),
    ):
        given = {"model": folder, "backend": "native"} | given
        with (
            GPT2.from_pretrained(given.pop("model"), **given) as model,
            pytest.raises(CheckpointError, match=name),
        ):
            model.load_session(path)


def test_another_version_of_the_bits_or_of_the_format_is_refused(saved, model, monkeypatch):
    _, path = saved
    monkeypatch.setattr(type(model.backend), "bits_version", 77)
    vars(model).pop("_session_facts")
    with pytest.raises(CheckpointError, match='a session of the bits version "1"'):
        model.load_session(path)
    monkeypatch.undo()
    path.write_bytes(path.read_bytes().replace(b'"format_version":"1"', b'"format_version":"2"'))
    with pytest.raises(CheckpointError, match='format version "2"; this gpt2core reads 1'):
        model.load_session(path)


def test_a_damaged_file_is_an_error_and_never_another_text(saved, model, tmp_path):
    session, path = saved
    whole = path.read_bytes()
    rng = np.random.default_rng(0)
    damaged = tmp_path / "damaged"
    header = 8 + int.from_bytes(whole[:8], "little")
    places = [*range(0, header, 7), *rng.integers(header, len(whole), 60).tolist(), len(whole) - 1]
    for place in places:
        changed = bytearray(whole)
        changed[place] ^= 1 << int(rng.integers(8))
        damaged.write_bytes(changed)
        with pytest.raises(CheckpointError):
            model.load_session(damaged)
    for length in (0, 5, header - 3, header, header + 10, len(whole) - 1):
        damaged.write_bytes(whole[:length])
        with pytest.raises(CheckpointError):
            model.load_session(damaged)
    damaged.write_bytes(whole + b"x")
    with pytest.raises(CheckpointError):
        model.load_session(damaged)
    with pytest.raises(CheckpointError, match="does not exist"):
        model.load_session(tmp_path / "none")
    with pytest.raises(CheckpointError, match="is no session"):
        model.load_session(next((tmp_path / "..").glob("model*/**/*.safetensors")))
    assert model.load_session(path).token_ids == session.token_ids


def test_what_a_file_says_is_taken_for_its_own_session_alone(saved, folder, cold):
    session, path = saved
    with GPT2.from_pretrained(folder, backend="native") as model:
        loaded = model.load_session(path)
        model.generate(session.token_ids, **HOT)
        assert model.engine.prefixes.hits == 0
        loaded.fork().generate(**HOT)
        assert model.engine.prefixes.hits == 1


def test_a_session_whose_file_cannot_be_written_is_an_error(saved, tmp_path):
    session, _ = saved
    with pytest.raises(CheckpointError, match="cannot be written"):
        session.save(tmp_path / "nowhere" / "a.session")
