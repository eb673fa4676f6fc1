"""Constraints that are none, cannot be compiled, cannot go on, or take too much."""

import json
import pickle
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import fakes
import pytest
from constraining import ASKED, PERSON
from engines import TOKENIZER, idle, make_model, run

from gpt2core.constraints import compiler
from gpt2core.errors import BackendUnavailableError, ConstraintError, InvalidSamplingError, RequestError
from gpt2core.model import GPT2
from gpt2core.sampling.constraint import MAX_CHARACTERS, MAX_CHOICES, MAX_SCHEMA_CHARACTERS
from gpt2core.sampling.params import SamplingParams
from gpt2core.tokenizer.tokenizer import Tokenizer

# Parameters


def test_parameters_with_a_constraint_are_hashable_picklable_and_canonical():
    for options in ASKED.values():
        params = SamplingParams(**options)
        assert hash(params) == hash(SamplingParams(**options))
        assert pickle.loads(pickle.dumps(params)) == params == replace(params)
    assert SamplingParams(json_schema=PERSON) == SamplingParams(json_schema=json.dumps(PERSON, indent=3))
    assert SamplingParams(choice=["a", "b"]) == SamplingParams(choice=("a", "b"))
    assert SamplingParams() == SamplingParams(regex=None, json_schema=None, choice=None, grammar=None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"regex": ""}, "regex has 0 characters; it must have 1 to 16384"),
        ({"regex": "a" * (MAX_CHARACTERS + 1)}, "regex has 16385 characters"),
        ({"regex": b"a"}, "regex is b'a'; it must be a string"),
        ({"regex": "a\0"}, "regex holds NUL or a lone surrogate"),
        ({"grammar": "\ud800"}, "grammar holds NUL or a lone surrogate"),
        ({"grammar": 3}, "grammar is 3; it must be a string"),
        ({"choice": []}, "choice has 0 entries; it must have 1 to 1024"),
        ({"choice": "yes"}, "choice is 'yes'; it must be a list of strings"),
        ({"choice": ["a", 1]}, r"choice[1] is 1; it must be a string"),
        ({"choice": ["a", ""]}, r"choice[1] has 0 characters"),
        ({"choice": ["a"] * (MAX_CHOICES + 1)}, "choice has 1025 entries"),
        ({"choice": ["a" * 40_000] * 2}, "choice has 80000 characters in all; at most 65536"),
        ({"json_schema": 3}, "json_schema is 3; it must be a dict, or JSON as a string"),
        ({"json_schema": "[1]"}, "json_schema holds no JSON object"),
        ({"json_schema": "{"}, "json_schema is not strict JSON: it is not JSON"),
        ({"json_schema": '{"a": 1, "a": 2}'}, "json_schema is not strict JSON: it has a key twice"),
        ({"json_schema": {"const": {1, 2}}}, "json_schema cannot be written as JSON"),
        ({"json_schema": {"const": float("nan")}}, "json_schema cannot be written as JSON"),
        ({"json_schema": {"a": "b" * MAX_SCHEMA_CHARACTERS}}, "json_schema has 65545 characters"),
        ({"json_schema": "[" * 70 + "]" * 70}, "json_schema is not strict JSON: it nests deeper than 64"),
        ({"regex": "a", "choice": ["a"]}, "regex and choice are both given; a text follows one constraint"),
    ],
)
def test_what_is_no_constraint_is_refused_when_it_is_made(options, message):
    with pytest.raises(InvalidSamplingError) as error:
        SamplingParams(**options)
    assert message in str(error.value)


NO_SCHEMA = "json_schema cannot be compiled; mend it"


@pytest.mark.parametrize(
    ("options", "message", "summary"),
    [
        ({"regex": "(?=secret)"}, "regex cannot be compiled: look-around, ", None),
        ({"regex": "secret("}, "regex cannot be compiled: unclosed group; mend it", None),
        ({"regex": r"secret\b"}, "regex cannot be compiled: ", "regex cannot be compiled; mend it"),
        ({"regex": "()"}, "regex matches the empty text only; change it", None),
        ({"regex": r"[^\x00-\x{10FFFF}]"}, "regex matches no text, or is too complex", None),
        (
            {"json_schema": {"not": {}}},
            'Unimplemented keys: ["not"]',
            NO_SCHEMA,
        ),
        (
            {"json_schema": {"type": "secret"}},
            "Invalid type: secret",
            NO_SCHEMA,
        ),
        ({"json_schema": {"$ref": "http://secret"}}, "secret", NO_SCHEMA),
        ({"json_schema": {"x-guidance": "secret"}}, "secret", NO_SCHEMA),
        ({"json_schema": {"$ref": "#"}}, "json_schema matches no text, or is too complex", None),
        (
            {"grammar": 'start: a\na: secret "b"'},
            'grammar cannot be compiled at line 2, column 4: unknown name: "secret"; mend it',
            "grammar cannot be compiled at line 2, column 4; mend it",
        ),
        ({"grammar": "secret"}, "grammar c", None),
        ({"grammar": "start: start"}, "grammar matches no text, or is too complex", None),
        ({"grammar": "root ::= secret ::="}, "grammar c", None),
        ({"grammar": "start: a\n" + 'a: "b"\n' * 600}, "grammar has 601 colons; at most 512 are", None),
    ],
)
def test_what_cannot_be_compiled_is_refused_before_anything_runs(options, message, summary):
    model = make_model()
    for call in (model.generate, model.stream):
        with pytest.raises(ConstraintError) as error:
            call("ab", **options)
        assert message in str(error.value)
        assert error.value.summary == (summary or error.value.summary)
        assert "secret" not in error.value.summary
    assert (idle(model), model.engine.steps) == (True, 0)
    with pytest.raises(InvalidSamplingError, match=r"^prompt 1 of the list: "):
        model.generate(["a", "b"], [SamplingParams(), SamplingParams(**options)])


def test_a_model_without_a_tokenizer_of_bytes_refuses_constraints_by_name():
    model = GPT2(fakes.FakeBackend(fakes.config(), fakes.endless), None)
    with pytest.raises(RequestError, match="regex needs text, and this model has no tokenizer"):
        model.generate([1, 2], regex="a")
    from tokenizers import Tokenizer as Inner
    from tokenizers import decoders, models

    inner = Inner(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    inner.decoder = decoders.Metaspace()
    model = GPT2(fakes.FakeBackend(fakes.config(), fakes.endless), Tokenizer(inner))
    with pytest.raises(RequestError, match="choice needs a tokenizer whose tokens are bytes"):
        model.generate([1], choice=["a"])


def test_without_the_package_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(BackendUnavailableError, match=r"pip install 'gpt2core\[guidance\]'"):
        make_model().generate("a", regex="a")


def test_a_package_that_does_not_load_is_not_called_missing(monkeypatch, tmp_path):
    (tmp_path / "llguidance.py").write_text("import a_module_that_nobody_has\n")
    monkeypatch.syspath_prepend(tmp_path)
    for name in [name for name in sys.modules if name.split(".")[0] == "llguidance"]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(
        BackendUnavailableError, match="llguidance, whose import failed: No module named 'a_mod"
    ):
        make_model().generate("a", regex="a")


def test_texts_without_a_constraint_do_not_load_the_package():
    code = (
        "from gpt2core import GPT2; import sys; GPT2.from_pretrained('demo', backend='numpy').generate('a'); "
    )
    code += "assert 'llguidance' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_constraint_is_compiled_once_and_the_last_ones_used_are_kept(monkeypatch):
    compiled, compile_one = [], compiler._compile

    def count(tokenizer, kind, source):
        compiled.append(source)
        return compile_one(tokenizer, kind, source)

    monkeypatch.setattr(compiler, "_compile", count)
    monkeypatch.setattr(compiler, "MAX_COMPILED", 2)
    model = make_model()
    for pattern in ("a", "b", "a", "c", "a", "b"):
        assert model.generate(["x", "y"], regex=pattern, n=2)[3].text == pattern
    assert compiled == ["a", "b", "c", "b"]


# What goes wrong on the way


def test_bans_that_leave_nothing_of_the_constraint_end_the_request_with_both_named():
    model = make_model()
    with pytest.raises(
        InvalidSamplingError, match=r"allows 1 tokens after 1 tokens, and all of them are banned"
    ):
        model.generate("ab", regex="xxxx", no_repeat_ngram_size=1)
    with pytest.raises(InvalidSamplingError, match=r"ends the text after 3 tokens, and min_new_tokens is 4"):
        model.generate("ab", regex="abc", min_new_tokens=4)
    assert model.generate("ab", regex="abc", min_new_tokens=3).text == "abc"
    assert idle(model)


def test_a_dead_end_says_so_and_ends_its_own_request_only():
    engine = make_model(fakes.hashed).engine
    [dead] = engine.submit([97], SamplingParams(grammar=r'start: "a" T' + "\n" + r"T: /[0-9]+/ & /[a-z]+/"))
    [other] = engine.submit([97], SamplingParams(max_new_tokens=5))
    run(engine)
    assert isinstance(dead.error, InvalidSamplingError)
    assert re.search("can neither go on nor end after|matches no text", str(dead.error))
    assert (other.error, len(other.generated)) == (None, 5)


def test_a_vocabulary_that_cannot_spell_the_text_says_so():
    config = fakes.config(vocab_size=99, eos=())
    model = GPT2(fakes.FakeBackend(config, fakes.hashed), TOKENIZER)
    with pytest.raises(
        InvalidSamplingError, match="can neither go on nor end after 2 tokens: no token of this"
    ):
        model.generate([97], regex="abz")
    assert idle(model)


HOSTILE = {
    "nested groups": {"regex": "(" * 8000 + "a" + ")" * 8000},
    "nested stars": {"regex": "(" * 200 + "a" + ")*" * 200},
    "repetitions": {"regex": "((a{1,1000}){1,1000}){1,1000}"},
    "an automaton of 2**400 states": {"regex": "(a|b)*a(a|b){400}"},
    "intersections": {"grammar": "start: T\nT: " + " & ".join(f"/(.*{chr(97 + i)}.*)/" for i in range(26))},
    "ambiguity": {"grammar": 'start: s\ns: s s s s s | "a"?'},
    "repeated repetitions": {"grammar": "start: " + "(" * 6 + '"a" "b"' + "){1,1000}" * 6},
    "a chain of rules": {
        "grammar": "start: r0\n" + "".join(f"r{i}:r{i + 1}\n" for i in range(500)) + 'r500:"a"'
    },
    "doubling": {
        "grammar": "start: T0\n" + "".join(f"T{i}:T{i + 1} T{i + 1}\n" for i in range(200)) + 'T200:"a"'
    },
    "nested parentheses": {"grammar": "start: " + "(" * 8000 + '"a"' + ")" * 8000},
    "a chain of references": {
        "json_schema": {
            "$ref": "#/$defs/0",
            "$defs": {
                **{str(i): {"$ref": f"#/$defs/{i + 1}"} for i in range(1500)},
                "1500": {"type": "null"},
            },
        }
    },
    "two thousand properties": {
        "json_schema": {"type": "object", "properties": {f"p{i}": {"type": "null"} for i in range(2000)}}
    },
    "a million items": {"json_schema": {"type": "array", "minItems": 10**6, "items": {"type": "integer"}}},
}


@pytest.mark.parametrize("constraint", HOSTILE.values(), ids=[*HOSTILE])
def test_a_hostile_constraint_ends_in_a_text_or_in_an_error_of_its_own(constraint):
    """In a process of its own, with little memory: what overflows a stack would end it."""
    code = f"""
import resource, sys, threading
sys.path.insert(0, {str(Path(__file__).parent)!r})
from engines import fakes, make_model
from gpt2core.errors import InvalidSamplingError
model = make_model(context=128)
model.generate("a", regex="a")
resource.setrlimit(resource.RLIMIT_DATA, (2**30, 2**30))
def work():
    try:
        print(model.generate("ab", temperature=2, seed=1, max_new_tokens=60, **{constraint!r}).finish_reason)
    except InvalidSamplingError as error:
        print(type(error).__name__, str(error)[:200])
threading.stack_size(2**18)  # as small as that of any thread
thread = threading.Thread(target=work)
thread.start()
thread.join()
assert model.generate("ab", max_new_tokens=3).finish_reason == "length"
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert re.match(r"stop|length|\w+Error .*(cannot be compiled|too complex)", done.stdout), done.stdout
