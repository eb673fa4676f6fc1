"""`gpt2core generate`: a prompt in, the prompt and what follows it out."""

import os
import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

from gpt2core._machine import peak_memory_nbytes
from gpt2core.cli.console import (
    adapter_option,
    format_nbytes,
    json_option,
    load,
    model_options,
    options,
    read_stdin,
    speculation_options,
    write,
    write_json,
)
from gpt2core.errors import RequestError

if TYPE_CHECKING:
    from gpt2core.model import GPT2, Generation
    from gpt2core.sampling.draw import SamplingParams

PROMPT_LIMIT_NBYTES = 2**20  # several times what the longest tokens could fit into any GPT-2's context

sampling_options = (
    click.option(
        "--max-new-tokens",
        metavar="N",
        type=int,
        help="How many tokens at most.  [default: 100, or as far as the context reaches]",
    ),
    click.option("--temperature", type=float, default=0.8, show_default=True, help="0: the likeliest token."),
    click.option("--top-k", metavar="K", type=int, help="Only the K likeliest tokens."),
    click.option("--top-p", metavar="P", type=float, default=1.0, help="Only the likeliest that sum to P."),
    click.option("--min-p", metavar="P", type=float, default=0.0, help="None below P times the likeliest."),
    click.option("--repetition-penalty", type=float, default=1.0, help="Above 1: less of what occurred."),
    click.option("--seed", type=int, help="The same seed gives the same text.  [default: a new one]"),
    click.option("--n", metavar="N", type=int, default=1, show_default=True, help="How many continuations."),
    click.option("--stop", metavar="TEXT", multiple=True, help="End before this text; repeatable."),
)


@dataclass(frozen=True, slots=True)
class Speed:
    """How fast a run wrote."""

    new_tokens: int
    ttft_s: float | None  # until the first token, from the moment when the model was ready
    decode_s: float | None  # from the first token to the last


@click.command(short_help="Continue a text.")
@click.argument("prompt", required=False)
@options(*model_options, *speculation_options, *sampling_options)
@options(adapter_option)
@click.option("--strict", is_flag=True, help="Refuse a config.json with fields that are not known.")
@click.option("--allow-special", is_flag=True, help="Read <|endoftext|> in the prompt as the special token.")
@click.option("--no-stream", is_flag=True, help="Print the text once it is complete.")
@click.option("--stats", is_flag=True, help="Report speed and memory on stderr.")
@json_option
def generate(
    prompt: str | None,
    *,
    model: str,
    revision: str | None,
    offline: bool,
    backend: str,
    precision: str,
    device: str,
    threads: int | None,
    speculation: str,
    draft_model: str | None,
    adapter: str | None,
    strict: bool,
    allow_special: bool,
    no_stream: bool,
    stats: bool,
    as_json: bool,
    **sampling: Any,
) -> None:
    """Continue PROMPT: print it and, as it is written, what follows it.

    `-`, or no PROMPT where stdin is not a terminal, reads the prompt from stdin; one line break at its end
    is left out. With --json nothing is streamed, and each text is what was generated, without the prompt.
    """
    from gpt2core.sampling.draw import SamplingParams

    if sampling["seed"] is None:
        sampling["seed"] = int.from_bytes(os.urandom(4))  # drawn here so that --stats can tell it
    text = _prompt(prompt)
    params = SamplingParams(**sampling)  # refuses what is out of range before anything is loaded
    start_s = time.perf_counter()
    with load(
        model,
        revision=revision,
        offline=offline,
        backend=backend,
        precision=precision,
        device=device,
        threads=threads,
        speculation=speculation,
        draft_model=draft_model,
        adapter=adapter,
        strict=strict,
    ) as loaded:
        load_s = time.perf_counter() - start_s
        if as_json or no_stream or params.n > 1:
            result = loaded.generate([text], params, allow_special=allow_special)
            speed = _measure_speed(result)
            if as_json:
                write_json(
                    {
                        "model": model,
                        "backend": loaded.backend.name,
                        "precision": getattr(loaded.backend, "precision", "float32"),
                        "prompt": text,
                        "load_s": load_s,
                        "generations": [_to_document(generation) for generation in result],
                    }
                )
            else:
                _write_whole(text, result)
        else:
            speed = _write_stream(loaded, text, params, allow_special)
        if stats:
            _report(loaded, params, speed, load_s, speculates=speculation != "off" or draft_model is not None)


def _prompt(argument: str | None) -> str:
    if argument is None and sys.stdin is not None and sys.stdin.isatty():
        raise click.UsageError("no prompt; give a PROMPT, or - to read it from stdin")
    if argument is None or argument == "-":
        text = read_stdin(PROMPT_LIMIT_NBYTES)
        return text.removesuffix("\r\n") if text.endswith("\r\n") else text.removesuffix("\n")
    try:
        argument.encode()
    except UnicodeEncodeError as error:  # what the shell passes on as it is, Python reads as a lone surrogate
        raise RequestError(
            f"PROMPT is not UTF-8 at character {error.start}; convert it, or check the locale"
        ) from error
    return argument


def _write_stream(loaded: "GPT2", prompt: str, params: "SamplingParams", allow_special: bool) -> Speed:
    start_s = time.perf_counter()
    pieces = loaded.stream(prompt, params, allow_special=allow_special)
    write(prompt)
    times_s = []
    for piece in pieces:
        if piece.token_id is not None:
            times_s.append(time.perf_counter() - start_s)
        write(piece.text)
    write("\n")
    if not times_s:
        return Speed(0, None, None)
    return Speed(len(times_s), times_s[0], times_s[-1] - times_s[0])


def _write_whole(prompt: str, generations: "list[Generation]") -> None:
    for i, generation in enumerate(generations, 1):
        if len(generations) > 1:
            write(f"--- {i} of {len(generations)} ---\n")
        write(f"{prompt}{generation.text}\n")


def _measure_speed(generations: "list[Generation]") -> Speed:
    """Of a batch: all its tokens, the first of them, and the time after it."""
    new_tokens = sum(len(generation.token_ids) for generation in generations)
    timings = [generation.timing for generation in generations]
    firsts_s = [timing.ttft_s for timing in timings if timing.ttft_s is not None]
    if not firsts_s:
        return Speed(0, None, None)
    return Speed(new_tokens, min(firsts_s), max(timing.elapsed_s for timing in timings) - min(firsts_s))


def _to_document(generation: "Generation") -> dict[str, Any]:
    return {
        "text": generation.text,
        "token_ids": generation.token_ids,
        "finish_reason": generation.finish_reason,
        "prompt_tokens": generation.prompt_tokens,
        "seed": generation.seed,
        "choice": generation.choice,
        "timing": {
            "ttft_s": generation.timing.ttft_s,
            "elapsed_s": generation.timing.elapsed_s,
            "tokens_per_s": generation.timing.tokens_per_s,
            "proposed_tokens": generation.timing.proposed_tokens,
            "accepted_tokens": generation.timing.accepted_tokens,
        },
    }


def _report(
    loaded: "GPT2", params: "SamplingParams", speed: Speed, load_s: float, *, speculates: bool
) -> None:
    later = speed.new_tokens - params.n  # what came after each text's first token
    rate = (
        f"{later / speed.decode_s:.1f} tok/s after it" if speed.decode_s and later > 0 else "no further token"
    )
    peak_nbytes = peak_memory_nbytes()
    lines = [
        f"backend       {loaded.backend.name}",
        f"seed          {params.seed}",
        f"load          {load_s:.3f} s",
        f"tokens        {speed.new_tokens}",
        "first token   " + ("none" if speed.ttft_s is None else f"{speed.ttft_s:.3f} s, {rate}"),
        "peak memory   " + ("unknown" if peak_nbytes is None else format_nbytes(peak_nbytes)),
    ]
    if speculates:
        proposed, accepted = loaded.speculated
        share = f" ({accepted / proposed:.0%})" if proposed else ""
        lines.insert(5, f"speculation   {accepted} of {proposed} proposed tokens accepted{share}")
    print(*lines, sep="\n", file=sys.stderr)
