"""`gpt2core score` over rows of files, and `gpt2core pairs`: formats, columns, faults, kills, the page."""

import csv
import io
import json
import math
import re
import sys

import pytest
from scipy.stats import binomtest

from gpt2core import GPT2
from gpt2core.cli import main
from gpt2core.cli import score_corpus as command
from gpt2core.scoring.corpus import Fault, Row, read_rows
from gpt2core.scoring.output import Output
from gpt2core.scoring.pairs import wilson_interval
from gpt2core.scoring.records import COLUMNS
from gpt2core.testing import random_checkpoint

TEXTS = ["Once upon a time.", "A fox ran home, and a king said: no!", "naïve €uro " * 9, "The end of it"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(random_checkpoint(tmp_path_factory.mktemp("scored"), seed=5))


@pytest.fixture(scope="module")
def model(folder):
    with GPT2.from_pretrained(folder, backend="native") as model:
        yield model


@pytest.fixture
def run(capfd, monkeypatch, folder):
    """Run a command on the model in this process: its exit code, stdout and stderr."""

    def run(*args, stdin=b"", backend="native"):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        code = main([str(arg) for arg in args] + ["--model", folder, "--backend", backend])
        return code, *capfd.readouterr()

    return run


@pytest.fixture
def jsonl(tmp_path):
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": t, "name": f"t{i}"}) + "\n" for i, t in enumerate(TEXTS)))
    return path


def lines(text):
    return [json.loads(line) for line in text.splitlines()]


def test_each_row_of_a_file_is_a_row_of_the_result(run, jsonl, model):
    code, out, err = run("score", jsonl, "--id", "name", "--bos")
    assert code == 0
    assert re.match(r"gpt2core \S+, .* native float32 \(bits [0-9a-f]{16}\), bos token 0, context 96", err)
    for i, (row, score) in enumerate(zip(lines(out), model.score(TEXTS, bos="eos"), strict=True)):
        assert tuple(row) == COLUMNS["text"]
        assert (row["file"], row["line"], row["id"]) == (str(jsonl), i + 1, f"t{i}")
        assert (row["tokens"], row["scored_tokens"]) == (len(score.token_ids), len(score.logprobs))
        assert (row["logprob"], row["perplexity"]) == (score.logprob, score.perplexity)
        assert row["surprisal"] == pytest.approx(-score.logprob / math.log(2))
        assert row["bytes"] == len(TEXTS[i].encode())


def test_rows_by_token_say_all_that_is_known(run, jsonl, model):
    _, out, _ = run("score", jsonl, "--by", "token", "--top", 2, "--entropy", "--base", "e")
    rows = lines(out)
    assert tuple(rows[0]) == COLUMNS["token"]
    scores = model.score(TEXTS, top=2, entropy=True)
    want = [token for score in scores for token in score.by_token(math.e)]
    for row, token in zip(rows, want, strict=True):
        for name in ("text", "token_id", "start", "end", "byte_start", "byte_end", "logprob", "rank"):
            assert row[name] == getattr(token, name)
        assert (row["surprisal"], row["entropy"]) == (token.surprisal, token.entropy)
        top = None if token.top is None else [[one.token_id, one.text, one.logprob] for one in token.top]
        assert row["top"] == top


def test_words_and_regions_are_those_of_the_library(run, tmp_path, model):
    path = tmp_path / "regions.csv"
    path.write_text('text,at\n"A fox ran, home","[[0, 5], [6, 15]]"\n')
    [score] = model.score(["A fox ran, home"], bos="eos", boundaries=True)
    _, out, _ = run("score", path, "--by", "region", "--regions", "at", "--bos", "--corrected")
    want = score.words([(0, 5), (6, 15)], corrected=True)
    assert [(r["region"], r["text"], r["logprob"], r["exact"]) for r in lines(out)] == [
        (i, w.text, w.logprob, w.exact) for i, w in enumerate(want)
    ]
    _, out, _ = run("score", path, "--by", "word", "--bos")
    assert [(r["word"], r["surprisal"]) for r in lines(out)] == [
        (i, w.surprisal) for i, w in enumerate(score.words())
    ]


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "tsv", "parquet"])
def test_every_format_holds_the_same_rows_with_the_columns_in_their_order(run, jsonl, tmp_path, suffix):
    _, printed, _ = run("score", jsonl, "--by", "token", "--id", "name", "--top", 1)
    output = tmp_path / f"out.{suffix}"
    code, out, _ = run("score", jsonl, "--by", "token", "--id", "name", "--top", 1, "--output", output)
    assert (code, out) == (0, "")
    want = lines(printed)
    assert read_back(output) == want
    meta = json.loads((tmp_path / f"out.{suffix}.meta.json").read_text())
    assert meta["complete"] is True
    assert meta["columns"] == list(COLUMNS["token"])
    assert (meta["rows"], meta["faults"]) == (4, 0)
    assert sorted(path.name for path in tmp_path.glob("out.*")) == [
        f"out.{suffix}",
        f"out.{suffix}.meta.json",
    ]


def read_back(path):
    if path.suffix == ".jsonl":
        return lines(path.read_text())
    if path.suffix == ".parquet":
        import pyarrow.parquet

        rows = pyarrow.parquet.read_table(path).to_pylist()
        return [row | {"top": row["top"] and json.loads(row["top"])} for row in rows]
    delimiter = "," if path.suffix == ".csv" else "\t"
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file, delimiter=delimiter))
    strings = ("file", "id", "text")
    return [
        {k: v if k in strings else None if v == "" else json.loads(v) for k, v in row.items()} for row in rows
    ]


@pytest.mark.parametrize("suffix", ["csv", "tsv", "parquet", "txt"])
def test_every_format_is_read(run, jsonl, tmp_path, suffix):
    path = tmp_path / f"texts.{suffix}"
    if suffix == "parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"text": t} for t in TEXTS]), path)
    elif suffix == "txt":
        path.write_text("\ufeff" + "\r\n".join(["", *TEXTS]), newline="")
    else:
        with path.open("w", newline="") as file:
            csv.writer(file, delimiter="," if suffix == "csv" else "\t").writerows(
                [["text"], *map(list, zip(TEXTS))]
            )
    extra = ["--format", "lines"] if suffix == "txt" else []
    _, out, _ = run("score", path, *extra)
    _, want, _ = run("score", jsonl)
    numbers = ("tokens", "logprob", "bits_per_byte")
    assert [[r[n] for n in numbers] for r in lines(out)] == [[r[n] for n in numbers] for r in lines(want)]


def test_stdin_is_read_line_by_line(run):
    _, out, _ = run("score", "-", "--by", "text", stdin=b"one line\n\nanother\n")
    assert [(row["file"], row["line"]) for row in lines(out)] == [("-", 1), ("-", 3)]


def test_rows_that_cannot_be_scored_are_told_by_their_line_and_kept_apart(run, tmp_path):
    path, output = tmp_path / "bad.jsonl", tmp_path / "out.jsonl"
    path.write_bytes(b'{"text": "fine"}\n{bad\n{"other": 1}\n{"text": ""}\n\xff\n{"text": "good"}\n[1]\n')
    code, out, err = run("score", path)
    assert code == 0
    assert [row["line"] for row in lines(out)] == [1, 6]
    told = re.findall(r"line (\d+): (.{8})", err)
    assert [int(line) for line, _ in told] == [2, 3, 4, 5, 7]
    assert "5 of 7 rows could not be scored" in err
    code, _, err = run("score", path, "--output", output)
    faults = lines((tmp_path / "out.jsonl.faults.jsonl").read_text())
    assert [fault["line"] for fault in faults] == [2, 3, 4, 5, 7]
    assert "has no field 'text'" in faults[1]["reason"]
    assert "out.jsonl.faults.jsonl" in err
    path.write_text("{bad\n")
    assert run("score", path)[0] == 2


def test_rows_of_a_broken_table_are_told(tmp_path):
    data = b'text,id\n"a\nb",1\nonly\n"c",\xff\n"d",2\n"never closed'
    rows = list(read_rows(io.BytesIO(data), "t.csv", "csv", "text"))
    assert rows[0] == Row("t.csv", 2, {"text": "a\nb", "id": "1"})
    assert rows[3] == Row("t.csv", 6, {"text": "d", "id": "2"})
    assert [(row.line, type(row)) for row in rows] == [(2, Row), (4, Fault), (5, Fault), (6, Row), (7, Fault)]


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet"])
@pytest.mark.parametrize("killed_at", [0, 1, 5, 11])
def test_after_a_kill_nothing_is_lost_and_nothing_there_twice(
    run, tmp_path, monkeypatch, suffix, killed_at, folder
):
    path = tmp_path / "many.jsonl"
    rows = [json.dumps({"text": "abc " * (1 + i % 5)}) if i % 4 else "{bad" for i in range(14)]
    path.write_text("\n".join(rows) + "\n")
    whole, output = tmp_path / f"whole.{suffix}", tmp_path / f"out.{suffix}"
    assert run("score", path, "--by", "token", "--output", whole)[0] == 0
    monkeypatch.setattr(command, "NOTE_S", 0.0)  # after each row
    note, write = Output.note, Output.write
    notes = []

    def torn_write(self, records):
        """Some bytes of a row that is not noted yet, and then the end."""
        if len(notes) >= killed_at:
            self._stream.write(b'{"torn": ')
            self._stream.flush()
            raise KeyboardInterrupt
        write(self, records)

    def counted_note(self, rows):
        note(self, rows)
        notes.append(rows)

    with monkeypatch.context() as patch:
        patch.setattr(Output, "note", counted_note)
        patch.setattr(Output, "write", torn_write)
        assert run("score", path, "--by", "token", "--output", output)[0] == 130
    assert not json.loads((tmp_path / f"out.{suffix}.meta.json").read_text())["complete"]
    code, _, err = run("score", path, "--by", "token", "--output", output)
    assert code == 2
    assert "is there already; go on with --resume" in err
    assert run("score", path, "--by", "token", "--output", output, "--resume")[0] == 0
    assert read_back(output) == read_back(whole)
    faults = [(tmp_path / f"{name}.{suffix}.faults.jsonl").read_text() for name in ("whole", "out")]
    assert faults[0] == faults[1]
    before = output.read_bytes()
    code, _, err = run("score", path, "--by", "token", "--output", output, "--resume")
    assert (code, output.read_bytes()) == (0, before)
    assert "is complete already" in err


def test_a_run_with_other_choices_or_another_input_is_no_resumption(run, jsonl, tmp_path):
    output = tmp_path / "out.jsonl"
    assert run("score", jsonl, "--output", output)[0] == 0
    code, _, err = run("score", jsonl, "--bos", "--output", output, "--resume")
    assert code == 2
    assert "was begun with another bos" in err
    jsonl.write_text(jsonl.read_text() + '{"text": "more"}\n')
    assert "was begun with another inputs" in run("score", jsonl, "--output", output, "--resume")[2]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--by", "region"], "--by region and --regions NAME go together"),
        (["--corrected"], "--corrected is about words"),
        (["--top", "2"], "--top and --entropy are of tokens"),
        (["--resume"], "--resume needs the --output"),
        (["--output", "x.txt"], "x.txt ends in .txt; known are .jsonl, .csv, .tsv, .parquet"),
        (["--per-token"], "--per-token and --json are for the summary of one text"),
        (["--stride", "200"], "stride is 200; it must be a whole number from 1 to 96"),
    ],
)
def test_options_that_do_not_go_together_are_refused(run, jsonl, args, message):
    code, out, err = run("score", jsonl, *args)
    assert (code, out) == (2, "")
    assert message in err


def test_a_summary_takes_the_choices_too(run, tmp_path, model):
    path = tmp_path / "one.txt"
    path.write_text(TEXTS[2])
    _, out, _ = run("score", path, "--bos", "--stride", 7, "--json")
    want = model.score(TEXTS[2], bos="eos", stride=7)
    assert json.loads(out)["mean_logprob"] == pytest.approx(want.logprobs.mean())
    _, out, _ = run("score", path, path, "--bos")
    assert [row["tokens"] for row in lines(out)] == [len(want.token_ids)] * 2


def test_a_page_shows_the_whole_text_and_needs_nothing_from_outside(run, tmp_path, model):
    path, page = tmp_path / "one.txt", tmp_path / "out.html"
    path.write_text("A <b>naïve</b> king & “queen”")
    assert run("score", path, "--page", page, "--top", 2, "--bos")[0] == 0
    text = page.read_text()
    assert not re.search(r"(?:src|href)=|url\(|@import|https?:", text)
    import html

    [shown] = re.findall(r'<div class="text">(.*?)</div>', text, re.DOTALL)
    assert html.unescape(re.sub(r"<[^>]*>", "", shown)) == path.read_text()
    packed = [json.loads(html.unescape(one)) for one in re.findall(r'data-t="([^"]*)"', shown)]
    score = model.score(path.read_text(), bos="eos", entropy=True)
    assert [one["rank"] for one in packed] == score.ranks.tolist()
    assert [one["surprisal"] for one in packed] == pytest.approx(score.surprisals().tolist(), abs=1e-4)
    assert all(len(one["top"]) == 2 for one in packed)


# pairs


@pytest.mark.parametrize(("correct", "pairs"), [(0, 1), (1, 1), (3, 10), (50, 100), (100, 100), (1, 1000)])
def test_intervals_are_those_of_scipy(correct, pairs):
    want = binomtest(correct, pairs).proportion_ci(method="wilson")
    assert wilson_interval(correct, pairs) == pytest.approx((want.low, want.high), abs=1e-12)


def test_pairs_are_judged_by_phenomenon(run, tmp_path, model):
    pairs = [("The cats are here.", "The cats is here.", "agreement"), ("a b", "b a", "order")] * 3
    path = tmp_path / "blimp.jsonl"
    names = ("sentence_good", "sentence_bad", "linguistics_term")
    path.write_text("".join(json.dumps(dict(zip(names, pair, strict=True))) + "\n" for pair in pairs))
    code, out, _ = run("pairs", path, "--json")
    assert code == 0
    right = {
        name: model.score(good, bos="eos").logprob > model.score(bad, bos="eos").logprob
        for good, bad, name in pairs
    }
    rows = {row["name"]: row for row in json.loads(out)["phenomena"]}
    assert list(rows) == ["agreement", "order", "all"]
    for name in right:
        assert (rows[name]["pairs"], rows[name]["correct"]) == (3, 3 * right[name])
    assert rows["all"]["correct"] == 3 * sum(right.values())
    shown = run("pairs", path)[1].splitlines()
    assert shown[0].split() == ["phenomenon", "pairs", "accuracy", "95", "%", "interval"]
    assert len(shown) == 4


def test_pairs_of_another_file_are_named_by_options(run, tmp_path, model):
    path = tmp_path / "mine.tsv"
    path.write_text("yes\tno\na b c\ta c\n")
    _, out, _ = run("pairs", path, "--good", "yes", "--bad", "no", "--mean", "--no-bos", "--json")
    [row] = json.loads(out)["phenomena"]
    better, worse = (float(model.score(text).logprobs.mean()) for text in ("a b c", "a c"))
    assert (row["name"], row["correct"]) == ("all", int(better > worse))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"sentence_good": "a"}\n', "line 1: has no field 'sentence_bad'"),
        ("{bad\n", "line 1: not JSON"),
        ("", "holds no pairs"),
    ],
)
def test_files_without_pairs_are_refused(run, tmp_path, content, message):
    path = tmp_path / "pairs.jsonl"
    path.write_text(content)
    code, _, err = run("pairs", path)
    assert code == 2
    assert message in err
