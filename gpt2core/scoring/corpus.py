"""Rows of text from files, one at a time; what cannot be read is told by its line."""

import csv
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final, Literal

from gpt2core._json import JSONFault, loads_strict, shown
from gpt2core.errors import RequestError, in_short

Format = Literal["text", "lines", "jsonl", "csv", "tsv", "parquet"]
FORMATS: Final[tuple[Format, ...]] = ("text", "lines", "jsonl", "csv", "tsv", "parquet")
_FORMAT_OF: Final[dict[str, Format]] = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
}
_CELL_NBYTES: Final = 2**27
_PARQUET_ROWS: Final = 1024


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a file.

    Attributes:
        file: its name, as it was given.
        line: where it begins, from 1; of parquet the number of the row.
        fields: what it holds, by name.
        read_nbytes: bytes of the file up to its end, where one can tell.
    """

    file: str
    line: int
    fields: dict[str, Any]
    read_nbytes: int = 0


@dataclass(frozen=True, slots=True)
class Fault:
    """A row that cannot be read or scored, and why."""

    file: str
    line: int
    reason: str
    read_nbytes: int = 0


def format_of(name: str) -> Format:
    """The format that a file's name tells; "text", one text for the whole file, where it tells none."""
    return _FORMAT_OF.get(Path(name).suffix.lower(), "text")


def read_rows(stream: BinaryIO, name: str, format: Format, field: str) -> Iterator[Row | Fault]:
    """The rows of a file.

    Args:
        stream: the file, opened for bytes.
        name: of the file.
        format: what it is; of "text" and "lines" each row has the one field `field`.
        field: which field the text is in.

    Raises:
        RequestError: the file as a whole is not what it is said to be.
    """
    match format:
        case "text" | "lines":
            yield from _read_lines(stream, name, field, whole=format == "text")
        case "jsonl":
            yield from _read_jsonl(stream, name)
        case "csv" | "tsv":
            yield from _read_csv(stream, name, "," if format == "csv" else "\t")
        case "parquet":
            yield from _read_parquet(stream, name)


def _read_lines(stream: BinaryIO, name: str, field: str, *, whole: bool) -> Iterator[Row | Fault]:
    read = 0
    for line, data in enumerate([stream.read()] if whole else stream, 1):
        read += len(data)
        if line == 1:
            data = data.removeprefix(b"\xef\xbb\xbf")
        try:
            text = data.decode()
        except UnicodeDecodeError as error:
            yield Fault(name, line, f"not UTF-8: byte 0x{data[error.start]:02x}", read)
            continue
        if not whole:
            text = text.rstrip("\r\n")
        if text.strip() or whole:
            yield Row(name, line, {field: text}, read)


def _read_jsonl(stream: BinaryIO, name: str) -> Iterator[Row | Fault]:
    read = 0
    for line, data in enumerate(stream, 1):
        read += len(data)
        if line == 1:
            data = data.removeprefix(b"\xef\xbb\xbf")
        if not data.strip():
            continue
        try:
            value = loads_strict(data)
        except JSONFault as error:
            yield Fault(name, line, f"not JSON: {error}", read)
            continue
        if isinstance(value, dict):
            yield Row(name, line, value, read)
        else:
            yield Fault(name, line, f"{shown(value)} is no object", read)


def _read_csv(stream: BinaryIO, name: str, delimiter: str) -> Iterator[Row | Fault]:
    csv.field_size_limit(_CELL_NBYTES)
    text = io.TextIOWrapper(stream, "utf-8-sig", errors="surrogateescape", newline="")
    reader = csv.reader(text, delimiter=delimiter, strict=True)
    try:
        header = next(reader, None)
        if header is None:
            raise RequestError(f"{name} is empty; its first line must name the columns")
        if len(set(header)) < len(header):
            raise RequestError(f"{name} has columns of the same name: {in_short(header)}; rename them")
        while True:
            line = reader.line_num + 1
            try:
                cells = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                yield Fault(name, line, f"no row of a table: {error}")
                continue
            if not cells:
                continue
            if len(cells) != len(header):
                yield Fault(name, line, f"has {len(cells)} cells where the first line names {len(header)}")
            elif any("\udc80" <= character <= "\udcff" for cell in cells for character in cell):
                yield Fault(name, line, "not UTF-8")
            else:
                yield Row(name, line, dict(zip(header, cells, strict=True)))
    finally:
        text.detach()


def _read_parquet(stream: BinaryIO, name: str) -> Iterator[Row | Fault]:
    parquet = import_parquet()
    try:
        batches = parquet.ParquetFile(stream).iter_batches(_PARQUET_ROWS)
    except (OSError, ValueError) as error:
        raise RequestError(f"{name} is no parquet file: {error}") from error
    line = 0
    for batch in batches:
        for fields in batch.to_pylist():
            line += 1
            yield Row(name, line, fields)


def import_parquet() -> Any:
    """`pyarrow.parquet`.

    Raises:
        RequestError: it is not installed.
    """
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise RequestError(
            'parquet needs the package pyarrow; install it with pip install "gpt2core[parquet]", '
            "or use jsonl or csv"
        ) from error
    return pyarrow.parquet


def text_of(row: Row, field: str) -> str:
    """The text in a row.

    Raises:
        RequestError: the row has no such field, or no text in it.
    """
    if field not in row.fields:
        raise RequestError(f"has no field {in_short(field)}; it has {', '.join(map(repr, row.fields))[:200]}")
    value = row.fields[field]
    if not isinstance(value, str):
        raise RequestError(f"field {in_short(field)} holds {shown(value)}, expected a text")
    return value


def regions_of(row: Row, field: str) -> list[tuple[int, int]]:
    """The regions of interest in a row: pairs of a start and an end, or JSON that spells them.

    Raises:
        RequestError: there are none.
    """
    value = row.fields.get(field)
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            value = None
    try:
        spans = [(int(start), int(end)) for start, end in value or ()]
    except (TypeError, ValueError):
        spans = []
    if not spans:
        raise RequestError(
            f"field {in_short(field)} holds no regions; give [[start, end], ...] in characters"
        )
    return spans
