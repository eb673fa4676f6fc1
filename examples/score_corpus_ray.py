"""Score a file of texts with Ray Data, on one machine or a cluster; can be resumed, and keeps the order.

    python examples/score_corpus_ray.py texts.jsonl out --model demo --by word --corrected --bos

A line of the file is a text, or (`.jsonl`) an object with the key `--field`; blank lines are passed over. The
lines are dealt into parts of `--part-size`, and each part becomes one file `out/part-00000.jsonl`, written
whole or not at all: in their order the parts are the result. Run again after an interruption, and only the
parts that are missing are made. On the backend `native` the numbers have the same bits whatever the parts,
the actors and the machines.

On a cluster (RAY_ADDRESS), the file, the output and the model must be at the same place on each machine.
"""

import argparse
import io
import math
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import batch_inference_ray
from batch_inference_ray import Part, parts_of, prepare, ray, write_whole

from gpt2core import GPT2, Gpt2CoreError, RequestError, __version__
from gpt2core.scoring.corpus import Fault, read_rows, text_of
from gpt2core.scoring.output import encode_json
from gpt2core.scoring.records import COLUMNS, RecordOptions, make_records

ray.cloudpickle.register_pickle_by_value(batch_inference_ray)  # machines need not have these files


@dataclass(frozen=True, kw_only=True)
class Work:
    """What the output depends on; is kept beside it as `run.json`."""

    texts_sha256: str
    model: str
    backend: str
    precision: str
    field: str
    by: str
    base: str
    corrected: bool
    part_size: int
    choices: dict[str, Any]
    version: str = __version__


class Scorer:
    """An actor: one model, which scores part after part."""

    def __init__(self, texts: Path, output: Path, work: Work, threads: int) -> None:
        self._texts, self._output, self._work = texts, output, work
        options = {"backend": work.backend, "precision": work.precision, "threads": threads}
        self._model = GPT2.from_pretrained(work.model, **options)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Score one part; return how many rows it has."""
        part = Part(**{name: int(value) for name, value in row.items()})
        lines = [encode_json(record).decode() for record in self._score(part)]
        write_whole(self._output / part.name, "".join(lines))
        return {"number": part.number, "rows": len(lines)}

    def _score(self, part: Part) -> Iterator[dict[str, Any]]:
        """Records, with the number of the line; a text that cannot be scored has a reason instead."""
        work = self._work
        with self._texts.open("rb") as file:
            file.seek(part.begin)
            data = io.BytesIO(file.read(part.end - part.begin))
        kind = "jsonl" if self._texts.suffix == ".jsonl" else "lines"
        columns = COLUMNS[work.by]
        options = RecordOptions(work.by, 2 if work.base == "2" else math.e, work.corrected)
        rows, texts, faults = [], [], []
        for row in read_rows(data, self._texts.name, kind, work.field):
            try:
                if isinstance(row, Fault):
                    raise RequestError(row.reason)
                texts.append(text_of(row, work.field))
                faults.append(None)
            except RequestError as error:
                faults.append(str(error))
            rows.append(row)
        scores = self._model.score_iter(texts, errors="return", boundaries=work.corrected, **work.choices)
        for row, fault in zip(rows, faults, strict=True):
            score = None if fault else next(scores)
            named = {"file": self._texts.name, "line": part.first_line + row.line}
            if score is None or isinstance(score, RequestError):
                yield named | {"reason": fault or str(score)}
                continue
            for record in make_records(score, options):
                full = named | record
                yield {name: full.get(name) for name in columns}


def run(options: argparse.Namespace) -> int:
    """Score what is missing; return how many parts were made."""
    parts, sha256 = parts_of(options.texts, options.part_size)
    choices = {
        "bos": "eos" if options.bos else None,
        "stride": options.stride,
        "top": options.top,
        "entropy": options.entropy,
    }
    given = {
        name: getattr(options, name) for name in ("model", "backend", "precision", "field", "by", "base")
    }
    work = Work(
        texts_sha256=sha256,
        part_size=options.part_size,
        corrected=options.corrected,
        choices=choices,
        **given,
    )
    missing = prepare(options.output, work, parts)
    print(f"{len(parts)} parts, {len(parts) - len(missing)} of them done", file=sys.stderr)
    if not missing:
        return 0
    if not ray.is_initialized():
        own = {} if "RAY_ADDRESS" in os.environ else {"_node_ip_address": "127.0.0.1"}
        ray.init(include_dashboard=False, **own)
    actors = min(options.actors, len(missing))
    done = ray.data.from_items([asdict(part) for part in missing], override_num_blocks=len(missing)).map(
        Scorer,
        fn_constructor_args=(options.texts.resolve(), options.output.resolve(), work, options.threads),
        num_cpus=options.threads,
        compute=ray.data.ActorPoolStrategy(size=actors),
    )
    for i, row in enumerate(done.iter_rows(), 1):
        print(f"part {row['number']}: {row['rows']} rows ({i} of {len(missing)})", file=sys.stderr)
    return len(missing)


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("texts", type=Path, help="one text a line, or .jsonl")
    parser.add_argument("output", type=Path, help="folder for the parts")
    parser.add_argument("--model", default="demo")
    parser.add_argument("--backend", default="native")
    parser.add_argument("--precision", default="float32")
    parser.add_argument("--field", default="text")
    parser.add_argument("--by", choices=["text", "word", "token"], default="text")
    parser.add_argument("--base", choices=["2", "e"], default="2")
    parser.add_argument("--corrected", action="store_true")
    parser.add_argument("--bos", action="store_true")
    parser.add_argument("--stride", type=int)
    parser.add_argument("--top", type=int, default=0)
    parser.add_argument("--entropy", action="store_true")
    parser.add_argument("--part-size", type=int, default=1024, help="lines per output file")
    parser.add_argument("--actors", type=int, default=1, help="models at once")
    parser.add_argument("--threads", type=int, default=1, help="CPUs of each")
    options = parser.parse_args(arguments)
    if min(options.part_size, options.actors, options.threads) < 1:
        parser.error("--part-size, --actors and --threads must be at least 1")
    try:
        run(options)
    except (Gpt2CoreError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
