"""The files that scoring writes: rows, faults kept apart, a head that fixes the numbers, and how far it came.

Beside OUTPUT stand `OUTPUT.meta.json` (the head), `OUTPUT.faults.jsonl` (rows that could not be scored; only
where there are any) and, until the end, `OUTPUT.progress.json`: after a kill, what lies behind the last
position noted there is cut off and done again, so that nothing is lost and nothing is there twice.
"""

import csv
import io
import json
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO, Final

from gpt2core import RequestError
from gpt2core._files import replacing
from gpt2core._json import read_json_object
from gpt2core.scoring.corpus import import_parquet

OUTPUT_FORMATS: Final = (".jsonl", ".csv", ".tsv", ".parquet")
_PARQUET_ROWS: Final = 10_000


class Output:
    """Where records go; use it as a context.

    Args:
        path: of the file; its suffix says the format.
        columns: of the records.
        head: all that fixes the numbers, as JSON holds it.
        resume: whether to go on where an earlier run with the same head ended.

    Attributes:
        rows: how many rows of the input are done already.
        complete: whether all of them are.

    Raises:
        RequestError: there is such a file already; or it is of another run than the one to go on with.
    """

    def __init__(self, path: Path, columns: Sequence[str], head: dict[str, Any], *, resume: bool) -> None:
        if path.suffix.lower() not in OUTPUT_FORMATS:
            raise RequestError(
                f"{path} ends in {path.suffix or 'nothing'}; known are {', '.join(OUTPUT_FORMATS)}"
            )
        self._path, self._columns, self._head = path, columns, head
        self._parquet = path.suffix.lower() == ".parquet"
        self._rows_path = _beside(path, ".partial.jsonl") if self._parquet else path
        self._progress_path = _beside(path, ".progress.json")
        self._faults_path = _beside(path, ".faults.jsonl")
        self._meta_path = _beside(path, ".meta.json")
        self.rows, self.complete = 0, False
        self.faults = 0
        nbytes = faults_nbytes = 0
        if resume and self._meta_path.exists():
            nbytes, faults_nbytes = self._recall()
        elif any(one.exists() for one in (path, self._rows_path, self._meta_path)):
            raise RequestError(
                f"{path} is there already; go on with --resume, remove it, or name another file"
            )
        self._stream, self._fault_stream = None, None
        if not self.complete:
            self._write_meta(complete=False)
            self._stream = _open_at(self._rows_path, nbytes)
            self._fault_stream = _open_at(self._faults_path, faults_nbytes)
            if nbytes == 0:
                self._stream.write(self._encode_header())

    def __enter__(self) -> "Output":
        return self

    def __exit__(self, *error: object) -> None:
        for stream in (self._stream, self._fault_stream):
            if stream is not None:
                stream.close()
        with suppress(OSError):
            if self._faults_path.stat().st_size == 0:
                self._faults_path.unlink()

    def write(self, records: Iterable[dict[str, Any]]) -> None:
        """Write the records of one row."""
        assert self._stream is not None
        self._stream.write(b"".join(map(self._encode, records)))

    def write_fault(self, fault: dict[str, Any]) -> None:
        """Keep a row that cannot be scored apart."""
        assert self._fault_stream is not None
        self._fault_stream.write(encode_json(fault))
        self.faults += 1

    def note(self, rows: int) -> None:
        """Make what was written last, and note that so many rows of the input are done."""
        assert self._stream is not None
        assert self._fault_stream is not None
        for stream in (self._stream, self._fault_stream):
            stream.flush()
            os.fsync(stream.fileno())
        self.rows = rows
        with replacing(self._progress_path) as file:
            file.write(
                encode_json(
                    {
                        "rows": rows,
                        "faults": self.faults,
                        "nbytes": self._stream.tell(),
                        "fault_nbytes": self._fault_stream.tell(),
                    }
                )
            )

    def finish(self, totals: dict[str, Any]) -> None:
        """All rows are done."""
        self.note(self.rows)
        if self._parquet:
            assert self._stream is not None
            self._stream.close()
            _write_parquet(self._rows_path, self._path, self._columns, self._head)
            self._rows_path.unlink()
        self._write_meta(complete=True, **totals)
        self._progress_path.unlink(missing_ok=True)
        self.complete = True

    def _recall(self) -> tuple[int, int]:
        """Where the earlier run stopped: bytes of the rows and of the faults that count."""
        meta = read_json_object(self._meta_path)
        theirs, ours = meta.get("head"), json.loads(json.dumps(self._head))
        if theirs != ours:
            parts = theirs if isinstance(theirs, dict) else {}
            differing = [name for name in {**parts, **ours} if parts.get(name) != ours.get(name)]
            raise RequestError(
                f"{self._path} was begun with another {' and '.join(sorted(differing))}; go on with the "
                "same, or name another file"
            )
        self.complete = meta.get("complete") is True
        if self.complete or not self._progress_path.exists():
            return 0, 0
        progress = read_json_object(self._progress_path)
        self.rows, self.faults = int(progress["rows"]), int(progress["faults"])
        return int(progress["nbytes"]), int(progress["fault_nbytes"])

    def _write_meta(self, *, complete: bool, **totals: Any) -> None:
        with replacing(self._meta_path) as file:
            document = {"complete": complete, **totals, "columns": [*self._columns], "head": self._head}
            file.write((json.dumps(document, indent=2, allow_nan=False) + "\n").encode())

    @property
    def _delimiter(self) -> str | None:
        return {".csv": ",", ".tsv": "\t"}.get(self._path.suffix.lower())

    def _encode_header(self) -> bytes:
        delimiter = self._delimiter
        return encode_cells(self._columns, delimiter) if delimiter else b""

    def _encode(self, record: dict[str, Any]) -> bytes:
        delimiter = self._delimiter
        if delimiter is None:
            return encode_json({name: record.get(name) for name in self._columns})
        return encode_cells([cell_of(record.get(name)) for name in self._columns], delimiter)


def encode_json(record: dict[str, Any]) -> bytes:
    """One line of strict JSON; a number that is not finite is null."""
    return (
        json.dumps({name: _finite(value) for name, value in record.items()}, allow_nan=False) + "\n"
    ).encode()


def encode_cells(cells: Sequence[str], delimiter: str) -> bytes:
    """One line of a table."""
    line = io.StringIO()
    csv.writer(line, delimiter=delimiter, lineterminator="\n").writerow(cells)
    return line.getvalue().encode()


def cell_of(value: object) -> str:
    """A value as a cell: floats so that they read back the same, lists as JSON, nothing for None."""
    match value:
        case None:
            return ""
        case bool():
            return "true" if value else "false"
        case float():
            return repr(value) if math.isfinite(value) else ""
        case list():
            return json.dumps(value, ensure_ascii=False)
    return str(value)


def _finite(value: object) -> object:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _beside(path: Path, suffix: str) -> Path:
    return path.with_name(path.name + suffix)


def _open_at(path: Path, nbytes: int) -> BinaryIO:
    """The file, opened at its end, cut to so many bytes.

    Raises:
        RequestError: it has fewer.
    """
    stream = path.open("r+b" if nbytes else "wb")
    if os.fstat(stream.fileno()).st_size < nbytes:
        stream.close()
        raise RequestError(f"{path} is shorter than what was noted of it; remove it and begin again")
    stream.truncate(nbytes)
    stream.seek(nbytes)
    return stream


def _read_back(path: Path) -> Iterator[dict[str, Any]]:
    with path.open("rb") as file:
        for line in file:
            yield json.loads(line)


def _write_parquet(rows: Path, path: Path, columns: Sequence[str], head: dict[str, Any]) -> None:
    import pyarrow

    parquet = import_parquet()
    schema = pyarrow.schema(
        [(name, _arrow_type(name, pyarrow)) for name in columns], metadata={"gpt2core": json.dumps(head)}
    )

    def groups() -> Iterator[list[dict[str, Any]]]:
        group: list[dict[str, Any]] = []
        for record in _read_back(rows):
            if record.get("top") is not None:
                record["top"] = json.dumps(record["top"], ensure_ascii=False)
            record["id"] = None if record.get("id") is None else str(record["id"])
            group.append(record)
            if len(group) == _PARQUET_ROWS:
                yield group
                group = []
        yield group

    with replacing(path) as file, parquet.ParquetWriter(file, schema) as writer:
        for group in groups():
            writer.write_table(pyarrow.Table.from_pylist(group, schema))


def _arrow_type(name: str, pyarrow: Any) -> Any:
    if name in ("file", "id", "text", "top"):
        return pyarrow.string()
    if name == "exact":
        return pyarrow.bool_()
    reals = (
        "logprob",
        "surprisal",
        "entropy",
        "perplexity",
        "word_perplexity",
        "byte_perplexity",
        "bits_per_byte",
    )
    return pyarrow.float64() if name in reals else pyarrow.int64()
