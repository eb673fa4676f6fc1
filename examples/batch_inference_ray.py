"""Generate offline for a file of prompts with Ray Data, on one machine or a cluster; can be resumed.

    python examples/batch_inference_ray.py prompts.txt out --model demo --max-new-tokens 50 --temperature 0.8

A line of the file is a prompt, or (`.jsonl`) an object with the key "prompt"; blank lines are passed over.
The lines are dealt into parts of `--part-size`, and each part becomes one file `out/part-00000.jsonl`,
written whole or not at all. Run again after an interruption, and only the parts that are missing are made.

A prompt's seed follows from `--seed` and its line number alone. So a text depends neither on the parts, nor
on how many actors share the work, nor on how often it was interrupted.

On a cluster (RAY_ADDRESS), the file of prompts, the output and the model must be at the same place on each
machine.
"""

import argparse
import hashlib
import json
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
if "RAY_ADDRESS" not in os.environ:  # a Ray of our own: on the loopback address, whatever the system is
    os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")

import ray

from gpt2core import GPT2, Engine, Gpt2CoreError, RequestError, SamplingParams, __version__


@dataclass(frozen=True, kw_only=True)
class Work:
    """What the output depends on; is kept beside it as `run.json`."""

    prompts_sha256: str
    model: str
    revision: str | None
    backend: str
    precision: str
    seed: int
    part_size: int
    params: dict[str, Any]
    version: str = __version__


@dataclass(frozen=True)
class Part:
    """Consecutive lines of the file of prompts."""

    number: int
    first_line: int
    begin: int  # bytes
    end: int

    @property
    def name(self) -> str:
        """Its file in the output folder."""
        return f"part-{self.number:05}.jsonl"


def seed_of(seed: int, line_number: int) -> int:
    """The seed of one prompt."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{line_number}".encode()).digest()[:8]) >> 1


def parts_of(prompts: Path, part_size: int) -> tuple[list[Part], str]:
    """The parts, and the file's SHA-256; the file is read once and not kept."""
    digest, parts = hashlib.sha256(), []
    begin = position = first = line_number = 0
    with prompts.open("rb") as file:
        for line in file:
            digest.update(line)
            position += len(line)
            line_number += 1
            if line_number - first == part_size:
                parts.append(Part(len(parts), first, begin, position))
                first, begin = line_number, position
    if position > begin:
        parts.append(Part(len(parts), first, begin, position))
    return parts, digest.hexdigest()


def read_part(prompts: Path, part: Part) -> Iterator[tuple[int, str]]:
    """Line numbers from 0 and prompts."""
    with prompts.open("rb") as file:
        file.seek(part.begin)
        lines = file.read(part.end - part.begin).decode().removesuffix("\n").split("\n")
    for line_number, line in enumerate(lines, part.first_line):
        line = line.removesuffix("\r")
        if line.strip():
            prompt = json.loads(line)["prompt"] if prompts.suffix == ".jsonl" else line
            if not isinstance(prompt, str):
                raise RequestError(f"line {line_number + 1} of {prompts} has a prompt that is not a text")
            yield line_number, prompt


def write_whole(path: Path, text: str) -> None:
    """All of a file or nothing, whatever interrupts it."""
    planned = path.with_name(f".{path.name}.{os.getpid()}")
    with planned.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    planned.replace(path)


class Generator:
    """An actor: one model, which makes part after part."""

    def __init__(self, prompts: Path, output: Path, work: Work, threads: int) -> None:
        self._prompts, self._output, self._work = prompts, output, work
        options = {"backend": work.backend, "precision": work.precision, "revision": work.revision}
        self._model = GPT2.from_pretrained(work.model, threads=threads, **options)
        self._engine = Engine(self._model.backend, self._model.tokenizer)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Make one part; return how many texts it has."""
        part = Part(**{name: int(value) for name, value in row.items()})
        lines = [
            json.dumps(one, ensure_ascii=False) + "\n"
            for one in self._generate(list(read_part(self._prompts, part)))
        ]
        write_whole(self._output / part.name, "".join(lines))
        return {"number": part.number, "texts": len(lines)}

    def _generate(self, prompts: Sequence[tuple[int, str]]) -> Iterator[dict[str, Any]]:
        """Continue all prompts as one batch that rows join and leave."""
        running = []
        for line_number, prompt in prompts:
            params = SamplingParams(**self._work.params, seed=seed_of(self._work.seed, line_number))
            head = {"index": line_number, "prompt": prompt, "seed": params.seed}
            try:
                [sequence] = self._engine.submit(self._model.tokenizer.encode(prompt), params)
            except RequestError as error:  # this prompt is too long: the others are not
                running.append((head | {"error": str(error)}, None))
            else:
                running.append((head, sequence))
        while self._engine.running or self._engine.waiting:
            self._engine.step()
        for head, sequence in running:
            if sequence is None:
                yield head
            elif sequence.error is not None:
                raise sequence.error  # of the backend: the part is not done
            else:
                yield head | {
                    "text": sequence.text,
                    "finish_reason": sequence.finish_reason,
                    "prompt_tokens": sequence.prompt_tokens,
                    "completion_tokens": len(sequence.token_ids) - sequence.prompt_tokens,
                }


def prepare(output: Path, work: Work, parts: Sequence[Part]) -> list[Part]:
    """The parts that are still to be made.

    Raises:
        RequestError: the folder holds the work of another run.
    """
    output.mkdir(parents=True, exist_ok=True)
    record = output / "run.json"
    if record.exists():
        before = json.loads(record.read_text())
        differing = sorted(name for name, value in asdict(work).items() if before.get(name) != value)
        if differing:
            raise RequestError(
                f"{output} holds a run that differs in {', '.join(differing)}; give another folder, or the "
                "same arguments"
            )
    elif any(output.iterdir()):
        raise RequestError(f"{output} is not empty and holds no run.json; give another folder")
    else:
        write_whole(record, json.dumps(asdict(work), indent=2) + "\n")
    for left_over in output.glob(".part-*"):  # of a run that was killed while it wrote
        left_over.unlink()
    return [part for part in parts if not (output / part.name).exists()]


def run(options: argparse.Namespace) -> int:
    """Make what is missing; return how many parts were made."""
    parts, sha256 = parts_of(options.prompts, options.part_size)
    given = {name: getattr(options, name) for name in ("max_new_tokens", "temperature", "top_k", "top_p")}
    work = Work(
        prompts_sha256=sha256,
        model=options.model,
        revision=options.revision,
        backend=options.backend,
        precision=options.precision,
        seed=options.seed,
        part_size=options.part_size,
        params=given,
    )
    SamplingParams(**given)  # refuse before anything is started
    missing = prepare(options.output, work, parts)
    print(f"{len(parts)} parts, {len(parts) - len(missing)} of them done", file=sys.stderr)
    if not missing:
        return 0
    if not ray.is_initialized():
        own = {} if "RAY_ADDRESS" in os.environ else {"_node_ip_address": "127.0.0.1"}
        ray.init(include_dashboard=False, **own)
    actors = min(options.actors, len(missing))
    texts = ray.data.from_items([asdict(part) for part in missing], override_num_blocks=len(missing)).map(
        Generator,
        fn_constructor_args=(options.prompts.resolve(), options.output.resolve(), work, options.threads),
        num_cpus=options.threads,
        compute=ray.data.ActorPoolStrategy(size=actors),
    )
    for i, row in enumerate(texts.iter_rows(), 1):
        print(f"part {row['number']}: {row['texts']} texts ({i} of {len(missing)})", file=sys.stderr)
    return len(missing)


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("prompts", type=Path, help="one prompt a line, or .jsonl")
    parser.add_argument("output", type=Path, help="folder for the parts")
    parser.add_argument("--model", default="demo")
    parser.add_argument("--revision")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--precision", default="float32")
    parser.add_argument("--max-new-tokens", type=int, default=100)
    parser.add_argument("--temperature", type=float, default=0.8)
    parser.add_argument("--top-k", type=int)
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--part-size", type=int, default=256, help="lines per output file")
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
