"""What `gpt2core score` does with rows of files: read, score, write, go on after a kill."""

import hashlib
import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, cast

import click

from gpt2core.cli.console import find, load, write
from gpt2core.cli.progress import Status, clock
from gpt2core.errors import RequestError

if TYPE_CHECKING:
    from gpt2core.model import GPT2, Score
    from gpt2core.scoring.corpus import Fault, Format, Row
    from gpt2core.scoring.output import Output
    from gpt2core.scoring.records import RecordOptions

NOTE_S = 2.0
"""Seconds between notes of how far it came: what a kill costs at most."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CorpusRequest:
    """The options of `gpt2core score`."""

    files: tuple[Path, ...]
    model: str
    where: dict[str, Any]
    engine: dict[str, Any]
    choices: dict[str, Any]
    format_: str
    field: str
    id_field: str | None
    by: str | None
    regions: str | None
    corrected: bool
    base: str
    top: int
    entropy: bool
    output: Path | None
    resume: bool
    page: Path | None

    @property
    def base_number(self) -> float:
        """The base of surprisals."""
        return 2 if self.base == "2" else math.e


def score_corpus(request: CorpusRequest) -> None:
    """Score the rows of the files."""
    from gpt2core.scoring.options import ScoreOptions
    from gpt2core.scoring.output import Output
    from gpt2core.scoring.provenance import cite, describe_run
    from gpt2core.scoring.records import COLUMNS, RecordOptions

    by = cast(Any, request.by or "text")
    _check(request, by)
    with ExitStack() as stack:
        model = stack.enter_context(load(request.model, **request.where, **request.engine))
        options = ScoreOptions(**request.choices).resolve(model.config)
        more = {
            "by": by,
            "corrected": request.corrected,
            "base": request.base,
            "top": request.top,
            "entropy": request.entropy,
            "field": request.field,
            "id": request.id_field,
            "regions": request.regions,
            "format": request.format_,
            "inputs": [_describe_input(path) for path in request.files],
        }
        head = describe_run(model, request.model, find(request.model, **request.where), options, **more)
        records = RecordOptions(by=by, base=request.base_number, corrected=request.corrected)
        output = None
        if request.output is not None:
            output = stack.enter_context(Output(request.output, COLUMNS[by], head, resume=request.resume))
            if output.complete:
                click.echo(f"{request.output} is complete already", err=True)
                return
        click.echo(cite(head), err=True)
        _run(request, model, records, output)


def _check(request: CorpusRequest, by: str) -> None:
    if (by == "region") != (request.regions is not None):
        raise click.UsageError("--by region and --regions NAME go together")
    if request.corrected and by not in ("word", "region"):
        raise click.UsageError("--corrected is about words; give --by word or --by region")
    if (request.top or request.entropy) and by != "token" and request.page is None:
        raise click.UsageError("--top and --entropy are of tokens; give --by token, or --page")
    if request.resume and request.output is None:
        raise click.UsageError("--resume needs the --output to go on with")
    if request.resume and any(str(path) == "-" for path in request.files):
        raise click.UsageError("--resume cannot go on with stdin; write it to a file first")


def _describe_input(path: Path) -> dict[str, Any]:
    if str(path) == "-":
        return {"name": "-"}
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"name": str(path), "nbytes": path.stat().st_size, "sha256": digest}


class Tally:
    """How many rows were read, scored and refused, and how far the files are read."""

    def __init__(self, request: CorpusRequest, done: int) -> None:
        self.rows = self.begun_at = done
        self.scored = self.refused = self.tokens = 0
        self.begun_s = time.monotonic()
        self.total_nbytes = sum(path.stat().st_size for path in request.files if str(path) != "-")
        self.before_nbytes = 0  # of the files that are done

    def line(self, read_nbytes: int) -> str:
        """How far it is, and how long the rest will take as far as one can tell."""
        elapsed_s = time.monotonic() - self.begun_s
        share = (self.before_nbytes + read_nbytes) / self.total_nbytes if self.total_nbytes else 0.0
        speed = f"{self.tokens / elapsed_s:.0f} tok/s" if elapsed_s > 0 else ""
        left = ""
        if 0 < share <= 1 and self.rows > self.begun_at and self.begun_at == 0:
            left = f", {share:.0%}, {clock(elapsed_s * (1 - share) / share)} left"
        return f"{self.rows} rows, {speed}{left}"


def _run(request: CorpusRequest, model: "GPT2", records: "RecordOptions", output: "Output | None") -> None:
    from gpt2core.scoring.corpus import Fault, regions_of, text_of
    from gpt2core.scoring.output import encode_json
    from gpt2core.scoring.page import MOST_TEXTS
    from gpt2core.scoring.records import COLUMNS, make_records

    done = 0 if output is None else output.rows
    tally = Tally(request, done)
    for_page: list[tuple[str, Score]] = []
    columns = COLUMNS[records.by]

    def refuse(fault: Fault) -> None:
        tally.refused += 1
        if output is None:
            click.echo(f"gpt2core: {fault.file}, line {fault.line}: {fault.reason}", err=True)
        else:
            output.write_fault({"file": fault.file, "line": fault.line, "reason": fault.reason})

    noted_s = time.monotonic()
    with Status("scoring") as status:
        for row, result in _score_rows(request, model, done, text_of):
            tally.rows += 1
            if isinstance(row, Fault) or isinstance(result, RequestError):
                refuse(row if isinstance(row, Fault) else Fault(row.file, row.line, str(result)))
            else:
                assert result is not None
                try:
                    regions = None if request.regions is None else regions_of(row, request.regions)
                    made = list(make_records(result, records, regions))
                except RequestError as error:
                    refuse(Fault(row.file, row.line, str(error)))
                    made = []
                else:
                    tally.scored += 1
                    tally.tokens += len(result.token_ids)
                    if request.page is not None and len(for_page) < MOST_TEXTS:
                        for_page.append((f"{row.file}, line {row.line}", result))
                named = {"file": row.file, "line": row.line}
                named["id"] = None if request.id_field is None else row.fields.get(request.id_field)
                if output is None:
                    for record in made:
                        full = named | record
                        write(encode_json({name: full.get(name) for name in columns}).decode())
                else:
                    output.write(named | record for record in made)
            if output is not None and time.monotonic() - noted_s >= NOTE_S:
                output.note(tally.rows)
                noted_s = time.monotonic()
            status.update(f"scoring: {tally.line(row.read_nbytes)}")
    if output is not None:
        output.rows = tally.rows
        output.finish({"rows": tally.rows, "faults": output.faults})
    if request.page is not None:
        write_page(request, model, for_page, tally.scored - len(for_page))
    if tally.refused:
        where = "" if output is None else f", listed in {request.output}.faults.jsonl"
        click.echo(f"gpt2core: {tally.refused} of {tally.rows} rows could not be scored{where}", err=True)
    if tally.rows and not tally.scored and tally.rows == tally.refused:
        raise RequestError(f"none of {tally.rows} rows could be scored; see the reasons above or beside them")


def _score_rows(
    request: CorpusRequest, model: "GPT2", skip: int, text_of: Callable[["Row", str], str]
) -> "Iterator[tuple[Row | Fault, Score | RequestError | None]]":
    """Each row with its score, in order, but for the first `skip`; faults among them, without one."""
    from gpt2core.scoring.corpus import Fault

    waiting: list[tuple[Row | Fault, RequestError | None]] = []

    def texts() -> Iterator[str]:
        for number, row in enumerate(_read_files(request)):
            if number < skip:
                continue
            if isinstance(row, Fault):
                waiting.append((row, None))
                continue
            try:
                text = text_of(row, request.field)
            except RequestError as error:
                waiting.append((row, error))
                continue
            waiting.append((row, None))
            yield text

    scores = model.score_iter(
        texts(),
        errors="return",
        top=request.top,
        entropy=request.entropy or request.page is not None,
        boundaries=request.corrected,
        **request.choices,
    )
    for result in scores:
        while isinstance(waiting[0][0], Fault) or waiting[0][1] is not None:
            yield waiting.pop(0)
        yield waiting.pop(0)[0], result
    yield from waiting


def _read_files(request: CorpusRequest) -> "Iterator[Row | Fault]":
    from gpt2core.scoring.corpus import format_of, read_rows

    for path in request.files:
        name = str(path)
        format = cast("Format", format_of(name) if request.format_ == "auto" else request.format_)
        if format == "text" and request.format_ == "auto" and name == "-":
            format = "lines"
        with _open(path) as stream:
            yield from read_rows(stream, name, format, request.field)


def _open(path: Path) -> AbstractContextManager[BinaryIO]:
    if str(path) != "-":
        return path.open("rb")
    if sys.stdin is None:
        raise RequestError("standard input is closed; give the text another way")
    return nullcontext(sys.stdin.buffer)


def write_page(
    request: CorpusRequest, model: "GPT2", scores: "list[tuple[str, Score]]", left_out: int
) -> None:
    """Write the HTML page."""
    from gpt2core._files import replacing
    from gpt2core.scoring.options import ScoreOptions
    from gpt2core.scoring.page import make_page
    from gpt2core.scoring.provenance import cite, describe_run

    assert request.page is not None
    options = ScoreOptions(**request.choices).resolve(model.config)
    head = describe_run(model, request.model, find(request.model, **request.where), options)
    title = f"Surprisal of {', '.join(str(path) for path in request.files)}"
    page = make_page(scores, title=title, cite=cite(head), base=request.base_number, left_out=left_out)
    with replacing(request.page) as file:
        file.write(page.encode())
