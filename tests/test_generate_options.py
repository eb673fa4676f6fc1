"""`gpt2core generate`: every sampling parameter is an option, and many prompts are one batch."""

import inspect
import json
import re
from dataclasses import fields

import pytest

from gpt2core import GPT2, SamplingParams
from gpt2core.cli import main, program
from gpt2core.testing import random_checkpoint

PROMPT = "Once upon"
BEAMS = {"num_beams", "length_penalty", "early_stopping"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(random_checkpoint(tmp_path_factory.mktemp("tiny")))


@pytest.fixture(scope="module")
def model(folder):
    with GPT2.from_pretrained(folder) as loaded:
        yield loaded


@pytest.fixture
def generate(folder, capsys):
    def run(*args, code=0):
        assert main(["generate", "--model", folder, *args]) == code
        return capsys.readouterr()

    return run


def test_every_sampling_parameter_is_an_option_and_every_default_but_two_is_the_librarys():
    options = {option.name: option for option in program.commands["generate"].params}
    names = {field.name for field in fields(SamplingParams)}
    assert names - set(options) == set()
    given = program.commands["generate"].make_context("generate", ["x"]).params
    ours = SamplingParams(**{name: given[name] for name in names - {"echo", "logit_bias"}})
    assert ours == SamplingParams(temperature=0.8)
    talk = {option.name for option in program.commands["chat"].params}
    # An answer is one text, shown as it is, and a conversation is never cut.
    assert names - talk == {"n", "logprobs", "echo", "overflow"} | BEAMS


def test_every_option_of_loading_that_concerns_one_text_is_an_option():
    known = inspect.signature(GPT2.from_pretrained).parameters
    options = {option.name for option in program.commands["generate"].params}
    elsewhere = {"model", "local_files_only", "cache_dir", "token", "max_batch", "cache_nbytes"}
    internal = {"prefix_cache", "on_progress", "unknown"}
    assert set(known) - options - elsewhere - internal == set()


def test_the_five_commonest_options_are_short(generate, model):
    want = model.generate(PROMPT, max_new_tokens=7, temperature=0.5, seed=3).text
    assert generate(PROMPT, "-n", "7", "-t", "0.5", "-s", "3", "-b", "numpy").out == f"{PROMPT}{want}\n"
    short = {opts[0]: opts[1] for p in program.commands["generate"].params if len(opts := p.opts) > 1}
    assert short == {
        "-m": "--model",
        "-b": "--backend",
        "-n": "--max-new-tokens",
        "-t": "--temperature",
        "-s": "--seed",
    }


@pytest.mark.parametrize(
    ("options", "sampling"),
    [
        (("--max-length", "30"), {"max_length": 30}),
        (("--min-new-tokens", "40", "-n", "40"), {"min_new_tokens": 40, "max_new_tokens": 40}),
        (("--presence-penalty", "1.5"), {"presence_penalty": 1.5}),
        (("--frequency-penalty", "-1.5"), {"frequency_penalty": -1.5}),
        (("--no-repeat-ngram-size", "2"), {"no_repeat_ngram_size": 2}),
        (("--logit-bias", "98=100", "--logit-bias", "99=-100"), {"logit_bias": {98: 100.0, 99: -100.0}}),
        (("--stop-token-id", "98", "--stop-token-id", "117"), {"stop_token_ids": [98, 117]}),
        (("--ignore-eos", "--logit-bias", "0=50"), {"ignore_eos": True, "logit_bias": {0: 50.0}}),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_each_option_is_passed_on(generate, model, options, sampling):
    fixed = {"temperature": 0.8, "seed": 5}
    want = model.generate(PROMPT, **fixed, **sampling)
    assert generate(PROMPT, "-s", "5", *options).out == f"{PROMPT}{want.text}\n"
    plain = model.generate(PROMPT, **fixed, max_new_tokens=sampling.get("max_new_tokens"))
    assert want.token_ids != plain.token_ids or "min_new_tokens" in sampling


def test_the_prompt_is_left_out_or_put_in_where_that_is_asked_for(generate, model):
    want = model.generate(PROMPT, max_new_tokens=5, temperature=0.8, seed=3).text
    for more in ((), ("--no-stream",)):
        assert generate(PROMPT, "-n", "5", "-s", "3", "--no-prompt", *more).out == f"{want}\n"
        assert generate(PROMPT, "-n", "5", "-s", "3", "--echo", *more).out == f"{PROMPT}{want}\n"
    [whole] = json.loads(generate(PROMPT, "-n", "5", "-s", "3", "--echo", "--json").out)["generations"]
    assert whole["text"] == PROMPT + want


def test_logprobs_are_in_the_document_and_else_a_table_on_stderr(generate, model):
    want = model.generate(PROMPT, max_new_tokens=3, temperature=0.8, seed=3, logprobs=2)
    [got] = json.loads(generate(PROMPT, "-n", "3", "-s", "3", "--logprobs", "2", "--json").out)["generations"]
    assert [(e["id"], e["logprob"]) for e in got["logprobs"]] == [
        (entry.token_id, pytest.approx(entry.logprob)) for entry in want.logprobs
    ]
    assert [[(t["id"], t["logprob"]) for t in e["top"]] for e in got["logprobs"]] == [
        [(token_id, pytest.approx(logprob)) for token_id, logprob in entry.top] for entry in want.logprobs
    ]
    for more in ((), ("--no-stream",)):
        shown = generate(PROMPT, "-n", "3", "-s", "3", "--logprobs", "2", *more)
        assert shown.out == f"{PROMPT}{want.text}\n"
        head, *rows = shown.err.splitlines()
        assert head.split() == ["logprob", "token", "likeliest"]
        assert [row.split()[0] for row in rows] == [f"{entry.logprob:.4f}" for entry in want.logprobs]
    (bare,) = [generate(PROMPT, "-n", "1", "-s", "3", "--logprobs", "0").err.splitlines()[0].split()]
    assert bare == ["logprob", "token"]


@pytest.mark.parametrize("bias", ["98", "98=", "=3", "x=3", "98=much"])
def test_a_bias_that_is_none_is_refused(generate, bias):
    got = generate(PROMPT, "--logit-bias", bias, code=2)
    assert f"--logit-bias is {bias!r}; give a token id and a number, as 50256=-100" in got.err


# Several prompts


def test_several_prompts_are_one_batch_and_each_text_is_the_one_it_would_be_alone(
    generate, model, monkeypatch
):
    calls = []
    whole = GPT2.generate
    monkeypatch.setattr(GPT2, "generate", lambda self, *a, **k: calls.append(a) or whole(self, *a, **k))
    alone = [model.generate(p, max_new_tokens=5, temperature=0.8, seed=3).text for p in ("One", "Two")]
    calls.clear()
    shown = generate("One", "Two", "-n", "5", "-s", "3")
    assert shown.out == f"--- 1 of 2 ---\nOne{alone[0]}\n--- 2 of 2 ---\nTwo{alone[1]}\n"
    assert len(calls) == 1
    pairs = generate("One", "Two", "-n", "5", "-s", "3", "--n", "2", "--no-prompt").out
    assert [line for line in pairs.splitlines() if line.startswith("---")] == [
        "--- 1 of 2, 1 of 2 ---",
        "--- 1 of 2, 2 of 2 ---",
        "--- 2 of 2, 1 of 2 ---",
        "--- 2 of 2, 2 of 2 ---",
    ]
    assert pairs.startswith(f"--- 1 of 2, 1 of 2 ---\n{alone[0]}\n")


def test_several_prompts_in_json_have_a_result_each(generate, model):
    document = json.loads(generate("One", "Two", "-n", "5", "-s", "3", "--n", "2", "--json").out)
    assert "prompt" not in document
    wants = model.generate(["One", "Two"], max_new_tokens=5, temperature=0.8, seed=3, n=2)
    assert [result["prompt"] for result in document["results"]] == ["One", "Two"]
    got = [one["token_ids"] for result in document["results"] for one in result["generations"]]
    assert got == [want.token_ids for want in wants]


@pytest.mark.parametrize(
    ("name", "content", "prompts"),
    [
        ("p.txt", "One\n\nTwo\r\n", ["One", "Two"]),
        ("p.txt", "\ufeffÆrø\n  spaces stay  ", ["Ærø", "  spaces stay  "]),
        ("p.txt", '"quoted"\n{"prompt": "no JSON here"}', ['"quoted"', '{"prompt": "no JSON here"}']),
        ("p.txt", "a\u2028b\x0cc\nd", ["a\u2028b\x0cc", "d"]),
        ("p.jsonl", '"One"\n{"prompt": "Two\\nlines", "id": 3}\n', ["One", "Two\nlines"]),
        ("p.jsonl", '[5, 9]\n{"prompt": [7]}\n', [[5, 9], [7]]),
    ],
    ids=["lines", "byte order mark", "text is text", "only line feeds", "jsonl", "token ids"],
)
def test_a_file_of_prompts_is_read_by_its_kind(generate, tmp_path, name, content, prompts):
    (tmp_path / name).write_bytes(content.encode())
    document = json.loads(generate("--prompts", str(tmp_path / name), "-n", "1", "--json").out)
    assert [result["prompt"] for result in document["results"]] == prompts
    both = json.loads(generate("first", "--prompts", str(tmp_path / name), "-n", "1", "--json").out)
    assert [result["prompt"] for result in both["results"]] == ["first", *prompts]


def test_token_ids_are_shown_as_the_text_that_they_are(generate, model, tmp_path):
    ids = model.tokenizer.encode(PROMPT)
    (tmp_path / "p.jsonl").write_text(json.dumps(ids))
    want = model.generate(ids, max_new_tokens=5, temperature=0.8, seed=3).text
    assert generate("--prompts", str(tmp_path / "p.jsonl"), "-n", "5", "-s", "3").out == f"{PROMPT}{want}\n"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.txt", "\n \n", "holds no prompt; write one a line"),
        ("p.txt", b"caf\xe9", "p.txt is not UTF-8: byte 0xe9 at offset 3"),
        ("p.jsonl", "One", "p.jsonl, line 1 is not JSON"),
        ("p.jsonl", '"One"\n\n{"text": "x"}', "p.jsonl, line 3 has no 'prompt', but 'text'"),
        ("p.jsonl", "[]", "line 1 is []; give a text, or a list of token ids"),
        ("p.jsonl", "[1, true]", "line 1 is [1, true]; give a text, or a list of token ids"),
        ("p.jsonl", "3", "line 1 is 3; give a text"),
        ("p.txt", f"One\n{'x' * 97}", "prompt 1 of the list: prompt has 97 tokens"),
        ("missing/p.txt", None, "which cannot be read: No such file or directory"),
    ],
)
def test_a_file_that_holds_no_prompts_is_refused_with_the_line(generate, tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    assert message in generate("--prompts", str(tmp_path / name), code=2).err


def test_what_was_left_out_of_a_prompt_is_told_on_stderr_and_in_the_json(generate, model):
    long = "Once upon a time " * 9  # 153 tokens of one byte; the context is 96
    want = model.generate(long, max_new_tokens=9, overflow="truncate")
    options = ("-n", "9", "-t", "0", "--overflow", "truncate")
    for extra in ((), ("--no-stream",)):
        got = generate(long, *options, *extra)
        assert got.out == f"{long}{want.text}\n"
        assert got.err == "the prompt: its first 66 tokens were left out (--overflow truncate)\n"
    got = generate("short", long, *options, "--json")
    assert got.err == "prompt 2: its first 66 tokens were left out (--overflow truncate)\n"
    [one, two] = [result["generations"][0] for result in json.loads(got.out)["results"]]
    assert (one["truncated_tokens"], one["prompt_tokens"]) == (0, 5)
    assert (two["truncated_tokens"], two["prompt_tokens"], two["text"]) == (66, 87, want.text)


def test_a_text_slides_on_beyond_the_context(generate, model):
    want = model.generate(PROMPT, max_new_tokens=200, overflow="slide")
    got = generate(PROMPT, "-n", "200", "-t", "0", "--overflow", "slide")
    assert (got.out, got.err) == (f"{PROMPT}{want.text}\n", "")
    assert len(want.token_ids) > 96 or want.finish_reason == "stop"


def test_a_search_for_the_likeliest_texts(generate, model):
    options = {"num_beams": 4, "max_new_tokens": 9, "length_penalty": 0.5, "early_stopping": "never"}
    best, second = model.generate(PROMPT, n=2, **options)
    given = ("-n", "9", "--num-beams", "4", "--length-penalty", "0.5", "--early-stopping", "never")
    assert generate(PROMPT, *given).out == f"{PROMPT}{best.text}\n"
    got = json.loads(generate(PROMPT, *given, "--n", "2", "--json").out)["generations"]
    assert [(one["text"], one["score"]) for one in got] == [
        (best.text, best.score),
        (second.text, second.score),
    ]
    refused = generate(PROMPT, "--num-beams", "4", "-t", "0.8", code=2)
    assert "--num-beams is 4 and temperature is 0.8; a beam search draws nothing" in refused.err


def test_a_text_matches_what_the_command_line_asks_for(generate, tmp_path):
    out = generate("a", "--regex", "[a-d]{3}-[0-9]", "-s", "1", "--no-prompt").out
    assert re.fullmatch(r"[a-d]{3}-[0-9]\n", out)
    out = generate("a", "--choice", "yes", "--choice", "no, sir", "-s", "1", "--no-prompt").out
    assert out in ("yes\n", "no, sir\n")
    schema = {"type": "array", "items": {"enum": [1, 22]}, "minItems": 2, "maxItems": 3}
    (tmp_path / "schema.json").write_text(json.dumps(schema))
    (tmp_path / "sum.lark").write_text('start: NUMBER ("+" NUMBER){1,3}\nNUMBER: /[0-9]{1,2}/\n')
    for given in (json.dumps(schema), str(tmp_path / "schema.json")):
        out = generate("a", "--json-schema", given, "-s", "1", "--no-prompt").out
        assert {*json.loads(out)} <= {1, 22}
    out = generate("a", "--grammar", str(tmp_path / "sum.lark"), "-s", "1", "--no-prompt").out
    assert re.fullmatch(r"\d{1,2}(\+\d{1,2}){1,3}\n", out)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--regex", "("), "regex cannot be compiled: unclosed group; mend it"),
        (("--regex", "a", "--choice", "b"), "regex and choice are both given"),
        (
            ("--json-schema", "nowhere.json"),
            "--json-schema names nowhere.json, which cannot be read: No such",
        ),
        (("--json-schema", "{"), "--json-schema is not strict JSON"),
        (("--grammar", "nowhere.lark"), "--grammar names nowhere.lark, which cannot be read: No such"),
    ],
)
def test_a_bad_constraint_is_refused_in_the_command_lines_spelling(generate, options, message):
    assert message in generate("a", *options, code=2).err
